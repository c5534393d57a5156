// RMSNorm (Zhang and Sennrich 2019) and its gradient.
//
// Equations, with 1/rms = scale * 2^-shift of a row (see `row_scale`):
//   forward:       unit = h / rms;  n = unit * gain, quantised to 11 bits in blocks of 32
//   backward:      du = dn * gain;  dh (+)= (du - unit * mean(du * unit)) / rms
//   backward_gain: gain_grad += sum over rows of dn * unit
// Shapes: h, unit, dn, dh (N, C); gain (C) in Q3.12; words (N, C/2 padded), exponents (N, C/32);
//   scales (N) of (scale, shift); gain_low, gain_high (C).
// Dispatch: forward, backward: x and y together count rows, a workgroup owns one. backward_gain: x
//   counts groups of LANES channels, y chunks of 64 rows.
// Writes: words, exponents, unit, scales `=`; dh `=`, or `= sat(dh + ...)` when `accumulate` is
//   set; gain_grad `+=` in 64 bits by atomics, whose order cannot matter. No aliasing.
// Numerics: h, unit FX(16), gradients FX(20), gain_grad FX(16). The row is prescaled to 15 bits, so
//   a square is at most 2^30; sums are 64-bit. `scale` times the root of C reaches 2^31: unsigned.
// Twin: shaders/src/twin/rmsnorm.rs

override LANES: u32 = 64u;

struct Params {
    rows: u32,
    cols: u32,
    epsilon: vec2<u32>,
    root: u32,
    root_shift: i32,
    inverse_width: i32,
    accumulate: u32,
}

@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(3) var<storage, read> h: array<i32>;
@group(0) @binding(3) var<storage, read> dn: array<i32>;
@group(0) @binding(4) var<storage, read> gain: array<i32>;
@group(0) @binding(5) var<storage, read_write> words: array<u32>;
@group(0) @binding(6) var<storage, read_write> exponents: array<i32>;
@group(0) @binding(7) var<storage, read_write> unit: array<i32>;
@group(0) @binding(8) var<storage, read_write> scales: array<vec2<i32>>;
@group(0) @binding(5) var<storage, read> unit_in: array<i32>;
@group(0) @binding(6) var<storage, read> scales_in: array<vec2<i32>>;
@group(0) @binding(7) var<storage, read_write> dh: array<i32>;
@group(0) @binding(7) var<storage, read_write> gain_low: array<atomic<u32>>;
@group(0) @binding(8) var<storage, read_write> gain_high: array<atomic<u32>>;

var<workgroup> row_top: atomic<u32>;
var<workgroup> row_low: atomic<u32>;
var<workgroup> row_high: atomic<u32>;

// Adds a 64-bit value to the workgroup's sum; exact in any order.
fn reduce_add64(v: vec2<u32>) {
    let old = atomicAdd(&row_low, v.x);
    atomicAdd(&row_high, v.y + select(0u, 1u, old + v.x < old));
}

// (scale, shift) from the sum of squares after the prescale.
fn row_scale(sum: vec2<u32>, prescale: i32) -> vec2<i32> {
    let up = (32 - bl64(sum)) & -2;
    var v: u32;
    if (up >= 0) {
        v = shl64(sum, u32(up)).x;
    } else {
        v = shr64(sum, u32(-up)).x;
    }
    let r = min(0x80000000u / max(isqrt(v), 1u), 65535u);
    let scale = rne64(vec2<u32>(r * p.root, 0u), 16u).x;
    return vec2<i32>(bitcast<i32>(scale), -((up >> 1u) - 31 - prescale + 32 - p.root_shift));
}

@compute @workgroup_size(LANES)
fn forward(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let row = group.y * groups.x + group.x;
    if (row >= p.rows) {
        return;
    }
    let at = row * p.cols;
    var top = 0u;
    for (var c = lane; c < p.cols; c += LANES) {
        top = max(top, mag(h[at + c]));
    }
    atomicMax(&row_top, top);
    workgroupBarrier();
    let prescale = max(bl(bitcast<i32>(atomicLoad(&row_top))) - 15, 0);
    var sum = vec2<u32>();
    for (var c = lane; c < p.cols; c += LANES) {
        let y = mag(rne(h[at + c], prescale));
        sum = add64(sum, vec2<u32>(y * y, 0u));
    }
    reduce_add64(sum);
    workgroupBarrier();
    let squares = vec2<u32>(atomicLoad(&row_low), atomicLoad(&row_high));
    let s = row_scale(add64(squares, shr64(p.epsilon, u32(2 * prescale))), prescale);
    if (lane == 0u) {
        scales[row] = s;
    }
    let blocks = (p.cols + 31u) / 32u;
    for (var b = lane; b < blocks; b += LANES) {
        for (var i = 0u; i < 32u; i++) {
            let c = b * 32u + i;
            block[i] = 0;
            if (c < p.cols) {
                let u = mulsh_counted(h[at + c], s.x, s.y);
                unit[at + c] = u;
                block[i] = mulsh_counted(u, gain[c], 12);
            }
        }
        exponents[row * blocks + b] = quantize_block(ACTIVATION_BITS, ACTIVATION_FRACTION);
        for (var i = 0u; i < 16u; i++) {
            words[(row * blocks + b) * 16u + i] = block_words[i];
        }
    }
    tally(SITE_NORM, clamped);
}

@compute @workgroup_size(LANES)
fn backward(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let row = group.y * groups.x + group.x;
    if (row >= p.rows) {
        return;
    }
    let at = row * p.cols;
    let s = scales_in[row];
    var sum = vec2<u32>();
    for (var c = lane; c < p.cols; c += LANES) {
        let du = mulsh_counted(dn[at + c], gain[c], 12);
        sum = add64(sum, wide(mulsh_counted(du, unit_in[at + c], 16)));
    }
    reduce_add64(sum);
    workgroupBarrier();
    // Every lane needs the mean; only the first one counts its clamps.
    let counted = clamped;
    let projection = sat64_counted(vec2<u32>(atomicLoad(&row_low), atomicLoad(&row_high)));
    let mean = mulsh_counted(projection, p.inverse_width, 20);
    clamped = select(counted, clamped, lane == 0u);
    for (var c = lane; c < p.cols; c += LANES) {
        let du = mulsh(dn[at + c], gain[c], 12);
        let along = mulsh_counted(unit_in[at + c], mean, 16);
        // Two clamped values differ by at most 2^31 - 2: no overflow.
        let dx = mulsh_counted(du - along, s.x, s.y);
        if (p.accumulate != 0u) {
            let sum = dh[at + c] + dx;
            tally(SITE_RESIDUAL, select(0u, 1u, mag(sum) > u32(LIM)));
            dh[at + c] = sat(sum);
        } else {
            dh[at + c] = dx;
        }
    }
    tally(SITE_NORM, clamped);
}

@compute @workgroup_size(LANES)
fn backward_gain(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let c = group.x * LANES + lane;
    if (c >= p.cols) {
        return;
    }
    var sum = vec2<u32>();
    for (var row = group.y * 64u; row < min(p.rows, group.y * 64u + 64u); row++) {
        sum = add64(sum, wide(mulsh_counted(dn[row * p.cols + c], unit_in[row * p.cols + c], 20)));
    }
    let old = atomicAdd(&gain_low[c], sum.x);
    atomicAdd(&gain_high[c], sum.y + select(0u, 1u, old + sum.x < old));
    tally(SITE_NORM, clamped);
}
