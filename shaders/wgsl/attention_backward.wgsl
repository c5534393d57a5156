// Gradient of grouped-query causal attention, for one query head of every group at a time.
//
// Equations, with P of `attention.probabilities` and sums over the keys or queries of a segment:
//   scores:          dP_ij = dO_i . v_j;  dS_ij = P_ij (dP_ij - sum over j of P_ij dP_ij)
//   by_query:        dS_i in 10 bits along j, the keys' exponents folded in
//   by_key:          P_j or dS_j in `bits` bits along i, the queries' exponents folded in if asked
//   value_gradient:  dV_j (+)= sum over i of P_ij dO_i
//   query_gradient:  dQ_i  =  sum over j of dS_ij k_j / sqrt(D), before the rotation is undone
//   key_gradient:    dK_j (+)= sum over i of dS_ij q_i / sqrt(D), before the rotation is undone
// Shapes: d_out (N, H D) in FX(20), as rows (N, H, D/2 padded) with exponents (N, H, D/32), and as
//   tokens (H D, B * 16) with exponents (H D, B); p and ds (N, K, L); by_query and by_key
//   (N, K, L/2) with exponents (N, K, L/32); dq (N, H D), dk and dv (N, K D) in FX(20).
// Dispatch: scores: x and y together count (row, group) pairs, a workgroup owns one. The others:
//   one invocation an output block, channel or channel pair; x and y together count groups of
//   LANES. The first row of the batch's chunk is `first_row`, of whole segments; p, ds, by_query
//   and by_key begin there, everything else at row 0.
// Writes: dk, dv `=` for the first head of a group, then `= sat(d + ...)`; the others `=`.
// Numerics: products of 10 by 11 bits in blocks of 32, see `matmul.wgsl`; only entries j <= i are
//   computed and counted. The row sum is 64-bit and clamped once.
// Twin: shaders/src/twin/attention_backward.rs

override LANES: u32 = 64u;

struct Params {
    first_row: u32,
    rows: u32,
    group: u32,
    first_head: u32,
    kv_heads: u32,
    dim: u32,
    words: u32,
    capacity: u32,
    keys: u32,
    bits: u32,
    fraction: i32,
    fold: u32,
    token_blocks: u32,
    inverse_root: i32,
}

@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(3) var<storage, read> rows: array<Row>;
@group(0) @binding(4) var<storage, read> left: array<u32>;
@group(0) @binding(5) var<storage, read> left_exponents: array<i32>;
@group(0) @binding(6) var<storage, read> right: array<u32>;
@group(0) @binding(7) var<storage, read> right_exponents: array<i32>;
// The same, four words at a time.
@group(0) @binding(4) var<storage, read> left_quads: array<vec4<u32>>;
@group(0) @binding(6) var<storage, read> right_quads: array<vec4<u32>>;
@group(0) @binding(8) var<storage, read> weights: array<i32>;
@group(0) @binding(9) var<storage, read_write> ds: array<i32>;
@group(0) @binding(4) var<storage, read> x: array<i32>;
@group(0) @binding(8) var<storage, read_write> words: array<u32>;
@group(0) @binding(9) var<storage, read_write> exponents: array<i32>;
@group(0) @binding(9) var<storage, read_write> out: array<i32>;

var<workgroup> mean_low: atomic<u32>;
var<workgroup> mean_high: atomic<u32>;

@compute @workgroup_size(LANES)
fn scores(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let index = group.y * groups.x + group.x;
    if (index >= p.rows * p.kv_heads) {
        return;
    }
    let at = index * p.keys;
    let g = index % p.kv_heads;
    let row = p.first_row + index / p.kv_heads;
    let info = rows[row];
    let blocks = p.words / 16u;
    let limit = term_limit(blocks);
    let vector = (row * p.kv_heads + g) * p.group + p.first_head;
    var count = 0u;
    var mean = vec2<u32>();
    for (var j = lane; j <= info.position; j += LANES) {
        let key = (info.slot * p.capacity + j) * p.kv_heads + g;
        var sum = 0u;
        for (var b = 0u; b < blocks; b++) {
            var d = 0;
            for (var i = b * 4u; i < b * 4u + 4u; i++) {
                let x = unpack(left_quads[vector * blocks * 4u + i]);
                d += dot8(x, unpack(right_quads[key * blocks * 4u + i]));
            }
            let e = left_exponents[vector * blocks + b] + right_exponents[key];
            let t = flush(d, -(e + GRADIENT_FRACTION));
            count += select(0u, 1u, abs(t) > limit);
            sum += bitcast<u32>(t);
        }
        let dp = sat(bitcast<i32>(sum));
        ds[at + j] = dp;
        mean = add64(mean, wide(mulsh(dp, weights[at + j], 24)));
    }
    tally(SITE_MATMUL, count);
    let old = atomicAdd(&mean_low, mean.x);
    atomicAdd(&mean_high, mean.y + select(0u, 1u, old + mean.x < old));
    workgroupBarrier();
    let center = sat64_counted(vec2<u32>(atomicLoad(&mean_low), atomicLoad(&mean_high)));
    // Every lane needs the sum; only the first one counts its clamp.
    clamped = select(0u, clamped, lane == 0u);
    for (var j = lane; j < p.keys; j += LANES) {
        var y = 0;
        if (j <= info.position) {
            // Two clamped values differ by at most 2^31 - 2: no overflow.
            y = mulsh_counted(ds[at + j] - center, weights[at + j], 24);
        }
        ds[at + j] = y;
    }
    tally(SITE_ATTENTION, clamped);
}

fn write(at: u32, bits: u32) {
    exponents[at] = quantize_mixed_block(bits);
    for (var i = 0u; i < 16u; i++) {
        words[at * 16u + i] = block_words[i];
    }
}

@compute @workgroup_size(LANES)
fn by_query(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let id = (group.y * groups.x + group.x) * LANES + lane;
    let blocks = p.keys / 32u;
    if (id >= p.rows * p.kv_heads * blocks) {
        return;
    }
    let vector = id / blocks;
    let info = rows[p.first_row + vector / p.kv_heads];
    let first = (id % blocks) * 32u;
    for (var i = 0u; i < 32u; i++) {
        block[i] = 0;
        block_exponent[i] = 0;
        if (first + i <= info.position) {
            let key = (info.slot * p.capacity + first + i) * p.kv_heads + vector % p.kv_heads;
            block[i] = x[vector * p.keys + first + i];
            block_exponent[i] = right_exponents[key] - p.fraction;
        }
    }
    write(id, p.bits);
}

@compute @workgroup_size(LANES)
fn by_key(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let id = (group.y * groups.x + group.x) * LANES + lane;
    let blocks = p.keys / 32u;
    if (id >= p.rows * p.kv_heads * blocks) {
        return;
    }
    // Rows fastest: neighbouring invocations read neighbouring keys.
    let local = id % p.rows;
    let g = (id / p.rows) % p.kv_heads;
    let b = id / p.rows / p.kv_heads;
    let info = rows[p.first_row + local];
    for (var i = 0u; i < 32u; i++) {
        block[i] = 0;
        block_exponent[i] = -p.fraction;
        let query = b * 32u + i;
        if (query >= info.position && query < info.segment_rows) {
            let vector = (info.first_row + query) * p.kv_heads + g;
            block[i] = x[(vector - p.first_row * p.kv_heads) * p.keys + info.position];
            if (p.fold != 0u) {
                block_exponent[i] += right_exponents[vector * p.group + p.first_head];
            }
        }
    }
    write((local * p.kv_heads + g) * blocks + b, p.bits);
}

fn accumulate(at: u32, y: i32) {
    if (p.first_head != 0u) {
        out[at] = sat_counted(out[at] + y);
    } else {
        out[at] = y;
    }
}

@compute @workgroup_size(LANES)
fn value_gradient(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let id = (group.y * groups.x + group.x) * LANES + lane;
    if (id >= p.rows * p.kv_heads * p.dim) {
        return;
    }
    let vector = id / p.dim;
    let info = rows[p.first_row + vector / p.kv_heads];
    let channel = ((vector % p.kv_heads) * p.group + p.first_head) * p.dim + id % p.dim;
    let blocks = (info.segment_rows + 31u) / 32u;
    let limit = term_limit(blocks);
    var sum = 0u;
    var count = 0u;
    // Earlier queries do not see this key.
    for (var b = info.position / 32u; b < blocks; b++) {
        let at = vector * (p.keys / 32u) + b;
        let origin = channel * p.token_blocks + info.first_block + b;
        var d = 0;
        for (var i = 0u; i < 4u; i++) {
            d += dot8(unpack(left_quads[at * 4u + i]), unpack(right_quads[origin * 4u + i]));
        }
        let t = flush(d, -(left_exponents[at] + right_exponents[origin] + GRADIENT_FRACTION));
        count += select(0u, 1u, abs(t) > limit);
        sum += bitcast<u32>(t);
    }
    accumulate(p.first_row * p.kv_heads * p.dim + id, sat(bitcast<i32>(sum)));
    tally(SITE_MATMUL, count);
    tally(SITE_ATTENTION, clamped);
}

// Sum over the blocks first_block to last_block - 1 of `left` times two channels of `right`, whose
// vectors begin at word `origin` and are `step` words apart; `vectors` of them exist.
fn combine(
    at: u32,
    begin: u32,
    end: u32,
    origin: u32,
    step: u32,
    vectors: u32,
    limit: i32,
) -> vec2<i32> {
    var sum = vec2<u32>();
    var count = 0u;
    for (var b = begin; b < end; b++) {
        var d = vec2<i32>();
        let pairs = (min(vectors - b * 32u, 32u) + 1u) / 2u;
        for (var i = 0u; i < pairs; i++) {
            let m = left[(at + b) * 16u + i];
            let even = right[origin + (b * 32u + 2u * i) * step];
            let odd = right[origin + (b * 32u + 2u * i + 1u) * step];
            d += lo16(m) * vec2<i32>(lo16(even), hi16(even));
            d += hi16(m) * vec2<i32>(lo16(odd), hi16(odd));
        }
        let shift = -(left_exponents[at + b] + GRADIENT_FRACTION);
        let t = vec2<i32>(flush(d.x, shift), flush(d.y, shift));
        count += select(0u, 1u, abs(t.x) > limit) + select(0u, 1u, abs(t.y) > limit);
        sum += bitcast<vec2<u32>>(t);
    }
    tally(SITE_MATMUL, count);
    return vec2<i32>(
        mulsh(sat(bitcast<i32>(sum.x)), p.inverse_root, 24),
        mulsh(sat(bitcast<i32>(sum.y)), p.inverse_root, 24),
    );
}

@compute @workgroup_size(LANES)
fn query_gradient(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let id = (group.y * groups.x + group.x) * LANES + lane;
    let pairs = p.dim / 2u;
    if (id >= p.rows * p.kv_heads * pairs) {
        return;
    }
    let vector = id / pairs;
    let g = vector % p.kv_heads;
    let row = p.first_row + vector / p.kv_heads;
    let info = rows[row];
    let limit = term_limit((info.segment_rows + 31u) / 32u);
    let origin = (info.slot * p.capacity * p.kv_heads + g) * p.words + id % pairs;
    let end = info.position / 32u + 1u;
    let at = vector * (p.keys / 32u);
    let y = combine(at, 0u, end, origin, p.kv_heads * p.words, info.segment_rows, limit);
    let to = ((row * p.kv_heads + g) * p.group + p.first_head) * p.dim + 2u * (id % pairs);
    out[to] = y.x;
    out[to + 1u] = y.y;
}

@compute @workgroup_size(LANES)
fn key_gradient(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let id = (group.y * groups.x + group.x) * LANES + lane;
    let pairs = p.dim / 2u;
    if (id >= p.rows * p.kv_heads * pairs) {
        return;
    }
    let vector = id / pairs;
    let row = p.first_row + vector / p.kv_heads;
    let info = rows[row];
    let end = (info.segment_rows + 31u) / 32u;
    let heads = p.kv_heads * p.group;
    let head = (vector % p.kv_heads) * p.group + p.first_head;
    let origin = (info.first_row * heads + head) * p.words + id % pairs;
    let at = vector * (p.keys / 32u);
    let begin = info.position / 32u;
    let y = combine(at, begin, end, origin, heads * p.words, info.segment_rows, term_limit(end));
    let to = (row * p.kv_heads + vector % p.kv_heads) * p.dim + 2u * (id % pairs);
    accumulate(to, y.x);
    accumulate(to + 1u, y.y);
    tally(SITE_ATTENTION, clamped);
}
