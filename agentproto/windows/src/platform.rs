//! What only Windows can say and do; a test plays it.

use stillpoint_agentproto::Refusal;
use stillpoint_agentproto::message::Finding;

use crate::backup::Vss;
use crate::volumes::Inventory;

/// The host.
pub(crate) trait Platform: Send + Sync {
    /// Windows and its version.
    fn os(&self) -> String;
    /// Changes at each boot.
    fn boot_id(&self) -> String;
    /// Disks and volumes now.
    fn inventory(&self) -> Inventory;
    /// Names of the iSCSI initiator.
    fn initiators(&self) -> Vec<String>;
    /// What keeps this host from any snapshot: an SMI-S provider, VSS or the provider not there.
    fn findings(&self) -> Vec<Finding>;
    /// A new backup. The object stays on the thread that asked.
    ///
    /// # Errors
    /// There is no VSS.
    fn vss(&self) -> Result<Box<dyn Vss>, Refusal>;
}
