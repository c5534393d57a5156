#!/usr/bin/env python3
"""Writes a tiny Llama with drawn weights twice, as GGUF and as the hub keeps models, and what it computes.

Needs numpy, gguf 0.19, tokenizers 0.22 and safetensors from PyPI. The writers and the forward pass
(in f64) are independent of this project. Values are kept in BF16, so that both files hold the same
numbers; in GGUF the rows of query and key are interleaved, as llama.cpp wants them.
"""

import json
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType as Type, GGUFWriter, quants
from safetensors.numpy import save
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

HERE = Path(__file__).parent
LAYERS, WIDTH, HEADS, KV_HEADS, DIM, FFN, CONTEXT = 2, 48, 3, 1, 16, 80, 512
EPS, BASE = 1e-5, 10000.0
TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'].strip() + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

# The tokenizer: bytes, a few merges, three marks.
alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
marks = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
merges = [("t", "h"), ("th", "e"), ("Ġ", "the"), ("a", "n"), ("Ġ", "an")]
tokens = marks + alphabet + [a + b for a, b in merges]
tokenizer = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=merges))
tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
    [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
)
tokenizer.decoder = decoders.ByteLevel()
tokenizer.add_special_tokens([AddedToken(m, special=True, normalized=False) for m in marks])

rng = np.random.default_rng(11)


def bf16(x):
    """Rounded to BF16, as f32."""
    return quants.dequantize(quants.quantize(x.astype(np.float32), Type.BF16), Type.BF16)


def matrix(rows, cols):
    return bf16(rng.normal(size=(rows, cols)) * (1.5 / np.sqrt(cols)))


def gain(scale):
    """Uneven by blocks of 32 channels, as trained gains are."""
    return bf16(np.abs(rng.normal(size=WIDTH)) * scale * np.where(np.arange(WIDTH) < 32, 1.0, 0.1) + 0.001)


weights = {"model.embed_tokens": matrix(len(tokens), WIDTH)}
for i in range(LAYERS):
    p = f"model.layers.{i}."
    weights[p + "input_layernorm"] = gain(0.05)
    weights[p + "self_attn.q_proj"] = matrix(HEADS * DIM, WIDTH) * 16
    weights[p + "self_attn.k_proj"] = matrix(KV_HEADS * DIM, WIDTH) * 16
    weights[p + "self_attn.v_proj"] = matrix(KV_HEADS * DIM, WIDTH) * 16
    weights[p + "self_attn.o_proj"] = matrix(WIDTH, HEADS * DIM)
    weights[p + "post_attention_layernorm"] = gain(1.0)
    weights[p + "mlp.gate_proj"] = matrix(FFN, WIDTH)
    weights[p + "mlp.up_proj"] = matrix(FFN, WIDTH)
    weights[p + "mlp.down_proj"] = matrix(WIDTH, FFN)
weights["model.norm"] = gain(2.0)
weights["lm_head"] = matrix(len(tokens), WIDTH)


def norm(x, g):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + EPS) * g


def rotate(x):
    angle = np.arange(len(x))[:, None] * BASE ** (-np.arange(DIM // 2) / (DIM // 2))
    c, s = np.cos(angle)[:, None], np.sin(angle)[:, None]
    a, b = x[..., : DIM // 2], x[..., DIM // 2 :]
    return np.concatenate([a * c - b * s, b * c + a * s], -1)


def forward(ids):
    w = {k: v.astype(np.float64) for k, v in weights.items()}
    h, n = w["model.embed_tokens"][ids], len(ids)
    for i in range(LAYERS):
        p = f"model.layers.{i}."
        x = norm(h, w[p + "input_layernorm"])
        q, k, v = (x @ w[f"{p}self_attn.{m}_proj"].T for m in "qkv")
        q, k, v = rotate(q.reshape(n, HEADS, DIM)), rotate(k.reshape(n, KV_HEADS, DIM)), v.reshape(n, KV_HEADS, DIM)
        k, v = (np.repeat(m, HEADS // KV_HEADS, 1) for m in (k, v))
        scores = np.einsum("thd,shd->hts", q, k) / np.sqrt(DIM) + np.triu(np.full((n, n), -np.inf), 1)
        p_ = np.exp(scores - scores.max(-1, keepdims=True))
        p_ /= p_.sum(-1, keepdims=True)
        h = h + np.einsum("hts,shd->thd", p_, v).reshape(n, -1) @ w[p + "self_attn.o_proj"].T
        x = norm(h, w[p + "post_attention_layernorm"])
        gate, up = x @ w[p + "mlp.gate_proj"].T, x @ w[p + "mlp.up_proj"].T
        h = h + (gate / (1 + np.exp(-gate)) * up) @ w[p + "mlp.down_proj"].T
    return norm(h, w["model.norm"]) @ w["lm_head"].T


ids = [1, 70, 85, 80, 71, 3, 258, 262, 99, 41, 12, 2]
positions = [0, 5, 11]
logits = np.round(forward(np.array(ids))[positions], 5).tolist()
reference = {"ids": ids, "positions": positions, "logits": logits}
battery = ["the 2019 cat", " then\nthan", "<|im_start|>user\nhi<|im_end|>", "naïve 🙂 12345"]
reference["battery"] = [{"text": t, "ids": tokenizer.encode(t, add_special_tokens=False).ids} for t in battery]
(HERE / "reference.json").write_text(json.dumps(reference) + "\n")

# As the hub keeps it.
config = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": len(tokens), "hidden_size": WIDTH,
    "intermediate_size": FFN, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS,
    "head_dim": DIM, "max_position_embeddings": CONTEXT, "rms_norm_eps": EPS, "rope_theta": BASE, "rope_scaling": None,
    "hidden_act": "silu", "attention_bias": False, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
}
hub = HERE / "hub"
hub.mkdir(exist_ok=True)
(hub / "config.json").write_text(json.dumps(config, indent=1) + "\n")
settings = {"bos_token": marks[1], "eos_token": {"content": marks[2]}, "chat_template": TEMPLATE}
(hub / "tokenizer_config.json").write_text(json.dumps(settings, indent=1) + "\n")
tokenizer.save(str(hub / "tokenizer.json"), pretty=False)
# numpy has no BF16: the header is written as F16 is, and its type replaced by one of equal length.
names = [k + ".weight" for k in weights]
halves = {k + ".weight": np.ascontiguousarray(quants.quantize(v.astype(np.float32), Type.BF16)).view(np.float16) for k, v in weights.items()}
for shard, part in enumerate([names[:9], names[9:]]):
    data = save({k: halves[k].reshape(weights[k.removesuffix(".weight")].shape) for k in part})
    size = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + size].replace(b'"F16"', b'"BF16"')
    header += b" " * (-len(header) % 8)
    (hub / f"model-{shard + 1:05}-of-00002.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + data[8 + size :])

# As llama.cpp keeps it.
out = GGUFWriter(HERE / "tiny.gguf", "llama")
out.add_context_length(CONTEXT)
out.add_embedding_length(WIDTH)
out.add_block_count(LAYERS)
out.add_feed_forward_length(FFN)
out.add_head_count(HEADS)
out.add_head_count_kv(KV_HEADS)
out.add_rope_dimension_count(DIM)
out.add_rope_freq_base(BASE)
out.add_layer_norm_rms_eps(EPS)
out.add_tokenizer_model("gpt2")
out.add_tokenizer_pre("smollm")
out.add_token_list(tokens)
out.add_token_types([3] * len(marks) + [1] * (len(tokens) - len(marks)))
out.add_token_merges([f"{a} {b}" for a, b in merges])
out.add_bos_token_id(1)
out.add_eos_token_id(2)
out.add_add_bos_token(False)
out.add_chat_template(TEMPLATE)
SHORT = {
    "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "post_attention_layernorm": "ffn_norm", "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}
for name, value in weights.items():
    if name.startswith("model.layers."):
        _, _, layer, own = name.split(".", 3)
        short = f"blk.{layer}.{SHORT[own]}"
    else:
        own, short = "", {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}[name]
    if own in ("self_attn.q_proj", "self_attn.k_proj"):
        heads = len(value) // DIM
        value = value.reshape(heads, 2, DIM // 2, WIDTH).swapaxes(1, 2).reshape(value.shape)
    if value.ndim == 1:
        out.add_tensor(short + ".weight", value.astype(np.float32))
    else:
        out.add_tensor(short + ".weight", quants.quantize(value.astype(np.float32), Type.BF16), raw_dtype=Type.BF16)
out.write_header_to_file()
out.write_kv_data_to_file()
out.write_tensors_to_file()
out.close()
