#!/bin/sh
# The searches of the storage engine at the size of a night: what every `make test` does with fewer
# seeds. Each that fails prints the seed, or the file, that replays it with one command.
#
#   scripts/nightly.sh              8 hours on two cores
#   SIM_SEEDS=100000 SILO_SEEDS=20000 FUZZ_SECONDS=60 scripts/nightly.sh      a shorter one
#
# Worlds of moves (three hosts, cuts, crashes, lying stores), power cuts under layers, every decoder; and
# the tests of whole systems that CI leaves out.
set -u
cd "$(dirname "$0")/.."
status=0
SIM_SEEDS=${SIM_SEEDS:-5000000} cargo test -p silo-block --test simulator -- --nocapture || status=1
SILO_SEEDS=${SILO_SEEDS:-500000} cargo test -p silo power -- --nocapture || status=1
scripts/build.sh && NIGHT=only scripts/test.sh || status=1
FUZZ_DEEP=1 scripts/fuzz.sh "${FUZZ_SECONDS:-1200}" || status=1
exit $status
