//! Sizes with units: `512B`, `4KiB`, `1.5TiB`.

use std::fmt;
use std::str::FromStr;

use crate::problem::Trouble;

/// A size in bytes, written with an IEC unit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Size(pub u64);

const UNITS: [(&str, &str, u32); 6] = [
    ("B", "", 0),
    ("KiB", "K", 10),
    ("MiB", "M", 20),
    ("GiB", "G", 30),
    ("TiB", "T", 40),
    ("PiB", "P", 50),
];

impl Size {
    /// The size in bytes.
    #[must_use]
    pub fn bytes(self) -> u64 {
        self.0
    }
}

impl FromStr for Size {
    type Err = Trouble;

    /// `K`, `M`, `G` … mean the IEC unit, as they do in `zfs` and `ceph`. `GB` is refused: it means two things.
    fn from_str(text: &str) -> Result<Self, Trouble> {
        let text = text.trim();
        let split = text
            .find(|c: char| !c.is_ascii_digit() && c != '.')
            .unwrap_or(text.len());
        let (number, unit) = text.split_at(split);
        let unit = unit.trim();
        if number.is_empty() {
            return Err(Trouble::new(
                format!("{text:?} is not a size"),
                "write for example \"512B\", \"4KiB\" or \"1.5TiB\"",
            ));
        }
        if unit.is_empty() {
            return Err(Trouble::new(
                format!("{text:?} has no unit"),
                format!("write \"{text}GiB\" or another of B, KiB, MiB, GiB, TiB, PiB"),
            ));
        }
        let Some(shift) = UNITS
            .iter()
            .find(|(long, short, _)| *long == unit || (!short.is_empty() && *short == unit))
            .map(|u| u.2)
        else {
            let iec = UNITS.iter().find(|(long, short, _)| {
                unit.eq_ignore_ascii_case(long)
                    || (!short.is_empty() && unit.eq_ignore_ascii_case(&format!("{short}B")))
            });
            let way_out = match iec {
                Some((long, ..)) => format!("write \"{number}{long}\""),
                None => "use one of B, KiB, MiB, GiB, TiB, PiB".to_owned(),
            };
            return Err(Trouble::new(format!("{unit:?} is not a unit of size"), way_out));
        };
        exact(number, shift).map(Size).ok_or_else(|| {
            Trouble::new(
                format!("{text:?} is not a whole number of bytes below 8EiB"),
                "write a whole number, or a fraction such as 1.5",
            )
        })
    }
}

/// `number` x 2^`shift`, when that is a whole number that fits.
fn exact(number: &str, shift: u32) -> Option<u64> {
    let (whole, fraction) = number.split_once('.').unwrap_or((number, "0"));
    if whole.is_empty() || fraction.is_empty() || fraction.len() > 12 {
        return None;
    }
    let scale = 10u128.pow(u32::try_from(fraction.len()).ok()?);
    let digits =
        whole.parse::<u64>().ok().map(u128::from)? * scale + fraction.parse::<u64>().ok().map(u128::from)?;
    let scaled = digits.checked_shl(shift).filter(|s| s >> shift == digits)?;
    if scaled % scale != 0 {
        return None;
    }
    u64::try_from(scaled / scale)
        .ok()
        .filter(|bytes| *bytes <= i64::MAX.unsigned_abs())
}

impl fmt::Display for Size {
    /// Exact when short, else with two decimals: `1.50 TiB` prints as `1.5TiB`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (unit, shift) = UNITS
            .iter()
            .rev()
            .find(|(_, _, shift)| self.0 >> shift > 0)
            .map_or(("B", 0), |(long, _, shift)| (*long, *shift));
        let whole = self.0 >> shift;
        let rest = self.0 - (whole << shift);
        // In u128, since the remainder of an EiB times 100 leaves 64 bits.
        let hundredths = (u128::from(rest) * 100) >> shift;
        let text = if hundredths == 0 {
            format!("{whole}{unit}")
        } else {
            format!(
                "{}{unit}",
                format!("{whole}.{hundredths:02}").trim_end_matches('0')
            )
        };
        f.pad(&text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn sizes_as_operators_write_them() {
        for (text, bytes) in [
            ("512B", 512),
            ("4KiB", 4096),
            ("1.5TiB", 3 << 39),
            ("10G", 10 << 30),
            ("0.5 KiB", 512),
            ("500GiB", 500 << 30),
            ("0B", 0),
        ] {
            assert_eq!(text.parse::<Size>(), Ok(Size(bytes)), "{text}");
        }
    }

    #[test]
    fn wrong_sizes_say_what_to_write() {
        for (text, hint) in [
            ("500", "500GiB"),
            ("10GB", "10GiB"),
            ("10gib", "10GiB"),
            ("", "512B"),
            ("-1GiB", "512B"),
            ("1.5B", "whole number"),
            ("99999999PiB", "whole number"),
            ("1.GiB", "whole number"),
            ("3 bananas", "KiB"),
        ] {
            let trouble = text.parse::<Size>().expect_err(text);
            assert!(trouble.to_string().contains(hint), "{text}: {trouble}");
        }
    }

    #[test]
    fn shown_sizes() {
        assert_eq!(Size(0).to_string(), "0B");
        assert_eq!(Size(1023).to_string(), "1023B");
        assert_eq!(Size(3 << 39).to_string(), "1.5TiB");
        assert_eq!(Size((1 << 30) + 1).to_string(), "1GiB");
        assert_eq!(Size(u64::MAX).to_string(), "16383.99PiB");
    }

    proptest! {
        #[test]
        fn whole_units_survive(n in 0u64..1 << 20, unit in 0usize..5) {
            let shift = [0, 10, 20, 30, 40][unit];
            let size = Size(n << shift);
            let text = format!("{n}{}", UNITS[unit].0);
            prop_assert_eq!(text.parse::<Size>(), Ok(size));
        }

        #[test]
        fn any_text_parses_or_is_refused(text in ".{0,40}") {
            let _ = text.parse::<Size>();
        }
    }
}
