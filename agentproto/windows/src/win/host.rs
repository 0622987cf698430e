//! This host.

use std::time::{SystemTime, UNIX_EPOCH};

use stillpoint_agentproto::message::{Finding, Severity};
use stillpoint_agentproto::{ErrorCode, Refusal};
use windows::Win32::System::SystemInformation::GetTickCount64;

use super::{disks, registry, requester};
use crate::backup::Vss;
use crate::config::TestLun;
use crate::platform::Platform;
use crate::volumes::Inventory;

/// Windows' own SMI-S provider: the service of the feature "Windows Standards-Based Storage Management".
const SMIS: &str = r"SYSTEM\CurrentControlSet\Services\MSStrgSvc";
const PRODUCT: &str = r"SYSTEM\CurrentControlSet\Control\ProductOptions";
const VERSION: &str = r"SOFTWARE\Microsoft\Windows NT\CurrentVersion";

/// Windows.
#[derive(Debug, Default)]
pub(crate) struct Windows {
    /// Folders that stand for volumes on LUNs (tests).
    pub(crate) test_luns: Vec<TestLun>,
}

impl Windows {
    /// What forbids an installation here.
    pub(crate) fn refusals() -> Vec<Finding> {
        let finding = |code, subject: &str, text: &str| Finding {
            code,
            severity: Severity::Error,
            subject: subject.to_owned(),
            text: text.to_owned(),
        };
        let mut found = Vec::new();
        if registry::has_key(SMIS) {
            let text = "an SMI-S provider is installed (service MSStrgSvc), and both would claim the same LUNs: remove the feature \
                        \"Windows Standards-Based Storage Management\" (WindowsStorageManagementService) first";
            found.push(finding(ErrorCode::LimitSmis, "SMI-S", text));
        }
        let product = registry::text(PRODUCT, "ProductType").unwrap_or_default();
        if product.eq_ignore_ascii_case("WinNT") {
            let text = "this is a client edition of Windows, and VSS takes hardware providers on Windows Server only";
            found.push(finding(ErrorCode::Unsupported, "Windows", text));
        }
        found
    }
}

impl Platform for Windows {
    fn os(&self) -> String {
        let value = |name| registry::text(VERSION, name);
        let name = value("ProductName").unwrap_or_else(|| "Windows".to_owned());
        match value("CurrentBuildNumber") {
            Some(build) => format!("{name}, build {build}"),
            None => name,
        }
    }

    fn boot_id(&self) -> String {
        // SAFETY: takes nothing and cannot fail.
        let up_ms = unsafe { GetTickCount64() };
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        // When it was booted, to ten seconds: the two clocks are not read at the same instant.
        let booted = now.as_secs().saturating_sub(up_ms / 1000) / 10;
        format!("boot-{booted}")
    }

    fn inventory(&self) -> Inventory {
        disks::inventory(&self.test_luns)
    }

    fn initiators(&self) -> Vec<String> {
        disks::initiator().into_iter().collect()
    }

    fn findings(&self) -> Vec<Finding> {
        let refusals = Self::refusals();
        // The service runs on a client edition in tests only; there VSS itself says no.
        refusals
            .into_iter()
            .filter(|finding| finding.code == ErrorCode::LimitSmis)
            .collect()
    }

    fn vss(&self) -> Result<Box<dyn Vss>, Refusal> {
        Ok(Box::new(requester::Requester::new()?))
    }
}
