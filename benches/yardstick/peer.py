#!/usr/bin/env python3
"""The jobs of benches/yardstick, done with torch, transformers and PEFT: one job as JSON in, one answer as JSON out.

scripts/peers_env.sh makes the environment. The shapes, the batches' formula and the words of a job are those of
workload.rs.
"""

import json
import os
import platform
import sys
import time

import peft
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, DynamicCache

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}


def device():
    # As the other program: LORA_DEVICE names tch:cuda:N or cuda:N, or a device on the processor.
    name = os.environ["LORA_DEVICE"].removeprefix("tch:")
    return name if name.startswith("cuda") else "cpu"


def now():
    # Where the processor computes, CUDA is not touched: its context would count as memory.
    if device() != "cpu":
        torch.cuda.synchronize(device())
    return time.perf_counter()


def batch_ids(step, rows, length, vocabulary):
    row, place = torch.meshgrid(torch.arange(rows), torch.arange(length + 1), indexing="ij")
    return (7919 * (row * 1009 + place * place + 31 * step + 1)) % vocabulary


def load(job):
    return AutoModelForCausalLM.from_pretrained(job["model"], dtype=DTYPES[job.get("dtype", "f32")]).to(device())


def train(job, answer):
    model = PeftModel.from_pretrained(load(job), job["adapter"], is_trainable=True)
    if job["checkpointing"]:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, weight_decay=0.0)
    for step in range(job["steps"] + 1):
        ids = batch_ids(0, job["rows"], job["length"], model.config.vocab_size).to(device())
        times = [now()]
        logits = model(input_ids=ids[:, :-1], use_cache=False).logits
        loss = cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())
        del logits
        answer["losses"].append(loss.item())
        times.append(now())
        loss.backward()
        times.append(now())
        optimizer.step()
        optimizer.zero_grad()
        times.append(now())
        if step > 0:
            for name, start, end in zip(["forward", "backward", "optimizer"], times, times[1:]):
                answer[name].append(end - start)


def numbers(rows, columns, seed):
    """Numbers from -1 to 1 that are the same in every program."""
    i = torch.arange(rows * columns).reshape(rows, columns)
    return (((i * 7919 + seed * 104_729) % 1009).float() / 504 - 1).to(device())


def mean_square(tensor):
    return tensor.detach().double().pow(2).mean().item()


def linear(job, answer):
    d, rank = job["d"], job["rank"]
    model = torch.nn.Sequential(torch.nn.Linear(d, d, bias=False)).to(device())
    model[0].weight.data.copy_(numbers(d, d, 1).T / d**0.5)
    model.requires_grad_(False)
    trained = []
    if job["layer"] == "lora":
        config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=["0"])
        model = get_peft_model(model, config)
        trained = [p for p in model.parameters() if p.requires_grad]
        trained[0].data.copy_(numbers(d, rank, 2).T / d**0.5)
        trained[1].data.copy_(numbers(rank, d, 3).T / rank**0.5)
    x = numbers(job["rows"], d, 4).requires_grad_(True)
    with open("/proc/self/clear_refs", "w", encoding="utf-8") as file:
        file.write("5")  # VmHWM begins here: making the numbers does not count
    for step in range(job["rounds"] + 1):
        start = now()
        y = model(x)
        between = now()
        y.sum().backward()
        end = now()
        if step == 0:
            answer["peak_bytes"] = resident("VmHWM")
            answer["losses"] = [mean_square(tensor) for tensor in [y, x.grad, *(p.grad for p in trained)]]
        x.grad = None
        model.zero_grad()
        if step > 0:
            answer["forward"].append(between - start)
            answer["backward"].append(end - between)
            answer["seconds"].append(end - start)


@torch.inference_mode()
def decode(job, answer):
    model = PeftModel.from_pretrained(load(job), job["adapter"])
    if job["merged"]:
        model = model.merge_and_unload()
    model.eval()
    prompt = batch_ids(0, 1, job["prompt"] - 1, model.config.vocab_size).to(device())
    for step in range(3):
        cache = DynamicCache()
        start = now()
        token = model(input_ids=prompt, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1:].argmax(-1)
        tokens = [token.item()]
        read = now() - start
        start = now()
        for _ in range(job["written"]):
            token = model(input_ids=token, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)
            tokens.append(token.item())
        if step > 0:
            answer["prompt_seconds"].append(read)
            answer["seconds"].append(now() - start)
        answer["tokens"] = tokens
    answer["peak_bytes"] = resident("VmHWM")  # the rest is for the comparison
    answer["losses"] = [mean_square(model(input_ids=prompt, logits_to_keep=1).logits)]


def repeat(job, answer, once):
    """Does a job once, and again, without what the time before made; then compares the last."""
    for step in range(job["rounds"] + 1):
        model = None
        seconds, model = once()
        answer["seconds" if step > 0 else "first_seconds"].append(seconds)
    answer["peak_bytes"] = resident("VmHWM")  # the rest is for the comparison
    weight = next(p for name, p in model.named_parameters() if name.endswith("layers.0.self_attn.q_proj.weight"))
    answer["losses"] = [mean_square(weight)]


def load_job(job, answer):
    def once():
        start = now()
        model = load(job)
        for weight in model.parameters():
            # In the file's own type the weights stay in the file, mapped: a value of each page of memory fetches it.
            weight.data.flatten()[:: 4096 // weight.element_size()].sum()
        return now() - start, model

    repeat(job, answer, once)


@torch.no_grad()
def merge(job, answer):
    def once():
        model = PeftModel.from_pretrained(load(job), job["adapter"])
        start = now()
        model = model.merge_and_unload()
        return now() - start, model

    repeat(job, answer, once)


def resident(field):
    with open("/proc/self/status", encoding="utf-8") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(field))


def main():
    job = json.loads(sys.argv[1])
    if job.get("medium"):
        torch.set_float32_matmul_precision("medium")
    keys = ["forward", "backward", "optimizer", "losses", "seconds", "first_seconds", "prompt_seconds", "tokens"]
    answer = {key: [] for key in keys}
    answer["start_bytes"] = resident("VmRSS")
    jobs = {"train": train, "linear": linear, "decode": decode, "load": load_job, "merge": merge}
    jobs[job["kind"]](job, answer)
    if "peak_bytes" not in answer:
        answer["peak_bytes"] = resident("VmHWM")  # ru_maxrss begins with that of the process that started this one
    answer["versions"] = (
        f"PEFT {peft.__version__}, transformers {transformers.__version__}, torch {torch.__version__}, "
        f"Python {platform.python_version()}, {torch.get_num_threads()} threads on {device()}"
    )
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
