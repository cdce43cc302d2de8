#!/bin/sh
# Builds the guest of the driver's tests: DIRECTORY/vmlinux and DIRECTORY/initramfs.cpio, from
# Debian packages (fetched with apt-get, unpacked, never installed).
#
#   build.sh DIRECTORY
#   export DRAFTER_TEST_KERNEL=DIRECTORY/vmlinux DRAFTER_TEST_INITRAMFS=DIRECTORY/initramfs.cpio
set -eu
[ $# -eq 1 ] || { echo "usage: $0 DIRECTORY" >&2; exit 2; }
here=$(cd "$(dirname "$0")" && pwd)
mkdir -p "$1"
cd "$1"
for tool in apt-get dpkg-deb python3 lz4 xz; do
    command -v $tool > /dev/null || { echo "$0: needs $tool" >&2; exit 1; }
done

kernel=$(apt-cache depends linux-image-cloud-amd64 | sed -n 's/.*Depends: \(linux-image-[0-9].*\)/\1/p' | head -1)
rm -rf debs tree initramfs
mkdir debs tree initramfs
(cd debs && apt-get -q download "$kernel" busybox-static)
for deb in debs/*.deb; do dpkg-deb -x "$deb" tree; done

# The ELF kernel inside the bzImage, compressed by one of two tools.
python3 - tree/boot/vmlinuz-* payload << 'PYTHON'
import struct, sys
image = open(sys.argv[1], "rb").read()
offset, length = struct.unpack_from("<II", image, 0x248)
start = (image[0x1F1] + 1) * 512 + offset
open(sys.argv[2], "wb").write(image[start : start + length - 4])
PYTHON
case $(head -c 4 payload | od -An -tx1 | tr -d ' ') in
    02214c18) lz4 -dc payload > vmlinux ;;
    fd377a58) xz -dc --single-stream < payload > vmlinux ;;
    *) echo "$0: the kernel is compressed in a way unknown here" >&2; exit 1 ;;
esac
[ "$(head -c 4 vmlinux | tail -c 3)" = ELF ] || { echo "$0: no ELF kernel inside the package" >&2; exit 1; }

mkdir -p initramfs/bin initramfs/modules initramfs/dev initramfs/proc initramfs/sys
cp tree/bin/busybox initramfs/bin/
cp "$here/init" initramfs/init
chmod 755 initramfs/init initramfs/bin/busybox
for name in virtio_ring virtio virtio_pci_modern_dev virtio_pci_legacy_dev virtio_pci \
    failover net_failover virtio_net virtio_blk virtio_console; do
    found=$(find tree/lib/modules -name "$name.ko")
    [ -n "$found" ] || { echo "$0: the kernel package has no module $name" >&2; exit 1; }
    cp "$found" initramfs/modules/
    echo "$name.ko" >> initramfs/modules/order
done
(cd initramfs && find . | ./bin/busybox cpio -o -H newc > ../initramfs.cpio)
rm -rf debs tree initramfs payload
ls -l vmlinux initramfs.cpio
