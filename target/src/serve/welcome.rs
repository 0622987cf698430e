//! What a person reads who started the embedded default: how to reach the demo LUN.

use std::fmt::Write as _;

use super::Daemon;

/// How to connect from Linux, Windows and ESXi.
pub(crate) fn text(daemon: &Daemon) -> String {
    let config = daemon.config();
    let mut text = String::from(
        "\nStillpoint serves a demo disk. Nothing was installed; everything is below the data directory.\n\n",
    );
    let mut line = |words: std::fmt::Arguments<'_>| {
        // Writing to a String cannot fail.
        let _ = text.write_fmt(words);
    };
    for (target, portal) in config.targets.iter().zip(config.portals.iter().cycle()) {
        let (iqn, address) = (target.iqn.as_str(), portal.address);
        let (ip, port) = (address.ip(), address.port());
        for lun in target.luns().iter().filter_map(|name| config.lun(name.as_str())) {
            line(format_args!("  LUN      {} ({})\n", lun.name.as_str(), lun.size));
        }
        line(format_args!(
            "  target   {iqn}\n  portal   {address}\n  data     {}\n",
            config.daemon.data_dir.display()
        ));
        line(format_args!(
            "\nLinux    iscsiadm -m discovery -t sendtargets -p {address}\n         iscsiadm -m node -T {iqn} -p {address} --login\n"
        ));
        line(format_args!(
            "Windows  New-IscsiTargetPortal -TargetPortalAddress {ip} -TargetPortalPortNumber {port}\n         \
             Connect-IscsiTarget -NodeAddress {iqn}\n"
        ));
        line(format_args!(
            "ESXi     esxcli iscsi adapter discovery sendtarget add -A vmhba64 -a {address}\n         \
             esxcli storage core adapter rescan -A vmhba64\n"
        ));
        line(format_args!(
            "\nSnapshot stillpoint --socket {} snapshot create demo\n",
            config.daemon.control_socket.display()
        ));
        if ip.is_loopback() {
            line(format_args!(
                "\nOnly this machine can connect. For others: stillpoint serve --listen 0.0.0.0\n"
            ));
        }
    }
    text.push_str("\nStop with Ctrl-C; the disk and its snapshots stay.\n");
    text
}
