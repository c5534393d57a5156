#!/usr/bin/env python3
"""Writes vectors.gguf: one tensor of every number format, and what each stands for.

Needs numpy and gguf 0.19 from PyPI, whose reading of the formats is independent of this project's.
Formats that the package can write are made from normal numbers with outliers; for the others every
byte is drawn, but for the scales, which stay finite. `NAME` holds blocks, `NAME.f32` their values.
"""

from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType as Type, GGUFWriter, quants

ROWS, COLS = 3, 512
WRITTEN = [Type.F16, Type.BF16, Type.Q8_0, Type.Q4_0, Type.Q4_1, Type.Q5_0, Type.Q5_1]
# Byte offsets of the half-precision scales of a block.
DRAWN = {Type.Q4_K: (144, (0, 2)), Type.Q5_K: (176, (0, 2)), Type.Q6_K: (210, (208,))}

rng = np.random.default_rng(7)
values = rng.normal(size=(ROWS, COLS)).astype(np.float32)
values[0, 5], values[1, 40:72], values[2, 300] = 40.0, 0.0, -1e-3

out = GGUFWriter(Path(__file__).with_name("vectors.gguf"), "vectors")
for kind in WRITTEN:
    blocks = quants.quantize(values, kind)
    out.add_tensor(kind.name, blocks, raw_dtype=kind)
    out.add_tensor(f"{kind.name}.f32", quants.dequantize(blocks, kind))
for kind, (size, halves) in DRAWN.items():
    blocks = rng.integers(0, 256, size=(ROWS, COLS // 256 * size), dtype=np.uint8)
    view = blocks.reshape(-1, size)
    for offset in halves:
        scale = rng.normal(scale=0.01, size=len(view)).astype(np.float16)
        view[:, offset : offset + 2] = scale.view(np.uint8).reshape(-1, 2)
    out.add_tensor(kind.name, blocks, raw_dtype=kind)
    out.add_tensor(f"{kind.name}.f32", quants.dequantize(blocks, kind).astype(np.float32))
out.write_header_to_file()
out.write_kv_data_to_file()
out.write_tensors_to_file()
out.close()
