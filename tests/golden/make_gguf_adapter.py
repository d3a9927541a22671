#!/usr/bin/env python3
"""Writes gguf_adapter/adapter.gguf: peft_gaussian_regex as llama.cpp's adapter file, by ggml's own package.

    pip install gguf==0.19.0 safetensors==0.8.0 && python make_gguf_adapter.py

What convert_lora_to_gguf.py does to a Llama's adapter, in a few lines: llama.cpp's names, and the rows of lora_B of q
and k in pairs (`permute` in convert_hf_to_gguf.py). Run again, it writes the same bytes.
"""

import json
from pathlib import Path

from gguf import GGUFWriter
from safetensors.numpy import load_file

HERE = Path(__file__).parent
NAMES = {"self_attn.q_proj": "attn_q", "mlp.up_proj": "ffn_up"}
HEADS = json.loads((HERE / "tiny_llama/config.json").read_text())["num_attention_heads"]

adapter = HERE / "peft_gaussian_regex"
config = json.loads((adapter / "adapter_config.json").read_text())
tensors = load_file(adapter / "adapter_model.safetensors")

(HERE / "gguf_adapter").mkdir(exist_ok=True)
writer = GGUFWriter(HERE / "gguf_adapter/adapter.gguf", "llama")
writer.add_type("adapter")
writer.add_string("adapter.type", "lora")
writer.add_float32("adapter.lora.alpha", config["lora_alpha"])
writer.add_file_type(0)
for module, name in NAMES.items():
    path = f"base_model.model.model.layers.1.{module}"
    a, b = tensors[f"{path}.lora_A.weight"], tensors[f"{path}.lora_B.weight"]
    if name == "attn_q":
        rows, rank = b.shape
        b = b.reshape(HEADS, 2, rows // HEADS // 2, rank).swapaxes(1, 2).reshape(rows, rank)
    writer.add_tensor(f"blk.1.{name}.weight.lora_a", a.copy())
    writer.add_tensor(f"blk.1.{name}.weight.lora_b", b.copy())
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_tensors_to_file()
writer.close()
