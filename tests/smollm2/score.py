"""Scores tokens by MLX: reads {"model", "sequences": [{"prompt", "tokens"}]} and writes for each
token {"best", "best_logprob", "logprob"}: the likeliest token in its place, and both chances."""

import json
import sys

import mlx.core as mx
from mlx_lm import load

mx.set_default_device(mx.cpu)
task = json.load(sys.stdin)
model, tokenizer = load(task["model"])
out = []
for sequence in task["sequences"]:
    prompt, tokens = sequence["prompt"], sequence["tokens"]
    logits = model(mx.array([prompt + tokens[:-1]]))[0, len(prompt) - 1 :].astype(mx.float32)
    logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    best = mx.argmax(logprobs, axis=-1)
    rows = zip(tokens, logprobs, best.tolist())
    out.append([{"best": b, "best_logprob": p[b].item(), "logprob": p[t].item()} for t, p, b in rows])
texts = [tokenizer.encode(text) for text in task["texts"]]
chat = tokenizer.apply_chat_template([{"role": "user", "content": task["chat"]}], add_generation_prompt=True)
print(json.dumps({"scores": out, "texts": texts, "chat": chat}))
