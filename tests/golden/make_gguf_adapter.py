#!/usr/bin/env python3
"""Writes adapters as llama.cpp's adapter files, by ggml's own package, into gguf_adapter/.

    pip install gguf==0.19.0 safetensors==0.8.0 && python tests/golden/make_gguf_adapter.py

adapter.gguf is peft_gaussian_regex. mixtral/ and qwen3_moe/ hold made-up adapters on the router and some experts of two
of families/, in PEFT's format, and the same as GGUF files.

What convert_lora_to_gguf.py does to an adapter, in a few lines: llama.cpp's names, the rows of lora_B of q and k of a
Llama in pairs (`permute` in convert_hf_to_gguf.py), and all experts of a layer in one tensor. That script wants
adapters of one rank on all experts; what is missing here is filled up with zeros, and where that changes the
factor alpha / rank, B makes up for it. Run again, it writes the same bytes.
"""

import json
from pathlib import Path

import numpy as np
from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, GGUFWriter, get_tensor_name_map
from safetensors.numpy import load_file, save_file

HERE = Path(__file__).parent
OUT = HERE / "gguf_adapter"


def write(path, arch, base, adapter):
    """`adapter` is a folder in PEFT's format, `base` that of its model."""
    model = json.loads((base / "config.json").read_text())
    config = json.loads((adapter / "adapter_config.json").read_text())
    factors = load_file(adapter / "adapter_model.safetensors")
    names = get_tensor_name_map(arch, model["num_hidden_layers"])
    n_experts = model.get("num_local_experts") or model.get("num_experts") or 0
    prefix, suffix = "base_model.model.", ".lora_A.weight"
    pairs = {}  # llama.cpp's name: {expert or None: (A, B)}
    for key in sorted(factors, key=lambda key: order(key, model)):
        if not key.endswith(suffix):
            continue
        module = key[len(prefix) : -len(suffix)]
        a, b = factors[key], factors[key.replace("lora_A", "lora_B")]
        if arch == MODEL_ARCH.LLAMA and module.endswith("q_proj"):
            heads, (rows, rank) = model["num_attention_heads"], b.shape
            b = b.reshape(heads, 2, rows // heads // 2, rank).swapaxes(1, 2).reshape(rows, rank)
        before, _, after = module.partition(".experts.")
        expert, _, projection = after.partition(".")
        module = f"{before}.experts.{projection}" if after else module
        pairs.setdefault(names.get_name(module), {})[int(expert) if after else None] = (a, b)

    writer = GGUFWriter(path, MODEL_ARCH_NAMES[arch])
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", config["lora_alpha"])
    writer.add_file_type(0)
    for name, experts in pairs.items():
        if None in experts:
            a, b = experts[None]
        else:
            rank = max(a.shape[0] for a, _ in experts.values())
            (_, width), (height, _) = (factor.shape for factor in next(iter(experts.values())))
            a = np.zeros((n_experts, rank, width), np.float32)
            b = np.zeros((n_experts, height, rank), np.float32)
            for expert, (own_a, own_b) in experts.items():
                own = len(own_a)
                a[expert, :own] = own_a
                b[expert, :, :own] = own_b * np.float32(rank / own)
        writer.add_tensor(f"{name}.weight.lora_a", a.copy())
        writer.add_tensor(f"{name}.weight.lora_b", b.copy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def order(key, model):
    """That of the modules in the model: the experts before their router, the first expert's projections first."""
    projections = ["q_proj", "gate_proj", "w1", "up_proj", "w3", "down_proj", "w2", "gate"]
    parts = key.split(".")
    layer = int(parts[parts.index("layers") + 1])
    expert = int(parts[parts.index("experts") + 1]) if "experts" in parts else -1
    module = next(place for place, name in enumerate(projections) if name in parts)
    part = 0 if "self_attn" in parts else 2 if expert < 0 and "gate" in parts else 1
    return layer, part, expert, module


def make_up(folder, base, targets, ranks):
    """An adapter of rank 2, or what `ranks` say for the ends of names, on the modules `targets`."""
    model = load_file_shapes(base / "model.safetensors")
    random, factors = np.random.default_rng(11), {}
    for module in targets:
        d_output, d_input = model[f"{module}.weight"]
        rank = next((rank for end, rank in ranks.items() if module.endswith(end)), 2)
        for name, shape in (("lora_A", (rank, d_input)), ("lora_B", (d_output, rank))):
            values = random.normal(0, 0.2, shape).astype(np.float32)
            factors[f"base_model.model.{module}.{name}.weight"] = values
    folder.mkdir(parents=True, exist_ok=True)
    save_file(factors, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": None, "r": 2, "lora_alpha": 3.0,
        "target_modules": targets, "rank_pattern": ranks, "alpha_pattern": {}, "lora_dropout": 0.0, "bias": "none",
        "use_rslora": False, "use_dora": False, "fan_in_fan_out": False, "inference_mode": True,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2))


def load_file_shapes(path):
    """The header of a safetensors file: the shapes alone, since numpy has no bf16."""
    bytes_ = path.read_bytes()
    header = json.loads(bytes_[8 : 8 + int.from_bytes(bytes_[:8], "little")])
    return {name: tensor["shape"] for name, tensor in header.items() if name != "__metadata__"}


def main():
    OUT.mkdir(exist_ok=True)
    write(OUT / "adapter.gguf", MODEL_ARCH.LLAMA, HERE / "tiny_llama", HERE / "peft_gaussian_regex")

    base, block = HERE / "families/mixtral_no_window", "model.layers.1.block_sparse_moe"
    targets = [f"{block}.experts.{place}" for place in ("0.w1", "0.w2", "1.w3", "2.w1", "2.w2")]
    targets = ["model.layers.0.self_attn.q_proj", *targets, f"{block}.gate"]
    make_up(OUT / "mixtral", base, targets, {"experts.2.w1": 3, "experts.0.w2": 1})
    write(OUT / "mixtral/adapter.gguf", MODEL_ARCH.LLAMA, base, OUT / "mixtral")

    base, block = HERE / "families/qwen3_moe_all_layers", "model.layers.0.mlp"
    targets = [f"{block}.experts.{expert}.gate_proj" for expert in range(6)]
    targets += ["model.layers.1.mlp.experts.5.up_proj", "model.layers.1.mlp.experts.3.down_proj", f"{block}.gate"]
    make_up(OUT / "qwen3_moe", base, targets, {"experts.4.gate_proj": 4})
    write(OUT / "qwen3_moe/adapter.gguf", MODEL_ARCH.QWEN3MOE, base, OUT / "qwen3_moe")


if __name__ == "__main__":
    main()
