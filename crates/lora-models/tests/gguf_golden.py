"""Writes tests/data/blocks.gguf and blocks.f32: one array, packed and unpacked by ggml's own package.

    pip install gguf==0.19.0 && python gguf_golden.py

blocks.f32 has the unpacked values of each tensor, little-endian f32, one tensor after the other in
the order of TYPES. Run again, it writes the same bytes.
"""

from pathlib import Path

import numpy as np
from gguf import GGUFWriter, GGMLQuantizationType, quants

TYPES = ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1"]
DATA = Path(__file__).parent / "data"

# Rows of different size, so that each block has a scale of its own; one block of zeros.
array = np.random.default_rng(7).standard_normal((6, 64)).astype(np.float32)
array *= np.array([1, 0.01, 100, 1e-6, 3, 0.5], dtype=np.float32)[:, None]
array[4, :32] = 0

DATA.mkdir(exist_ok=True)
writer = GGUFWriter(DATA / "blocks.gguf", "blocks")
writer.add_array("test.words", ["a", "b c"])
writer.add_float32("test.float", 1e-5)
unpacked = []
for name in TYPES:
    type_ = GGMLQuantizationType[name]
    packed = quants.quantize(array, type_)
    writer.add_tensor(name, packed, raw_dtype=type_)
    unpacked.append(quants.dequantize(packed, type_).astype("<f4"))
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_tensors_to_file()
writer.close()
(DATA / "blocks.f32").write_bytes(b"".join(values.tobytes() for values in unpacked))
