"""Yardstick: prefill and decoding by llama.cpp on the CPU, through the C interface of its shared libraries.

usage: python llama.py DIRECTORY MODEL.gguf threads prompt new batch...     (needs numpy; the directory holds libllama and libggml, such
as node_modules/@node-llama-cpp/linux-x64/bins/linux-x64; `Q8_0` is what llama.cpp is fastest with)
Prints `prefill tokens/s X`, then `decode BATCH tokens/s X` of each batch: greedy, as many sequences at once."""
import ctypes, glob, os, struct, sys, time
import numpy as np

lib, gguf = (os.path.abspath(p) for p in sys.argv[1:3])
threads, prompt, new, *batches = map(int, sys.argv[3:])
load = lambda name: ctypes.CDLL(sorted(glob.glob(os.path.join(lib, name)))[0], mode=ctypes.RTLD_GLOBAL)
load("libggml-base.*so*"); ggml = load("libggml.*so*"); llama = load("libllama.*so*")

class Params(ctypes.Structure):  # At least as long as any parameter structure; only its start is looked at.
    _fields_ = [("bytes", ctypes.c_uint8 * 512)]

class Batch(ctypes.Structure):
    _fields_ = [("count", ctypes.c_int32), ("token", ctypes.POINTER(ctypes.c_int32)), ("embedding", ctypes.c_void_p),
                ("position", ctypes.POINTER(ctypes.c_int32)), ("sequences", ctypes.POINTER(ctypes.c_int32)),
                ("sequence", ctypes.POINTER(ctypes.POINTER(ctypes.c_int32))), ("logits", ctypes.POINTER(ctypes.c_int8))]

def declare(name, result, *arguments):
    f = getattr(llama, name); f.restype, f.argtypes = result, arguments
    return f

pointer = ctypes.c_void_p
silence = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, pointer)(lambda *_: None)
llama.llama_log_set(silence, None)
ggml.ggml_backend_load_all_from_path(lib.encode()); llama.llama_backend_init()
model = declare("llama_model_load_from_file", pointer, ctypes.c_char_p, Params)(gguf.encode(), declare("llama_model_default_params", Params)())
assert model, f"{gguf} cannot be loaded"
params = bytearray(declare("llama_context_default_params", Params)().bytes)
# n_ctx, n_batch, n_ubatch, n_seq_max, three more, n_threads, n_threads_batch: by their defaults.
start = struct.unpack_from("<9i", params)
assert start[:4] == (512, 2048, 512, 1) and start[7:] == (4, 4), f"an unknown version of llama.cpp: {start}"
most = max(batches)
struct.pack_into("<4i", params, 0, most * 1024, 2048, 512, most); struct.pack_into("<2i", params, 28, threads, threads)
context = declare("llama_init_from_model", pointer, pointer, Params)(model, Params.from_buffer(params))
assert context, "no context"
vocabulary = declare("llama_vocab_n_tokens", ctypes.c_int32, pointer)(declare("llama_model_get_vocab", pointer, pointer)(model))
batch = declare("llama_batch_init", Batch, *[ctypes.c_int32] * 3)(2048, 0, 1)
run = declare("llama_decode", ctypes.c_int32, pointer, Batch)
memory = declare("llama_get_memory", pointer, pointer)(context)
clear = declare("llama_memory_clear", None, pointer, ctypes.c_bool)
row = declare("llama_get_logits_ith", ctypes.POINTER(ctypes.c_float), pointer, ctypes.c_int32)

def decode(rows):
    batch.count = len(rows)
    for i, (token, position, sequence, logits) in enumerate(rows):
        batch.token[i], batch.position[i], batch.sequences[i], batch.logits[i] = token, position, 1, logits
        batch.sequence[i][0] = sequence
    assert run(context, batch) == 0, "llama_decode failed"

greedy = lambda i: int(np.ctypeslib.as_array(row(context, i), (vocabulary,)).argmax())
token = lambda i: 100 + i * 7919 % (vocabulary - 100)

def prefill():
    clear(memory, True); t = time.perf_counter()
    decode([(token(i), i, 0, i == prompt - 1) for i in range(prompt)]); greedy(prompt - 1)
    return prompt / (time.perf_counter() - t)

def generate(count):
    clear(memory, True); decode([(token(s + i * 31), i, s, i == 15) for s in range(count) for i in range(16)])
    last = [greedy(16 * s + 15) for s in range(count)]; t = time.perf_counter()
    for k in range(new):
        decode([(last[s], 16 + k, s, True) for s in range(count)]); last = [greedy(s) for s in range(count)]
    return count * new / (time.perf_counter() - t)

median = lambda f: sorted([f() for _ in range(4)][1:])[1]
print(f"prefill tokens/s {median(prefill):.1f}")
for count in batches: print(f"decode {count} tokens/s {median(lambda: generate(count)):.1f}")
