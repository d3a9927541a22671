#!/usr/bin/env python3
"""Makes the tiny random Llama models beside this file, with the logits that transformers gives.

    pip install torch==2.9.0 transformers==5.23.0 safetensors==0.8.0 numpy==2.4.6
    python tests/golden/make_tiny_llama.py

Each folder is a model as Hugging Face writes it (config.json, model.safetensors) and golden.safetensors:

    input_ids  int64 [2, 24]
    logits     f32   [2, 24, vocab]  in float32 arithmetic, from the weights as saved (rounded to f16 or bf16)
    greedy     int64 [12]            tiny_llama only: what greedy decoding appends to input_ids[0, :8]

tiny_llama       untied head, grouped queries, f32
tiny_llama_tied  tied head, head_dim that is not hidden / heads, biases everywhere, another RoPE base, bf16
tiny_llama_f16   one layer, one key-value head for all queries, f16

The same versions on the same processor write the same bytes; elsewhere the logits' last bits may differ.
"""

from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

HERE = Path(__file__).parent
VOCAB = 128

COMMON = dict(
    vocab_size=VOCAB, max_position_embeddings=64, rms_norm_eps=1e-5, bos_token_id=1, eos_token_id=2
)

CASES = {
    "tiny_llama": (
        torch.float32,
        dict(
            hidden_size=64, intermediate_size=160, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, head_dim=16,
            tie_word_embeddings=False,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        ),
    ),
    "tiny_llama_tied": (
        torch.bfloat16,
        dict(
            hidden_size=48, intermediate_size=112, num_hidden_layers=2,
            num_attention_heads=6, num_key_value_heads=3, head_dim=24,
            tie_word_embeddings=True, attention_bias=True, mlp_bias=True,
            rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
        ),
    ),
    "tiny_llama_f16": (
        torch.float16,
        dict(
            hidden_size=64, intermediate_size=96, num_hidden_layers=1,
            num_attention_heads=4, num_key_value_heads=1, head_dim=16,
            tie_word_embeddings=False,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        ),
    ),
}


def randomise(model):
    """Weights and biases from N(0, 0.2^2), norms from N(1, 0.2^2): no parameter is at a value that hides a mistake."""
    for name, parameter in model.named_parameters():
        mean = 1.0 if name.endswith("norm.weight") else 0.0
        parameter.data.normal_(mean, 0.2)


def greedy(model, ids, count):
    """The `count` tokens that taking the largest logit appends to `ids`, without a cache and without a stop."""
    for _ in range(count):
        ids = torch.cat([ids, model(ids[None]).logits[0, -1].argmax()[None]])
    return ids[-count:]


@torch.no_grad()
def main():
    torch.set_num_threads(1)  # the order of a sum depends on the number of threads
    for seed, (name, (dtype, settings)) in enumerate(CASES.items()):
        torch.manual_seed(seed)
        folder = HERE / name
        config = LlamaConfig(**COMMON, **settings)
        model = LlamaForCausalLM(config)
        randomise(model)
        model.to(dtype).save_pretrained(folder)
        (folder / "generation_config.json").unlink()

        model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
        ids = torch.randint(VOCAB, (2, 24))
        golden = {"input_ids": ids, "logits": model(ids).logits}
        if name == "tiny_llama":
            golden["greedy"] = greedy(model, ids[0, :8], 12)
        save_file(golden, folder / "golden.safetensors")
        print(f"{name}: {sum(p.numel() for p in model.parameters())} parameters, "
              f"logits' standard deviation {golden['logits'].std():.3f}")


if __name__ == "__main__":
    main()
