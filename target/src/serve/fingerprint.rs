//! Which initiator it is, by what it cannot easily hide: the maker's number in its ISID, and the naming authority that the
//! default names come from. For people who read `session list`; nothing is decided by it.

/// Names of makers (RFC 7143 §4.2.7.4): the date and the domain, as the initiator makes up its name when nobody gives it one.
const MICROSOFT: &str = "iqn.1991-05.com.microsoft:";
const VMWARE: &str = "iqn.1998-01.com.vmware:";
const QEMU: &str = "iqn.2008-11.org.linux-kvm";
const IPXE: &str = "iqn.2010-04.org.ipxe:";
const LINUX: [&str; 6] = [
    "iqn.1993-08.org.debian:",
    "iqn.1994-05.com.redhat:",
    "iqn.1996-04.de.suse:",
    "iqn.1988-12.com.oracle:",
    "iqn.2004-10.com.ubuntu:",
    "iqn.2016-04.com.open-iscsi:",
];

/// `windows`, `esxi`, `linux`, `ipxe`, `qemu`, `libiscsi` or `unknown`.
pub(crate) fn fingerprint(initiator: &str, isid: [u8; 6]) -> &'static str {
    if initiator.starts_with(VMWARE) {
        return "esxi";
    }
    match isid {
        // Type 01b with the enterprise number of Microsoft (311), and of Fen Systems (10019), who made iPXE (RFC 7143 §11.12.5).
        [0x40, 0x00, 0x01, 0x37, ..] => "windows",
        [0x40, 0x00, 0x27, 0x23, ..] => "ipxe",
        // Type 00b with the OUI that open-iscsi was born with. ESXi has it too, and is known by its name only.
        [0x00, 0x02, 0x3d, ..] => "linux",
        // Type 10b, random: libiscsi, which QEMU uses under a name of its own.
        [0x80, ..] if initiator.starts_with(QEMU) => "qemu",
        [0x80, ..] => "libiscsi",
        _ if initiator.starts_with(MICROSOFT) => "windows",
        _ if initiator.starts_with(IPXE) => "ipxe",
        _ if initiator.starts_with(QEMU) => "qemu",
        _ if LINUX.iter().any(|name| initiator.starts_with(name)) => "linux",
        _ => "unknown",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn makers_are_known_under_any_name() {
        for (initiator, isid, expected) in [
            (
                "iqn.1991-05.com.microsoft:host",
                [0x40, 0, 1, 0x37, 0, 0],
                "windows",
            ),
            ("iqn.2026-01.com.example:sql", [0x40, 0, 1, 0x37, 0, 7], "windows"),
            ("iqn.1991-05.com.microsoft:host", [0; 6], "windows"),
            ("iqn.1998-01.com.vmware:esx-1", [0, 2, 0x3d, 0, 0, 1], "esxi"),
            ("iqn.1993-08.org.debian:01:abc", [0, 2, 0x3d, 0, 0, 1], "linux"),
            ("iqn.2026-01.com.example:db", [0, 2, 0x3d, 3, 0, 1], "linux"),
            ("iqn.1994-05.com.redhat:abc", [0; 6], "linux"),
            ("iqn.2008-11.org.linux-kvm", [0x80, 1, 2, 3, 0, 0], "qemu"),
            (
                "iqn.2007-10.com.github:sahlberg:libiscsi:iscsi-ls",
                [0x80, 1, 2, 3, 0, 0],
                "libiscsi",
            ),
            ("iqn.2010-04.org.ipxe:abc", [0x40, 0, 0x27, 0x23, 1, 2], "ipxe"),
            ("iqn.2026-01.com.example:a", [0xc0, 0, 0, 0, 0, 0], "unknown"),
        ] {
            assert_eq!(fingerprint(initiator, isid), expected, "{initiator} {isid:02x?}");
        }
    }
}
