#!/usr/bin/env python3
"""Checks adapters that this library wrote against PEFT: PEFT must read them and give the same logits.

    pip install torch==2.9.0 transformers==5.23.0 peft==0.21.2 safetensors==0.8.0
    python scripts/peft_check.py --base FOLDER --adapter FOLDER --logits FILE.safetensors
    python scripts/peft_check.py --cases FOLDER --program target/release/examples/logits

One adapter: FILE holds `input_ids` (int64 [batch, length]) and `logits` (f32 [batch, length, vocab]), computed by this
library with the adapter over the base.

A folder of cases: each is a folder with an adapter that PEFT wrote and `golden.safetensors`, `input_ids` and PEFT's
`logits`; beside them are the bases, folders with config.json and model.safetensors. A case belongs to the base over
which PEFT gives its logits. PROGRAM, the example `logits`, reads PEFT's adapter and saves it; PEFT reads that. Where a
case has `residual_base.safetensors`, the weights that its start left over, it is read over these too.

Prints the largest relative difference, max |ours - PEFT's| / max |PEFT's|. Exits with 1 if one is above the tolerance,
or if PEFT finds keys of an adapter missing or unexpected.
"""

import argparse
import re
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from transformers.utils import logging


def peft_logits(base, adapter, ids, residual=None, check_keys=True):
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager")
    if residual is not None:
        weights = {key.replace(".base_layer", ""): value for key, value in load_file(residual).items()}
        model.load_state_dict(weights, strict=False)
    model = PeftModel.from_pretrained(model, adapter).eval()
    # from_pretrained keeps what it found to itself, and of unexpected keys says nothing; loading again returns both.
    found = model.load_adapter(adapter, adapter_name="default")
    if check_keys and (found.missing_keys or found.unexpected_keys):
        raise ValueError(f"PEFT misses the keys {found.missing_keys} and does not expect {found.unexpected_keys}")
    with torch.no_grad():
        return model(ids).logits


def difference(ours, expected):
    if ours.shape != expected.shape:
        raise ValueError(f"our logits are {list(ours.shape)}, PEFT's are {list(expected.shape)}")
    return ((ours - expected).abs().max() / expected.abs().max()).item()


def check_one(args):
    ours = load_file(args.logits)
    apart = difference(ours["logits"], peft_logits(args.base, args.adapter, ours["input_ids"]))
    print(f"largest relative difference {apart:.3e} (tolerance {args.tolerance:.0e})")
    return apart <= args.tolerance  # false for NaN


def base_of(case, bases, golden):
    """The base over which PEFT gives the case's logits."""
    for base in bases:
        try:
            # PEFT does not expect all keys that it wrote itself.
            logits = peft_logits(base, case, golden["input_ids"], check_keys=False)
        except (RuntimeError, ValueError, KeyError, IndexError):  # it fits another base
            continue
        if logits.shape == golden["logits"].shape and difference(logits, golden["logits"]) < 1e-4:
            return base
    raise ValueError("PEFT gives its logits over none of the bases")


def read(args, base, case, *options):
    """What the program prints as the difference between its logits and the golden ones."""
    command = [args.program, "--model", base, "--adapter", case, "--input", case / "golden.safetensors", *options]
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    found = re.search(r"largest relative difference (\S+)", done.stdout)
    if done.returncode != 0 or found is None:
        raise ValueError(done.stderr.strip() or done.stdout.strip())
    return float(found.group(1))


def is_case(golden):
    return golden.exists() and "input_ids" in load_file(golden)


def check_cases(args):
    folders = sorted(path.parent for path in Path(args.cases).glob("*/config.json"))
    bases = [folder for folder in folders if (folder / "model.safetensors").exists()]
    adapters = Path(args.cases).glob("*/adapter_config.json")
    cases = [path.parent for path in sorted(adapters) if is_case(path.parent / "golden.safetensors")]
    width = max((len(case.name) for case in cases), default=0) + len(", residual base")
    print(f"{'case':<{width}}  reading PEFT's  PEFT reading ours  base")
    good = bool(cases)
    for case in cases:
        with tempfile.TemporaryDirectory() as temp:
            try:
                golden = load_file(case / "golden.safetensors")
                base = base_of(case, bases, golden)
                residual = case / "residual_base.safetensors"
                rows = []
                for over in [None] + [residual] * residual.exists():
                    copy = Path(temp) / f"adapter-{len(rows)}"
                    options = ["--save-adapter", copy] + (["--residual-base", over] if over else [])
                    reading = read(args, base, case, *options)
                    writing = difference(peft_logits(base, copy, golden["input_ids"], over), golden["logits"])
                    rows.append((case.name + (", residual base" if over else ""), reading, writing))
            except ValueError as error:
                print(f"{case.name:<{width}}  {error}")
                good = False
                continue
        for name, reading, writing in rows:
            print(f"{name:<{width}}  {reading:14.2e}  {writing:17.2e}  {base.name}")
            good &= reading <= args.tolerance and writing <= args.tolerance  # false for NaN
    return good


def main():
    parser = argparse.ArgumentParser(description="Compares this library's logits with PEFT's over the same adapters.")
    parser.add_argument("--base", metavar="FOLDER", help="base model in Hugging Face format")
    parser.add_argument("--adapter", metavar="FOLDER", help="adapter in PEFT's format")
    parser.add_argument("--logits", metavar="FILE", help="safetensors with input_ids and logits")
    parser.add_argument("--cases", metavar="FOLDER", help="adapters with golden logits, and their bases")
    parser.add_argument("--program", metavar="FILE", help="the example `logits`, for --cases")
    parser.add_argument("--tolerance", type=float, default=1e-5, help="largest relative difference (default 1e-5)")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(1)

    try:
        if args.cases and args.program:
            good = check_cases(args)
        elif args.base and args.adapter and args.logits:
            good = check_one(args)
        else:
            parser.error("give --base, --adapter and --logits, or --cases and --program")
    except ValueError as error:
        sys.exit(str(error))
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
