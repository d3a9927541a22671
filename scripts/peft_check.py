#!/usr/bin/env python3
"""Checks an adapter that this library wrote against PEFT: PEFT must read it and give the same logits.

    pip install torch==2.9.0 transformers==5.23.0 peft==0.21.2 safetensors==0.8.0
    python scripts/peft_check.py --base FOLDER --adapter FOLDER --logits FILE.safetensors

FILE holds `input_ids` (int64 [batch, length]) and `logits` (f32 [batch, length, vocab]), computed by this library with
the adapter over the base. Prints the largest relative difference, max |ours - PEFT's| / max |PEFT's|. Exits with 1 if
it is above the tolerance, or if PEFT finds keys of the adapter missing or unexpected.
"""

import argparse
import sys

import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM


def main():
    parser = argparse.ArgumentParser(description="Compares this library's logits with PEFT's over the same adapter.")
    parser.add_argument("--base", required=True, metavar="FOLDER", help="base model in Hugging Face format")
    parser.add_argument("--adapter", required=True, metavar="FOLDER", help="adapter in PEFT's format")
    parser.add_argument("--logits", required=True, metavar="FILE", help="safetensors with input_ids and logits")
    parser.add_argument("--tolerance", type=float, default=1e-5, help="largest relative difference (default 1e-5)")
    args = parser.parse_args()

    base = AutoModelForCausalLM.from_pretrained(args.base, dtype=torch.float32, attn_implementation="eager")
    model = PeftModel.from_pretrained(base, args.adapter).eval()

    # from_pretrained keeps what it found to itself, and of unexpected keys says nothing; loading again returns both.
    found = model.load_adapter(args.adapter, adapter_name="default")
    if found.missing_keys or found.unexpected_keys:
        sys.exit(f"PEFT misses the keys {found.missing_keys} and does not expect {found.unexpected_keys}")

    ours = load_file(args.logits)
    with torch.no_grad():
        logits = model(ours["input_ids"]).logits
    if ours["logits"].shape != logits.shape:
        sys.exit(f"our logits are {list(ours['logits'].shape)}, PEFT's are {list(logits.shape)}")
    difference = ((ours["logits"] - logits).abs().max() / logits.abs().max()).item()
    print(f"largest relative difference {difference:.3e} (tolerance {args.tolerance:.0e})")
    if not difference <= args.tolerance:  # also true of NaN
        sys.exit(1)


if __name__ == "__main__":
    main()
