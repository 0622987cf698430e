# Debian's packages, unpacked below build/ and never installed: sourced by `build` and `tools`. No root is needed, and
# nothing of the host changes.

# Programs of an unpacked tree run through that tree's own loader and libraries.
loader_of() { echo "$1"/lib64/ld-linux-*.so.*; }
libraries_of() { echo "$1/usr/lib/x86_64-linux-gnu:$1/usr/lib"; }
run_in() { # TREE PROGRAM ARGUMENT…
    local tree=$1 program=$2
    shift 2
    "$(loader_of "$tree")" --library-path "$(libraries_of "$tree")" --argv0 "$(basename "$program")" "$tree/$program" "$@"
}

# fetch WORK PACKAGE…: leaves the packages with everything they depend on in WORK/archives. An empty status file makes apt return the
# whole closure. The host's package lists serve when they are there and fresh; otherwise own ones are fetched.
fetch() {
    local work=$1
    shift
    mkdir -p "$work/archives/partial" "$work/state/lists/partial" "$work/cache"
    : >"$work/status"
    local options=(-qq -y -o Debug::NoLocking=1 -o APT::Sandbox::User=root -o Dir::State::status="$work/status"
        -o Dir::Cache::archives="$work/archives" -o Dir::Cache::pkgcache="" -o Dir::Cache::srcpkgcache="")
    local download=(--no-install-recommends --download-only install "$@")
    apt-get "${options[@]}" "${download[@]}" >"$work/apt.log" 2>&1 && return
    options+=(-o Dir::State="$work/state" -o Dir::State::lists="$work/state/lists" -o Dir::State::status="$work/status")
    # A broken third-party list must not stop this; what is really missing fails by name below.
    apt-get "${options[@]}" update >>"$work/apt.log" 2>&1 || true
    apt-get "${options[@]}" "${download[@]}" >>"$work/apt.log" 2>&1 && return
    cat "$work/apt.log" >&2
    echo "apt-get could not fetch: $*" >&2
    return 1
}

# unpack WORK TREE UNNEEDED-REGEX
unpack() {
    local work=$1 tree=$2 unneeded=$3 deb name d
    mkdir -p "$tree"/usr/{bin,sbin,lib,lib64}
    for d in bin sbin lib lib64; do ln -s "usr/$d" "$tree/$d"; done
    for deb in "$work"/archives/*.deb; do
        name=$(basename "$deb")
        [[ $name =~ $unneeded ]] && continue
        dpkg-deb --fsys-tarfile "$deb" | tar -x -C "$tree" --keep-directory-symlink --no-same-owner \
            --exclude='./usr/share/doc/*' --exclude='./usr/share/man/*' --exclude='./usr/share/locale/*' \
            --exclude='./usr/share/info/*' --exclude='./usr/share/lintian/*'
    done
}

# begin OUT SCRIPT…: makes OUT and a work directory ($work); returns 1 when OUT is up to date with the scripts.
begin() {
    out=$1
    shift
    mkdir -p "$out"
    out=$(cd "$out" && pwd)
    # Stories run side by side, and each of them asks.
    exec 9>"$out/lock"
    flock 9
    stamp=$(cat "$@" | sha256sum | cut -d' ' -f1)
    [[ ! -f $out/stamp || $(<"$out/stamp") != "$stamp" ]] || return 1
    rm -rf "$out/stamp" "$out"/work.*
    work=$(mktemp -d "$out/work.XXXXXX")
    trap 'rm -rf "$work"' EXIT
    command -v apt-get >/dev/null && command -v dpkg-deb >/dev/null ||
        { echo "the stories need packages of Debian, and this system has no apt-get" >&2; exit 1; }
}
