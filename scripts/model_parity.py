#!/usr/bin/env python3
"""Compares a model here with transformers' reading of the same file: logits, and greedy answers.

    cargo build --release --examples
    pip install torch==2.9.0 transformers==5.23.0 gguf==0.19.0 safetensors==0.8.0
    python scripts/model_parity.py MODEL [FOLDER]

MODEL is a Hugging Face folder or a GGUF file. Where FOLDER is given, the model is written there by
`examples/merge.rs` in f32, and transformers loads that folder too. TARGET_DIR names the folder of the
built examples (default: target/release/examples).
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

EXAMPLES = Path(os.environ.get("TARGET_DIR", "target/release/examples"))
QUESTIONS = [
    "What is the capital of France?",
    "Name three colours.",
    "How many legs does a spider have?",
    "Write one sentence about the sea.",
    "What is 12 + 30?",
    "Who wrote Hamlet?",
    "Translate 'good morning' into French.",
    "What do bees make?",
    "Give a synonym of 'quick'.",
    "Why is the sky blue?",
]
TOKENS = 24


def run(name, *arguments):
    done = subprocess.run([EXAMPLES / name, *map(str, arguments)], capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"{name}: {done.stderr}")
    return done.stdout


def load(path):
    path = Path(path)
    where = (path, {}) if path.is_dir() else (path.parent, {"gguf_file": path.name})
    return AutoModelForCausalLM.from_pretrained(where[0], dtype=torch.float32, **where[1]).eval()


@torch.inference_mode()
def main():
    model_path = sys.argv[1]
    folder = sys.argv[2] if len(sys.argv) > 2 else None
    if folder:
        run("merge", "--model", model_path, "--output", folder, "--dtype", "f32")
    theirs = load(model_path)
    # Ours has the digits' splitting that transformers' reading of some GGUF files lacks, so the ids
    # of both are made by one tokenizer: that of the folder written here.
    tokenizer = AutoTokenizer.from_pretrained(folder or model_path)

    def ids(question):
        turn = [{"role": "user", "content": question}]
        text = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
        return tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids

    with tempfile.TemporaryDirectory() as temp:
        batch = torch.cat([ids(question)[:, :24] for question in QUESTIONS])
        file = Path(temp) / "golden.safetensors"
        save_file({"input_ids": batch, "logits": theirs(batch).logits.contiguous()}, file)
        print("logits, ours and transformers' of", model_path)
        print("   ", run("logits", "--model", model_path, "--input", file).strip())
        if folder:
            apart = (load(folder)(batch).logits - theirs(batch).logits).abs().max()
            print("logits, transformers' of the folder and of the file")
            print(f"    largest relative difference {apart / theirs(batch).logits.abs().max():.3e}")

    equal = 0
    for question in QUESTIONS:
        ours = run("generate", "--model", model_path, "--temperature", 0, "--max-new-tokens", TOKENS, question)
        prompt = ids(question)
        answer = theirs.generate(prompt, do_sample=False, max_new_tokens=TOKENS, pad_token_id=0)
        expected = tokenizer.decode(answer[0, prompt.shape[1]:], skip_special_tokens=True)
        same = ours.strip() == expected.strip()
        equal += same
        print(f"{'=' if same else 'x'} {question}\n    {ours.strip()!r}" + ("" if same else f"\n    {expected.strip()!r}"))
    print(f"{equal} of {len(QUESTIONS)} answers equal")


if __name__ == "__main__":
    main()
