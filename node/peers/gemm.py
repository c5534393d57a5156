"""Yardstick: f32 matrix products of numpy's OpenBLAS. usage: gemm.py THREADS MxNxK ...
Prints one line a shape: shape, median seconds."""
import os, sys, time
threads = sys.argv[1]
os.environ["OPENBLAS_NUM_THREADS"] = os.environ["OMP_NUM_THREADS"] = threads
import numpy as np
for shape in sys.argv[2:]:
    m, n, k = map(int, shape.split("x"))
    a, b = np.random.rand(m, k).astype("f4"), np.random.rand(n, k).astype("f4")
    bn = np.ascontiguousarray(b.T); c = np.empty((m, n), "f4")
    best = []
    for right in (b.T, bn):  # both orders of the right operand; the faster one counts
        np.matmul(a, right, out=c)
        t0 = time.perf_counter(); np.matmul(a, right, out=c); once = time.perf_counter() - t0
        repeat, ts = max(1, int(0.01 / max(once, 1e-7))), []
        for _ in range(9):
            t0 = time.perf_counter()
            for _ in range(repeat): np.matmul(a, right, out=c)
            ts.append((time.perf_counter() - t0) / repeat)
        best.append(sorted(ts)[4])
    print(shape, min(best), flush=True)
