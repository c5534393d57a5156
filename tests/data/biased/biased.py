#!/usr/bin/env python3
"""Writes a tiny Qwen2 with drawn weights as the hub keeps it, and the logits that transformers computes.

Needs torch and transformers 5 from PyPI. The biases of keys are the largest, as trained ones are.
"""

import json
from pathlib import Path

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

HERE = Path(__file__).parent
torch.manual_seed(5)
config = Qwen2Config(
    vocab_size=264, hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=3,
    num_key_value_heads=1, max_position_embeddings=256, rms_norm_eps=1e-6, rope_theta=1e6, tie_word_embeddings=True,
)
model = Qwen2ForCausalLM(config).eval()
with torch.no_grad():
    for name, value in model.named_parameters():
        if name.endswith("bias"):
            size = {"q": 1.0, "k": 4.0, "v": 0.3}[name.split(".")[-2][0]]
            value.copy_(torch.randn_like(value) * size)
        elif value.dim() == 1:
            value.copy_(torch.rand_like(value) + 0.5)
        else:
            value.copy_(torch.randn_like(value) * 1.2 / value.shape[1] ** 0.5)
model = model.to(torch.bfloat16)
model.save_pretrained(HERE)
(HERE / "generation_config.json").unlink(missing_ok=True)
ids = [7, 19, 159, 0, 44, 44, 101, 3, 88, 12, 61, 5]
with torch.no_grad():
    # Read again, so that rotary frequencies are not those that BF16 rounded.
    logits = Qwen2ForCausalLM.from_pretrained(HERE, dtype=torch.float64)(torch.tensor([ids])).logits[0]
positions = [0, 4, 11]
reference = {"ids": ids, "positions": positions, "logits": [[round(x, 5) for x in logits[p].tolist()] for p in positions]}
(HERE / "reference.json").write_text(json.dumps(reference) + "\n")
