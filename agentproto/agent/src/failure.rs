//! Why a verb ended: the words and the exit codes of operator-interface.md §2 (0 done, 1 failed, 2 usage, 3 refused by a rule, 4 the
//! other end cannot be reached).

use std::process::ExitCode;

use stillpoint_agentproto::Refusal;

/// What the operator can do something about.
#[derive(Debug, thiserror::Error)]
#[error("{message}")]
pub(crate) struct Failure {
    /// The exit code.
    pub(crate) exit: u8,
    /// A stable word for scripts.
    pub(crate) code: String,
    /// The thing and the trouble.
    pub(crate) message: String,
    /// The way out.
    pub(crate) hint: String,
}

/// Refused by a rule.
pub(crate) const REFUSED: u8 = 3;
/// Nobody answers there.
pub(crate) const UNREACHABLE: u8 = 4;
/// The command line says something else than it means.
const USAGE: u8 = 2;

impl Failure {
    fn new(exit: u8, code: &str, message: impl Into<String>, hint: impl Into<String>) -> Self {
        Self {
            exit,
            code: code.to_owned(),
            message: message.into(),
            hint: hint.into(),
        }
    }

    /// Exit code 1.
    pub(crate) fn failed(code: &str, message: impl Into<String>, hint: impl Into<String>) -> Self {
        Self::new(1, code, message, hint)
    }

    /// Exit code 2.
    pub(crate) fn usage(message: impl Into<String>, hint: impl Into<String>) -> Self {
        Self::new(USAGE, "usage", message, hint)
    }

    /// Exit code 3.
    pub(crate) fn refused(code: &str, message: impl Into<String>, hint: impl Into<String>) -> Self {
        Self::new(REFUSED, code, message, hint)
    }

    /// Exit code 4.
    pub(crate) fn unreachable(message: impl Into<String>, hint: impl Into<String>) -> Self {
        Self::new(UNREACHABLE, "unreachable", message, hint)
    }

    /// The target's word.
    pub(crate) fn of_target(address: &str, refusal: &Refusal) -> Self {
        let code = refusal.code.name().map_or_else(|| "refused".to_owned(), snake);
        let message = format!("{address} refused: {}", refusal.text);
        let hint = "`stillpoint events` on the target says what it saw; a new token: `stillpoint agent token create`";
        Self::new(REFUSED, &code, message, hint)
    }
}

/// `NotEnrolled` as `not_enrolled`.
fn snake(name: &str) -> String {
    let mut out = String::new();
    for c in name.chars() {
        if c.is_ascii_uppercase() && !out.is_empty() {
            out.push('_');
        }
        out.push(c.to_ascii_lowercase());
    }
    out
}

/// Tells an error, for people or as JSON, on standard error; the exit code.
pub(crate) fn tell(json: bool, error: &anyhow::Error) -> ExitCode {
    let known = error.downcast_ref::<Failure>();
    let (exit, code) = known.map_or((1, "failed"), |failure| (failure.exit, failure.code.as_str()));
    let hint = known
        .map(|failure| failure.hint.as_str())
        .filter(|hint| !hint.is_empty());
    let text = if json {
        let error = serde_json::json!({ "code": code, "message": format!("{error:#}"), "hint": hint });
        serde_json::json!({ "error": error }).to_string()
    } else {
        let hint = hint.map_or_else(String::new, |hint| format!("\n  {hint}"));
        format!("stillpoint-agent: {error:#}{hint}")
    };
    // Nobody can be told that standard error is gone.
    std::io::Write::write_all(&mut std::io::stderr(), format!("{text}\n").as_bytes()).ok();
    ExitCode::from(exit)
}

#[cfg(test)]
mod tests {
    use super::*;
    use stillpoint_agentproto::ErrorCode;

    #[test]
    fn a_refusal_of_the_target_is_exit_3_with_its_word() {
        let refusal = Refusal::new(ErrorCode::NotEnrolled, "wrong, used or expired token");
        let failure = Failure::of_target("san1:11169", &refusal);
        assert_eq!((failure.exit, failure.code.as_str()), (REFUSED, "not_enrolled"));
        assert!(
            failure.message.starts_with("san1:11169 refused: wrong"),
            "{failure}"
        );
    }
}
