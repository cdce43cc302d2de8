#!/bin/sh
# Gets a fresh Debian 12 computer ready: looks for what is needed, installs what is missing in one
# apt call, and names what it cannot install. Quick and silent about what is there; run it as often
# as you like.
#
#   scripts/setup.sh           install what is missing
#   scripts/setup.sh --check   only say what is missing
set -eu

check=no
case "${1:-}" in
    "") ;;
    --check) check=yes ;;
    *) echo "usage: $0 [--check]" >&2; exit 2 ;;
esac

PATH="$PATH:/usr/sbin:/sbin:$HOME/.cargo/bin"
export PATH
root=$(cd "$(dirname "$0")/.." && pwd)
problems=0

say() { printf 'setup: %s\n' "$*"; }
# What this script cannot mend: what is wrong, then how to mend it.
problem() {
    printf 'setup: %s\n       %s\n' "$1" "$2" >&2
    problems=$((problems + 1))
}

# Programs by the Debian package that has them.
packages=""
while read -r program package; do
    command -v "$program" > /dev/null 2>&1 || case " $packages " in
        *" $package "*) ;;
        *) packages="$packages $package" ;;
    esac
done << 'PROGRAMS'
qemu-system-x86_64 qemu-system-x86
qemu-img qemu-utils
qemu-nbd qemu-utils
qemu-storage-daemon qemu-system-common
nbdkit nbdkit
nbdinfo libnbd-bin
nbdcopy libnbd-bin
nbdsh python3-libnbd
nbd-client nbd-client
fio fio
fusermount3 fuse3
g++ g++
clang clang
ip iproute2
tc iproute2
nft nftables
wg wireguard-tools
wireguard-go wireguard-go
mke2fs e2fsprogs
lz4 lz4
xz xz-utils
python3 python3
modprobe kmod
busybox busybox
bird bird2
etcd etcd-server
dpkg-deb dpkg
cc gcc
ld binutils
make make
PROGRAMS
# The guest's static binaries are linked with libc.a, which a compiler alone does not bring.
if command -v cc > /dev/null 2>&1; then
    case $(cc -print-file-name=libc.a) in
        /*) ;;
        *) packages="$packages libc6-dev" ;;
    esac
else
    packages="$packages libc6-dev"
fi
# PostgreSQL's server is not in the path; tests of leases start their own.
command -v postgres > /dev/null 2>&1 || ls /usr/lib/postgresql/*/bin/postgres > /dev/null 2>&1 ||
    packages="$packages postgresql"
# The BPF programs include the kernel's own.
[ -e /usr/include/linux/bpf.h ] || packages="$packages linux-libc-dev"
packages=${packages# }

if [ -n "$packages" ]; then
    if [ $check = yes ]; then
        problem "missing packages: $packages" "run $0 as root"
    elif ! command -v apt-get > /dev/null 2>&1; then
        problem "missing programs, and no apt-get to install them with" \
            "install what this system calls: $packages"
    elif [ "$(id -u)" != 0 ]; then
        problem "missing packages: $packages" "run as root: apt-get install $packages"
    else
        say "installing $packages"
        export DEBIAN_FRONTEND=noninteractive
        # Only programs are wanted: a service that a package brings is neither started nor kept for the
        # next start of this computer.
        policy=/usr/sbin/policy-rc.d
        if [ ! -e $policy ]; then
            printf '#!/bin/sh\nexit 101\n' > $policy
            chmod 755 $policy
            trap 'rm -f /usr/sbin/policy-rc.d' EXIT
            trap 'exit 1' INT TERM HUP
        fi
        # The lists may be absent or old; they are fetched only when installing without fails.
        # shellcheck disable=SC2086  # a list of words
        apt-get install -y -qq --no-install-recommends $packages > /dev/null 2>&1 || {
            say "fetching the package lists first"
            apt-get update -qq || true
            # shellcheck disable=SC2086
            apt-get install -y -qq --no-install-recommends $packages > /dev/null ||
                problem "apt-get could not install: $packages" \
                    "read its message above; is a Debian mirror reachable?"
        }
        for service in bird2:bird etcd-server:etcd postgresql:postgresql; do
            case " $packages " in
                *" ${service%%:*} "*)
                    systemctl --quiet disable "${service#*:}.service" 2> /dev/null || true ;;
            esac
        done
    fi
fi

# Rust comes from rustup: Debian's is too old.
needed=$(sed -n 's/^rust-version = "\(.*\)"/\1/p' "$root/Cargo.toml")
if ! command -v cargo > /dev/null 2>&1; then
    problem "no cargo" "install Rust $needed or newer: https://rustup.rs"
else
    found=$(cargo --version | cut -d' ' -f2)
    oldest=$(printf '%s\n%s\n' "$needed" "$found" | sort -V | head -n 1)
    [ "$oldest" = "$needed" ] ||
        problem "cargo $found is older than $needed" "rustup update stable"
fi

# What machines need from the kernel. `architect doctor` tries all of it, and more, for real.
[ "$(uname -m)" = x86_64 ] || problem "this is $(uname -m)" "machines run on x86_64 only"
if [ "$(id -u)" = 0 ]; then
    for pair in tun:/dev/net/tun vxlan:/sys/module/vxlan; do
        [ -e "${pair#*:}" ] || modprobe -q "${pair%%:*}" 2> /dev/null || true
    done
    [ -e /dev/net/tun ] ||
        problem "no /dev/net/tun" "modprobe tun; a container must be given the device"
    [ -e /dev/userfaultfd ] ||
        problem "no /dev/userfaultfd" \
            "needs Linux 6.1 with CONFIG_USERFAULTFD; a container must be given the device"
else
    say "not root: building works, moving machines (demo, test, bench) needs root"
fi
kernel=$(uname -r | cut -d. -f1,2)
oldest=$(printf '6.7\n%s\n' "${kernel%%-*}" | sort -V | head -n 1)
[ "$oldest" = 6.7 ] ||
    say "Linux $kernel: pre-copy needs 6.7 (Debian: linux-image-amd64 from backports); moves will be post-copy only"

if [ $problems -gt 0 ]; then
    say "$problems of the above must be mended first" >&2
    exit 1
fi
