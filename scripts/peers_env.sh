#!/usr/bin/env bash
# Makes a Python environment with the peers that benches/yardstick measures, in pinned versions.
#
#   scripts/peers_env.sh target/peers          # from PyPI; its torch has CUDA: 3 GB are fetched
#   scripts/peers_env.sh target/peers --cpu    # torch for the processor, from download.pytorch.org: 200 MB
#
# Needs Python 3.11 to 3.13 with venv (Debian: python3-venv).
set -euo pipefail

usage="usage: $0 FOLDER [--cpu]"
folder=${1:?$usage}
index=()
case ${2:-} in
'') ;;
--cpu) index=(--index-url https://download.pytorch.org/whl/cpu) ;;
*)
    echo "$usage" >&2
    exit 2
    ;;
esac

"${PYTHON:-python3}" -m venv "$folder"
pip=("$folder/bin/python" -m pip install --quiet --disable-pip-version-check)
"${pip[@]}" ${index[@]+"${index[@]}"} torch==2.9.0
"${pip[@]}" transformers==5.23.0 peft==0.21.2 accelerate==1.15.0 safetensors==0.8.0 numpy==2.4.6 gguf==0.19.0 \
    sentencepiece==0.2.3 protobuf==7.36.2 tokenizers==0.23.3 huggingface_hub==2.4.0
"$folder/bin/python" -c 'import peft, torch, transformers; print(torch.__version__, transformers.__version__, peft.__version__)'
