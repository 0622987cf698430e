//! What a dump of this process's memory may show: nothing. It holds CHAP secrets, enrolment tokens, a private key and the LUNs' data.

/// Says "with everything", for whoever has to look for a bug on a machine of their own.
const WHOLE: &str = "STILLPOINT_FULL_CORE";

/// Keeps memory out of core dumps and of `gcore`: a core then holds registers and the list of mappings (core(5), coredump_filter).
pub(crate) fn keep_out_of_cores() {
    if std::env::var_os(WHOLE).is_some() {
        tracing::warn!("{WHOLE} is set: a core dump of this process shows secrets and data");
        return;
    }
    if let Err(error) = std::fs::write("/proc/self/coredump_filter", "0") {
        tracing::warn!(%error, "a core dump of this process would show secrets: /proc/self/coredump_filter cannot be written");
    }
}
