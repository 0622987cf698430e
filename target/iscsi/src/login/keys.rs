//! The operational keys (RFC 7143 §13): for each offer our answer, and what it does to the parameters.

use std::borrow::Cow;

use super::params::Params;
use crate::config::{DigestPolicy, KeyConfig};
use crate::error::LoginFault;
use crate::text::{IRRELEVANT, NOT_UNDERSTOOD, REJECT, boolean, number, yes_no};
use crate::types::SessionType;

/// The values of MaxRecvDataSegmentLength, MaxBurstLength and FirstBurstLength (§13.12 to §13.14).
const SEGMENT_RANGE: core::ops::RangeInclusive<u64> = 512..=(1 << 24) - 1;
const TIME_RANGE: core::ops::RangeInclusive<u64> = 0..=3600;
const COUNT_RANGE: core::ops::RangeInclusive<u64> = 1..=65535;

/// What we answer to a key; `None` where a declaration needs no answer.
pub(super) type Answer = Option<Cow<'static, str>>;

/// The longest X#NodeArchitecture (§13.26.1).
const NODE_ARCHITECTURE_MAX: usize = 255;

/// Keys that only we may send, and those of other stages and phases: a protocol error in the operational stage (§6.3).
pub(super) const FOREIGN_KEYS: [&str; 5] = [
    "TargetAlias",
    "TargetAddress",
    "TargetPortalGroupTag",
    "SendTargets",
    "AuthMethod",
];

/// The operational negotiation of one login.
pub(super) struct Negotiation<'a> {
    pub(super) ours: &'a KeyConfig,
    pub(super) session_type: SessionType,
    pub(super) params: &'a mut Params,
}

impl Negotiation<'_> {
    /// The answer to one offer. FirstBurstLength comes after MaxBurstLength, whatever the order of the offer:
    /// its answer MUST NOT exceed the other's (§13.14).
    pub(super) fn answer(&mut self, key: &str, value: &str) -> Result<Answer, LoginFault> {
        if self.session_type == SessionType::Discovery && irrelevant_in_discovery(key) {
            return Ok(Some(Cow::Borrowed(IRRELEVANT)));
        }
        Ok(match key {
            "HeaderDigest" => Some(self.header_digest(value)?),
            "DataDigest" => Some(self.data_digest(value)?),
            "MaxRecvDataSegmentLength" => match ranged(value, SEGMENT_RANGE) {
                Some(len) => {
                    self.params.initiator_max_recv = len;
                    None
                }
                None => Some(Cow::Borrowed(REJECT)),
            },
            "InitialR2T" => Some(self.initial_r2t(value)),
            "ImmediateData" => Some(self.immediate_data(value)),
            "MaxBurstLength" => Some(minimum(
                value,
                SEGMENT_RANGE,
                self.ours.max_burst_length,
                &mut self.params.max_burst_length,
            )),
            "FirstBurstLength" => {
                let ours = self.ours.first_burst_length.min(self.params.max_burst_length);
                Some(minimum(
                    value,
                    SEGMENT_RANGE,
                    ours,
                    &mut self.params.first_burst_length,
                ))
            }
            "MaxOutstandingR2T" => Some(minimum(
                value,
                COUNT_RANGE,
                self.ours.max_outstanding_r2t,
                &mut self.params.max_outstanding_r2t,
            )),
            "DefaultTime2Wait" => Some(maximum(
                value,
                TIME_RANGE,
                self.ours.default_time2wait_s,
                &mut self.params.time2wait_s,
            )),
            "DefaultTime2Retain" => Some(minimum(
                value,
                TIME_RANGE,
                self.ours.default_time2retain_s,
                &mut self.params.time2retain_s,
            )),
            _ => self.fixed(key, value)?,
        })
    }

    /// Keys whose answer does not depend on our configuration.
    fn fixed(&self, key: &str, value: &str) -> Result<Answer, LoginFault> {
        let in_range = |range| {
            if ranged::<u32>(value, range).is_some() {
                Some(())
            } else {
                None
            }
        };
        Ok(Some(Cow::Borrowed(match key {
            // One connection per session, no recovery within one: Minimum makes it so whatever is offered.
            "MaxConnections" => in_range(COUNT_RANGE).map_or(REJECT, |()| "1"),
            "ErrorRecoveryLevel" => in_range(0..=2).map_or(REJECT, |()| "0"),
            // OR: our Yes decides.
            "DataPDUInOrder" | "DataSequenceInOrder" => boolean(value).map_or(REJECT, |_| "Yes"),
            // Obsolete, still offered by open-iscsi and libiscsi: "No" is accepted by both (§13.25).
            "IFMarker" | "OFMarker" => "No",
            "IFMarkInt" | "OFMarkInt" => REJECT,
            // One connection delivers everything in order: that is the response fence.
            "TaskReporting" => first_of(value, &["RFC3720", "ResponseFence"]).unwrap_or(REJECT),
            "iSCSIProtocolLevel" => match number(value) {
                Some(0) => "0",
                Some(1..=31) => "1",
                _ => REJECT,
            },
            "InitiatorAlias" => return Ok(None),
            "X#NodeArchitecture" if value.len() <= NODE_ARCHITECTURE_MAX => return Ok(None),
            _ if FOREIGN_KEYS.contains(&key) || key.starts_with("CHAP_") => {
                return Err(LoginFault::KeyNotAllowed(key.to_owned()));
            }
            _ => NOT_UNDERSTOOD,
        })))
    }

    fn header_digest(&mut self, value: &str) -> Result<Cow<'static, str>, LoginFault> {
        let chosen = digest("HeaderDigest", value, self.ours.header_digest)?;
        self.params.header_digest = chosen == CRC32C;
        Ok(Cow::Borrowed(chosen))
    }

    fn data_digest(&mut self, value: &str) -> Result<Cow<'static, str>, LoginFault> {
        let chosen = digest("DataDigest", value, self.ours.data_digest)?;
        self.params.data_digest = chosen == CRC32C;
        Ok(Cow::Borrowed(chosen))
    }

    fn initial_r2t(&mut self, value: &str) -> Cow<'static, str> {
        Cow::Borrowed(match boolean(value) {
            None => REJECT,
            Some(theirs) => {
                self.params.initial_r2t = theirs || self.ours.initial_r2t;
                yes_no(self.params.initial_r2t)
            }
        })
    }

    fn immediate_data(&mut self, value: &str) -> Cow<'static, str> {
        Cow::Borrowed(match boolean(value) {
            None => REJECT,
            Some(theirs) => {
                self.params.immediate_data = theirs && self.ours.immediate_data;
                yes_no(self.params.immediate_data)
            }
        })
    }
}

const CRC32C: &str = "CRC32C";
const NONE: &str = "None";

fn digest(key: &str, offer: &str, policy: DigestPolicy) -> Result<&'static str, LoginFault> {
    let chosen = match policy {
        DigestPolicy::Offered => first_of(offer, &[NONE, CRC32C]),
        DigestPolicy::Prefer => first_of(offer, &[CRC32C]).or_else(|| first_of(offer, &[NONE])),
        DigestPolicy::Require => first_of(offer, &[CRC32C]),
        DigestPolicy::Never => first_of(offer, &[NONE]),
    };
    match (chosen, policy) {
        (Some(chosen), _) => Ok(chosen),
        // "Reject" leaves the default, None: fine unless we insist.
        (None, DigestPolicy::Require) => Err(LoginFault::BadValue(key.to_owned())),
        (None, _) => Ok(REJECT),
    }
}

/// The first value of the initiator's list that is one of ours (§6.2.1).
fn first_of(offer: &str, ours: &[&'static str]) -> Option<&'static str> {
    offer
        .split(',')
        .find_map(|value| ours.iter().copied().find(|known| *known == value))
}

fn ranged<T: TryFrom<u64>>(value: &str, range: core::ops::RangeInclusive<u64>) -> Option<T> {
    number(value)
        .filter(|number| range.contains(number))
        .and_then(|number| T::try_from(number).ok())
}

fn minimum<T: TryFrom<u64> + Ord + Copy + ToString>(
    value: &str,
    range: core::ops::RangeInclusive<u64>,
    ours: T,
    result: &mut T,
) -> Cow<'static, str> {
    agree(value, range, result, |theirs| theirs.min(ours))
}

fn maximum<T: TryFrom<u64> + Ord + Copy + ToString>(
    value: &str,
    range: core::ops::RangeInclusive<u64>,
    ours: T,
    result: &mut T,
) -> Cow<'static, str> {
    agree(value, range, result, |theirs| theirs.max(ours))
}

fn agree<T: TryFrom<u64> + Copy + ToString>(
    value: &str,
    range: core::ops::RangeInclusive<u64>,
    result: &mut T,
    rule: impl Fn(T) -> T,
) -> Cow<'static, str> {
    match ranged(value, range) {
        None => Cow::Borrowed(REJECT),
        Some(theirs) => {
            *result = rule(theirs);
            Cow::Owned(result.to_string())
        }
    }
}

fn irrelevant_in_discovery(key: &str) -> bool {
    matches!(
        key,
        "MaxConnections"
            | "InitialR2T"
            | "ImmediateData"
            | "MaxBurstLength"
            | "FirstBurstLength"
            | "MaxOutstandingR2T"
            | "DataPDUInOrder"
            | "DataSequenceInOrder"
            | "TaskReporting"
    )
}

/// A redeclared MaxRecvDataSegmentLength in the full feature phase.
pub(crate) fn segment_length(value: &str) -> Option<u32> {
    ranged(value, SEGMENT_RANGE)
}

/// Keys that are known but may only be used during login (§13): answered with "Reject" in the full feature phase.
pub(crate) fn is_login_only(key: &str) -> bool {
    matches!(
        key,
        "HeaderDigest"
            | "DataDigest"
            | "ErrorRecoveryLevel"
            | "DefaultTime2Wait"
            | "DefaultTime2Retain"
            | "IFMarker"
            | "OFMarker"
            | "IFMarkInt"
            | "OFMarkInt"
            | "iSCSIProtocolLevel"
            | "SessionType"
            | "InitiatorName"
            | "TargetName"
            | "X#NodeArchitecture"
    ) || irrelevant_in_discovery(key)
        || key.starts_with("CHAP_")
        || (FOREIGN_KEYS.contains(&key) && key != "SendTargets")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(key: &str, value: &str) -> (Result<Answer, LoginFault>, Params) {
        answer_with(&KeyConfig::default(), SessionType::Normal, key, value)
    }

    fn answer_with(
        ours: &KeyConfig,
        session_type: SessionType,
        key: &str,
        value: &str,
    ) -> (Result<Answer, LoginFault>, Params) {
        let mut params = Params::new();
        let answer = Negotiation {
            ours,
            session_type,
            params: &mut params,
        }
        .answer(key, value);
        (answer, params)
    }

    fn text(key: &str, value: &str) -> String {
        answer(key, value)
            .0
            .unwrap()
            .map_or_else(|| "-".to_owned(), Cow::into_owned)
    }

    #[test]
    fn the_table_of_section_13() {
        for (key, offer, expected) in [
            ("HeaderDigest", "None,CRC32C", "None"),
            ("HeaderDigest", "CRC32C,None", "CRC32C"),
            ("DataDigest", "Y-foo,CRC32C", "CRC32C"),
            ("DataDigest", "crc32c", "Reject"),
            ("MaxConnections", "32", "1"),
            ("MaxConnections", "0", "Reject"),
            ("InitialR2T", "No", "Yes"),
            ("InitialR2T", "Yes", "Yes"),
            ("InitialR2T", "yes", "Reject"),
            ("ImmediateData", "Yes", "Yes"),
            ("ImmediateData", "No", "No"),
            ("MaxRecvDataSegmentLength", "8192", "-"),
            ("MaxRecvDataSegmentLength", "0x2000", "-"),
            ("MaxRecvDataSegmentLength", "511", "Reject"),
            ("MaxRecvDataSegmentLength", "16777216", "Reject"),
            ("MaxBurstLength", "16776192", "1048576"),
            ("MaxBurstLength", "512", "512"),
            ("MaxBurstLength", "0x40000", "262144"),
            ("FirstBurstLength", "65536", "65536"),
            ("FirstBurstLength", "16776192", "262144"),
            ("DefaultTime2Wait", "0", "2"),
            ("DefaultTime2Wait", "30", "30"),
            ("DefaultTime2Wait", "3601", "Reject"),
            ("DefaultTime2Retain", "60", "20"),
            ("DefaultTime2Retain", "0", "0"),
            ("MaxOutstandingR2T", "16", "4"),
            ("MaxOutstandingR2T", "65536", "Reject"),
            ("DataPDUInOrder", "No", "Yes"),
            ("DataSequenceInOrder", "Yes", "Yes"),
            ("ErrorRecoveryLevel", "2", "0"),
            ("ErrorRecoveryLevel", "3", "Reject"),
            ("IFMarker", "No", "No"),
            ("OFMarker", "Yes", "No"),
            ("IFMarkInt", "2048~65535", "Reject"),
            ("OFMarkInt", "2048", "Reject"),
            (
                "TaskReporting",
                "FastAbort,ResponseFence,RFC3720",
                "ResponseFence",
            ),
            ("TaskReporting", "FastAbort", "Reject"),
            ("iSCSIProtocolLevel", "2", "1"),
            ("InitiatorAlias", "Web Server 4", "-"),
            ("X#NodeArchitecture", "OS/1", "-"),
            ("X-com.example.magic", "1", "NotUnderstood"),
            ("Headerdigest", "None", "NotUnderstood"),
        ] {
            assert_eq!(text(key, offer), expected, "{key}={offer}");
        }
    }

    #[test]
    fn keys_of_other_places_are_protocol_errors() {
        for key in [
            "SendTargets",
            "CHAP_A",
            "AuthMethod",
            "TargetAlias",
            "TargetPortalGroupTag",
        ] {
            assert_eq!(
                answer(key, "All").0,
                Err(LoginFault::KeyNotAllowed(key.to_owned()))
            );
        }
    }

    #[test]
    fn digest_policies() {
        let with = |policy, offer: &str| {
            let ours = KeyConfig {
                data_digest: policy,
                ..KeyConfig::default()
            };
            let (answer, params) = answer_with(&ours, SessionType::Normal, "DataDigest", offer);
            answer.map(|answer| (answer.unwrap().into_owned(), params.data_digest))
        };
        assert_eq!(
            with(DigestPolicy::Prefer, "None,CRC32C"),
            Ok(("CRC32C".to_owned(), true))
        );
        assert_eq!(with(DigestPolicy::Prefer, "None"), Ok(("None".to_owned(), false)));
        assert_eq!(
            with(DigestPolicy::Never, "CRC32C,None"),
            Ok(("None".to_owned(), false))
        );
        assert_eq!(
            with(DigestPolicy::Never, "CRC32C"),
            Ok(("Reject".to_owned(), false))
        );
        assert_eq!(
            with(DigestPolicy::Require, "None,CRC32C"),
            Ok(("CRC32C".to_owned(), true))
        );
        assert_eq!(
            with(DigestPolicy::Require, "None"),
            Err(LoginFault::BadValue("DataDigest".to_owned()))
        );
    }

    #[test]
    fn discovery_has_no_data_keys() {
        for key in ["InitialR2T", "MaxBurstLength", "MaxConnections", "TaskReporting"] {
            let (answer, _) = answer_with(&KeyConfig::default(), SessionType::Discovery, key, "1");
            assert_eq!(answer, Ok(Some(Cow::Borrowed("Irrelevant"))), "{key}");
        }
    }
}
