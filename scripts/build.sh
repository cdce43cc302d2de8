#!/bin/sh
# Builds the commands and the preload hook (profile dev), and the two static binaries that run
# inside guests (profile guest), and puts everything where the commands look for it: beside
# themselves, the guest's binaries in guest/.
set -eu
cd "$(dirname "$0")/.."
PATH="$PATH:$HOME/.cargo/bin"
target=${CARGO_TARGET_DIR:-target}
triple=x86_64-unknown-linux-gnu

cargo build --workspace
CARGO_TARGET_X86_64_UNKNOWN_LINUX_GNU_RUSTFLAGS="-C target-feature=+crt-static" \
    cargo build -p drafter-guest -p oracle --profile guest --target $triple

mkdir -p "$target/debug/guest"
for name in drafter-guest oracle; do
    built=$target/$triple/guest/$name
    placed=$target/debug/guest/$name
    cmp -s "$built" "$placed" || {
        # A machine that runs may have the old one open.
        cp "$built" "$placed.new"
        mv "$placed.new" "$placed"
    }
done
