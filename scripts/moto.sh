#!/bin/bash
# An S3 server for tests that is not ours: moto, from PyPI, in a virtual environment under target/.
# Prints the command that starts it, or fails with a reason on the standard error.
set -eu -o pipefail
cd "$(dirname "$0")/.."
target=${CARGO_TARGET_DIR:-target}
case $target in /*) ;; *) target=$PWD/$target ;; esac
venv=$target/moto
# Two tests may ask for it at once.
mkdir -p "$target"
exec 9> "$target/moto.lock"
flock 9
if [ ! -x "$venv/bin/moto_server" ]; then
    rm -rf "$venv.new"
    python3 -m venv "$venv.new" >&2
    "$venv.new/bin/pip" install --quiet --disable-pip-version-check 'moto[server,s3]==5.2.*' >&2
    # Scripts have the folder's name in them: keep it, and put a link at the place that is looked at.
    mv "$venv.new" "$venv"
    sed -i "1s|$venv.new|$venv|" "$venv"/bin/* 2> /dev/null || true
fi
echo "$venv/bin/python $PWD/scripts/one_at_a_time.py"
