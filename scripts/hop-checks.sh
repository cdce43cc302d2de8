#!/bin/sh
# Writes docs/hop-checks.md: which tests make each of the 36 checks of a move. A test makes a check if its
# name begins with hop_check_NN_, and several with hop_check_NN_MM_. Fails if a check has no test and is
# not said to wait for a later part.
#
#   scripts/hop-checks.sh           write it
#   scripts/hop-checks.sh --check   only say whether it is up to date
set -eu
cd "$(dirname "$0")/.."
page=docs/hop-checks.md
fresh=$(mktemp)
trap 'rm -f "$fresh"' EXIT

python3 - > "$fresh" << 'PYTHON'
import pathlib, re, sys

# What must hold; after "|" what no test shows yet, or where else it is seen; after another "|" tests that
# have their names from elsewhere. "later:" waits for a part that does not exist.
CHECKS = """
every byte of every device is the same at completion, after many hops too | ten hops in each mode, and the soak; no run of 1,000
memory and disk under a checker with generation counters: nothing lost, doubled or stale
post-copy with most blocks missing: reads are right, faults come first
destination killed at every message: the source runs, one copy is alive
source killed before authority: the destination discards; after it, with all blocks there: it runs on
partition at each step: the same verdict on both sides, never two copies that run
the guest's hook before the pause fails or hangs: the move ends, the machine runs on, another try works
the state cannot be saved after the pause: the machine goes on at the source
it cannot be started at the destination: it goes back
what does not fit is refused before pre-copy, with a reason
unknown, missing or wrong devices, hostile lengths: a typed error, no file touched
a wrong certificate, or none, begins nothing
no credential on the wire or in logs
dirtying faster than the line: bounded total, bounded and reported blackout
no round, one, many: all the same
predicted blackout against the real one | the benchmark `move.*` has the percentiles
several connections order nothing wrongly | a machine's move has a main and a fault connection; moves of devices have more | check_32_writers_and_any_order_across_connections_leave_the_same_bytes
all lists of all devices before authority | and `early_faults == 0` in every move of the end-to-end tests | check_06_a_dirty_list_applies_before_any_of_its_content check_36_devices_of_a_group_share_the_line_by_what_is_left_and_change_hands_at_one_point
a large device starves no small one |  | check_31_a_device_that_stores_slowly_does_not_hold_the_others check_36_devices_of_a_group_share_the_line_by_what_is_left_and_change_hands_at_one_point
devices are ready before they are used
hops in a chain send what changed; a wrong base is found by its hash
blocks from a store are verified; its outage is waited for or falls back |  | check_15_a_store_that_lies_or_is_stale_costs_no_block check_15_a_store_that_is_gone_at_any_moment_costs_no_block
the source may go once the rest is in the store: the destination completes alone | by sleep; a move does not end with the store alone
clients see no reset and a short gap | the benchmark `move.gap.*` measures it
nothing is left behind after an end, a crash, a kill, a restart
1,000 namespaces come and go; rules cost the same however many machines there are
packages: any order, truncated, corrupt, foreign, mismatched
a copy gets its own entropy, name, clock, identity
guest clock: steady, and right again
agent: reconnects, slow, malformed
two moves at once, moves while suspending or closing: defined errors
the monitor is not root, when started, resumed and moved
every documented command, from end to end
an idle machine moves little | the benchmark `move.*` has the bytes | check_02_a_device_of_zeros_sends_no_payload
a notice, and the host is empty in time
a controller that crashes anywhere converges | the runner, by `recover`; the control plane is later
""".strip().splitlines()
assert len(CHECKS) == 36

tests = {n: [] for n in range(1, 37)}
named, strange = {}, []
for root in ("crates", "tests"):
    for path in sorted(pathlib.Path(root).rglob("*.rs")):
        text = path.read_text()
        named.update((name, str(path)) for name in re.findall(r"fn (check_\w+)", text))
        for match in re.finditer(r"fn (hop_check_((?:\d\d_)+)(\w+))", text):
            for number in map(int, match[2].strip("_").split("_")):
                if number in tests:
                    tests[number].append((match[3], str(path)))
                else:
                    strange.append(match[1])

print("# What a hop must keep: 36 checks, and the tests that make them\n")
print("A move can go wrong in ways that no benchmark shows. These are the behaviours that a user may rely on,")
print("each with the tests that try to break it. Written by `scripts/hop-checks.sh`; the tests of check 7 are")
print("run by `cargo nextest run -E 'test(/hop_check_(.._)*07_/)'`.\n")
print("| | behaviour | tests | |\n|---|---|---|---|")
missing = []
for number, line in enumerate(CHECKS, 1):
    text, note, others, *_ = [part.strip() for part in line.split("|")] + ["", ""]
    for name in others.split():
        if name in named:
            tests[number].append((re.sub(r"^check_[\d_]+", "", name), named[name]))
        else:
            strange.append(name)
    links = "<br>".join(
        f"[{name.replace('_', ' ')}](../{path})" for name, path in tests[number]
    )
    if not links and not note.startswith("later:"):
        missing.append(number)
    print(f"| {number} | {text} | {links or '**none**'} | {note} |")
for name in strange:
    print(f"{name}: there is no such check, or no such test", file=sys.stderr)
if missing:
    print(f"no test for the checks {missing}", file=sys.stderr)
sys.exit(1 if missing or strange else 0)
PYTHON

if [ "${1:-}" = --check ]; then
    cmp -s "$fresh" $page || { echo "$page is out of date: run $0" >&2; exit 1; }
else
    cp "$fresh" $page
    chmod 644 $page
fi
