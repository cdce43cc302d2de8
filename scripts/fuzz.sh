#!/bin/bash
# Fuzzes every decoder for a while, two for each processor at a time, with coverage on the stable toolchain.
#
#   scripts/fuzz.sh                 60 seconds each
#   scripts/fuzz.sh 600             as long as that each
#   scripts/fuzz.sh 60 NAME...      only these
#   scripts/fuzz.sh --build         only builds
#   FUZZ_TARGET=NAME target/fuzz/x86_64-unknown-linux-gnu/release/fuzz FILE    replays a finding
#
# Corpora stay in target/fuzz/corpus/NAME and grow; findings lie in target/fuzz/findings.
set -eu -o pipefail
cd "$(dirname "$0")/.."
PATH="$PATH:$HOME/.cargo/bin"
target=${CARGO_TARGET_DIR:-$PWD/target}/fuzz
triple=x86_64-unknown-linux-gnu

only_build=no
[ "${1:-}" != --build ] || { only_build=yes; shift; }
seconds=${1:-60}
[ $# -eq 0 ] || shift

# What `cargo fuzz` sets, less what needs a nightly compiler.
flags="-Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4"
flags="$flags -Cllvm-args=-sanitizer-coverage-inline-8bit-counters"
flags="$flags -Cllvm-args=-sanitizer-coverage-pc-table"
flags="$flags -Cllvm-args=-sanitizer-coverage-trace-compares"
flags="$flags --cfg fuzzing"
CARGO_TARGET_X86_64_UNKNOWN_LINUX_GNU_RUSTFLAGS=$flags \
    cargo build --quiet --release --locked --target $triple --target-dir "$target" \
    --manifest-path fuzz/Cargo.toml
program=$target/$triple/release/fuzz
[ $only_build = no ] || exit 0

if [ $# -eq 0 ]; then
    # shellcheck disable=SC2046  # names without spaces
    set -- $(cd "$target" && FUZZ_LIST=1 "$program" -runs=1 2> /dev/null)
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
