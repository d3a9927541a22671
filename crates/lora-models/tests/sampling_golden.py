"""Writes tests/data/sampling.json: the probabilities that transformers' logits processors leave.

    pip install torch==2.9.0 transformers==5.23.0 && python sampling_golden.py

Each case has the settings, a row of logits, the tokens so far, and the probabilities. Nothing is drawn,
so that run again it writes the same file, to the rounding of another torch.
"""

import json
from pathlib import Path

import torch
from transformers.generation import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

# transformers' order, as in GenerationMixin._get_logits_processor.
PROCESSORS = {
    "repetition_penalty": RepetitionPenaltyLogitsProcessor,
    "temperature": TemperatureLogitsWarper,
    "top_k": TopKLogitsWarper,
    "top_p": TopPLogitsWarper,
    "min_p": MinPLogitsWarper,
}
# A value next to a limit would be cut by one rounding and kept by another.
MARGIN = 1e-4

SETTINGS = [
    {"temperature": 1.0},
    {"temperature": 0.3},
    {"temperature": 2.5},
    {"top_k": 1},
    {"top_k": 5},
    {"top_k": 1000},
    {"top_p": 0.0},
    {"top_p": 0.37},
    {"top_p": 0.9},
    {"top_p": 1.0},
    {"min_p": 0.0},
    {"min_p": 0.12},
    {"min_p": 1.0},
    {"repetition_penalty": 1.7, "temperature": 1.0},
    {"repetition_penalty": 0.6, "temperature": 1.0},
    {"temperature": 0.7, "top_k": 20, "top_p": 0.8},
    {"temperature": 1.5, "top_k": 9, "top_p": 0.71, "min_p": 0.2},
    {"repetition_penalty": 1.3, "temperature": 0.6, "top_k": 40, "top_p": 0.95, "min_p": 0.05},
    {"repetition_penalty": 2.0, "temperature": 1.8, "top_p": 0.66, "min_p": 0.31},
]


def probabilities(settings, logits, tokens):
    chain = [(name, PROCESSORS[name]) for name in PROCESSORS if name in settings]
    scores, ids = torch.tensor([logits]), torch.tensor([tokens])
    for name, processor in chain:
        if name == "top_p":
            ascending = scores.double().softmax(-1).sort().values.cumsum(-1)
            assert (ascending[..., :-1] - (1 - settings[name])).abs().min() > MARGIN or settings[name] in (0.0, 1.0)
        if name == "min_p":
            weights = scores.double().softmax(-1)
            parts = weights / weights.max()
            assert (parts - settings[name]).abs().min() > MARGIN or settings[name] in (0.0, 1.0)
        scores = LogitsProcessorList([processor(settings[name])])(ids, scores)
    return scores.double().softmax(-1)[0].tolist()


generator = torch.Generator().manual_seed(11)
rows = [
    # Negative, positive, zero, equal to each other (away from every limit), and far apart.
    [2.0, -1.5, 0.0, 4.0, -30.0, 3.25, 1.0, -0.25, 3.5, 0.5, -2.0, 2.75],
    torch.randn(60, generator=generator).mul(3).tolist(),
]
tokens = [[3, 0, 3, 1, 2, 8], [0, 7, 7, 31, 59, 12, 40, 3, 3, 22]]
cases = []
for row, (logits, written) in enumerate(zip(rows, tokens)):
    for settings in SETTINGS:
        cases.append({"row": row, **settings, "probabilities": probabilities(settings, logits, written)})

# Tokens that are as likely as the last of top_k stay.
rows.append([1.0, 3.0, 2.0, 2.0, 2.0, 0.0])
tokens.append([])
cases.append({"row": 2, "top_k": 2, "probabilities": probabilities({"top_k": 2}, rows[2], [0])})

text = json.dumps({"rows": rows, "tokens": tokens, "cases": cases}, separators=(",", ":"))
path = Path(__file__).parent / "data" / "sampling.json"
path.write_text(text.replace('{"row"', '\n{"row"') + "\n")
