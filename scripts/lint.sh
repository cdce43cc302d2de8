#!/bin/sh
# What must hold before a change is merged, tests apart: format, lints, and dependencies with
# allowed licences from allowed sources. Advisories are checked when their database can be reached.
set -eu
cd "$(dirname "$0")/.."
PATH="$PATH:$HOME/.cargo/bin"

say() { printf '== %s\n' "$*"; }

say "format"
cargo fmt --all --check

say "lints"
cargo clippy --workspace --all-targets --quiet -- -D warnings
# All features are on above; once more without those that can be left out. (Of the whole workspace, and
# with the examples, as above: else most dependencies would be checked again.)
cargo clippy --workspace --lib --bins --examples --no-default-features --quiet -- -D warnings

say "every behavioural check has a test"
scripts/silo-checks.sh --check
scripts/hop-checks.sh --check

say "dependencies: bans, licences, sources"
if ! cargo deny --version > /dev/null 2>&1; then
    say "installing cargo-deny"
    cargo install --locked --quiet --debug cargo-deny
fi
cargo fetch --quiet --locked --target x86_64-unknown-linux-gnu
cargo deny --offline --log-level error check bans licenses sources

database=$(sed -n 's/^db-urls = \["\(.*\)"\]/\1/p' deny.toml)
if timeout 20 git ls-remote --exit-code "$database" HEAD > /dev/null 2>&1; then
    say "dependencies: advisories"
    timeout 300 cargo deny --log-level error check advisories
else
    say "dependencies: advisories NOT checked, $database cannot be reached"
fi
