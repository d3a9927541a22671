"""Adapters that PEFT wrote over tests/golden/tiny_llama, with PEFT's logits.

Each folder gets adapter_config.json, adapter_model.safetensors and golden.safetensors
(`input_ids`, i64 [2, 24], and `logits`, f32 [2, 24, 128]). A and B are both moved off zero.

    pip install torch==2.9.0 transformers==5.23.0 peft==0.21.2 safetensors==0.8.0
    python tests/golden/make_peft_cases.py
"""

import json
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

HERE = Path(__file__).parent
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CASES = {
    "peft_plain": dict(r=4, lora_alpha=6, target_modules=ALL),
    "peft_patterns_rslora": dict(
        r=4,
        lora_alpha=6,
        target_modules=ALL,
        use_rslora=True,
        rank_pattern={"model.layers.1.mlp.down_proj": 2, "q_proj": 8},
        alpha_pattern={"^model.layers.0.self_attn.k_proj": 3, "v_proj": 20},
    ),
    "peft_gaussian_regex": dict(
        r=3,
        lora_alpha=7.5,
        target_modules=r".*\.1\.(self_attn|mlp)\.(q|up)_proj",
        init_lora_weights="gaussian",
    ),
}


def make(name: str, settings: dict) -> None:
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(
        HERE / "tiny_llama", dtype=torch.float32, attn_implementation="eager"
    )
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **settings)).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "lora_" in key:
                parameter.copy_(torch.randn_like(parameter) * 0.2)
        ids = load_file(HERE / "tiny_llama" / "golden.safetensors")["input_ids"]
        logits = model(ids).logits
    model.save_pretrained(HERE / name)
    # PEFT writes the path of this machine.
    config_path = HERE / name / "adapter_config.json"
    config = json.loads(config_path.read_text())
    config["base_model_name_or_path"] = None
    config_path.write_text(json.dumps(config, indent=2) + "\n")
    (HERE / name / "README.md").unlink(missing_ok=True)
    save_file({"input_ids": ids, "logits": logits.contiguous()}, HERE / name / "golden.safetensors")
    print(name, sorted(path.name for path in (HERE / name).iterdir()))


if __name__ == "__main__":
    for name, settings in CASES.items():
        make(name, settings)
