//! The bytes in PROTOCOL.md are the bytes of this crate.

use stillpoint_agentproto::frame::{Decoded, Decoder, Frame, MAX_BODY};
use stillpoint_agentproto::message::{
    Capabilities, Freeze, Frozen, FrozenVolume, Hello, Message, MessageType, Mode, Prepare, Progress, Reply,
    Request, Require,
};
use stillpoint_agentproto::{AgentId, ErrorCode, LunId, Refusal, SessionId};

const SESSION: SessionId = SessionId([0xaa; 16]);
const LUN: LunId = LunId([0x62; 16]);

/// The examples, in the order of the document.
fn examples() -> Vec<(&'static str, Frame)> {
    let frame = |request_id, generation, message| Frame {
        request_id,
        generation,
        message,
    };
    let hello = Hello {
        min_version: 1,
        max_version: 1,
        agent_id: Some(AgentId([0x11; 16])),
        product: "agent 1.0".into(),
        capabilities: Capabilities::LINUX_FS.with(Capabilities::HOOKS),
    };
    let prepare = Prepare {
        session: SESSION,
        luns: vec![LUN],
        mode: Mode::Filesystem,
        hold_ms: 5000,
        require: Require::BestEffort,
    };
    let volume = FrozenVolume {
        lun: LUN,
        path: "/srv".into(),
        frozen: true,
        error: None,
    };
    let frozen = Frozen {
        remaining_ms: 4985,
        volumes: vec![volume],
        apps: vec![],
    };
    let busy = Refusal::new(ErrorCode::Busy, "frozen less than 10 s ago").retry_after(7300);
    let progress = Progress {
        done: 1,
        total: 2,
        text: "hooks".into(),
    };
    vec![
        ("hello", frame(0, 0, Message::Request(Request::Hello(hello)))),
        (
            "prepare",
            frame(3, 7, Message::Request(Request::Prepare(prepare))),
        ),
        (
            "freeze",
            frame(
                4,
                7,
                Message::Request(Request::Freeze(Freeze {
                    session: SESSION,
                    hold_ms: 5000,
                })),
            ),
        ),
        ("frozen", frame(4, 7, Message::Reply(Reply::Freeze(frozen)))),
        ("busy", frame(3, 7, Message::Refused(MessageType(12), busy))),
        (
            "progress",
            frame(3, 7, Message::Progress(MessageType(12), progress)),
        ),
    ]
}

fn hex_lines(bytes: &[u8]) -> String {
    let line = |line: &[u8]| {
        line.iter()
            .map(|byte| format!("{byte:02x}"))
            .collect::<Vec<_>>()
            .join(" ")
    };
    bytes.chunks(20).map(line).collect::<Vec<_>>().join("\n")
}

#[test]
fn the_examples_are_real_frames() {
    let document = include_str!("../PROTOCOL.md");
    for (name, frame) in examples() {
        let bytes = frame.encode().expect("within the limits");
        let block = format!("```hex {name}\n{}\n```", hex_lines(&bytes));
        assert!(document.contains(&block), "PROTOCOL.md should have:\n{block}");
        let mut decoder = Decoder::new(MAX_BODY);
        decoder.feed(&bytes);
        assert_eq!(decoder.next_frame(), Ok(Some(Decoded::Frame(frame))));
    }
    assert_eq!(
        document.matches("```hex ").count(),
        examples().len(),
        "an example that nobody checks"
    );
}

/// Every code is in the table, with its number.
#[test]
fn the_errors_are_all_listed() {
    let document = include_str!("../PROTOCOL.md");
    for code in ErrorCode::ALL {
        let row = format!("| {} | {} |", code.0, code.name().expect("known"));
        assert!(document.contains(&row), "PROTOCOL.md should have the row {row}");
    }
}
