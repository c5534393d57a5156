// Rotary embedding (Su et al. 2021, halves rotated) of head vectors, and their quantisation.
//
// Equations, for the pair (i, i + D/2) at a position with cosine c and sine s in Q14:
//   x_i' = rne(x_i c - x_j s, 14),  x_j' = rne(x_j c + x_i s, 14), each clamped
//   forward: x -> mantissas of `bits` bits under one exponent a head; unrotated when `rotate` is 0
//   inverse: x = the rotation by the opposite angle, in place
// Shapes: x (N, H D) in FX(16), or x_out (N, H D) in FX(20) for `inverse`; rope (T, D/2) of cosine
//   in the low and sine in the high half; rows (N) of `Row`; words (R, H, D/2 padded),
//   exponents (R, H), where R = N for queries and slot * capacity + position for the cache.
// Dispatch: one invocation a (row, head) in `forward`, a (row, head, pair) in `inverse`; x and y
//   together count groups of LANES.
// Writes: words, exponents `=`; x_out in place.
// Numerics: |x| <= 2^30 times Q14: sums below 2^46, in 64 bits. Padding channels are mantissa 0.
// Twin: shaders/src/twin/rope.rs, shaders/src/twin/attention.rs (`heads`)

override LANES: u32 = 64u;

struct Params {
    rows: u32,
    heads: u32,
    dim: u32,
    words: u32,
    bits: u32,
    rotate: u32,
    to_cache: u32,
    capacity: u32,
}

@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(3) var<storage, read> x: array<i32>;
@group(0) @binding(3) var<storage, read_write> x_out: array<i32>;
@group(0) @binding(4) var<storage, read> rows: array<Row>;
@group(0) @binding(5) var<storage, read> rope: array<u32>;
@group(0) @binding(6) var<storage, read_write> words: array<u32>;
@group(0) @binding(7) var<storage, read_write> exponents: array<i32>;

// rne(a * c + b * s, 14), clamped.
fn rotated(a: i32, c: i32, b: i32, s: i32) -> i32 {
    return sat64_counted(rne64_signed(add64(mulsh_wide(a, c, 0), mulsh_wide(b, s, 0)), 14u));
}

// Channel i of the vector at `at`, rotated to `position`; 0 beyond D.
fn channel(at: u32, position: u32, i: u32) -> i32 {
    if (i >= p.dim) {
        return 0;
    }
    let a = x[at + i];
    if (p.rotate == 0u) {
        return a;
    }
    let half = p.dim / 2u;
    let low = i < half;
    let turn = rope[position * half + select(i - half, i, low)];
    let sine = hi16(turn);
    let b = x[at + select(i - half, i + half, low)];
    return rotated(a, lo16(turn), b, select(sine, -sine, low));
}

@compute @workgroup_size(LANES)
fn forward(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let id = (group.y * groups.x + group.x) * LANES + lane;
    if (id >= p.rows * p.heads) {
        return;
    }
    let row = rows[id / p.heads];
    let at = id * p.dim;
    var top = 0u;
    for (var i = 0u; i < p.dim; i++) {
        top = max(top, mag(channel(at, row.position, i)));
    }
    // The second reading below repeats the same clamps: count the first one's only.
    tally(SITE_ROPE, clamped);
    var exponent = bl(bitcast<i32>(top)) - ACTIVATION_FRACTION - i32(p.bits) + 1;
    if (top == 0u) {
        exponent = 0;
    }
    let shift = exponent + ACTIVATION_FRACTION;
    var to = id;
    if (p.to_cache != 0u) {
        to = (row.slot * p.capacity + row.position) * p.heads + id % p.heads;
    }
    exponents[to] = exponent;
    for (var w = 0u; w < p.words; w++) {
        let even = mantissa(channel(at, row.position, 2u * w), shift, p.bits);
        let odd = mantissa(channel(at, row.position, 2u * w + 1u), shift, p.bits);
        words[to * p.words + w] = even | (odd << 16u);
    }
}

@compute @workgroup_size(LANES)
fn inverse(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let id = (group.y * groups.x + group.x) * LANES + lane;
    let half = p.dim / 2u;
    if (id >= p.rows * p.heads * half) {
        return;
    }
    let vector = id / half;
    let i = id % half;
    let turn = rope[rows[vector / p.heads].position * half + i];
    let at = vector * p.dim + i;
    let a = x_out[at];
    let b = x_out[at + half];
    x_out[at] = rotated(a, lo16(turn), b, hi16(turn));
    x_out[at + half] = rotated(b, lo16(turn), a, -hi16(turn));
    tally(SITE_ROPE, clamped);
}
