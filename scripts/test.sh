#!/bin/bash
# Runs every test, with nextest where it is installed and plain cargo elsewhere. After the tests it
# lists by name every capability that this computer lacked, and ends with the runner's own count.
# Arguments go to the runner. WITHOUT_NIGHT=1 leaves out, and names, what scripts/nightly.sh runs instead:
# slow variants of tests that stay.
set -u -o pipefail
cd "$(dirname "$0")/.."
PATH="$PATH:$HOME/.cargo/bin"
target=${CARGO_TARGET_DIR:-target}

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
export ARCHITECT_MISSING=$scratch/missing
: > "$ARCHITECT_MISSING"

# The guest of the driver's tests: a kernel and a busybox, fetched and unpacked once.
if [ -z "${DRAFTER_TEST_KERNEL:-}" ]; then
    guest=$PWD/$target/test-guest
    case $target in /*) guest=$target/test-guest ;; esac
    if [ ! -s "$guest/initramfs.cpio" ]; then
        echo "fetching the guest of the driver's tests into $guest"
        crates/drafter/src/driver/qemu/tests/guest/build.sh "$guest" > "$scratch/guest" 2>&1 ||
            { cat "$scratch/guest"; echo "test guest: it could not be built" >> "$ARCHITECT_MISSING"; }
    fi
    export DRAFTER_TEST_KERNEL=$guest/vmlinux DRAFTER_TEST_INITRAMFS=$guest/initramfs.cpio
fi

# The same as another test of its file, with the other kind of disks or of move, or another lease store.
night="package(e2e) & (test(=the_same_with_nbd_disks) | test(=the_same_by_post_copy) |
    test(=the_same_load_moves_with_nbd_disks) | test(=so_are_copies_of_a_machine_with_nbd_disks) |
    test(=a_machine_whose_nbd_disk_waits_for_room_is_suspended_too) |
    test(=a_machine_whose_nbd_disk_waits_for_room_moves_too) |
    test(=machines_whose_leases_are_objects_share_a_sign_of_life_unless_they_are_told_otherwise))"

status=0
if cargo nextest --version > /dev/null 2>&1; then
    # Some tests mostly wait: see .config/nextest.toml.
    export NEXTEST_PROFILE=${NEXTEST_PROFILE:-whole}
    export NEXTEST_TEST_THREADS=${NEXTEST_TEST_THREADS:-$((2 * $(nproc)))}
    [ "${NIGHT:-}" != only ] || set -- -E "$night" "$@"
    [ -z "${WITHOUT_NIGHT:-}" ] || set -- -E "not ($night)" "$@"
    # Nextest does not run the examples in doc comments.
    cargo test --workspace --doc --quiet > "$scratch/doc" 2>&1 || { status=1; cat "$scratch/doc"; }
    cargo nextest run --workspace --no-fail-fast "$@" 2>&1 | tee "$scratch/log" || status=1
    closing=$(grep -E '^ *Summary \[' "$scratch/log" | tail -n 1)
    # What failed once and passed when it was tried again (see .config/nextest.toml).
    grep -E '^ *FLAKY ' "$scratch/log" | sort -u > "$scratch/flaky" || true
else
    # It runs all of them: it has no such expressions.
    WITHOUT_NIGHT=
    cargo test --workspace --no-fail-fast "$@" 2>&1 | tee "$scratch/log" || status=1
    # One line for all binaries, in the words of each.
    closing=$(awk '/^test result:/ {
            if ($3 != "ok.") bad = 1
            for (i = 4; i < NF; i++) {
                if ($(i + 1) == "passed;") passed += $i
                if ($(i + 1) == "failed;") failed += $i
                if ($(i + 1) == "ignored;") ignored += $i
                if ($(i + 1) == "measured;") measured += $i
                if ($(i + 1) == "filtered") filtered += $i
            }
            sub(/s$/, "", $NF); seconds += $NF; any = 1
        }
        END {
            if (any) printf "test result: %s. %d passed; %d failed; %d ignored; %d measured; %d filtered out; finished in %.2fs\n",
                bad ? "FAILED" : "ok", passed, failed, ignored, measured, filtered, seconds
        }' "$scratch/log")
fi
[ -n "$closing" ] || { echo "no test ran: see the errors above" >&2; exit 1; }

"$target/debug/architect" doctor --missing >> "$ARCHITECT_MISSING" || true
echo
if [ -s "$ARCHITECT_MISSING" ]; then
    echo "Capabilities that were missing here (tests that need them did not prove anything):"
    sort -u "$ARCHITECT_MISSING" | sed 's/^/  /'
else
    echo "No capability was missing."
fi
if [ -s "$scratch/flaky" ]; then
    echo
    echo "Failed once, and passed when tried again (each is a defect; what it said first is above):"
    sed 's/^ */  /' "$scratch/flaky"
fi
if [ -n "${WITHOUT_NIGHT:-}" ]; then
    echo
    echo "Left to scripts/nightly.sh:"
    echo "$night" | grep -o '=[a-z_]*' | sed 's/^=/  /'
fi
echo
echo "$closing"
exit $status
