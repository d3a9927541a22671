"""Adapters that PEFT wrote over the tiny Llamas beside this file and over a small net of convolutions, with
PEFT's outputs. Every value that trains is moved off where it starts.

Over a Llama: adapter_config.json, adapter_model.safetensors and golden.safetensors with `input_ids`, i64
[batch, length], and `logits`, f32 [batch, length, 128]; for PiSSA also residual_base.safetensors, the weights
that its start left over.

Over the net (`ConvNet`, whose weights are in conv_net/model.safetensors): golden.safetensors holds `ids`, i64
[3, 16], and `output`, f32 [3, 5].

    pip install torch==2.9.0 transformers==5.23.0 peft==0.21.2 safetensors==0.8.0
    python tests/golden/make_peft_cases.py [CASE ...]
"""

import json
import sys
import warnings
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

HERE = Path(__file__).parent
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# Over tiny_llama, with two rows of 24 tokens.
FIRST_CASES = {
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
# The base and the settings; one row of 12 tokens.
CASES = {
    "peft_dora": ("tiny_llama_tied", dict(r=4, lora_alpha=6, target_modules=["q_proj", "down_proj"], use_dora=True)),
    "peft_dora_rslora": (
        "tiny_llama",
        dict(
            r=4, lora_alpha=6, target_modules=["v_proj", "up_proj"], use_dora=True, use_rslora=True,
            rank_pattern={"v_proj": 2}, alpha_pattern={"layers.1.mlp.up_proj": 3},
        ),
    ),
    "peft_lora_bias": ("tiny_llama_tied", dict(r=3, lora_alpha=6, target_modules=["q_proj", "up_proj"], lora_bias=True)),
    # One projection is saved whole, with its bias: PEFT writes that bias three times.
    "peft_bias_all": (
        "tiny_llama_tied",
        dict(r=2, lora_alpha=6, target_modules=["q_proj"], bias="all", modules_to_save=["layers.1.mlp.down_proj"]),
    ),
    "peft_bias_lora_only": (
        "tiny_llama_tied", dict(r=2, lora_alpha=6, target_modules=["q_proj", "down_proj"], bias="lora_only"),
    ),
    "peft_saved_head": ("tiny_llama", dict(r=2, lora_alpha=6, target_modules=["q_proj"], modules_to_save=["lm_head"])),
    # The head stays tied to the embedding as it was. The down projection has a bias.
    "peft_saved_embedding_tied": (
        "tiny_llama_tied",
        dict(
            r=2, lora_alpha=6, target_modules=["q_proj", "down_proj"],
            modules_to_save=["embed_tokens", "layers.1.mlp.down_proj"],
        ),
    ),
    # PEFT adds the frozen weights of both.
    "peft_embedding": ("tiny_llama", dict(r=3, lora_alpha=6, target_modules=["q_proj", "embed_tokens", "lm_head"])),
    "peft_embedding_tied": ("tiny_llama_tied", dict(r=3, lora_alpha=6, target_modules=["q_proj", "embed_tokens"])),
    "peft_embedding_dora": ("tiny_llama", dict(r=3, lora_alpha=6, target_modules=["embed_tokens"], use_dora=True)),
    "peft_tokens": (
        "tiny_llama",
        dict(r=2, lora_alpha=6, target_modules=["q_proj"], trainable_token_indices={"embed_tokens": [7, 90, 3, 127]}),
    ),
    "peft_tokens_tied": (
        "tiny_llama_tied", dict(r=2, lora_alpha=6, target_modules=["q_proj"], trainable_token_indices=[7, 90, 3, 127]),
    ),
    # An embedding starts at zero whatever the start is.
    "peft_pissa": (
        "tiny_llama",
        dict(r=3, lora_alpha=6, target_modules=["q_proj", "v_proj", "embed_tokens"], init_lora_weights="pissa"),
    ),
    "peft_olora": (
        "tiny_llama",
        dict(
            r=3, lora_alpha=6, target_modules=["q_proj", "v_proj"], init_lora_weights="olora", use_rslora=True,
            use_dora=True, rank_pattern={"v_proj": 4},
        ),
    ),
    "peft_negative_alpha": ("tiny_llama", dict(r=3, lora_alpha=-6, target_modules=["q_proj"])),
    "peft_orthogonal": ("tiny_llama", dict(r=4, lora_alpha=6, target_modules=["q_proj"], init_lora_weights="orthogonal")),
    "peft_layers": (
        "tiny_llama",
        dict(
            r=2, lora_alpha=6, target_modules=["q_proj", "k_proj", "up_proj"], exclude_modules=["k_proj"],
            layers_to_transform=[1], layers_pattern="layers",
        ),
    ),
}
# Over the net.
CONV_CASES = {
    "peft_conv": dict(
        r=4, lora_alpha=6, target_modules=["embed", "along", "plain", "grouped"], modules_to_save=["head"]
    ),
    "peft_conv_dora": dict(
        r=3, lora_alpha=6, target_modules=["along", "plain", "head"], use_dora=True, rank_pattern={"plain": 2}
    ),
}


class ConvNet(torch.nn.Module):
    """Tokens to 5 numbers, by way of convolutions with strides, padding and groups."""

    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(11, 6)
        self.along = torch.nn.Conv1d(6, 8, 3, stride=2, padding=1)
        self.plain = torch.nn.Conv2d(4, 6, (3, 2), stride=(1, 2), padding=(1, 0), bias=False)
        self.grouped = torch.nn.Conv2d(6, 4, 3, padding=1, groups=2)
        self.head = torch.nn.Linear(4 * 4 * 2, 5)

    def forward(self, ids):  # [batch, 16]
        x = self.along(self.embed(ids).transpose(1, 2)).tanh()  # [batch, 8, 8]
        x = self.plain(x.reshape(-1, 4, 4, 4)).tanh()  # [batch, 6, 4, 2]
        x = self.grouped(x).tanh()  # [batch, 4, 4, 2]
        return self.head(x.flatten(1))


def save(model, name: str, golden: dict) -> None:
    model.save_pretrained(HERE / name)
    # PEFT writes the path of this machine, and sets in an order that changes from run to run.
    config_path = HERE / name / "adapter_config.json"
    config = json.loads(config_path.read_text())
    config["base_model_name_or_path"] = None
    if isinstance(config["target_modules"], list):
        config["target_modules"].sort()
    config_path.write_text(json.dumps(config, indent=2) + "\n")
    (HERE / name / "README.md").unlink(missing_ok=True)
    save_file({key: value.contiguous() for key, value in golden.items()}, HERE / name / "golden.safetensors")
    print(name, {path.name: path.stat().st_size for path in sorted((HERE / name).iterdir())})


def load(base: str):
    return AutoModelForCausalLM.from_pretrained(HERE / base, dtype=torch.float32, attn_implementation="eager")


def make_first(name: str, settings: dict) -> None:
    torch.manual_seed(0)
    model = get_peft_model(load("tiny_llama"), LoraConfig(task_type="CAUSAL_LM", **settings)).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "lora_" in key:
                parameter.copy_(torch.randn_like(parameter) * 0.2)
        ids = load_file(HERE / "tiny_llama" / "golden.safetensors")["input_ids"]
        save(model, name, {"input_ids": ids, "logits": model(ids).logits})


def move(model) -> None:
    """Every value that trains, by about a fifth of what it may be."""
    for _, parameter in sorted(model.named_parameters()):
        if parameter.requires_grad:
            parameter.add_(torch.randn_like(parameter) * 0.2)


@torch.no_grad()
def make(name: str, base: str, settings: dict) -> None:
    torch.manual_seed(0)
    model = get_peft_model(load(base), LoraConfig(task_type="CAUSAL_LM", **settings)).eval()
    move(model)
    ids = load_file(HERE / base / "golden.safetensors")["input_ids"][:1, :12].clone()
    trained = settings.get("trainable_token_indices")
    if trained:  # ones that are in the text
        ids[0, 2], ids[0, 5], ids[0, 9] = 90, 3, 127
    golden = {"input_ids": ids, "logits": model(ids).logits}
    save(model, name, golden)
    if name.endswith("_tied"):
        # Merging into an embedding that is tied to the head changes the head with it, in PEFT.
        merged = model.merge_and_unload()(ids).logits
        save_file({**golden, "peft_merged": merged}, HERE / name / "golden.safetensors")
    if settings.get("init_lora_weights") == "pissa":
        left = {
            key.removeprefix("base_model.model."): value
            for key, value in model.state_dict().items()
            if key.endswith("base_layer.weight") and "embed_tokens" not in key
        }
        save_file(left, HERE / name / "residual_base.safetensors")


@torch.no_grad()
def make_conv(name: str, settings: dict) -> None:
    torch.manual_seed(0)
    net = ConvNet()
    ids = torch.randint(11, (3, 16))
    (HERE / "conv_net").mkdir(exist_ok=True)
    save_file(net.state_dict(), HERE / "conv_net" / "model.safetensors")
    model = get_peft_model(net, LoraConfig(**settings)).eval()
    move(model)
    save(model, name, {"ids": ids, "output": model(ids)})


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    wanted = sys.argv[1:] or [*FIRST_CASES, *CASES, *CONV_CASES]
    for name in wanted:
        if name in FIRST_CASES:
            make_first(name, FIRST_CASES[name])
        elif name in CASES:
            make(name, *CASES[name])
        else:
            make_conv(name, CONV_CASES[name])
