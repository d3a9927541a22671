#!/usr/bin/env python3
"""Tokens per second of transformers and PEFT, as benches/decode.rs measures them here.

    pip install torch==2.9.0 transformers==5.23.0 peft==0.21.2 gguf==0.19.0
    python scripts/decode_baseline.py MODEL        # a folder or a GGUF file

Greedy decoding with the key-value cache, called step by step as benches/decode.rs does, without
generate()'s own work around it; the best of three rounds.
"""

import sys
import time
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, DynamicCache

PROMPT, WRITTEN, ROUNDS = 256, 128, 3


def load(path, dtype):
    path = Path(path)
    if path.is_dir():
        return AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
    return AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=dtype).to(dtype)


@torch.inference_mode()
def report(name, model):
    model.eval()
    vocabulary = model.config.vocab_size
    prompt = torch.tensor([[token * 37 % vocabulary for token in range(PROMPT)]])
    read = written = float("inf")
    for _ in range(ROUNDS):
        cache = DynamicCache()
        start = time.perf_counter()
        token = model(prompt, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1:].argmax(-1)
        read = min(read, time.perf_counter() - start)
        start = time.perf_counter()
        for _ in range(WRITTEN):
            token = model(token, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)
        written = min(written, time.perf_counter() - start)
    print(f"{name:<14}{PROMPT / read:>16.1f}{WRITTEN / written:>16.1f}", flush=True)


def main():
    print(f"{'':<14}{'prompt tokens/s':>16}{'decode tokens/s':>16}")
    for name, dtype in [("f32", torch.float32), ("bf16", torch.bfloat16)]:
        model = load(sys.argv[1], dtype)
        report(f"{name}, merged", model)
        config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear")
        report(f"{name}, adapter", get_peft_model(model, config))


if __name__ == "__main__":
    main()
