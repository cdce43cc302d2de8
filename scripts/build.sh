#!/bin/sh
# Builds the commands and the preload hook (profile dev), and the two static binaries that run
# inside guests (profile guest). The commands find the hook beside themselves and the guest's binaries
# in x86_64-unknown-linux-gnu/guest/ of the same target folder.
set -eu
cd "$(dirname "$0")/.."
PATH="$PATH:$HOME/.cargo/bin"
triple=x86_64-unknown-linux-gnu

# With the examples, Cargo gives dependencies the features that tests want of them; without, it would
# build half of them a second time for the tests.
cargo build --workspace --lib --bins --examples
CARGO_TARGET_X86_64_UNKNOWN_LINUX_GNU_RUSTFLAGS="-C target-feature=+crt-static" \
    cargo build -p drafter-guest -p oracle --profile guest --target $triple
