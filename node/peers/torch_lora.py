"""Yardstick: the gradient of LoRA factors on a frozen Llama of SmolLM2-135M's shape, in PyTorch on the CPU, f32.

The same work as the project's bench: rank r beside all seven matrices of every layer, cross-entropy on every token, forward and backward.
usage: python torch_lora.py threads steps batch tokens rank     (needs torch, from PyPI)
Prints tokens/s by the median step."""
import sys, time, torch, torch.nn as nn, torch.nn.functional as F

threads, steps, B, T, R = map(int, sys.argv[1:6])
L, D, H, KV, FF, V = 30, 576, 9, 3, 1536, 49152
torch.set_num_threads(threads); torch.manual_seed(0)
HD = D // H
freq = 100000.0 ** (-torch.arange(HD // 2) / (HD // 2)); ang = torch.arange(T)[:, None] * freq
COS, SIN = ang.cos(), ang.sin()

def rope(x):
    a, b = x[..., : HD // 2], x[..., HD // 2:]
    return torch.cat([a * COS - b * SIN, b * COS + a * SIN], -1)

class Lora(nn.Module):
    def __init__(s, i, o):
        super().__init__()
        s.w = nn.Parameter(torch.randn(o, i) * 0.02, requires_grad=False)
        s.a, s.b = nn.Parameter(torch.randn(R, i) * 0.02), nn.Parameter(torch.randn(o, R) * 0.02)
    def forward(s, x): return x @ s.w.T + (x @ s.a.T) @ s.b.T

norm = lambda x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5)

class Block(nn.Module):
    def __init__(s):
        super().__init__()
        s.q, s.k, s.v, s.o = Lora(D, D), Lora(D, KV * HD), Lora(D, KV * HD), Lora(D, D)
        s.g, s.u, s.d = Lora(D, FF), Lora(D, FF), Lora(FF, D)
    def forward(s, x):
        h = norm(x); split = lambda y, n: y.view(B, T, n, HD).transpose(1, 2)
        y = F.scaled_dot_product_attention(rope(split(s.q(h), H)), rope(split(s.k(h), KV)), split(s.v(h), KV), is_causal=True, enable_gqa=True)
        x = x + s.o(y.transpose(1, 2).reshape(B, T, D)); h = norm(x)
        return x + s.d(F.silu(s.g(h)) * s.u(h))

blocks = nn.ModuleList(Block() for _ in range(L)); embedding = torch.randn(V, D) * 0.02; wall = []
for _ in range(steps):
    ids, targets = torch.randint(0, V, (B, T)), torch.randint(0, V, (B, T)); t = time.perf_counter()
    x = embedding[ids]
    for b in blocks: x = b(x)
    loss = F.cross_entropy((norm(x) @ embedding.T).view(-1, V), targets.view(-1))
    blocks.zero_grad(); loss.backward(); loss.item(); wall.append(time.perf_counter() - t)
wall = sorted(wall[1:]); print(f"torch {torch.__version__} threads {threads} tokens/s {B * T / wall[len(wall) // 2]:.1f}")
