//! The login phase (RFC 7143 §6.3): names, security, operational keys, in this order.
//!
//! ```text
//! (start) ──CSG 0──▶ Security ──T, NSG 1──▶ Operational ──T, NSG 3──▶ Admission ──owner──▶ full feature phase
//!    │                   └──────T, NSG 3──────────────────────────────▲
//!    └──────CSG 1──────────────────────────────▲
//! ```

mod chap;
mod keys;
mod params;
mod security;

use bytes::Bytes;
use sha2::{Digest, Sha256};

pub use chap::{ChapAlgorithm, ChapPolicy, ChapPolicyError};
pub(crate) use keys::{is_login_only, segment_length};
pub(crate) use params::DEFAULT_MAX_RECV;
pub use params::Params;

use self::keys::Negotiation;
use self::security::{Security, SecurityKeys};
use crate::config::{ConnectionConfig, DigestPolicy};
use crate::error::{AuthFault, LoginFault, LoginIdentity, LoginStatus};
use crate::event::{Directory, LoginAsk, TargetGrant};
use crate::pdu::{LoginRequest, Stage};
use crate::text::{Collector, IRRELEVANT, NOT_UNDERSTOOD, Outgoing, Pair, REJECT, parse};
use crate::types::{SessionType, Tsih};

/// The most requests in one login: text of 64 KiB in pieces of 8 KiB, both ways, and CHAP fit in three times over.
const MAX_REQUESTS: u32 = 64;

/// The longest iSCSI name (RFC 7143 §4.2.7.1).
const MAX_NAME_LEN: usize = 223;

/// Bytes that nobody can guess, made from the seed of the connection: hashes of the seed and a counter.
#[derive(Debug)]
pub(crate) struct Entropy {
    seed: [u8; 32],
    counter: u64,
}

impl Entropy {
    pub(crate) fn new(seed: [u8; 32]) -> Self {
        Self { seed, counter: 0 }
    }

    fn block(&mut self) -> [u8; 32] {
        self.counter += 1;
        Sha256::new()
            .chain_update(self.seed)
            .chain_update(self.counter.to_be_bytes())
            .finalize()
            .into()
    }

    pub(crate) fn vec(&mut self, len: usize) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(len + 32);
        while bytes.len() < len {
            bytes.extend_from_slice(&self.block());
        }
        bytes.truncate(len);
        bytes
    }

    pub(crate) fn bytes<const N: usize>(&mut self) -> [u8; N] {
        let mut array = [0; N];
        array.copy_from_slice(&self.vec(N));
        array
    }
}

/// One Login Response that goes on.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct LoginReply {
    pub(crate) transit: bool,
    pub(crate) continues: bool,
    pub(crate) current: Stage,
    pub(crate) next: Stage,
    pub(crate) text: Bytes,
}

/// What to do after a Login Request.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Step {
    /// Send this.
    Reply(LoginReply),
    /// Send this when the owner admits the session.
    Admission(LoginReply),
}

/// Who logs in, and where to.
#[derive(Debug, Clone)]
pub(crate) struct Names {
    pub(crate) initiator: String,
    pub(crate) initiator_alias: Option<String>,
    pub(crate) target: Option<String>,
    pub(crate) session_type: SessionType,
}

/// The login phase of one connection.
#[derive(Debug)]
pub(crate) struct Login {
    identity: Option<LoginIdentity>,
    stage: Option<Stage>,
    requests: u32,
    text: Collector,
    out: Outgoing,
    /// Keys that came, each of which may come once (§6.3).
    seen: Vec<String>,
    names: Option<Names>,
    grant: Option<TargetGrant>,
    security: Security,
    params: Params,
    declared: bool,
    entropy: Entropy,
}

impl Login {
    pub(crate) fn new(seed: [u8; 32]) -> Self {
        Self {
            identity: None,
            stage: None,
            requests: 0,
            text: Collector::default(),
            out: Outgoing::default(),
            seen: Vec::new(),
            names: None,
            grant: None,
            security: Security::Open,
            params: Params::new(),
            declared: false,
            entropy: Entropy::new(seed),
        }
    }

    pub(crate) fn names(&self) -> Option<&Names> {
        self.names.as_ref()
    }

    pub(crate) fn grant(&self) -> Option<&TargetGrant> {
        self.grant.as_ref()
    }

    pub(crate) fn identity(&self) -> Option<LoginIdentity> {
        self.identity
    }

    /// What was agreed; the login must be over.
    pub(crate) fn params(&self) -> Params {
        self.params.clone().sealed()
    }

    /// Takes one Login Request with its data.
    ///
    /// # Errors
    /// The status to refuse the login with.
    pub(crate) fn handle(
        &mut self,
        request: &LoginRequest,
        data: &[u8],
        config: &ConnectionConfig,
        directory: &dyn Directory,
    ) -> Result<Step, LoginStatus> {
        self.check_identity(request)?;
        self.check_stage(request)?;
        if !self.out.is_empty() {
            // §6.2: a response with C set MUST be answered with an empty request.
            return if data.is_empty() {
                self.reply(request)
            } else {
                Err(LoginFault::NotEmpty.into())
            };
        }
        self.text.push(data)?;
        if request.continues {
            return Ok(Step::Reply(plain_reply(request)));
        }
        let text = self.text.take();
        let pairs = parse(&text)?;
        self.once(&pairs)?;
        if self.names.is_none() {
            self.introduce(request, &pairs, config, directory)?;
        }
        if request.current == Stage::SECURITY {
            self.secure(&pairs)?;
        } else {
            self.operate(&pairs, config)?;
        }
        self.reply(request)
    }

    /// Version, TSIH, and that all requests of the login carry the same identity (§11.12).
    fn check_identity(&mut self, request: &LoginRequest) -> Result<(), LoginStatus> {
        self.requests += 1;
        if self.requests > MAX_REQUESTS {
            return Err(LoginFault::TooManyRequests.into());
        }
        let identity = LoginIdentity {
            itt: request.itt,
            isid: request.isid,
            tsih: request.tsih,
            cid: request.cid,
            cmd_sn: request.cmd_sn,
        };
        let Some(first) = self.identity else {
            self.identity = Some(identity);
            if request.version_min > 0 {
                return Err(LoginStatus::UnsupportedVersion);
            }
            return Ok(());
        };
        let changed = if first.itt != identity.itt {
            "InitiatorTaskTag"
        } else if first.isid != identity.isid {
            "ISID"
        } else if first.tsih != identity.tsih {
            "TSIH"
        } else if first.cid != identity.cid {
            "CID"
        } else {
            return Ok(());
        };
        Err(LoginFault::Changed(changed).into())
    }

    /// The stage is the one we are in, and T leads where the table of §6.3 allows.
    fn check_stage(&mut self, request: &LoginRequest) -> Result<(), LoginStatus> {
        let (current, next) = (request.current, request.next);
        if current != Stage::SECURITY && current != Stage::OPERATIONAL {
            return Err(LoginFault::ReservedStage(current.0).into());
        }
        let expected = *self.stage.get_or_insert(current);
        if expected != current {
            return Err(LoginFault::WrongStage {
                expected: expected.0,
                got: current.0,
            }
            .into());
        }
        if !request.transit {
            return Ok(());
        }
        if request.continues {
            return Err(LoginFault::TransitAndContinue.into());
        }
        match (current, next) {
            (Stage::SECURITY, Stage::OPERATIONAL) | (_, Stage::FULL_FEATURE) => Ok(()),
            (from, to) => Err(LoginFault::Transition {
                from: from.0,
                to: to.0,
            }
            .into()),
        }
    }

    /// No key may be declared or negotiated twice during login (§6.3).
    fn once(&mut self, pairs: &[Pair<'_>]) -> Result<(), LoginStatus> {
        for (key, value) in pairs {
            // An answer to a declaration of ours is no declaration.
            if is_answer(value) {
                continue;
            }
            if self.seen.iter().any(|seen| seen == key) {
                return Err(LoginFault::KeyRepeated((*key).to_owned()).into());
            }
            if self.seen.len() == crate::text::MAX_KEYS {
                return Err(crate::error::TextError::TooManyKeys(crate::text::MAX_KEYS).into());
            }
            self.seen.push((*key).to_owned());
        }
        Ok(())
    }

    /// The first complete text: who is it, and may they? The first response then says which portal group this is (§13.9).
    fn introduce(
        &mut self,
        request: &LoginRequest,
        pairs: &[Pair<'_>],
        config: &ConnectionConfig,
        directory: &dyn Directory,
    ) -> Result<(), LoginStatus> {
        let names = read_names(pairs)?;
        let grant = directory.login(&LoginAsk {
            initiator: &names.initiator,
            initiator_alias: names.initiator_alias.as_deref(),
            target: names.target.as_deref(),
            session_type: names.session_type,
            isid: request.isid,
            cid: request.cid,
            peer: config.peer,
            local: config.local,
            portal_group: config.portal_group,
        })?;
        if request.tsih != Tsih(0) {
            // MaxConnections is 1: no session takes a second connection (§6.3.1). Which of the two is wrong tells an initiator
            // whether its session lives: Windows' "MCS" is refused, and goes on with what it has.
            let there =
                names.target.is_some() && directory.has_session(&names.initiator, request.isid, request.tsih);
            return Err(if there {
                LoginStatus::TooManyConnections
            } else {
                LoginStatus::SessionDoesNotExist
            });
        }
        if grant.chap.is_some() && request.current != Stage::SECURITY {
            return Err(AuthFault::ChapNotOffered.into());
        }
        // "for all session types" (§6.3.1), "when TargetName is given" (§13.9): without a target there are no portal groups.
        if names.target.is_some() {
            self.out
                .pair("TargetPortalGroupTag", &grant.portal_group.to_string());
        }
        if names.session_type == SessionType::Normal
            && let Some(alias) = &grant.alias
        {
            self.out.pair("TargetAlias", alias);
        }
        self.names = Some(names);
        self.grant = Some(grant);
        Ok(())
    }

    fn secure(&mut self, pairs: &[Pair<'_>]) -> Result<(), LoginStatus> {
        let mut keys = SecurityKeys::default();
        for &(key, value) in pairs {
            if self.skip(key, value)? || keys.take(key, value) {
                continue;
            }
            security::check_foreign(key)?;
            // Operational keys belong to the operational stage (§12).
            if is_login_only(key) || matches!(key, "MaxRecvDataSegmentLength" | "SendTargets") {
                return Err(LoginFault::KeyNotAllowed(key.to_owned()).into());
            }
            self.out.pair(key, NOT_UNDERSTOOD);
        }
        let policy = self.grant.as_ref().and_then(|grant| grant.chap.as_ref());
        let state = core::mem::replace(&mut self.security, Security::Done);
        self.security = state.step(&keys, policy, &mut self.entropy, &mut self.out)?;
        Ok(())
    }

    fn operate(&mut self, pairs: &[Pair<'_>], config: &ConnectionConfig) -> Result<(), LoginStatus> {
        if !self.declared {
            self.declared = true;
            self.params.target_max_recv = config.keys.max_recv_data_segment_length;
            self.out.pair(
                "MaxRecvDataSegmentLength",
                &self.params.target_max_recv.to_string(),
            );
        }
        let (bursts, others): (Vec<_>, Vec<_>) =
            pairs.iter().partition(|(key, _)| *key == "FirstBurstLength");
        for (key, value) in others.into_iter().chain(bursts) {
            if self.skip(key, value)? {
                continue;
            }
            let session_type = self
                .names
                .as_ref()
                .map_or(SessionType::Normal, |names| names.session_type);
            let mut negotiation = Negotiation {
                ours: &config.keys,
                session_type,
                params: &mut self.params,
            };
            if let Some(answer) = negotiation.answer(key, value)? {
                self.out.pair(key, &answer);
            }
        }
        Ok(())
    }

    /// Names are read already; answers to our declarations need nothing; a constant proposed by itself is an error (§6.2).
    fn skip(&mut self, key: &str, value: &str) -> Result<bool, LoginFault> {
        if is_answer(value) {
            return match key {
                "TargetAlias" | "TargetPortalGroupTag" | "MaxRecvDataSegmentLength" => Ok(true),
                _ => Err(LoginFault::BadValue(key.to_owned())),
            };
        }
        if key == "InitiatorAlias"
            && let Some(names) = &mut self.names
        {
            names.initiator_alias = Some(value.to_owned());
            return Ok(true);
        }
        match key {
            "InitiatorName" | "SessionType" => Ok(true),
            // In the first text these were read; later they come too late (`once` caught the repetition).
            "TargetName" => match &self.names {
                Some(Names {
                    target: Some(target), ..
                }) if target == value => Ok(true),
                _ => Err(LoginFault::KeyNotAllowed(key.to_owned())),
            },
            _ => Ok(false),
        }
    }

    /// The response to a request whose text is complete: as much of our text as fits, and the transition if it may be.
    fn reply(&mut self, request: &LoginRequest) -> Result<Step, LoginStatus> {
        // The default MaxRecvDataSegmentLength is used during login (§6.3).
        let (text, complete) = self.out.next_piece(DEFAULT_MAX_RECV as usize);
        let mut reply = plain_reply(request);
        reply.text = text;
        reply.continues = !complete;
        if !complete || !request.transit {
            return Ok(Step::Reply(reply));
        }
        if request.current == Stage::SECURITY {
            let policy = self.grant.as_ref().and_then(|grant| grant.chap.as_ref());
            if !self.security.may_leave(policy) {
                // Wants to leave without having offered anything: the initiator forgoes security.
                return match self.security {
                    Security::Open => Err(AuthFault::ChapNotOffered.into()),
                    _ => Ok(Step::Reply(reply)),
                };
            }
        }
        reply.transit = true;
        reply.next = request.next;
        self.stage = Some(request.next);
        if request.next == Stage::FULL_FEATURE {
            Ok(Step::Admission(reply))
        } else {
            Ok(Step::Reply(reply))
        }
    }

    /// The digests that the configuration insists on were agreed on.
    pub(crate) fn check_required(&self, config: &ConnectionConfig) -> Result<(), LoginStatus> {
        let missing = |policy, agreed: bool| policy == DigestPolicy::Require && !agreed;
        if missing(config.keys.header_digest, self.params.header_digest) {
            return Err(LoginStatus::MissingParameter("HeaderDigest"));
        }
        if missing(config.keys.data_digest, self.params.data_digest) {
            return Err(LoginStatus::MissingParameter("DataDigest"));
        }
        Ok(())
    }
}

fn plain_reply(request: &LoginRequest) -> LoginReply {
    LoginReply {
        transit: false,
        continues: false,
        current: request.current,
        next: Stage(0),
        text: Bytes::new(),
    }
}

fn is_answer(value: &str) -> bool {
    [NOT_UNDERSTOOD, REJECT, IRRELEVANT].contains(&value)
}

/// The names of the first text (§6.3): InitiatorName always, TargetName unless it is a discovery session.
fn read_names(pairs: &[Pair<'_>]) -> Result<Names, LoginStatus> {
    let value = |key| {
        pairs
            .iter()
            .find(|(name, _)| *name == key)
            .map(|(_, value)| *value)
    };
    let name = |key: &'static str| match value(key) {
        Some(name) if name.is_empty() || name.len() > MAX_NAME_LEN => {
            Err(LoginStatus::from(LoginFault::BadValue(key.to_owned())))
        }
        name => Ok(name.map(str::to_owned)),
    };
    let session_type = match value("SessionType") {
        None | Some("Normal") => SessionType::Normal,
        Some("Discovery") => SessionType::Discovery,
        Some(_) => return Err(LoginStatus::SessionTypeNotSupported),
    };
    let names = Names {
        initiator: name("InitiatorName")?.ok_or(LoginStatus::MissingParameter("InitiatorName"))?,
        initiator_alias: value("InitiatorAlias").map(str::to_owned),
        target: name("TargetName")?,
        session_type,
    };
    if session_type == SessionType::Normal && names.target.is_none() {
        return Err(LoginStatus::MissingParameter("TargetName"));
    }
    Ok(names)
}
