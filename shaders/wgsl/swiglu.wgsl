// SwiGLU (Shazeer 2020) and its gradient.
//
// Equations, with sig = sigmoid(gate) and silu = gate * sig:
//   forward:  a = silu * up, quantised to 11 bits in blocks of 32
//   backward: d_gate = da * up * (sig + silu * (1 - sig));  d_up = da * silu
// Shapes: gate, up, da, d_gate, d_up (N, F); words (N, F/2 padded), exponents (N, F/32).
// Dispatch: forward: one invocation a block; backward: one an element; x and y together count
//   groups of LANES.
// Writes: all `=`; no aliasing.
// Numerics: gate, up FX(16), gradients FX(20). Each product is exact in 64 bits, rounded and
//   clamped.
// Twin: shaders/src/twin/swiglu.rs

override LANES: u32 = 64u;

struct Params {
    rows: u32,
    cols: u32,
}

@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(3) var<storage, read> gate: array<i32>;
@group(0) @binding(4) var<storage, read> up: array<i32>;
@group(0) @binding(5) var<storage, read_write> words: array<u32>;
@group(0) @binding(6) var<storage, read_write> exponents: array<i32>;
@group(0) @binding(5) var<storage, read> da: array<i32>;
@group(0) @binding(6) var<storage, read_write> d_gate: array<i32>;
@group(0) @binding(7) var<storage, read_write> d_up: array<i32>;

@compute @workgroup_size(LANES)
fn forward(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let id = (group.y * groups.x + group.x) * LANES + lane;
    let blocks = (p.cols + 31u) / 32u;
    if (id >= p.rows * blocks) {
        return;
    }
    let first = (id % blocks) * 32u;
    for (var i = 0u; i < 32u; i++) {
        block[i] = 0;
        if (first + i < p.cols) {
            let at = (id / blocks) * p.cols + first + i;
            let silu = mulsh_counted(gate[at], sigmoid(gate[at]), 16);
            block[i] = mulsh_counted(silu, up[at], 16);
        }
    }
    exponents[id] = quantize_block(ACTIVATION_BITS, ACTIVATION_FRACTION);
    for (var i = 0u; i < 16u; i++) {
        words[id * 16u + i] = block_words[i];
    }
    tally(SITE_SWIGLU, clamped);
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
    let g = gate[id];
    let sig = sigmoid(g);
    let silu = mulsh_counted(g, sig, 16);
    let slope = sig + mulsh_counted(silu, 65536 - sig, 16);
    let du = mulsh_counted(da[id], up[id], 16);
    d_gate[id] = mulsh_counted(du, slope, 16);
    d_up[id] = mulsh_counted(da[id], silu, 16);
    tally(SITE_SWIGLU, clamped);
}
