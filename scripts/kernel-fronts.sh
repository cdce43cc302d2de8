#!/bin/sh
# Runs the front ends that need drivers of the kernel's, ublk and nbd, in a virtual machine with a
# Debian kernel that has them: content both ways, fio with verification, ext4 through a kill -9 of the
# server and its taking over, and an end in order. No KVM and no root are needed; 110 MB are fetched
# once, it takes 2 minutes, and it fails if anything in it does.
#
#   scripts/kernel-fronts.sh [DIRECTORY for what is fetched, target/kernel-fronts if not given]
#
# Needs apt-get, dpkg-deb, xz, qemu-system-x86_64, fio, e2fsprogs, and target/debug/silo.
set -eu
cd "$(dirname "$0")/.."
PATH="$PATH:/usr/sbin:/sbin"
target=${CARGO_TARGET_DIR:-target}
here=$PWD/scripts/kernel-fronts
dir=${1:-$target/kernel-fronts}
suite=${SUITE:-bookworm-backports}
for tool in apt-get dpkg-deb xz qemu-system-x86_64 fio mkfs.ext4 fsck.ext4 ldd; do
    command -v $tool > /dev/null || { echo "$0: needs $tool" >&2; exit 1; }
done
silo=$target/debug/silo
[ -x "$silo" ] || { echo "$0: build silo first (make build)" >&2; exit 1; }
silo=$(realpath "$silo")
mkdir -p "$dir"
cd "$dir"

if [ ! -s vmlinuz ]; then
    echo "fetching the kernel and three packages into $PWD"
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
    for name in crc16 crc32c_generic mbcache jbd2 ext4 nbd ublk_drv; do
        found=$(find tree/lib/modules -name "$name.ko*" | head -n 1)
        # What is built in is no module.
        case $found in *.xz) xz -d "$found" ;; esac
    done
    mv tree/boot/vmlinuz-* vmlinuz
fi

rm -rf initramfs
mkdir -p initramfs/bin initramfs/modules initramfs/proc initramfs/sys initramfs/dev initramfs/tmp
cp "$here/init" initramfs/init
find tree/lib/modules -name '*.ko' -exec cp {} initramfs/modules/ \;
find tree -path '*bin/busybox' -o -path '*bin/nbd-client' | xargs -I{} cp {} initramfs/bin/
cp -L "$(command -v fio)" "$(command -v mkfs.ext4)" "$(command -v fsck.ext4)" initramfs/bin/
strip -o initramfs/bin/silo "$silo"
chmod 755 initramfs/init initramfs/bin/*
for program in initramfs/bin/*; do
    { ldd "$program" 2> /dev/null || true; } | grep -o '/[^ ]*' | while read -r library; do
        mkdir -p "initramfs$(dirname "$library")"
        cp -Lu "$library" "initramfs$library"
    done
done
(cd initramfs && find . | ./bin/busybox cpio -o -H newc | gzip -1 > ../initramfs.gz)
rm -rf initramfs

timeout 900 qemu-system-x86_64 -accel tcg -m 1500 -smp 2 -nographic -no-reboot -net none \
    -kernel vmlinuz -initrd initramfs.gz -append "console=ttyS0 panic=-1 quiet" \
    < /dev/null 2>&1 | tr -d '\r' | tee console | grep --line-buffered -A 1000 '^## ' | tee log
rm -f initramfs.gz
grep -q '^## ALL DONE$' log || { echo "$0: it failed; see $PWD/console" >&2; exit 1; }
