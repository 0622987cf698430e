//! `[[schedule]]`: when, what, how consistent, how long kept.

use std::time::Duration;

use croner::Cron;
use croner::parser::CronParser;
use jiff::tz::TimeZone;

use crate::config::{Consistency, OnFailure};
use crate::name::LunName;
use crate::problem::Trouble;

/// A checked schedule.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Schedule {
    /// Its name.
    pub name: LunName,
    /// One cut of all of these.
    pub luns: Vec<LunName>,
    /// As written, for display.
    pub cron_text: String,
    /// When.
    pub cron: Cron,
    /// None: the machine's time zone.
    pub timezone: Option<TimeZone>,
    /// Asked for.
    pub consistency: Consistency,
    /// When it cannot be proved.
    pub on_failure: OnFailure,
    /// Retention; None keeps everything.
    pub keep: Option<Keep>,
    /// Cannot be deleted by anyone before.
    pub lock: Option<Duration>,
}

/// How many of each age are kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Keep {
    /// The newest.
    pub last: u32,
    /// One per hour.
    pub hourly: u32,
    /// One per day.
    pub daily: u32,
    /// One per ISO week.
    pub weekly: u32,
    /// One per month.
    pub monthly: u32,
    /// One per year.
    pub yearly: u32,
}

/// Parses a cron pattern, and refuses one that never fires.
pub(crate) fn parse_cron(text: &str) -> Result<Cron, Trouble> {
    let example = "write five fields, as in \"0 * * * *\" (minute hour day month weekday)";
    let cron = CronParser::new().parse(text).map_err(|e| {
        Trouble::new(
            format!(
                "{text:?} is not a cron pattern ({})",
                e.to_string().trim_end_matches('.')
            ),
            example,
        )
    })?;
    // A fixed day, so that the same file is right or wrong on every day of the year.
    let from = jiff::civil::date(2026, 1, 1)
        .to_zoned(TimeZone::UTC)
        .map_err(|e| Trouble::new(e.to_string(), example))?;
    cron.find_next_occurrence(&from, false)
        .map_err(|_| Trouble::new(format!("{text:?} never comes"), "name a day that the month has"))?;
    Ok(cron)
}

/// Parses an IANA time zone name.
pub(crate) fn parse_timezone(text: &str) -> Result<TimeZone, Trouble> {
    TimeZone::get(text).map_err(|_| {
        Trouble::new(
            format!("{text:?} is not a time zone that this machine knows"),
            "write for example \"Europe/Berlin\", or install the package tzdata",
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cron_patterns() {
        for text in [
            "0 * * * *",
            "30 2 * * *",
            "0 0 * * MON-FRI",
            "*/15 * * * *",
            "@daily",
            "0 0 L * *",
        ] {
            assert!(parse_cron(text).is_ok(), "{text}");
        }
        for text in ["", "hourly", "61 * * * *", "0 0 31 2 *", "* * *"] {
            assert!(parse_cron(text).is_err(), "{text}");
        }
        assert!(
            parse_cron("0 0 30 2 *")
                .expect_err("30 February")
                .to_string()
                .contains("never comes")
        );
    }

    #[test]
    fn time_zones() {
        assert!(parse_timezone("UTC").is_ok());
        assert!(
            parse_timezone("Mars/Olympus")
                .expect_err("none")
                .to_string()
                .contains("Mars/Olympus")
        );
    }
}
