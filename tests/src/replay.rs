//! Logins as Windows and ESXi make them: their first bytes, their keys, their order.
//!
//! Source: measurements of others and the vendors' documents, gathered by the project. What is not known of ESXi (its key order) follows
//! the Linux initiator, from which its ISID qualifier comes.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use crate::raw::{Came, Pdu, Raw, login_request, op};

/// A Login Response may take this long; ESXi gives up after it, and Windows after three times as much.
const LOGIN_LIMIT: Duration = Duration::from_secs(5);
/// Keys that a target declares without being asked (RFC 7143 §13).
const DECLARED: &[&str] = &["TargetPortalGroupTag", "TargetAlias", "MaxRecvDataSegmentLength"];

/// An initiator that is played.
#[derive(Debug, Clone)]
pub struct Actor {
    /// InitiatorName.
    pub initiator: String,
    /// ISID.
    pub isid: [u8; 6],
    /// Initiator task tag of the first Login Request.
    pub first_itt: u32,
    /// Keys of the operational stage.
    pub keys: &'static [(&'static str, &'static str)],
    /// Longest Data-In that it takes.
    pub own_segment: usize,
    /// Most immediate data that it sends.
    pub immediate: usize,
    /// Longest Data-Out that it sends.
    pub data_out: usize,
}

impl Actor {
    /// Microsoft's initiator on the host of this name.
    #[must_use]
    pub fn windows(host: &str) -> Self {
        Self {
            initiator: format!("iqn.1991-05.com.microsoft:{host}"),
            isid: [0x40, 0x00, 0x01, 0x37, 0x00, 0x00],
            first_itt: 1,
            keys: &[
                ("HeaderDigest", "None,CRC32C"),
                ("DataDigest", "None,CRC32C"),
                ("ErrorRecoveryLevel", "2"),
                ("InitialR2T", "No"),
                ("ImmediateData", "Yes"),
                ("MaxRecvDataSegmentLength", "65536"),
                ("MaxBurstLength", "262144"),
                ("FirstBurstLength", "65536"),
                ("MaxConnections", "32"),
                ("DataPDUInOrder", "Yes"),
                ("DataSequenceInOrder", "Yes"),
                ("DefaultTime2Wait", "0"),
                ("DefaultTime2Retain", "60"),
                ("MaxOutstandingR2T", "16"),
            ],
            own_segment: 65_536,
            immediate: 65_536,
            data_out: 65_536,
        }
    }

    /// The software initiator of an ESXi host of this name.
    #[must_use]
    pub fn esxi(host: &str) -> Self {
        Self {
            initiator: format!("iqn.1998-01.com.vmware:{host}"),
            isid: [0x00, 0x02, 0x3d, 0x00, 0x00, 0x01],
            first_itt: 0,
            keys: &[
                ("HeaderDigest", "None"),
                ("DataDigest", "None"),
                ("DefaultTime2Wait", "0"),
                ("DefaultTime2Retain", "0"),
                ("IFMarker", "No"),
                ("OFMarker", "No"),
                ("ErrorRecoveryLevel", "0"),
                ("InitialR2T", "No"),
                ("ImmediateData", "Yes"),
                ("MaxBurstLength", "262144"),
                ("FirstBurstLength", "262144"),
                ("MaxOutstandingR2T", "1"),
                ("MaxConnections", "1"),
                ("DataPDUInOrder", "Yes"),
                ("DataSequenceInOrder", "Yes"),
                ("MaxRecvDataSegmentLength", "131072"),
            ],
            own_segment: 131_072,
            immediate: 8_192,
            data_out: 131_072,
        }
    }

    /// Another session of the same host.
    #[must_use]
    pub fn session(mut self, number: u8) -> Self {
        let [.., last] = &mut self.isid;
        *last = number;
        self
    }

    /// Logs in: security stage without CHAP, then the keys. `target` is `None` for a discovery session.
    ///
    /// # Errors
    /// The target refuses, is slow, or answers what these initiators do not forgive: keys that were not offered, no
    /// TargetPortalGroupTag in the first answer of a normal session, an unpadded segment, a window without room.
    pub fn log_in(&self, address: SocketAddr, target: Option<&str>) -> Result<Login> {
        let mut raw = Raw::connect(address)?;
        let mut names = format!("InitiatorName={}\0", self.initiator);
        match target {
            Some(target) => names.push_str(&format!("SessionType=Normal\0TargetName={target}\0")),
            None => names.push_str("SessionType=Discovery\0"),
        }
        names.push_str("AuthMethod=None\0");
        // Byte 1 = 81h: security stage, on to the operational one.
        let first = login_request(0x81, &self.isid).itt(self.first_itt);
        let security = stage(&mut raw, first.data(names), 0x81)?;
        let offered: Vec<(&str, &str)> = self
            .keys
            .iter()
            .filter(|(key, _)| target.is_some() || of_discovery(key))
            .copied()
            .collect();
        let text: String = offered
            .iter()
            .map(|(key, value)| format!("{key}={value}\0"))
            .collect();
        let second = login_request(0x87, &self.isid).itt(self.first_itt);
        let exp_stat_sn = raw.exp_stat_sn;
        let operational = stage(&mut raw, second.word(28, exp_stat_sn).data(text), 0x87)?;
        raw.tsih = u16::from_be_bytes([operational.at(14), operational.at(15)]);
        let login = Login {
            security: security.text(),
            operational: operational.text(),
            raw,
        };
        login.judge(&offered, target.is_some())?;
        login.adopt(self)
    }
}

/// What a discovery session of Windows offers.
fn of_discovery(key: &str) -> bool {
    matches!(
        key,
        "HeaderDigest"
            | "DataDigest"
            | "MaxRecvDataSegmentLength"
            | "DefaultTime2Wait"
            | "DefaultTime2Retain"
    )
}

/// One Login Request and its answer.
fn stage(raw: &mut Raw, request: Pdu, flags: u8) -> Result<Pdu> {
    raw.send(&request)?;
    let Came::Pdu(answer) = raw.receive(LOGIN_LIMIT)? else {
        anyhow::bail!("no Login Response in {LOGIN_LIMIT:?}");
    };
    ensure!(
        answer.opcode() == op::LOGIN_RESPONSE,
        "not a Login Response: {answer:?}"
    );
    ensure!(
        answer.at(36) == 0,
        "refused: {:02x}{:02x}",
        answer.at(36),
        answer.at(37)
    );
    ensure!(
        answer.at(1) == flags,
        "flags {:02x} in answer to {flags:02x}",
        answer.at(1)
    );
    ensure!(answer.tag() == request.tag(), "another task's tag: {answer:?}");
    ensure!(
        answer.data.is_empty() || answer.data.ends_with(b"\0"),
        "the last key has no NUL: {answer:?}"
    );
    Ok(answer)
}

/// A login that was accepted.
#[derive(Debug)]
pub struct Login {
    /// Keys of the security stage's answer.
    pub security: Vec<String>,
    /// Keys of the operational stage's answer.
    pub operational: Vec<String>,
    /// The session.
    pub raw: Raw,
}

impl Login {
    /// What the target says about a key.
    #[must_use]
    pub fn value(&self, key: &str) -> Option<&str> {
        let all = self.security.iter().chain(&self.operational);
        let mut pairs = all.filter_map(|pair| pair.split_once('='));
        pairs.find(|(k, _)| *k == key).map(|(_, value)| value)
    }

    fn judge(&self, offered: &[(&str, &str)], normal: bool) -> Result<()> {
        for pair in self.security.iter().chain(&self.operational) {
            let (key, _) = pair
                .split_once('=')
                .with_context(|| format!("no pair: {pair:?}"))?;
            let known =
                key == "AuthMethod" || DECLARED.contains(&key) || offered.iter().any(|(k, _)| *k == key);
            ensure!(known, "{pair} answers a key that was not offered");
        }
        let tag_first = self
            .security
            .iter()
            .any(|pair| pair.starts_with("TargetPortalGroupTag="));
        ensure!(
            tag_first || !normal,
            "no TargetPortalGroupTag in the first answer: {:?}",
            self.security
        );
        ensure!(self.raw.tsih != 0, "no TSIH");
        ensure!(
            self.raw.max_cmd_sn.wrapping_sub(self.raw.exp_cmd_sn) < 1 << 31,
            "no room in the command window: {:?}",
            self.raw
        );
        Ok(())
    }

    /// Sends from now on as the actor does, within what the target said.
    fn adopt(mut self, actor: &Actor) -> Result<Self> {
        let number = |key: &str, default: usize| -> Result<usize> {
            self.value(key)
                .map_or(Ok(default), str::parse)
                .with_context(|| format!("{key}: {:?}", self.value(key)))
        };
        let takes = number("MaxRecvDataSegmentLength", 8_192)?;
        let first_burst = number("FirstBurstLength", 65_536)?;
        let immediate = if self.value("ImmediateData") == Some("No") {
            0
        } else {
            actor.immediate.min(first_burst).min(takes)
        };
        self.raw.segment = takes.min(actor.data_out);
        self.raw.first_burst = immediate;
        self.raw.own_segment = actor.own_segment;
        self.raw.login_text = [self.security.clone(), self.operational.clone()].concat();
        Ok(self)
    }
}
