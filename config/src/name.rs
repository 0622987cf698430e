//! Names: of LUNs, and of iSCSI nodes.

use std::fmt;
use std::str::FromStr;

use crate::limits::{MAX_ISCSI_NAME_BYTES, MAX_NAME_BYTES};
use crate::problem::Trouble;

/// The name of a LUN, volume, snapshot or schedule: what operators type, so neither `@` (snapshots) nor `,` (lists) is in it.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LunName(String);

impl LunName {
    /// The name as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for LunName {
    type Err = Trouble;

    fn from_str(text: &str) -> Result<Self, Trouble> {
        let first = text.bytes().next();
        let fits = text.len() <= MAX_NAME_BYTES
            && first.is_some_and(|b| b.is_ascii_alphanumeric())
            && text
                .bytes()
                .all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.'));
        if fits {
            return Ok(Self(text.to_owned()));
        }
        Err(Trouble::new(
            format!("{text:?} is not a name"),
            format!(
                "use letters, digits, `-`, `_` and `.`, beginning with a letter or digit, at most {MAX_NAME_BYTES} characters"
            ),
        ))
    }
}

impl fmt::Display for LunName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}

/// An iSCSI name of a target or initiator (RFC 7143 §4.2.7): `iqn.`, `eui.` or `naa.`.
///
/// Kept in lower case, as RFC 3722 normalises it. `_` is let through after the colon although RFC 3722 has no place for
/// it: QEMU puts the virtual machine's name there.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct IscsiName(String);

impl IscsiName {
    /// The normalised name.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for IscsiName {
    type Err = Trouble;

    fn from_str(text: &str) -> Result<Self, Trouble> {
        let name = text.to_lowercase();
        if name.len() > MAX_ISCSI_NAME_BYTES {
            return Err(Trouble::new(
                format!("the iSCSI name has {} bytes", name.len()),
                format!("RFC 7143 allows {MAX_ISCSI_NAME_BYTES}: shorten it"),
            ));
        }
        let checked = match name.split_at_checked(4) {
            Some(("iqn.", rest)) => check_iqn(rest),
            Some(("eui.", hex)) => check_hex(hex, &[16]),
            Some(("naa.", hex)) => check_hex(hex, &[16, 32]),
            _ => Err("it begins with none of `iqn.`, `eui.` and `naa.`"),
        };
        match checked {
            Ok(()) => Ok(Self(name)),
            Err(why) => Err(Trouble::new(
                format!("{text:?} is not an iSCSI name: {why}"),
                "write for example \"iqn.2026-11.com.example:sql01\" (RFC 7143 §4.2.7)",
            )),
        }
    }
}

/// `yyyy-mm.reversed.domain[:anything]` (RFC 3720 §3.2.6.3.1).
fn check_iqn(rest: &str) -> Result<(), &'static str> {
    let (authority, own) = rest.split_once(':').map_or((rest, None), |(a, o)| (a, Some(o)));
    let Some((date, domain)) = authority.split_once('.') else {
        return Err("after `iqn.` comes a month and a reversed domain, as in `iqn.2026-11.com.example`");
    };
    let digits = |t: &str, n: usize| t.len() == n && t.bytes().all(|b| b.is_ascii_digit());
    match date.split_once('-') {
        Some((year, month)) if digits(year, 4) && digits(month, 2) && ("01"..="12").contains(&month) => {}
        _ => return Err("after `iqn.` comes a month as yyyy-mm"),
    }
    let label = |l: &str| !l.is_empty() && l.chars().all(|c| c.is_alphanumeric() || c == '-');
    if !domain.split('.').all(label) {
        return Err("the part after the month is not a reversed domain name");
    }
    match own {
        Some("") => Err("nothing follows the colon"),
        Some(own)
            if !own
                .chars()
                .all(|c| c.is_alphanumeric() || matches!(c, '-' | '.' | ':' | '_')) =>
        {
            Err("after the colon only letters, digits, `-`, `.`, `:` are allowed")
        }
        _ => Ok(()),
    }
}

fn check_hex(hex: &str, lengths: &[usize]) -> Result<(), &'static str> {
    if lengths.contains(&hex.len()) && hex.bytes().all(|b| b.is_ascii_hexdigit()) {
        return Ok(());
    }
    Err("`eui.` takes 16 hexadecimal digits, `naa.` 16 or 32")
}

impl fmt::Display for IscsiName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn iscsi_names_of_rfc_7143_and_of_real_initiators() {
        for text in [
            // RFC 7143 §4.2.7.4 and §4.2.7.5, §4.2.7.6 examples.
            "iqn.2001-04.com.example:storage:diskarrays-sn-a8675309",
            "iqn.2001-04.com.example",
            "iqn.2001-04.com.example:storage.tape1.sys1.xyz",
            "eui.02004567A425678D",
            "naa.52004567BA64678D",
            "naa.62004567BA64678D0123456789ABCDEF",
            // Windows, Debian, ESXi, QEMU.
            "iqn.1991-05.com.microsoft:sql01.corp.example",
            "iqn.1993-08.org.debian:01:8a7b6c5d4e3f",
            "iqn.1998-01.com.vmware:esx1-4f2a9d10",
            "iqn.2008-11.org.linux-kvm:my_vm",
        ] {
            assert!(text.parse::<IscsiName>().is_ok(), "{text}");
        }
        assert_eq!(
            "IQN.2026-11.Com.Example:SQL"
                .parse::<IscsiName>()
                .expect("upper")
                .as_str(),
            "iqn.2026-11.com.example:sql"
        );
    }

    #[test]
    fn wrong_iscsi_names_say_why() {
        for (text, why) in [
            ("sql01", "begins with none"),
            ("iqn.2026-13.com.example:x", "month as yyyy-mm"),
            ("iqn.26-11.com.example:x", "month as yyyy-mm"),
            ("iqn.2026-11", "month and a reversed domain"),
            ("iqn.2026-11.:x", "reversed domain"),
            ("iqn.2026-11.com..example", "reversed domain"),
            ("iqn.2026-11.com.example:", "nothing follows"),
            ("iqn.2026-11.com.example:a b", "after the colon"),
            ("eui.0200", "16 hexadecimal"),
            ("naa.zz004567BA64678D", "16 hexadecimal"),
            ("", "begins with none"),
        ] {
            let trouble = text.parse::<IscsiName>().expect_err(text);
            assert!(trouble.to_string().contains(why), "{text}: {trouble}");
        }
        let long = format!("iqn.2026-11.com.example:{}", "a".repeat(200));
        assert!(
            long.parse::<IscsiName>()
                .expect_err("long")
                .to_string()
                .contains("223")
        );
    }

    #[test]
    fn lun_names() {
        for text in ["sql01", "a", "9-x_y.z"] {
            assert!(text.parse::<LunName>().is_ok(), "{text}");
        }
        for text in ["", "-a", ".a", "a@b", "a,b", "a b", "ä", &"x".repeat(65)] {
            assert!(text.parse::<LunName>().is_err(), "{text}");
        }
    }

    proptest! {
        #[test]
        fn any_text_is_a_name_or_is_refused(text in ".{0,64}") {
            if let Ok(name) = text.parse::<IscsiName>() {
                prop_assert_eq!(name.as_str().parse::<IscsiName>(), Ok(name.clone()), "normalising twice changes nothing");
            }
        }
    }
}
