#!/usr/bin/env python3
"""Makes a tiny random model of each family in families/, with what transformers makes of it.

    pip install torch==2.9.0 transformers==5.23.0 safetensors==0.8.0 numpy==2.4.6
    python tests/golden/make_families.py [CASE...]      (all cases unless some are named)

Each folder is a model as Hugging Face writes it, in bf16, and golden.safetensors:

    input_ids     int64 [2, 24]
    logits        f32   [2, 24, vocab]  in float32 arithmetic from those weights
    logits_bf16   f32   [2, 24, vocab]  in bfloat16 arithmetic
    loss          f32   []              mean cross-entropy of each next token, in float32
    grad.<name>   f32                   the loss's gradient for every tensor of the checkpoint

Every switch is on in some case: heads wider than hidden / heads, one, two and four query heads for a
key head, biases of each kind, each scaling of RoPE (with texts longer than the first training's),
windows of all, some and no layers, tied and untied heads, experts in all or some layers, their
probabilities scaled or not.

The same versions on the same processor write the same bytes; elsewhere the last bits may differ.
"""

import json
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

HERE = Path(__file__).parent / "families"
VOCAB = 48

COMMON = dict(
    vocab_size=VOCAB, hidden_size=24, intermediate_size=40, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64, rms_norm_eps=1e-5,
    bos_token_id=1, eos_token_id=2, tie_word_embeddings=False,
)


def rope(kind="default", theta=10000.0, **fields):
    return {"rope_parameters": {"rope_type": kind, "rope_theta": theta, **fields}}


CASES = {
    "llama_linear": ("llama", dict(head_dim=6, num_key_value_heads=4, **rope("linear", factor=4.0))),
    # Trained on 8 positions: the 24 of the text make theta grow.
    "llama_dynamic": (
        "llama", dict(head_dim=8, max_position_embeddings=8, **rope("dynamic", factor=2.0)),
    ),
    # Wavelengths of all three kinds: kept, mixed, stretched.
    "llama_llama3": (
        "llama",
        dict(
            head_dim=16, num_key_value_heads=1, attention_bias=True, mlp_bias=True,
            **rope("llama3", theta=100.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                   original_max_position_embeddings=64),
        ),
    ),
    "llama_yarn": (
        "llama",
        dict(
            head_dim=16, tie_word_embeddings=True,
            **rope("yarn", theta=100.0, factor=4.0, original_max_position_embeddings=16),
        ),
    ),
    "llama_yarn_mscale": (
        "llama",
        dict(
            head_dim=16,
            **rope("yarn", theta=1000.0, factor=8.0, original_max_position_embeddings=8,
                   beta_fast=4.0, beta_slow=0.5, mscale=1.2, mscale_all_dim=0.7, truncate=False),
        ),
    ),
    "mistral": ("mistral", dict(head_dim=8, sliding_window=5, **rope(theta=5000.0))),
    "mistral_no_window": (
        "mistral", dict(head_dim=10, num_key_value_heads=1, sliding_window=None, **rope()),
    ),
    "qwen2": (
        "qwen2",
        dict(
            num_hidden_layers=3, use_sliding_window=True, sliding_window=4, max_window_layers=1,
            **rope(theta=1e6),
        ),
    ),
    "qwen2_tied": (
        "qwen2", dict(num_key_value_heads=4, tie_word_embeddings=True, **rope(theta=1e6)),
    ),
    "qwen3": (
        "qwen3",
        dict(
            head_dim=16, num_key_value_heads=1, attention_bias=True, use_sliding_window=True,
            sliding_window=6, layer_types=["sliding_attention", "full_attention"], **rope(theta=1e6),
        ),
    ),
    "qwen3_tied": ("qwen3", dict(head_dim=8, tie_word_embeddings=True, **rope(theta=1e6))),
    "mixtral": (
        "mixtral",
        dict(
            head_dim=8, intermediate_size=16, num_local_experts=4, num_experts_per_tok=2,
            sliding_window=9, **rope(theta=1e6),
        ),
    ),
    "qwen3_moe": (
        "qwen3_moe",
        dict(
            head_dim=8, num_experts=5, num_experts_per_tok=3, moe_intermediate_size=12,
            mlp_only_layers=[0], norm_topk_prob=True, **rope(theta=1e6),
        ),
    ),
    "qwen3_moe_sparse_step": (
        "qwen3_moe",
        dict(
            head_dim=8, num_experts=4, num_experts_per_tok=1, moe_intermediate_size=20,
            decoder_sparse_step=2, norm_topk_prob=False, tie_word_embeddings=True, attention_bias=True,
            use_sliding_window=True, sliding_window=7, **rope(theta=1e6),
        ),
    ),
    # As GGUF files can say them: no windows, experts in every layer.
    "mixtral_no_window": (
        "mixtral",
        dict(
            head_dim=6, num_key_value_heads=4, intermediate_size=20, num_local_experts=3,
            num_experts_per_tok=2, sliding_window=None, **rope(theta=1e6),
        ),
    ),
    "qwen3_moe_all_layers": (
        "qwen3_moe",
        dict(
            head_dim=8, num_experts=6, num_experts_per_tok=2, moe_intermediate_size=12,
            norm_topk_prob=True, **rope(theta=1e6),
        ),
    ),
}


def randomise(model):
    """Weights and biases from N(0, 0.2^2), norms from N(1, 0.2^2): no parameter is at a value that hides a mistake."""
    for name, parameter in model.named_parameters():
        mean = 1.0 if name.endswith("norm.weight") else 0.0
        parameter.data.normal_(mean, 0.2)


def gradients_by_checkpoint_name(model, folder):
    """Each parameter's gradient under the names of the files, by saving a model that holds the gradients."""
    for parameter in model.parameters():
        # An expert that no token went to has none.
        parameter.data = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    model.save_pretrained(folder)
    with safe_open(folder / "model.safetensors", "pt") as file:
        grads = {f"grad.{name}": file.get_tensor(name) for name in file.keys()}
    for file in folder.iterdir():
        file.unlink()
    folder.rmdir()
    return grads


def load(folder, dtype):
    plain = dict(attn_implementation="eager", experts_implementation="eager")
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **plain).eval()


def main():
    torch.set_num_threads(1)  # the order of a sum depends on the number of threads
    for seed, (name, (model_type, settings)) in enumerate(CASES.items()):
        if sys.argv[1:] and name not in sys.argv[1:]:
            continue
        torch.manual_seed(seed)
        folder = HERE / name
        config = AutoConfig.for_model(model_type, **{**COMMON, **settings})
        model = AutoModelForCausalLM.from_config(config)
        randomise(model)
        model.to(torch.bfloat16).save_pretrained(folder)
        (folder / "generation_config.json").unlink(missing_ok=True)

        ids = torch.randint(VOCAB, (2, 24))
        model = load(folder, torch.float32)
        logits = model(ids).logits
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        with torch.no_grad():
            logits_bf16 = load(folder, torch.bfloat16)(ids).logits.float()
        golden = {
            "input_ids": ids, "logits": logits.detach(), "logits_bf16": logits_bf16,
            "loss": loss.detach(), **gradients_by_checkpoint_name(model, HERE / "temporary"),
        }
        save_file({name: tensor.contiguous() for name, tensor in golden.items()}, folder / "golden.safetensors")
        apart = (logits_bf16 - logits).abs().max() / logits.abs().max()
        scaling = json.loads((folder / "config.json").read_text()).get("rope_parameters")
        print(f"{name}: {sum(p.numel() for p in model.parameters())} parameters, loss {loss:.3f}, "
              f"bf16 is {apart:.1e} from f32, {scaling}")


if __name__ == "__main__":
    main()
