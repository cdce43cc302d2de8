#!/bin/sh
# Runs what needs drivers that this computer's kernel may not have, in a virtual machine with a Debian
# kernel that has them. No KVM and no root are needed; 110 MB are fetched once, the first takes about 2
# minutes, the second 5, and it fails if anything in it does.
#
#   scripts/kernel-vm.sh [fronts] [wireguard]        both if none is given
#
#   fronts     ublk and the kernel's nbd: content both ways, fio with verification, ext4 through a
#              kill -9 of the server and its taking over, and an end in order
#   wireguard  conduit's agents and edge encrypted by the kernel: a machine that moves, agents and edge
#              killed, nothing in clear, keys of every pair changed under traffic
#
# Needs apt-get, dpkg-deb, depmod, xz, qemu-system-x86_64; fio and e2fsprogs (fronts); ip, nft, wg and
# cargo (wireguard); and what `make build` makes. SUITE says which Debian the kernel comes from.
set -eu
cd "$(dirname "$0")/.."
PATH="$PATH:/usr/sbin:/sbin"
target=$(realpath "${CARGO_TARGET_DIR:-target}")
here=$PWD/scripts/kernel-vm
dir=$target/kernel-vm
suite=${SUITE:-bookworm-backports}
need() {
    for tool in "$@"; do
        command -v "$tool" > /dev/null || { echo "$0: needs $tool" >&2; exit 1; }
    done
}
need apt-get dpkg-deb depmod modprobe xz qemu-system-x86_64 ldd
mkdir -p "$dir"
cd "$dir"

if [ ! -s vmlinuz ]; then
    echo "fetching the kernel and two packages into $PWD"
    rm -rf lists tree debs
    mkdir -p lists/partial debs tree
    echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] http://deb.debian.org/debian $suite main" > sources.list
    # This computer's own lists stay as they are.
    there=$PWD
    with() {
        program=$1
        shift
        "$program" -q -o Dir::Etc::sourcelist="$there/sources.list" -o Dir::Etc::sourceparts=/dev/null \
            -o Dir::State::lists="$there/lists" -o Dir::Cache::pkgcache= -o Dir::Cache::srcpkgcache= "$@"
    }
    with apt-get update
    kernel=$(with apt-cache depends linux-image-amd64 | sed -n 's/.*Depends: \(linux-image-[0-9].*\)/\1/p' | head -n 1)
    (cd debs && with apt-get download "$kernel" && apt-get -q download busybox-static nbd-client)
    for deb in debs/*.deb; do dpkg-deb -x "$deb" tree; done
    [ -d tree/usr/lib/modules ] && [ ! -d tree/lib/modules ] && mkdir -p tree/lib && ln -s ../usr/lib/modules tree/lib/modules
    depmod -b tree "$(ls tree/lib/modules)"
    mv tree/boot/vmlinuz-* vmlinuz
fi
version=$(ls tree/lib/modules)

# begin NAME MODULES …: an initramfs with the script, busybox and the modules, in the order in which
# they are to be put in.
begin() {
    name=$1
    shift
    root=$dir/initramfs-$name
    rm -rf "$root"
    mkdir -p "$root/bin" "$root/modules" "$root/proc" "$root/sys" "$root/dev" "$root/tmp"
    cat "$here/common" "$here/$name" > "$root/init"
    cp "$(find tree -path '*bin/busybox')" "$root/bin/"
    number=100
    # What is built into the kernel is no module, and is not listed.
    for module in "$@"; do
        modprobe -d tree -S "$version" --show-depends "$module" || exit 1
    done | sed -n 's/^insmod \([^ ]*\).*/\1/p' | awk '!seen[$0]++' > modules.list
    while read -r path; do
        number=$((number + 1))
        file=$root/modules/$number-$(basename "$path" .xz)
        case $path in *.xz) xz -dc "$path" > "$file" ;; *) cp "$path" "$file" ;; esac
    done < modules.list
}
# finish MEMORY: adds the libraries of its programs and runs it.
finish() {
    chmod 755 "$root/init" "$root"/bin/*
    for program in "$root"/bin/* ${extra:-}; do
        { ldd "$program" 2> /dev/null || true; } | grep -o '/[^ ]*' | while read -r library; do
            mkdir -p "$root$(dirname "$library")"
            cp -Lu "$library" "$root$library"
        done
    done
    (cd "$root" && find . | ./bin/busybox cpio -o -H newc | gzip -1 > "$dir/initramfs.gz")
    rm -rf "$root"
    timeout 900 qemu-system-x86_64 -accel tcg -m "$1" -smp 2 -nographic -no-reboot -net none \
        -kernel vmlinuz -initrd initramfs.gz -append "console=ttyS0 panic=-1 quiet" \
        < /dev/null 2>&1 | tr -d '\r' | tee "console-$name" | grep --line-buffered -A 1000 '^## ' | tee log
    rm -f initramfs.gz
    grep -q '^## ALL DONE$' log || { echo "$0: $name failed; see $PWD/console-$name" >&2; exit 1; }
}

fronts() {
    need fio mkfs.ext4 fsck.ext4
    [ -x "$target/debug/silo" ] || { echo "$0: build silo first (make build)" >&2; exit 1; }
    begin fronts crc32c_generic ext4 nbd ublk_drv
    cp "$(find tree -path '*bin/nbd-client')" "$root/bin/"
    cp -L "$(command -v fio)" "$(command -v mkfs.ext4)" "$(command -v fsck.ext4)" "$root/bin/"
    strip -o "$root/bin/silo" "$target/debug/silo"
    finish 1500
}

wireguard() {
    need ip bridge tc nft wg cargo
    begin wireguard wireguard vxlan veth tun bridge nf_tables nft_chain_nat nft_masq nft_nat nft_ct \
        nft_limit nft_connlimit nft_reject_inet nf_conntrack_netlink sch_ingress cls_bpf
    cp -L "$(command -v ip)" "$(command -v bridge)" "$(command -v tc)" "$(command -v nft)" "$(command -v wg)" "$root/bin/"
    # The test knows its program by the place where cargo puts it.
    test=$(cd "$here/../.." && cargo test -q -p conduit --test wg --no-run --message-format json |
        sed -n 's/.*"executable":"\([^"]*\/wg-[^"]*\)".*/\1/p' | tail -n 1)
    [ -x "$test" ] || { echo "$0: cargo made no test" >&2; exit 1; }
    strip -o "$root/bin/wg-test" "$test"
    mkdir -p "$root$target/debug"
    strip -o "$root$target/debug/conduit" "$target/debug/conduit"
    finish 1500
}

for which in ${*:-fronts wireguard}; do
    case $which in
        fronts | wireguard) $which ;;
        *) echo "$0: there is fronts and wireguard, not $which" >&2; exit 2 ;;
    esac
done
