#!/usr/bin/env python3
"""Writes families/CASE/model.gguf for the cases that llama.cpp's format can say, with ggml's own package.

    pip install gguf==0.19.0 safetensors==0.8.0 torch==2.9.0 numpy==2.4.6
    python tests/golden/make_gguf_families.py

What convert_hf_to_gguf.py does to these families: the package's own names of tensors, matrices in bf16 and vectors in
f32, rows of q and k in pairs for the architecture `llama`, all experts of a layer in one tensor, and the factors of
Llama 3.1's RoPE as a tensor. There is no tokenizer in them. Run again, it writes the same bytes.
"""

import json
import math
from pathlib import Path

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter, MODEL_ARCH, MODEL_ARCH_NAMES, RopeScalingType
from gguf import get_tensor_name_map
from safetensors import safe_open

HERE = Path(__file__).parent / "families"
CASES = {
    "llama_linear": MODEL_ARCH.LLAMA,
    "llama_llama3": MODEL_ARCH.LLAMA,
    "llama_yarn": MODEL_ARCH.LLAMA,
    "mistral_no_window": MODEL_ARCH.LLAMA,
    "mixtral_no_window": MODEL_ARCH.LLAMA,
    "qwen2_tied": MODEL_ARCH.QWEN2,
    "qwen3_tied": MODEL_ARCH.QWEN3,
    "qwen3_moe_all_layers": MODEL_ARCH.QWEN3MOE,
}


def read(folder):
    """Every tensor as the bits of its bf16 values."""
    with safe_open(folder / "model.safetensors", "pt") as file:
        return {name: file.get_tensor(name).view(torch.uint16).numpy() for name in file.keys()}


def permute(rows, heads):
    """The rows of each head from halves into pairs."""
    return rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def llama3_factors(rope, head_dim):
    """By what Llama 3.1 divides the rotary frequencies."""
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    original, factor = rope["original_max_position_embeddings"], rope["factor"]
    factors = []
    for pair in range(head_dim // 2):
        wavelength = 2 * math.pi * rope["rope_theta"] ** (2 * pair / head_dim)
        smooth = min(max((original / wavelength - low) / (high - low), 0), 1)
        factors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(factors, dtype=np.float32)


def merged_experts(tensors):
    """One tensor for the same projection of all experts of a layer, under the name without their numbers."""
    merged = {}
    for name, bits in tensors.items():
        before, _, after = name.partition(".experts.")
        if not after:
            merged[name] = bits
            continue
        number, projection = after.split(".", 1)
        stack = merged.setdefault(f"{before}.experts.{projection}", {})
        stack[int(number)] = bits
    return {
        name: np.stack([bits[number] for number in range(len(bits))]) if isinstance(bits, dict) else bits
        for name, bits in merged.items()
    }


def main():
    for case, arch in CASES.items():
        folder = HERE / case
        config = json.loads((folder / "config.json").read_text())
        rope, heads = config["rope_parameters"], config["num_attention_heads"]
        head_dim = config.get("head_dim") or config["hidden_size"] // heads
        writer = GGUFWriter(folder / "model.gguf", MODEL_ARCH_NAMES[arch])
        writer.add_type("model")
        writer.add_context_length(config["max_position_embeddings"])
        writer.add_embedding_length(config["hidden_size"])
        writer.add_feed_forward_length(config["intermediate_size"])
        writer.add_block_count(config["num_hidden_layers"])
        writer.add_head_count(heads)
        writer.add_head_count_kv(config["num_key_value_heads"])
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
        writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
        writer.add_rope_freq_base(rope["rope_theta"])
        writer.add_vocab_size(config["vocab_size"])
        writer.add_bos_token_id(config["bos_token_id"])
        writer.add_eos_token_id(config["eos_token_id"])
        if rope["rope_type"] in ("linear", "yarn"):
            writer.add_rope_scaling_type(RopeScalingType(rope["rope_type"]))
            writer.add_rope_scaling_factor(rope["factor"])
        if rope["rope_type"] == "yarn":
            writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
        if experts := config.get("num_local_experts") or config.get("num_experts"):
            writer.add_expert_count(experts)
            writer.add_expert_used_count(config["num_experts_per_tok"])
            if "moe_intermediate_size" in config:
                writer.add_expert_feed_forward_length(config["moe_intermediate_size"])

        if rope["rope_type"] == "llama3":
            writer.add_tensor("rope_freqs.weight", llama3_factors(rope, head_dim))
        names = get_tensor_name_map(arch, config["num_hidden_layers"])
        for name, bits in merged_experts(read(folder)).items():
            if arch == MODEL_ARCH.LLAMA and ".q_proj." in name:
                bits = permute(bits, heads)
            if arch == MODEL_ARCH.LLAMA and ".k_proj." in name:
                bits = permute(bits, config["num_key_value_heads"])
            to = names.get_name(name, try_suffixes=(".weight", ".bias"))
            if bits.ndim == 1:
                writer.add_tensor(to, (bits.astype(np.uint32) << 16).view(np.float32))
            else:
                writer.add_tensor(to, np.ascontiguousarray(bits).view(np.uint8), raw_dtype=GGMLQuantizationType.BF16)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        print(f"{case}: {(folder / 'model.gguf').stat().st_size} bytes")


if __name__ == "__main__":
    main()
