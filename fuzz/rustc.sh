#!/bin/sh
# Cargo calls it in place of rustc for the crates of this workspace (RUSTC_WORKSPACE_WRAPPER), and keeps
# what comes out apart. It adds what is in `coverage`: what `cargo fuzz` sets, less what needs a nightly
# compiler.
case " $* " in
    *" --crate-name build_script_"* | *" --crate-type proc-macro "*) exec "$@" ;;
esac
# shellcheck disable=SC2046  # a word a line
exec "$@" $(cat "$(dirname "$0")/coverage")
