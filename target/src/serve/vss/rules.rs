//! Who may reserve what: allow-lists, the limits of LUNs that are used with agents, quotas.

use std::collections::BTreeSet;

use stillpoint_agentproto::message::{LunIdentity, ProvBegin};
use stillpoint_agentproto::{ErrorCode, LunId, Refusal};
use stillpoint_snapshot::VolumeId;

use super::record::{Copy, Quota, SetRecord};
use super::{Asker, MAX_COPIES_OF_LUN, MAX_SETS, MAX_SHADOWS, internal, now_ms};
use crate::serve::Daemon;
use crate::serve::agents::{LunFacts, Site, lun_limits};
use crate::serve::state::{Identity, VolumeTag};

/// A LUN that the agent may have shadow copies of.
#[derive(Debug)]
pub(super) struct Source {
    facts: LunFacts,
    volume: VolumeId,
    block_size: u32,
    iqn: String,
}

impl Source {
    /// What the host read of its disk must be what this LUN is.
    pub(super) fn agrees_with(&self, said: &LunIdentity) -> Result<(), Refusal> {
        let known = &self.facts.identity;
        let text = |what: &str, here: String, there: String| {
            let text = format!(
                "LUN {}: its {what} is {here} here, and {there} on the host: rescan the disks there",
                self.facts.name
            );
            Err(Refusal::new(ErrorCode::IdentityMismatch, text).about(self.facts.name.clone()))
        };
        let trimmed = |serial: &Option<String>| serial.as_deref().unwrap_or_default().trim().to_owned();
        if said.serial.is_some() && !trimmed(&said.serial).eq_ignore_ascii_case(&trimmed(&known.serial)) {
            return text("serial number", trimmed(&known.serial), trimmed(&said.serial));
        }
        if let Some(iqn) = said
            .iqn
            .as_ref()
            .filter(|iqn| !iqn.eq_ignore_ascii_case(&self.iqn))
        {
            return text("target", self.iqn.clone(), iqn.clone());
        }
        if let (Some(there), Some(here)) = (said.number, known.number)
            && here != there
        {
            return text("number", here.to_string(), there.to_string());
        }
        if let (Some(there), Some(here)) = (said.size_bytes, known.size_bytes)
            && here != there
        {
            return text("size", format!("{here} bytes"), format!("{there} bytes"));
        }
        Ok(())
    }
}

/// Whether the agent may use the provider at all.
fn provides(asker: &Asker) -> Result<&[String], Refusal> {
    if !asker.provides {
        let text = "the feature vss-provider of this agent is switched off: `stillpoint-agent features --enable vss-provider` there";
        return Err(Refusal::new(ErrorCode::NotAllowed, text));
    }
    asker.initiators.as_deref().ok_or_else(|| {
        let text = "this agent is not registered now: its registration channel has to be up";
        Refusal::new(ErrorCode::WrongState, text)
    })
}

/// The initiator is one that the agent registered: no other host gets to see a copy.
pub(super) fn initiator(asker: &Asker, initiator: &str) -> Result<(), Refusal> {
    let registered = provides(asker)?;
    if registered.iter().any(|name| name.eq_ignore_ascii_case(initiator)) {
        return Ok(());
    }
    let text = format!(
        "initiator {initiator:?} is none that the agent on {} registered",
        asker.host
    );
    Err(Refusal::new(ErrorCode::NotAllowed, text).about(initiator))
}

/// The LUN of that identity, if this agent may have shadow copies of it. A LUN of another agent is answered as one that is not there.
pub(super) fn source(daemon: &Daemon, asker: &Asker, lun: LunId) -> Result<Source, Refusal> {
    provides(asker)?;
    let unknown = || {
        let text = format!(
            "{lun} is no LUN here that this agent is allowed on: `stillpoint agent allow` on the target"
        );
        Refusal::new(ErrorCode::NotAllowed, text).about(lun.to_string())
    };
    if !asker.luns.contains(&lun) {
        return Err(unknown());
    }
    let facts = daemon.lun_by_id(lun).ok_or_else(unknown)?;
    lun_limits(&facts)?;
    let volume = daemon.pool.volume(&facts.name).ok_or_else(unknown)?;
    let info = volume.info().map_err(|error| internal(&error))?;
    if VolumeTag::of(&info)
        .map_err(|error| internal(&error))?
        .kind
        .is_passing()
    {
        let text = format!("{} is a copy itself", facts.name);
        return Err(Refusal::new(ErrorCode::Unsupported, text).about(facts.name));
    }
    let iqn = facts
        .targets
        .first()
        .map(|target| target.iqn.clone())
        .ok_or_else(unknown)?;
    Ok(Source {
        facts,
        volume: info.id,
        block_size: info.block_size,
        iqn,
    })
}

/// Judges a ProvBegin, and makes the set that it asks for, with new identities.
pub(super) fn begin(daemon: &Daemon, asker: &Asker, ask: &ProvBegin) -> Result<SetRecord, Refusal> {
    if ask.shadows.is_empty() || ask.shadows.len() > MAX_SHADOWS {
        let text = format!(
            "{} shadow copies in one set: 1 to {MAX_SHADOWS} are possible",
            ask.shadows.len()
        );
        return Err(Refusal::new(ErrorCode::TooLarge, text));
    }
    let distinct: BTreeSet<_> = ask.shadows.iter().map(|shadow| shadow.shadow).collect();
    if distinct.len() != ask.shadows.len() {
        return Err(Refusal::new(ErrorCode::Malformed, "a shadow copy is named twice"));
    }
    if daemon.pool.stats().out_of_space {
        let text = "the store has no space: delete snapshots on the target, or give it more room";
        return Err(Refusal::new(ErrorCode::Internal, text));
    }
    let now = now_ms();
    let company = daemon.config().daemon.naa_company_id;
    let mut copies: Vec<Copy> = Vec::new();
    for shadow in &ask.shadows {
        let known = copies.iter_mut().find(|copy| copy.source == shadow.lun);
        let copy = match known {
            Some(copy) => copy,
            None => {
                let source = source(daemon, asker, shadow.lun)?;
                let identity = Identity::new(company).map_err(|error| internal(&error))?;
                let size_bytes = source.facts.identity.size_bytes.unwrap_or(0);
                copies.push(Copy::new(
                    (shadow.lun, source.facts.name, source.volume),
                    source.iqn,
                    format!("vss-{}", random_hex()?),
                    identity,
                    (size_bytes, source.block_size),
                    now,
                ));
                copies.last_mut().ok_or_else(|| internal(&"no copy"))?
            }
        };
        copy.shadows.push(shadow.shadow);
    }
    let mut token = [0; 16];
    getrandom::fill(&mut token).map_err(|error| internal(&error))?;
    let snapshot = format!("vss-{}", random_hex()?);
    let owner = (asker.agent, asker.host.clone());
    Ok(SetRecord::new(ask, owner, token, snapshot, copies, now))
}

/// 12 digits: names of copies and snapshots are not the agent's to choose.
fn random_hex() -> Result<String, Refusal> {
    let mut random = [0; 6];
    getrandom::fill(&mut random).map_err(|error| internal(&error))?;
    Ok(data_encoding::HEXLOWER.encode(&random))
}

/// Quotas: sets of an agent, copies of a LUN.
pub(super) fn quota<'a>(
    wanted: &Quota,
    record: &SetRecord,
    others: impl Iterator<Item = &'a Quota>,
) -> Result<(), Refusal> {
    let (mut sets, mut copies) = (0, vec![0; wanted.sources.len()]);
    for other in others {
        sets += usize::from(other.agent == wanted.agent);
        for (count, source) in copies.iter_mut().zip(&wanted.sources) {
            *count += usize::from(other.sources.contains(source));
        }
    }
    if sets >= MAX_SETS {
        let text = format!(
            "the agent on {} has {MAX_SETS} snapshot sets already: finish or delete one (`stillpoint lun list` shows them)",
            record.host
        );
        return Err(Refusal::new(ErrorCode::Busy, text));
    }
    let full = copies
        .iter()
        .zip(&record.copies)
        .find(|(count, _)| **count >= MAX_COPIES_OF_LUN);
    match full {
        None => Ok(()),
        Some((count, copy)) => {
            let text = format!(
                "LUN {} has {count} shadow copies already: delete one (`stillpoint lun list` shows them)",
                copy.source_name
            );
            Err(Refusal::new(ErrorCode::Busy, text).about(copy.source_name.clone()))
        }
    }
}
