#!/bin/sh
# Runs the commands about backups against Azurite, Microsoft's emulator of Azure's blob storage: a
# backup's whole life, two writers that fence each other, a writer that is killed, wrong keys and
# containers. No account is needed; 100 MB are fetched from npm once. It takes a minute, and fails if
# anything in it does.
#
#   scripts/azure.sh
#
# Needs node, npm, curl, openssl, qemu-io and a built silo (scripts/build.sh). The account and its key are those
# that every Azurite has (learn.microsoft.com/azure/storage/common/storage-use-azurite): no secret.
set -eu
cd "$(dirname "$0")/.."
for tool in node npm curl openssl cmp od base64 qemu-io; do
    command -v "$tool" > /dev/null || { echo "$0: needs $tool" >&2; exit 1; }
done
target=$(realpath "${CARGO_TARGET_DIR:-target}")
silo=${SILO:-$target/debug/silo}
[ -x "$silo" ] || { echo "$0: there is no $silo; run scripts/build.sh" >&2; exit 1; }
port=${PORT:-10400}
version=3.35.0
home=$target/azurite
server=$home/node_modules/.bin/azurite-blob
if ! grep -qs "\"version\": \"$version\"" "$home/node_modules/azurite/package.json"; then
    echo "fetching azurite $version into $home"
    mkdir -p "$home"
    npm install --prefix "$home" --no-audit --no-fund --omit=dev "azurite@$version" > "$home/npm.log" 2>&1 ||
        { cat "$home/npm.log" >&2; exit 1; }
fi

work=$(mktemp -d)
writer=
"$server" --silent --disableTelemetry --skipApiVersionCheck --location "$work/data" \
    --blobHost 127.0.0.1 --blobPort "$port" > "$work/azurite.log" 2>&1 &
azurite=$!
end() {
    [ -z "$writer" ] || kill -9 "$writer" 2> /dev/null || true
    kill "$azurite" 2> /dev/null || true
    wait
    rm -rf "$work"
}
trap end EXIT
trap 'exit 1' INT TERM

account=devstoreaccount1
key='Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=='
endpoint=http://127.0.0.1:$port/$account
# Makes a container, by Azure's signature for requests (Shared Key); says the answer's status.
container() {
    date=$(LC_ALL=C date -u '+%a, %d %b %Y %H:%M:%S GMT')
    api=2023-11-03
    hex=$(printf %s "$key" | base64 -d | od -An -v -tx1 | tr -d ' \n')
    signature=$(printf 'PUT\n\n\n\n\n\n\n\n\n\n\n\nx-ms-date:%s\nx-ms-version:%s\n/%s/%s/%s\nrestype:container' \
        "$date" "$api" $account $account "$1" |
        openssl dgst -sha256 -mac HMAC -macopt "hexkey:$hex" -binary | base64)
    curl -sS -o /dev/null -w '%{http_code}' -X PUT -H 'Content-Length: 0' -H "x-ms-date: $date" \
        -H "x-ms-version: $api" -H "Authorization: SharedKey $account:$signature" \
        "$endpoint/$1?restype=container" 2> /dev/null || true
}
tries=0
until [ "$(container silo)" = 201 ]; do
    tries=$((tries + 1))
    [ $tries -lt 100 ] || { cat "$work/azurite.log" >&2; echo "$0: azurite does not answer" >&2; exit 1; }
    sleep 0.2
done

cd "$work"
export AZURE_STORAGE_ACCOUNT_NAME=$account AZURE_STORAGE_ACCOUNT_KEY="$key"
export SILO_STORE="az://silo/some/folder?endpoint=$endpoint" SILO_KEY_FILE="$work/keys"
failed() {
    echo "$0: failed: $*" >&2
    cat "$work"/*.err >&2
    exit 1
}
silo() {
    timeout 120 "$silo" "$@" > out 2> said.err || failed "silo $*"
}
# Fails, and says so.
refused() {
    says=$1
    shift
    if timeout 120 "$silo" "$@" > out 2> said.err; then failed "silo $* was not refused"; fi
    grep -q "$says" said.err || failed "silo $* did not say \"$says\""
}
restores() {
    rm -f back
    silo restore "$1" --to back ${3:+--generation "$3"}
    cmp "$2" back || failed "$1 is not what was stored"
}
changed() {
    dd if=/dev/urandom of=image bs=4096 count=20 seek="$1" conv=notrunc status=none
}

echo "a backup's life: made, restored, forked, verified, pruned, collected"
silo keys create keys
head -c 3000077 /dev/urandom > image
silo sync --once --line acme/vm --file image
cp image first
for at in 50 100 150; do
    changed $at
    silo sync --once --line acme/vm --file image
done
restores acme/vm image
silo fork acme/vm acme/test
for depth in quick full scrub; do silo verify --depth $depth; done
silo prune acme/vm --keep-last 1
silo prune acme/vm --keep-last 1 --delete
silo prune acme/test --keep-last 1 --delete
silo collect --grace 0s --dry-run
silo collect --grace 0s
silo collect --grace 0s
silo verify --depth full
restores acme/vm image
restores acme/test image

echo "two writers: the second takes the line, the first ends and stores nothing any more"
cp image other
"$silo" --json sync --line acme/vm --file image --max-age 1s --socket "$work/nbd" > first.out 2> first.err &
writer=$!
# Until it has the line it is not ready.
tries=0
until grep -q . first.out; do
    tries=$((tries + 1))
    [ $tries -lt 300 ] || failed "the first writer does not begin"
    sleep 0.1
done
silo sync --once --line acme/vm --file other
qemu-io -f raw -c 'write -P 7 0 4096' "nbd+unix:///?socket=$work/nbd" > qemu.out 2> qemu.err || failed "a write"
tries=0
while kill -0 "$writer" 2> /dev/null; do
    tries=$((tries + 1))
    [ $tries -lt 300 ] || failed "the first writer was not fenced"
    sleep 0.1
done
wait "$writer" && failed "the first writer ended well"
writer=
grep -q "taken over by another writer" first.err || failed "the first writer does not say why it ended"
restores acme/vm other

echo "a writer that is killed at any moment leaves what was committed"
for pause in 0.02 0.05 0.1 0.2 0.4; do
    head -c 3000077 /dev/urandom > image
    "$silo" sync --once --line acme/killed --file image > out 2> killed.err &
    writer=$!
    sleep $pause
    kill -9 "$writer" 2> /dev/null || true
    wait "$writer" || true
    writer=
    silo verify --depth full
done
silo sync --once --line acme/killed --file image
restores acme/killed image

echo "wrong keys and places"
AZURE_STORAGE_ACCOUNT_KEY=aGFsbG8= refused 403 generations acme/vm
SILO_STORE="az://none/x?endpoint=$endpoint" refused "container does not exist" sync --once --line acme/vm --file other
silo keys create wrong
refused key restore acme/vm --to nothing --keys wrong
[ ! -e nothing ] || failed "something was written with a wrong key"
echo "all is well"
