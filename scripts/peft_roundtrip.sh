#!/usr/bin/env bash
# Does PEFT itself read an adapter that this library saved, with the same logits?
#
#   pip install torch==2.9.0 transformers==5.23.0 peft==0.21.2 safetensors==0.8.0
#   cargo run --release --example finetune
#   scripts/peft_roundtrip.sh runs/1/adapter [BASE-FOLDER]
#
# BASE-FOLDER is the Hugging Face folder that the adapter belongs to, the repository's own model
# unless given. PYTHON names the interpreter (python3 unless set).
set -euo pipefail
adapter=${1:?usage: scripts/peft_roundtrip.sh ADAPTER-FOLDER [BASE-FOLDER]}
root=$(cd "$(dirname "$0")/.." && pwd)
base=${2:-$root/examples/tiny_world}
python=${PYTHON:-python3}
temp=$(mktemp -d)
trap 'rm -rf "$temp"' EXIT

"$python" - "$base" "$temp/ids.safetensors" <<'PYTHON'
import json, sys
import torch
from safetensors.torch import save_file

vocab = json.load(open(f"{sys.argv[1]}/config.json"))["vocab_size"]
ids = torch.randint(vocab, (2, 48), generator=torch.Generator().manual_seed(0))
save_file({"input_ids": ids}, sys.argv[2])
PYTHON
cargo run --release --quiet --manifest-path "$root/Cargo.toml" --example logits -- \
    --model "$base" --adapter "$adapter" \
    --input "$temp/ids.safetensors" --output "$temp/logits.safetensors"
"$python" "$root/scripts/peft_check.py" \
    --base "$base" --adapter "$adapter" --logits "$temp/logits.safetensors"
