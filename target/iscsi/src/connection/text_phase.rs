//! Text Requests in full feature phase: SendTargets, and the few keys that may still change (RFC 7143 §6.4, appendix C).

use super::full::Full;
use crate::error::RejectReason;
use crate::event::DiscoveryAsk;
use crate::login::{is_login_only, segment_length};
use crate::pdu::{Numbers, TextRequest, TextResponse};
use crate::receive::Head;
use crate::text::{Collector, IRRELEVANT, NOT_UNDERSTOOD, Outgoing, REJECT, parse};
use crate::transmit::{Control, Mark};
use crate::types::{Itt, SessionType, Ttt};

/// The most text in one response: the peer may allow more, nobody needs it.
const PIECE_MAX: u32 = 64 << 10;

/// A text negotiation that goes on.
pub(super) struct Exchange {
    itt: Itt,
    ttt: Ttt,
    text: Collector,
    out: Outgoing,
    seen: Vec<String>,
    /// Declared, and in effect when the negotiation ends (§6.4).
    max_recv: Option<u32>,
}

impl Full<'_> {
    pub(super) fn on_text(&mut self, head: &Head, request: &TextRequest, data: &[u8]) {
        match self.text_exchange(request, data) {
            Ok(exchange) => self.reply_text(request, exchange),
            // "A target may reset an operational parameter negotiation by answering [...] with a Reject" (§6.4).
            Err(reason) => {
                self.session.text = None;
                self.reject(head, reason);
            }
        }
    }

    /// Takes the text of a request; the exchange it belongs to comes back with what we answer.
    fn text_exchange(&mut self, request: &TextRequest, data: &[u8]) -> Result<Exchange, RejectReason> {
        if *self.our_turn || request.itt == Itt::RESERVED || (request.is_final && request.continues) {
            // "There MUST NOT be more than one outstanding Text Request" (§6.2).
            return Err(RejectReason::PROTOCOL_ERROR);
        }
        let mut exchange = if request.ttt == Ttt::RESERVED {
            // A new request, which resets whatever went on.
            Exchange {
                itt: request.itt,
                ttt: self.session.new_ttt(),
                text: Collector::default(),
                out: Outgoing::default(),
                seen: Vec::new(),
                max_recv: None,
            }
        } else {
            let open = self.session.text.take();
            open.filter(|open| open.ttt == request.ttt && open.itt == request.itt)
                .ok_or(RejectReason::INVALID_FIELD)?
        };
        if !exchange.out.is_empty() {
            // The rest of our text is fetched with empty requests.
            return if data.is_empty() {
                Ok(exchange)
            } else {
                Err(RejectReason::PROTOCOL_ERROR)
            };
        }
        exchange
            .text
            .push(data)
            .map_err(|_| RejectReason::OUT_OF_RESOURCES)?;
        if !request.continues {
            let text = exchange.text.take();
            self.answer_keys(&mut exchange, &text)?;
        }
        Ok(exchange)
    }

    fn answer_keys(&mut self, exchange: &mut Exchange, text: &[u8]) -> Result<(), RejectReason> {
        for (key, value) in parse(text).map_err(|_| RejectReason::PROTOCOL_ERROR)? {
            if [NOT_UNDERSTOOD, REJECT, IRRELEVANT].contains(&value) {
                continue;
            }
            if exchange.seen.iter().any(|seen| seen == key) || exchange.seen.len() == crate::text::MAX_KEYS {
                return Err(RejectReason::PROTOCOL_ERROR);
            }
            exchange.seen.push(key.to_owned());
            match key {
                "SendTargets" => self.send_targets(exchange, value),
                "MaxRecvDataSegmentLength" => match segment_length(value) {
                    Some(len) => exchange.max_recv = Some(len),
                    None => exchange.out.pair(key, REJECT),
                },
                "InitiatorAlias" => {
                    if let Some(names) = &mut self.who.names {
                        names.initiator_alias = Some(value.to_owned());
                    }
                }
                _ if is_login_only(key) => exchange.out.pair(key, REJECT),
                _ => exchange.out.pair(key, NOT_UNDERSTOOD),
            }
        }
        Ok(())
    }

    /// SendTargets (appendix C): `All` in discovery sessions only, a name, or nothing for the session's own target.
    fn send_targets(&mut self, exchange: &mut Exchange, value: &str) {
        let Some(names) = &self.who.names else { return };
        let own = names.target.as_deref();
        let discovery = self.session.session_type == SessionType::Discovery;
        let asked = match value {
            "All" if discovery => None,
            "" if own.is_some() => own,
            "" | "All" => return exchange.out.pair("SendTargets", REJECT),
            name if discovery || own == Some(name) => Some(name),
            _ => return exchange.out.pair("SendTargets", REJECT),
        };
        let records = self.directory.discover(&DiscoveryAsk {
            initiator: &names.initiator,
            target: asked,
            peer: self.config.peer,
            local: self.config.local,
            portal_group: self.config.portal_group,
        });
        for record in records
            .iter()
            .filter(|record| asked.is_none_or(|name| record.name == name))
        {
            exchange.out.pair("TargetName", &record.name);
            for (address, group) in &record.portals {
                // Two separate keys, with the group: Windows refuses anything else.
                exchange.out.pair("TargetAddress", &format!("{address},{group}"));
            }
        }
    }

    fn reply_text(&mut self, request: &TextRequest, mut exchange: Exchange) {
        let max = self.session.params.initiator_max_recv.min(PIECE_MAX);
        let (text, complete) = exchange.out.next_piece(max as usize);
        let is_final = request.is_final && complete;
        let response = TextResponse {
            is_final,
            continues: !complete,
            itt: request.itt,
            ttt: if is_final { Ttt::RESERVED } else { exchange.ttt },
            numbers: Numbers::default(),
        };
        *self.our_turn = true;
        self.tx
            .send(Control::new(response.encode(), text).marked(Mark::Turn));
        if is_final {
            self.session.text = None;
            if let Some(len) = exchange.max_recv {
                self.session.params.initiator_max_recv = len;
            }
        } else {
            self.session.text = Some(exchange);
        }
    }
}
