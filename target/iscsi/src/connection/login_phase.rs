//! Login Requests up to the owner's admission.

use super::{Connection, State};
use crate::buffer::{Buffer, Pool};
use crate::connection::full::Session;
use crate::error::{Error, LoginStatus};
use crate::event::{Admission, Event};
use crate::login::{DEFAULT_MAX_RECV, Login, LoginReply, Step};
use crate::pdu::{LoginRequest, LoginResponse, Numbers, Opcode, Stage};
use crate::receive::{Head, Received, Sink};
use crate::session::CommandWindow;
use crate::text::Outgoing;
use crate::transmit::{Control, Mark};
use crate::types::{SessionType, Tsih};

impl Connection {
    /// Where the data of a PDU before full feature phase goes. The default MaxRecvDataSegmentLength holds (§6.3).
    pub(super) fn login_sink(&mut self, head: &Head) -> Result<Sink, Error> {
        let (opcode, len) = (head.prefix.opcode, head.prefix.data_len);
        let State::Login(login) = &self.state else {
            return Err(Error::LoginOutOfTurn);
        };
        if opcode != Opcode::LOGIN_REQUEST {
            // The first PDU decides whether this is an iSCSI initiator at all: strangers get no answer.
            if login.identity().is_some() {
                self.send_refusal(&LoginRequest::parse(&head.bhs), &LoginStatus::InvalidDuringLogin);
            }
            return Err(Error::NotLoggedIn { opcode: opcode.0 });
        }
        if len > DEFAULT_MAX_RECV {
            return Err(Error::SegmentTooLong {
                opcode: opcode.0,
                len,
                max: DEFAULT_MAX_RECV,
            });
        }
        Ok(Sink::Into(Buffer::new(len as usize, &Pool::default())))
    }

    pub(super) fn on_login_pdu(&mut self, received: &Received) -> Result<(), Error> {
        let request = LoginRequest::parse(&received.head.bhs);
        let State::Login(login) = &mut self.state else {
            return Err(Error::LoginOutOfTurn);
        };
        if self.our_turn {
            return Err(Error::LoginOutOfTurn);
        }
        if login.identity().is_none() {
            self.who.isid = Some(request.isid);
            self.who.cid = Some(request.cid);
            self.window = CommandWindow::new(request.cmd_sn, self.config.limits.queue_depth);
        }
        let data = match &received.sink {
            Sink::Into(buffer) => buffer.data(),
            Sink::Discard => &[],
        };
        let step = login
            .handle(&request, data, &self.config, &*self.directory)
            .and_then(|step| {
                if matches!(step, Step::Admission(_)) {
                    login.check_required(&self.config)?;
                }
                Ok(step)
            });
        self.who.names = login.names().cloned();
        match step {
            Ok(Step::Reply(reply)) => {
                self.send_login_reply(&request, Tsih(0), reply);
                Ok(())
            }
            Ok(Step::Admission(reply)) => {
                self.ask_admission(reply);
                Ok(())
            }
            Err(status) => {
                self.send_refusal(&request, &status);
                Err(Error::LoginRefused(status))
            }
        }
    }

    fn ask_admission(&mut self, reply: LoginReply) {
        let state = core::mem::replace(&mut self.state, State::Closing { logged_out: false });
        let State::Login(login) = state else { return };
        if let (Some(names), Some(isid)) = (login.names(), self.who.isid) {
            self.events.push_back(Event::Admission {
                initiator: names.initiator.clone(),
                isid,
                target_name: names.target.clone(),
                target: match names.session_type {
                    SessionType::Normal => login.grant().map(|grant| grant.target),
                    SessionType::Discovery => None,
                },
            });
        }
        self.state = State::Admission(login, reply);
    }

    pub(super) fn on_admission(&mut self, admission: Admission) {
        let state = core::mem::replace(&mut self.state, State::Closing { logged_out: false });
        let (login, reply) = match state {
            State::Admission(login, reply) => (login, reply),
            other => {
                self.state = other;
                return;
            }
        };
        let Some(request) = login.identity().map(|identity| final_request(identity, &reply)) else {
            return;
        };
        match admission {
            Admission::Accept { tsih } => {
                assert!(
                    tsih != Tsih(0),
                    "0 is the handle of no session (RFC 7143 §11.13.3)"
                );
                self.who.tsih = Some(tsih);
                self.send_login_reply(&request, tsih, reply);
                self.enter_full_feature(&login);
            }
            Admission::Refuse(status) => self.send_refusal(&request, &status),
        }
    }

    fn enter_full_feature(&mut self, login: &Login) {
        let Some(names) = login.names() else { return };
        let session = Session::new(login.params(), names, &self.config);
        // Digests hold for every PDU of the full feature phase; the response that ends login has none, so they are set
        // when it has left.
        self.timers.logged_in(self.now);
        self.events.push_back(Event::LoggedIn);
        self.tx.set_digests_after_queue(session.digests());
        self.state = State::Full(Box::new(session));
    }

    fn send_login_reply(&mut self, request: &LoginRequest, tsih: Tsih, reply: LoginReply) {
        let response = LoginResponse {
            transit: reply.transit,
            continues: reply.continues,
            current: reply.current,
            next: reply.next,
            status: (0, 0),
            tsih,
            ..blank_response(request)
        };
        self.our_turn = true;
        self.tx
            .send(Control::new(response.encode(), reply.text).marked(Mark::Turn));
    }

    fn send_refusal(&mut self, request: &LoginRequest, status: &LoginStatus) {
        let mut text = Outgoing::default();
        if let Some(address) = status.address() {
            text.pair("TargetAddress", address);
        }
        let (text, _) = text.next_piece(DEFAULT_MAX_RECV as usize);
        let response = LoginResponse {
            status: status.code(),
            ..blank_response(request)
        };
        self.tx.send(Control::new(response.encode(), text));
    }
}

fn blank_response(request: &LoginRequest) -> LoginResponse {
    LoginResponse {
        transit: false,
        continues: false,
        current: request.current,
        next: Stage(0),
        version_max: 0,
        version_active: 0,
        isid: request.isid,
        tsih: request.tsih,
        itt: request.itt,
        numbers: Numbers::default(),
        status: (0, 0),
    }
}

/// The request that the final response answers, as far as a response repeats it.
fn final_request(identity: crate::error::LoginIdentity, reply: &LoginReply) -> LoginRequest {
    LoginRequest {
        immediate: true,
        transit: reply.transit,
        continues: false,
        current: reply.current,
        next: reply.next,
        version_max: 0,
        version_min: 0,
        isid: identity.isid,
        tsih: identity.tsih,
        itt: identity.itt,
        cid: identity.cid,
        cmd_sn: identity.cmd_sn,
        exp_stat_sn: crate::types::StatSn(0),
    }
}
