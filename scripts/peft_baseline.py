#!/usr/bin/env python3
"""The fine-tuning run of this library's example, done with PEFT, to compare loss, speed and memory.

    pip install torch==2.9.0 transformers==5.23.0 peft==0.21.2 gguf==0.19.0
    python scripts/peft_baseline.py --model GGUF_OR_FOLDER --data FILE.json

FILE is a JSON list of rows with `instruction`, `input` and `output`. The user's message is the instruction, then, if
there is an input, a blank line and the input. The model's chat template is applied, and the loss is taken on the answer
alone: the output's tokens and the end-of-turn token. The last rows are held out, or
those that a run of the example held out (--held-out-rows runs/1/metrics.jsonl); the seed sets the order of the others
and the adapter's first values.

LoRA of rank 8 and alpha 16 on all seven projections, no dropout; AdamW without weight decay, constant learning rate,
no clipping; float32. Prints the held-out loss (mean over tokens) before and after, the training speed in tokens that are
not padding (prompt and answer) per second, and the peak resident memory (its own line for the loading, which unpacks
a GGUF file).
"""

import argparse
import json
import resource
import time
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
IGNORED = -100  # cross_entropy leaves these targets out


def load(path):
    """The tokenizer and the float32 model in a Hugging Face folder or a GGUF file."""
    if path.is_dir():
        return AutoTokenizer.from_pretrained(path), AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    model = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    return tokenizer, model


def encode(row, tokenizer):
    """One row's tokens, and its targets: the next token inside the answer, IGNORED elsewhere."""
    user = row["instruction"] + ("\n\n" + row["input"] if row["input"] else "")
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": user}], add_generation_prompt=True, tokenize=False
    )
    prompt = tokenizer(prompt, add_special_tokens=False).input_ids
    answer = tokenizer(row["output"] + tokenizer.eos_token, add_special_tokens=False).input_ids
    ids = torch.tensor(prompt + answer)
    targets = torch.tensor([IGNORED] * len(prompt) + answer)[1:]
    return ids[:-1], targets


def summed_loss(model, batch):
    """The cross-entropy summed over a batch's answers, and the number of tokens that it is summed over."""
    ids = pad_sequence([ids for ids, _ in batch], batch_first=True)
    targets = pad_sequence([targets for _, targets in batch], batch_first=True, padding_value=IGNORED)
    # Padding comes last, so that with causal attention no answer sees it and no mask is needed.
    logits = model(input_ids=ids, use_cache=False).logits
    loss = cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="sum")
    return loss, (targets != IGNORED).sum()


@torch.no_grad()
def mean_loss(model, rows, batch_size):
    """The mean loss over all answer tokens of `rows`."""
    model.eval()
    sums = [summed_loss(model, rows[i : i + batch_size]) for i in range(0, len(rows), batch_size)]
    return (sum(loss for loss, _ in sums) / sum(count for _, count in sums)).item()


def train(model, rows, steps, batch_size, learning_rate):
    """Steps through `rows` in random order, again from the start where they end; tokens per second."""
    model.train()
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=learning_rate, weight_decay=0.0
    )
    order = torch.randperm(len(rows)).tolist()
    tokens, start = 0, time.perf_counter()
    for step in range(steps):
        first = step * batch_size
        batch = [rows[order[i % len(rows)]] for i in range(first, first + batch_size)]
        loss, count = summed_loss(model, batch)
        loss = loss / count
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        tokens += sum(len(ids) for ids, _ in batch)
        print(f"step {step + 1:3}  loss {loss.item():.4f}", flush=True)
    return tokens / (time.perf_counter() - start)


def peak_mib():
    """The process's peak resident memory in MiB (Linux counts it in KiB)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main():
    parser = argparse.ArgumentParser(description="Fine-tunes a model with PEFT, as this library's example does.")
    parser.add_argument("--model", type=Path, required=True, help="GGUF file or Hugging Face folder")
    parser.add_argument("--data", type=Path, required=True, help="JSON list of instruction, input, output")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch", type=int, default=4, help="rows in a step")
    parser.add_argument("--lr", type=float, default=2e-4, help="constant learning rate")
    parser.add_argument("--held-out", type=int, default=64, help="rows at the end of the file to test on")
    parser.add_argument(
        "--held-out-rows", type=Path, metavar="METRICS.jsonl", help="hold out the rows that this run of the example did"
    )
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    tokenizer, base = load(args.model)
    print(f"peak memory after loading {peak_mib():.0f} MiB, {torch.get_num_threads()} threads")
    rows = [encode(row, tokenizer) for row in json.loads(args.data.read_text(encoding="utf-8"))]
    chosen = range(len(rows) - args.held_out, len(rows))
    if args.held_out_rows:
        chosen = json.loads(args.held_out_rows.read_text().splitlines()[0])["held_out_rows"]
    held_out = [rows[i] for i in chosen]
    training = [row for i, row in enumerate(rows) if i not in set(chosen)]

    torch.manual_seed(args.seed)
    config = LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16, target_modules=PROJECTIONS)
    model = get_peft_model(base, config)
    model.print_trainable_parameters()

    before = mean_loss(model, held_out, args.batch)
    print(f"held-out loss before {before:.4f}", flush=True)
    speed = train(model, training, args.steps, args.batch, args.lr)
    after = mean_loss(model, held_out, args.batch)
    print(f"held-out loss {before:.4f} -> {after:.4f}")
    print(f"{speed:.1f} tokens/s")
    print(f"peak memory {peak_mib():.0f} MiB")


if __name__ == "__main__":
    main()
