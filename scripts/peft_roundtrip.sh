#!/usr/bin/env bash
# Does PEFT itself read an adapter that this library saved, with the same logits?
#
#   pip install torch==2.9.0 transformers==5.23.0 peft==0.21.2 safetensors==0.8.0
#   cargo run --release --example finetune
#   scripts/peft_roundtrip.sh runs/1/adapter [BASE-FOLDER]
#   scripts/peft_roundtrip.sh tests/golden
#
# BASE-FOLDER is the Hugging Face folder that the adapter belongs to, the repository's own model
# unless given. A folder of adapters with golden logits and their bases, such as tests/golden, is gone
# through both ways: PEFT's adapters read here, and ours, saved again, read by PEFT; one line for each.
#
# PYTHON names the interpreter (python3 unless set), LOGITS the example `logits` where it is built
# already.
set -euo pipefail
adapter=${1:?usage: scripts/peft_roundtrip.sh ADAPTER-FOLDER [BASE-FOLDER] or CASES-FOLDER}
root=$(cd "$(dirname "$0")/.." && pwd)
base=${2:-$root/examples/tiny_world}
python=${PYTHON:-python3}
program=${LOGITS:-}
export HF_HUB_OFFLINE=1
temp=$(mktemp -d)
trap 'rm -rf "$temp"' EXIT

if [[ -z $program ]]; then
    cargo build --release --quiet --manifest-path "$root/Cargo.toml" --example logits
    program=${CARGO_TARGET_DIR:-$root/target}/release/examples/logits
fi
if [[ ! -e $adapter/adapter_config.json ]]; then
    "$python" "$root/scripts/peft_check.py" --cases "$adapter" --program "$program"
    exit
fi
"$python" - "$base" "$temp/ids.safetensors" <<'PYTHON'
import json, sys
import torch
from safetensors.torch import save_file

vocab = json.load(open(f"{sys.argv[1]}/config.json"))["vocab_size"]
ids = torch.randint(vocab, (2, 48), generator=torch.Generator().manual_seed(0))
save_file({"input_ids": ids}, sys.argv[2])
PYTHON
"$program" --model "$base" --adapter "$adapter" \
    --input "$temp/ids.safetensors" --output "$temp/logits.safetensors"
"$python" "$root/scripts/peft_check.py" \
    --base "$base" --adapter "$adapter" --logits "$temp/logits.safetensors"
