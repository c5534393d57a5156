// Token embedding and its gradient, and the gathering of rows.
//
// Equations:
//   forward:  h[n] = the embedding's row tokens[n], in FX(16)
//   backward: grad[tokens[n]] += dh[n] in FX(16)
//   rows:     gathered[n] = x[tokens[n]]
// Shapes: tokens (N), or row indices; words (V, C/2 padded) with one exponent a 32 x 32 tile; h,
//   dh, x, gathered (N, C); grad_low, grad_high (V, C).
// Dispatch: one invocation an element; x and y together count groups of LANES.
// Writes: h, gathered `=`; grad `+=` in 64 bits by atomics, whose order cannot matter. No aliasing.
// Numerics: a value of 2^14 and more does not fit FX(16): it is clamped and counted. dh FX(20).
// Twin: shaders/src/twin/embedding.rs

override LANES: u32 = 64u;

struct Params {
    rows: u32,
    cols: u32,
    col_blocks: u32,
}

@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(3) var<storage, read> tokens: array<u32>;
@group(0) @binding(4) var<storage, read> words: array<u32>;
@group(0) @binding(5) var<storage, read> exponents: array<i32>;
@group(0) @binding(6) var<storage, read_write> h: array<i32>;
@group(0) @binding(4) var<storage, read> x: array<i32>;
@group(0) @binding(5) var<storage, read_write> grad_low: array<atomic<u32>>;
@group(0) @binding(6) var<storage, read_write> grad_high: array<atomic<u32>>;

@compute @workgroup_size(LANES)
fn forward(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let id = (group.y * groups.x + group.x) * LANES + lane;
    if (id >= p.rows * p.cols) {
        return;
    }
    let token = tokens[id / p.cols];
    let c = id % p.cols;
    let pair = words[token * p.col_blocks * 16u + c / 2u];
    let exponent = exponents[(token / 32u) * p.col_blocks + c / 32u];
    let m = select(lo16(pair), hi16(pair), (c & 1u) == 1u);
    let v = flush(m, -(exponent + ACTIVATION_FRACTION));
    h[id] = v;
    tally(SITE_EMBEDDING, select(0u, 1u, abs(v) == LIM));
}

@compute @workgroup_size(LANES)
fn backward(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let id = (group.y * groups.x + group.x) * LANES + lane;
    if (id >= p.rows * p.cols) {
        return;
    }
    let at = tokens[id / p.cols] * p.cols + id % p.cols;
    let v = wide(rne(x[id], 4));
    let old = atomicAdd(&grad_low[at], v.x);
    let carry = v.y + select(0u, 1u, old + v.x < old);
    if (carry != 0u) {
        atomicAdd(&grad_high[at], carry);
    }
}

@compute @workgroup_size(LANES)
fn rows(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let id = (group.y * groups.x + group.x) * LANES + lane;
    if (id < p.rows * p.cols) {
        h[id] = x[tokens[id / p.cols] * p.cols + id % p.cols];
    }
}
