"""Writes tests/data/blocks.gguf and blocks.f32: arrays, packed and unpacked by ggml's own package.

    pip install gguf==0.19.0 && python gguf_golden.py

blocks.f32 has the unpacked values of each tensor, little-endian f32, one tensor after the other in
the order of PACKED and then RANDOM. Run again, it writes the same bytes.
"""

from pathlib import Path

import numpy as np
from gguf import GGML_QUANT_SIZES, GGUFWriter, GGMLQuantizationType, quants

# What the package can pack itself.
PACKED = ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"]
# What it can only unpack, with the places of the f16 in a block: their other bytes are random.
RANDOM = {"Q2_K": [80, 82], "Q3_K": [108], "Q4_K": [0, 2], "Q5_K": [0, 2], "Q6_K": [208]}
DATA = Path(__file__).parent / "data"

# Rows of different size, so that each block has a scale of its own; one block of zeros.
array = np.random.default_rng(7).standard_normal((6, 64)).astype(np.float32)
array *= np.array([1, 0.01, 100, 1e-6, 3, 0.5], dtype=np.float32)[:, None]
array[4, :32] = 0

# The f16 of five blocks: usual ones, one below 0, the smallest, 0.
SCALES = np.array([1.5e-3, 0.37, -0.02, 2**-24, 0], dtype=np.float16)

DATA.mkdir(exist_ok=True)
writer = GGUFWriter(DATA / "blocks.gguf", "blocks")
writer.add_array("test.words", ["a", "b c"])
writer.add_float32("test.float", 1e-5)
unpacked = []


def add(name, packed):
    type_ = GGMLQuantizationType[name]
    writer.add_tensor(name, packed, raw_dtype=type_)
    unpacked.append(quants.dequantize(packed, type_).astype("<f4"))


for name in PACKED:
    add(name, quants.quantize(array, GGMLQuantizationType[name]))
for seed, (name, places) in enumerate(RANDOM.items()):
    _, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType[name]]
    random = np.random.default_rng(seed)
    blocks = random.integers(0, 256, (len(SCALES), block_bytes), dtype=np.uint8)
    for turn, place in enumerate(places):
        blocks[:, place : place + 2] = np.roll(SCALES, turn).astype("<f2").view(np.uint8).reshape(-1, 2)
    add(name, blocks)
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_tensors_to_file()
writer.close()
(DATA / "blocks.f32").write_bytes(b"".join(values.tobytes() for values in unpacked))
