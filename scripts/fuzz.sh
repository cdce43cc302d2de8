#!/bin/bash
# Fuzzes every decoder for a while, two for each processor at a time, with coverage on the stable toolchain.
#
#   scripts/fuzz.sh                 60 seconds each
#   scripts/fuzz.sh 600             as long as that each
#   scripts/fuzz.sh 60 NAME...      only these
#   scripts/fuzz.sh --build         only builds
#   FUZZ_DEEP=1 scripts/fuzz.sh 600 with coverage of other people's code too, which takes as long again to
#                                   build as everything else (names of the DNS are parsed by such code)
#   FUZZ_TARGET=NAME target/debug/examples/fuzz FILE    replays a finding
#
# Corpora stay in target/fuzz/corpus/NAME and grow; findings lie in target/fuzz/findings.
set -eu -o pipefail
cd "$(dirname "$0")/.."
PATH="$PATH:$HOME/.cargo/bin"
target=${CARGO_TARGET_DIR:-$PWD/target}
program=$target/debug/examples/fuzz
target=$target/fuzz

only_build=no
[ "${1:-}" != --build ] || { only_build=yes; shift; }
seconds=${1:-60}
[ $# -eq 0 ] || shift

build() { cargo build --quiet --locked --workspace --example fuzz --features fuzz/fuzzer "$@"; }
if [ -z "${FUZZ_DEEP:-}" ]; then
    # Only this workspace's crates are built for this; all others are those of scripts/build.sh.
    RUSTC_WORKSPACE_WRAPPER=$PWD/fuzz/rustc.sh build
else
    triple=x86_64-unknown-linux-gnu
    CARGO_TARGET_X86_64_UNKNOWN_LINUX_GNU_RUSTFLAGS=$(tr '\n' ' ' < fuzz/coverage) \
        build --target $triple --target-dir "$target/deep"
    program=$target/deep/$triple/debug/examples/fuzz
fi
[ $only_build = no ] || exit 0

if [ $# -eq 0 ]; then
    # shellcheck disable=SC2046  # names without spaces
    set -- $(mkdir -p "$target" && cd "$target" && FUZZ_LIST=1 "$program" -runs=1 2> /dev/null)
fi

mkdir -p "$target/findings" "$target/log"
one() {
    mkdir -p "$target/corpus/$1"
    if FUZZ_TARGET=$1 "$program" "$target/corpus/$1" -max_total_time="$seconds" -timeout=10 \
        -rss_limit_mb=1024 -malloc_limit_mb=256 -max_len=65536 -print_final_stats=1 \
        -artifact_prefix="$target/findings/$1-" > "$target/log/$1" 2>&1; then
        runs=$(sed -n 's/^stat::number_of_executed_units: *//p' "$target/log/$1")
        echo "fuzz $1: $runs inputs, nothing found"
    else
        echo "fuzz $1: FAILED; the input lies in $target/findings, the end of the log:"
        tail -n 25 "$target/log/$1"
        return 1
    fi
}
export -f one
export target program seconds
printf '%s\n' "$@" | xargs -P $((2 * $(nproc))) -I{} bash -c 'one {}'
