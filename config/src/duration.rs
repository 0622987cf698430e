//! Spans of time with units: `15m`, `7d`, `1h30m`.

use std::time::Duration;

use crate::problem::Trouble;

const UNITS: [(&str, u64); 6] = [
    ("y", 365 * 86_400),
    ("w", 7 * 86_400),
    ("d", 86_400),
    ("h", 3600),
    ("m", 60),
    ("s", 1),
];

/// Parses `15m`, `7d`, `1h30m`. Units: `s`, `m` (minutes), `h`, `d`, `w`, `y` (365 days).
///
/// # Errors
/// When the text is no span of time or longer than a century; the error says what to write.
pub fn parse_duration(text: &str) -> Result<Duration, Trouble> {
    let example = "write for example \"15m\", \"12h\" or \"7d\"";
    let bad = || Trouble::new(format!("{text:?} is not a span of time"), example);
    let mut rest = text.trim();
    if rest.is_empty() {
        return Err(bad());
    }
    let mut seconds = 0u64;
    while !rest.is_empty() {
        let digits = rest.find(|c: char| !c.is_ascii_digit()).ok_or_else(|| {
            Trouble::new(
                format!("{text:?} has no unit"),
                "add one of s, m (minutes), h, d, w, y",
            )
        })?;
        let (number, after) = rest.split_at(digits);
        let number = number.parse::<u64>().map_err(|_| bad())?;
        let end = after.find(|c: char| c.is_ascii_digit()).unwrap_or(after.len());
        let (unit, next) = after.split_at(end);
        let (_, unit_seconds) = UNITS
            .iter()
            .find(|(name, _)| *name == unit.trim())
            .ok_or_else(|| {
                Trouble::new(
                    format!("{:?} is not a unit of time", unit.trim()),
                    "use one of s, m (minutes), h, d, w, y",
                )
            })?;
        seconds = number
            .checked_mul(*unit_seconds)
            .and_then(|s| s.checked_add(seconds))
            .filter(|s| *s <= 100 * 365 * 86_400)
            .ok_or_else(|| Trouble::new(format!("{text:?} is longer than a century"), example))?;
        rest = next;
    }
    Ok(Duration::from_secs(seconds))
}

/// A span of time in the form that [`parse_duration`] reads, with at most two units: `1h30m`, `7d`.
#[must_use]
pub fn format_duration(span: Duration) -> String {
    let mut left = span.as_secs();
    if left == 0 {
        return "0s".to_owned();
    }
    let mut text = String::new();
    let mut shown = 0;
    for (name, seconds) in UNITS {
        let count = left / seconds;
        if count > 0 && shown < 2 {
            text.push_str(&format!("{count}{name}"));
            left %= seconds;
            shown += 1;
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spans_as_operators_write_them() {
        for (text, seconds) in [
            ("15m", 900),
            ("7d", 604_800),
            ("1h30m", 5400),
            ("2w", 1_209_600),
            ("0s", 0),
            ("1y", 31_536_000),
        ] {
            assert_eq!(parse_duration(text), Ok(Duration::from_secs(seconds)), "{text}");
        }
    }

    #[test]
    fn wrong_spans_say_what_to_write() {
        for (text, hint) in [
            ("", "15m"),
            ("7", "no unit"),
            ("7 days", "use one of"),
            ("d", "not a span"),
            ("200y", "century"),
            ("99999999999999999999s", "not a span"),
            ("-1d", "not a"),
        ] {
            let trouble = parse_duration(text).expect_err(text);
            assert!(trouble.to_string().contains(hint), "{text}: {trouble}");
        }
    }

    #[test]
    fn shown_spans_read_back() {
        for seconds in [0, 1, 59, 60, 5400, 604_800, 31_536_000] {
            let span = Duration::from_secs(seconds);
            assert_eq!(parse_duration(&format_duration(span)), Ok(span));
        }
        assert_eq!(format_duration(Duration::from_secs(90_061)), "1d1h");
    }
}
