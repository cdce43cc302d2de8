#!/bin/sh
# Writes docs/silo-checks.md: which tests keep each of the behavioural checks. A test keeps a check
# if its name begins with check_NN_. Fails if a check has no test.
#
#   scripts/silo-checks.sh           write it
#   scripts/silo-checks.sh --check   only say whether it is up to date
set -eu
cd "$(dirname "$0")/.."
page=docs/silo-checks.md
fresh=$(mktemp)
trap 'rm -f "$fresh"' EXIT

python3 - > "$fresh" << 'PYTHON'
import pathlib, re, sys

CHECKS = """
sizes and block sizes that do not fit each other: byte-identical, short last block right
an all-zero device sends metadata and no payload
a writer active throughout: after the last quiesced round the destination equals the source
a write that races the read of its block is sent again, never lost
each write is in exactly one round
a dirty list applies before any payload; a read between the two blocks
late data never satisfies a block that a newer list made absent
a whole-block write before arrival wins over anything that comes later
a partial write before arrival waits, merges, survives a later send
concurrent readers of one absent block: one demand, all wake
a demanded block overtakes what is queued
a demanded block that a store promised is first there too, with the peer to fall back to
static blocks first, least volatile next, priority overrides, constant time
a hash goes instead of content only while it is the content's
a corrupt, missing or stale object is found out by its hash and fetched elsewhere
a killed source, after it may go: the destination completes
a killed source, before: the destination fails in time, reads fail and do not hang
a killed destination in any phase: the source runs on, a second move succeeds
a cut line, restored: only what is missing is sent
a full disk or a failed write at the destination: the move fails, authority stays
at every crash point at most one side may run; late and doubled messages change nothing
the base's identity is verified before blocks count as held
an overlay's granularity may differ from a move's
stacked overlays keep what was flushed, through a clean close and a kill
a flush of the exposed device is durable in the backend
write cache: reads see writes, overlapping writes are linear, errors of flushes surface
a torn tail of a sparse file is dropped and not read as data
the redundant-write filter gives what the reference gives
every codec comes back, never larger than its input and a constant, bounded when decoding
no bytes from outside make a decoder panic, allocate without bound or loop
a slow device stalls no other
any order across connections is right
a backup's list holds only blocks whose object has the recorded hash; a cancelled upload is unknown
backup obeys age, rate and grouping; hot blocks are limited
what was on a device before is backed up too
several devices: phases aligned, shares of the line fair, one point of authority
rounds converge or stop
a chain of moves while the middle still fills; a way back sends the difference
close during input and output ends within a second, flushed
binlog: the same image, the same pace, a truncated log is reported
no credential and no path of one side is obeyed or readable on the wire
what is reported matches what an independent observer counts
""".strip().splitlines()
assert len(CHECKS) == 42

tests = {n: [] for n in range(1, 43)}
for root in ("crates", "tests"):
    for path in sorted(pathlib.Path(root).rglob("*.rs")):
        for match in re.finditer(r"fn (check_(\d\d)_\w+)", path.read_text()):
            tests.setdefault(int(match[2]), []).append((match[1], str(path)))

print("# The behavioural checks of the storage engine\n")
print("What other systems got wrong, or never covered, as tests. Written by `scripts/silo-checks.sh`;")
print("`cargo nextest run check_07` runs those of one check.\n")
print("| check | what must hold | tests |\n|---|---|---|")
for number, text in enumerate(CHECKS, 1):
    links = "<br>".join(
        f"[{name[9:].replace('_', ' ')}](../{path})" for name, path in tests[number]
    )
    print(f"| {number:02} | {text} | {links or '**none**'} |")
missing = [number for number in range(1, 43) if not tests[number]]
if missing:
    print(f"no test for the checks {missing}", file=sys.stderr)
sys.exit(1 if missing else 0)
PYTHON

if [ "${1:-}" = --check ]; then
    cmp -s "$fresh" $page || { echo "$page is out of date: run $0" >&2; exit 1; }
else
    cp "$fresh" $page
    chmod 644 $page
fi
