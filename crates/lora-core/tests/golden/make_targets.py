"""Which layers PEFT adapts, and with which rank and alpha: tests/golden/targets.json.

Each case is a LoraConfig over a model of 1 x 1 linear layers at the given paths, injected by PEFT
itself. A case is `[model, config, outcome]`:

- `model` is a key of `models`, whose value is the list of its linear layers' paths;
- `outcome` is `"config"` where LoraConfig refuses the settings, `"none"` where PEFT finds nothing to
  adapt, and otherwise the indices of the adapted paths; `{index: [rank, alpha]}` holds those that
  differ from the config's own.

Cases in which PEFT would adapt something that is no linear layer are left out, since PEFT refuses
those by the kind of the layer and not by its name.

    pip install torch==2.9.0 peft==0.21.2
    python crates/lora-core/tests/golden/make_targets.py
"""

import json
import random
import warnings
from pathlib import Path

import peft
import torch
from peft import LoraConfig
from peft.tuners import tuners_utils
from peft.tuners.lora import LoraModel

R, ALPHA = 8, 16
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]


def llama(layers: int) -> list[str]:
    paths = []
    for i in range(layers):
        paths += [f"model.layers.{i}.self_attn.{name}" for name in ATTENTION]
        paths += [f"model.layers.{i}.mlp.{name}" for name in MLP]
    return paths + ["lm_head"]


MODELS = {
    "llama": llama(3),
    # Twelve layers, so that 1, 10 and 11 can be confused.
    "deep": [f"model.layers.{i}.{name}" for i in range(12) for name in ("q_proj", "xq_proj")],
    # The list stands at the top, where PEFT's default rule for indices does not see it.
    "top": [f"layers.{i}.{name}" for i in range(3) for name in ("q", "k", "kv.q")] + ["q", "head"],
    "experts": [
        f"model.layers.{i}.mlp.experts.{j}.{name}" for i in range(2) for j in range(3) for name in ("w1", "w2")
    ]
    + ["model.layers.0.mlp.gate", "model.layers.1.mlp.gate"],
    # Two towers, a list in a list, an index as the last part, numbers with zeros, underscores.
    "odd": [
        "vision.blocks.0.attn.qkv",
        "vision.blocks.1.attn.qkv",
        "text.h.0.attn.q_proj",
        "text.h.0.attn.qxproj",
        "text.h.1.attn.q_proj",
        "text.h.01.attn.q_proj",
        "text.stages.0.blocks.1.fc",
        "text.stages.1.blocks.0.fc",
        "text.head.0",
        "text.head.2",
        "text.h_1.2.fc",
        "a.1.2.3.fc",
        "1.fc",
        "1.2.fc",
        "fc",
    ],
}


# It wraps what modules_to_save names, after the targets were chosen, and takes some kinds of module only.
tuners_utils.set_additional_trainable_modules = lambda **_: None


def build(paths: list[str]) -> torch.nn.Module:
    model = torch.nn.Module()
    for path in paths:
        *parents, last = path.split(".")
        module = model
        for name in parents:
            if name not in module._modules:
                module.add_module(name, torch.nn.Module())
            module = module._modules[name]
        module.add_module(last, torch.nn.Linear(1, 1))
    return model


def outcome(paths: list[str], settings: dict):
    try:
        config = LoraConfig(r=R, lora_alpha=ALPHA, **json.loads(json.dumps(settings)))
    except ValueError:
        return ["config"]
    model = build(paths)
    try:
        adapted = LoraModel(model, config, "default").targeted_module_names
    except ValueError as error:
        if "is not supported" in str(error):
            return None  # a container was targeted
        assert type(error).__name__ == "NoMatchingPeftModuleError", error
        return ["none"]
    indices, changed = [], {}
    for index, path in enumerate(paths):
        if path in adapted:
            layer = model.get_submodule(path)
            indices.append(index)
            own = [layer.r["default"], layer.lora_alpha["default"]]
            if own != [R, ALPHA]:
                changed[index] = own
    return [indices] + ([changed] if changed else [])


# Written by hand: each names a rule or a trap.
BY_HAND = [
    ("llama", {"target_modules": ["q_proj", "v_proj"]}),
    ("llama", {"target_modules": ["self_attn.q_proj"]}),
    ("llama", {"target_modules": ["attn.q_proj"]}),
    ("llama", {"target_modules": ["proj"]}),
    ("llama", {"target_modules": ["model.layers.1.self_attn.q_proj"]}),
    ("llama", {"target_modules": ["layers.1.self_attn.q_proj", "lm_head"]}),
    ("llama", {"target_modules": [".q_proj"]}),
    ("llama", {"target_modules": ["q_proj."]}),
    ("llama", {"target_modules": [""]}),
    ("llama", {"target_modules": ["q_proj", "q_proj", "query_key_value"]}),
    ("llama", {"target_modules": ["q.proj"]}),
    ("llama", {"target_modules": [".*q_proj"]}),
    ("llama", {"target_modules": "all-linear"}),
    ("llama", {"target_modules": "All-Linear", "exclude_modules": ["lm_head"]}),
    ("llama", {"target_modules": "all-linear", "layers_to_transform": [0]}),
    ("llama", {"target_modules": r".*\.q_proj"}),
    ("llama", {"target_modules": "q_proj"}),
    ("llama", {"target_modules": "q_proj|lm_head"}),
    ("llama", {"target_modules": "lm_head|lm"}),
    ("llama", {"target_modules": "lm|lm_head"}),
    ("llama", {"target_modules": r"model.layers.[02].*_proj"}),
    ("llama", {"target_modules": r"(?i).*\.Q_PROJ"}),
    ("llama", {"target_modules": r"^model.*(q|v)_proj$"}),
    ("llama", {"target_modules": r".*\.\d\.mlp\.\w+"}),
    ("llama", {"target_modules": r".*q_proj", "layers_to_transform": [0]}),
    ("llama", {"target_modules": r".*q_proj", "layers_to_transform": []}),
    ("llama", {"target_modules": r".*q_proj", "layers_pattern": ["layers"]}),
    ("llama", {"target_modules": ["q_proj"], "layers_pattern": ["layers"]}),
    ("llama", {"target_modules": ["q_proj"], "exclude_modules": ["q_proj"]}),
    ("llama", {"target_modules": ["q_proj", "k_proj"], "exclude_modules": ["layers.1.self_attn.q_proj"]}),
    ("llama", {"target_modules": ["q_proj", "k_proj"], "exclude_modules": ["self_attn"]}),
    ("llama", {"target_modules": ["q_proj", "k_proj"], "exclude_modules": []}),
    ("llama", {"target_modules": ["q_proj", "k_proj"], "exclude_modules": ""}),
    ("llama", {"target_modules": ["q_proj", "k_proj"], "exclude_modules": "q_proj"}),
    ("llama", {"target_modules": ["q_proj", "k_proj"], "exclude_modules": r".*\.0\..*"}),
    ("llama", {"target_modules": ["q_proj", "k_proj"], "exclude_modules": r".*\.0\..*|.*k_proj"}),
    ("llama", {"target_modules": ["model.layers.0.self_attn.q_proj", "k_proj"], "layers_to_transform": [1]}),
    ("llama", {"target_modules": ["layers.0.self_attn.q_proj", "k_proj"], "layers_to_transform": [1]}),
    ("llama", {"target_modules": ["q_proj", "lm_head"], "layers_to_transform": [1]}),
    ("llama", {"target_modules": ["q_proj"], "layers_to_transform": 2}),
    ("llama", {"target_modules": ["q_proj"], "layers_to_transform": 0}),
    ("llama", {"target_modules": ["q_proj"], "layers_to_transform": []}),
    ("llama", {"target_modules": ["q_proj"], "layers_to_transform": [], "layers_pattern": ["h"]}),
    ("llama", {"target_modules": ["q_proj"], "layers_to_transform": [0, 2, 2, 7]}),
    ("llama", {"target_modules": ["q_proj"], "layers_to_transform": [7]}),
    ("llama", {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": "layers"}),
    ("llama", {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": ""}),
    ("llama", {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": []}),
    ("llama", {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": ["h", "layers"]}),
    ("llama", {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": ["h"]}),
    ("llama", {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": ["layer"]}),
    ("llama", {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": ["ayers"]}),
    ("llama", {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": ["layer."]}),
    ("llama", {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": ["model.layers"]}),
    ("llama", {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": ["model|layers"]}),
    ("llama", {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": ["(model|layers)"]}),
    ("llama", {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": ["h|layers"]}),
    ("llama", {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": ["model", "layers"]}),
    ("llama", {"target_modules": ["q_proj", "lm_head"], "modules_to_save": ["lm_head"]}),
    ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["model.layers.1"]}),
    ("llama", {"target_modules": ["q_proj", "up_proj"], "modules_to_save": ["self_attn"]}),
    ("llama", {"target_modules": ["q_proj", "up_proj"], "modules_to_save": ["mlp|self_attn"]}),
    ("llama", {"target_modules": ["q_proj", "up_proj"], "modules_to_save": ["attn"]}),
    ("llama", {"target_modules": ["q_proj", "up_proj"], "modules_to_save": ["1"]}),
    ("llama", {"target_modules": ["q_proj"], "rank_pattern": {"q_proj": 4}}),
    ("llama", {"target_modules": ["q_proj"], "rank_pattern": {"proj": 4}}),
    ("llama", {"target_modules": ["q_proj"], "rank_pattern": {"q.proj": 4}}),
    ("llama", {"target_modules": ["q_proj"], "rank_pattern": {"layers.1.self_attn.q_proj": 4, "q_proj": 2}}),
    ("llama", {"target_modules": ["q_proj"], "rank_pattern": {"q_proj": 2, "layers.1.self_attn.q_proj": 4}}),
    ("llama", {"target_modules": ["q_proj"], "rank_pattern": {"^model.layers.0.self_attn.q_proj": 3}}),
    ("llama", {"target_modules": ["q_proj"], "rank_pattern": {"^layers.0.self_attn.q_proj": 3}}),
    ("llama", {"target_modules": ["q_proj", "k_proj"], "rank_pattern": {"q_proj|k_proj": 3}}),
    ("llama", {"target_modules": ["q_proj", "k_proj"], "rank_pattern": {".*": 3, "k_proj": 5}}),
    ("llama", {"target_modules": ["q_proj", "k_proj"], "alpha_pattern": {r".*\.[01]\..*k_proj": 3.5}}),
    ("llama", {"target_modules": ["q_proj", "k_proj"], "alpha_pattern": {"k_proj": 3}, "rank_pattern": {"v_proj": 3}}),
    ("deep", {"target_modules": ["q_proj"], "layers_to_transform": [1]}),
    ("deep", {"target_modules": ["q_proj"], "layers_to_transform": [10, 11]}),
    ("deep", {"target_modules": ["q_proj"], "exclude_modules": ["1.q_proj"]}),
    ("deep", {"target_modules": ["q_proj", "xq_proj"], "rank_pattern": {"1.q_proj": 2}}),
    ("deep", {"target_modules": ["q_proj", "xq_proj"], "rank_pattern": {".1.q_proj": 2}}),
    ("deep", {"target_modules": ["q_proj", "xq_proj"], "rank_pattern": {"layers.1.*": 2}}),
    ("deep", {"target_modules": ["q_proj", "xq_proj"], "modules_to_save": ["layers.1"]}),
    ("top", {"target_modules": ["q"], "layers_to_transform": [1]}),
    ("top", {"target_modules": ["k"], "layers_to_transform": [1]}),
    ("top", {"target_modules": ["q"], "layers_to_transform": [1], "layers_pattern": ["layers"]}),
    ("top", {"target_modules": ["q", "k"], "layers_to_transform": [1], "layers_pattern": ["layers"]}),
    ("top", {"target_modules": ["q"]}),
    ("top", {"target_modules": ["kv.q"]}),
    ("top", {"target_modules": ["v.q"]}),
    ("experts", {"target_modules": ["w1"], "layers_to_transform": [1]}),
    ("experts", {"target_modules": ["w1", "gate"], "layers_to_transform": [2]}),
    ("experts", {"target_modules": ["w1", "gate"], "layers_to_transform": [2], "layers_pattern": ["experts"]}),
    ("experts", {"target_modules": ["w1"], "layers_to_transform": [0], "layers_pattern": ["experts", "layers"]}),
    ("experts", {"target_modules": ["w1", "gate"], "layers_to_transform": [0], "layers_pattern": ["experts", "layers"]}),
    ("experts", {"target_modules": ["w1"], "layers_to_transform": [1], "layers_pattern": [r"layers\.0\.mlp\.experts"]}),
    ("experts", {"target_modules": ["experts.0.w1"], "layers_to_transform": [1]}),
    ("experts", {"target_modules": ["w1", "w2"], "modules_to_save": ["experts.1"]}),
    ("odd", {"target_modules": ["fc"]}),
    ("odd", {"target_modules": ["fc"], "layers_to_transform": [1]}),
    ("odd", {"target_modules": ["fc"], "layers_to_transform": [2]}),
    ("odd", {"target_modules": ["fc"], "layers_to_transform": [2], "layers_pattern": ["1"]}),
    ("odd", {"target_modules": ["fc"], "layers_to_transform": [2], "layers_pattern": [r"\d"]}),
    ("odd", {"target_modules": ["fc"], "layers_to_transform": [2], "layers_pattern": ["h"]}),
    ("odd", {"target_modules": ["fc"], "layers_to_transform": [2], "layers_pattern": ["h_1"]}),
    ("odd", {"target_modules": ["fc"], "layers_to_transform": [0], "layers_pattern": ["blocks"]}),
    ("odd", {"target_modules": ["qkv", "q_proj"], "layers_to_transform": [1]}),
    ("odd", {"target_modules": ["qkv", "q_proj"], "layers_to_transform": [1], "layers_pattern": ["blocks"]}),
    ("odd", {"target_modules": ["qkv", "q_proj"], "layers_to_transform": [1], "layers_pattern": ["blocks", "h"]}),
    ("odd", {"target_modules": ["head.0", "2"]}),
    ("odd", {"target_modules": ["head.0", "head.2"], "layers_to_transform": [0]}),
    ("odd", {"target_modules": r".*\.head\.\d"}),
    ("odd", {"target_modules": r"(vision|text)\..*\.q.*"}),
    ("odd", {"target_modules": ["q_proj", "qxproj"], "rank_pattern": {"q.proj": 2}}),
    ("odd", {"target_modules": ["q_proj", "qxproj"], "rank_pattern": {r"q\.proj": 2}}),
    ("odd", {"target_modules": ["q_proj", "qxproj"], "exclude_modules": ["q.proj"]}),
    ("odd", {"target_modules": ["q_proj", "qxproj"], "modules_to_save": ["q.proj"]}),
    ("odd", {"target_modules": ["q_proj", "qxproj"], "modules_to_save": ["text.h.0"]}),
    ("odd", {"target_modules": ["q_proj", "qxproj"], "modules_to_save": ["h.0"]}),
    ("odd", {"target_modules": ["q_proj", "qxproj"], "modules_to_save": ["h.?0"]}),
]


def at_random(rng: random.Random) -> tuple[str, dict]:
    """A case out of parts that exist in the model, mostly."""
    name = rng.choice(list(MODELS))
    paths = MODELS[name]

    def suffix() -> str:
        parts = rng.choice(paths).split(".")
        return ".".join(parts[-rng.choice([1, 1, 1, 2, 3, len(parts)]) :])

    def pattern() -> str:
        parts = [part if rng.random() < 0.6 else rng.choice([r"\w+", ".", ".*", r"[a-q]\w*", r"\d+"]) for part in suffix().split(".")]
        return rng.choice(["", ".*", r".*\.", r"(?:.*\.)?"]) + rng.choice([".", r"\."]).join(parts)

    def some(make, most: int) -> list:
        return [make() for _ in range(rng.randint(1, most))]

    settings: dict = {"target_modules": pattern() if rng.random() < 0.25 else some(suffix, 4)}
    if rng.random() < 0.35:
        settings["exclude_modules"] = pattern() if rng.random() < 0.4 else some(suffix, 2)
    if isinstance(settings["target_modules"], list) and rng.random() < 0.5:
        settings["layers_to_transform"] = some(lambda: rng.randint(0, 4), 3)
        if rng.random() < 0.5:
            segments = sorted({part for path in paths for part in path.split(".")[:-1]})
            settings["layers_pattern"] = some(lambda: rng.choice(segments), 2)
    if rng.random() < 0.15:
        parts = rng.choice(paths).split(".")
        start = rng.randrange(len(parts))
        settings["modules_to_save"] = [".".join(parts[start : start + 2])]
    if rng.random() < 0.5:
        settings["rank_pattern"] = {rng.choice([suffix, pattern])(): rng.randint(1, 6) for _ in range(2)}
    if rng.random() < 0.3:
        settings["alpha_pattern"] = {rng.choice([suffix, pattern])(): rng.randint(1, 40) / 2 for _ in range(2)}
    return name, settings


def main() -> None:
    warnings.simplefilter("ignore")
    rng = random.Random(0)
    cases = list(BY_HAND)
    cases += [at_random(rng) for _ in range(260)]
    rows = []
    for name, settings in cases:
        found = outcome(MODELS[name], settings)
        if found is not None:
            rows.append([name, settings, *found])
    head = {"peft": peft.__version__, "torch": torch.__version__, "rank": R, "alpha": ALPHA, "models": MODELS}
    lines = [f'"{key}": {json.dumps(value, separators=(",", ":"))},' for key, value in head.items()]
    lines.append('"cases": [')
    lines.append(",\n".join(json.dumps(row, separators=(",", ":")) for row in rows) + "\n]")
    path = Path(__file__).with_name("targets.json")
    path.write_text("{\n" + "\n".join(lines) + "\n}\n")
    print(f"{len(rows)} of {len(cases)} cases, {path.stat().st_size} bytes")


main()
