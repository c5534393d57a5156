// Grouped-query causal attention: scores, softmax and weighted values of one query and head.
//
// Equations, for query i and keys j <= i:
//   s_j = q . k_j in FX(16);  e_j = exp2n((max s - s_j) * scale);  p_j = e_j / sum e in Q24
//   probabilities: p, with zeros for the keys that come later
//   forward:       out = sum over j of p_j v_j, p quantised to 11 bits in blocks of 32 keys with
//                  the values' exponents folded in
// Shapes: q_words (N, H, D/2 padded), q_exponents (N, H); keys, values (slots, capacity, K, D/2
//   padded), their exponents (slots, capacity, K); rows (N) of `Row`; scores (rows, heads, L),
//   with L a multiple of 32: the probabilities; out (N, H D) in FX(16).
// Dispatch: x and y together count (row, head) pairs, a workgroup owns one. The heads are
//   `first_head + i * head_step` for i below `heads`; rows begin at `first_row`.
// Writes: scores `=` (`forward` overwrites them: 16 words of mantissa pairs, then the exponent, in
//   each group of 32); out `=`. No aliasing.
// Numerics: 10 by 11 bits in blocks of 32, see `matmul.wgsl`. A sum of 32 weights, shifted by 8,
//   is at most 2^21: those of 2^15 keys fit u32. Keys after the query are neither read nor counted.
// Twin: shaders/src/twin/attention.rs

override LANES: u32 = 64u;

struct Params {
    first_row: u32,
    rows: u32,
    heads: u32,
    head_step: u32,
    first_head: u32,
    all_heads: u32,
    kv_heads: u32,
    dim: u32,
    words: u32,
    capacity: u32,
    keys: u32,
    score_scale: i32,
    score_limit: i32,
}

@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(3) var<storage, read> q_words: array<vec4<u32>>;
@group(0) @binding(4) var<storage, read> q_exponents: array<i32>;
@group(0) @binding(5) var<storage, read> keys: array<vec4<u32>>;
@group(0) @binding(6) var<storage, read> key_exponents: array<i32>;
@group(0) @binding(7) var<storage, read> rows: array<Row>;
@group(0) @binding(8) var<storage, read_write> scores: array<i32>;
@group(0) @binding(3) var<storage, read> values: array<u32>;
@group(0) @binding(4) var<storage, read> value_exponents: array<i32>;
@group(0) @binding(5) var<storage, read_write> out: array<i32>;

var<workgroup> top: atomic<u32>;
var<workgroup> total: atomic<u32>;

struct Query {
    row: u32,
    head: u32,
    kv_head: u32,
    // First score of this query, and the number of keys that it sees.
    at: u32,
    keys: u32,
    // First key of the slot.
    first_key: u32,
}

fn query(index: u32) -> Query {
    var o: Query;
    o.row = p.first_row + index / p.heads;
    o.head = p.first_head + (index % p.heads) * p.head_step;
    o.kv_head = o.head / (p.all_heads / p.kv_heads);
    o.at = index * p.keys;
    o.keys = rows[o.row].position + 1u;
    o.first_key = rows[o.row].slot * p.capacity;
    return o;
}

// Order-preserving map of integers to unsigned ones, for the atomic maximum.
fn ordered(x: i32) -> u32 {
    return bitcast<u32>(x) ^ 0x80000000u;
}

// Scores of the keys j = lane, lane + LANES, ...; returns how many terms are out of range.
fn score_keys(o: Query, lane: u32) -> u32 {
    var count = 0u;
    let vector = o.row * p.all_heads + o.head;
    let quads = p.words / 4u;
    let q = vector * quads;
    let fraction = q_exponents[vector] + ACTIVATION_FRACTION;
    var best = 0u;
    for (var j = lane; j < o.keys; j += LANES) {
        let key = (o.first_key + j) * p.kv_heads + o.kv_head;
        let shift = -(fraction + key_exponents[key]);
        var sum = 0u;
        for (var w = 0u; w < quads; w += 4u) {
            var d = 0;
            for (var i = w; i < w + 4u; i++) {
                d += dot8(unpack(q_words[q + i]), unpack(keys[key * quads + i]));
            }
            let t = flush(d, shift);
            count += select(0u, 1u, abs(t) > p.score_limit);
            sum += bitcast<u32>(t);
        }
        let s = sat(bitcast<i32>(sum));
        scores[o.at + j] = s;
        best = max(best, ordered(s));
    }
    atomicMax(&top, best);
    storageBarrier();
    workgroupBarrier();
    return count;
}

fn weight(s: i32, best: i32) -> i32 {
    return exp2n(min(mulsh(best - s, p.score_scale, 24), 40 << 16u), 24);
}

// (reciprocal, shift) such that mulsh(e, reciprocal, shift) is e / total in Q24.
fn softmax_scale(total: u32) -> vec2<i32> {
    let bits = bl(bitcast<i32>(total));
    var t = total;
    if (bits > 16) {
        t = total >> (u32(bits - 16) & 31u);
    } else {
        t = total << (u32(16 - bits) & 31u);
    }
    return vec2<i32>(i32(min(0x80000000u / max(t, 1u), 65535u)), bits - 1);
}

// The weights' total, after every lane has summed its groups of 32 keys.
fn sum_weights(o: Query, best: i32, lane: u32) {
    var sum = 0u;
    for (var first = lane * 32u; first < o.keys; first += LANES * 32u) {
        var e = 0u;
        for (var j = first; j < min(first + 32u, o.keys); j++) {
            e += u32(weight(scores[o.at + j], best));
        }
        sum += e >> 8u;
    }
    atomicAdd(&total, sum);
    workgroupBarrier();
}

@compute @workgroup_size(LANES)
fn probabilities(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let index = group.y * groups.x + group.x;
    if (index >= p.rows * p.heads) {
        return;
    }
    let o = query(index);
    tally(SITE_MATMUL, score_keys(o, lane));
    let best = bitcast<i32>(atomicLoad(&top) ^ 0x80000000u);
    sum_weights(o, best, lane);
    let scale = softmax_scale(atomicLoad(&total));
    for (var j = lane; j < p.keys; j += LANES) {
        var x = 0;
        if (j < o.keys) {
            x = mulsh(weight(scores[o.at + j], best), scale.x, scale.y);
        }
        scores[o.at + j] = x;
    }
}

// Quantises the group of 32 probabilities at `first` in place.
fn quantize_group(o: Query, first: u32) {
    for (var i = 0u; i < 32u; i++) {
        block[i] = 0;
        block_exponent[i] = 0;
        if (first + i < o.keys) {
            let key = (o.first_key + first + i) * p.kv_heads + o.kv_head;
            block[i] = scores[o.at + first + i];
            block_exponent[i] = value_exponents[key] - 24;
        }
    }
    let exponent = quantize_mixed_block(ACTIVATION_BITS);
    for (var i = 0u; i < 16u; i++) {
        scores[o.at + first + i] = bitcast<i32>(block_words[i]);
    }
    scores[o.at + first + 16u] = exponent;
}

@compute @workgroup_size(LANES)
fn forward(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let index = group.y * groups.x + group.x;
    if (index >= p.rows * p.heads) {
        return;
    }
    let o = query(index);
    for (var first = lane * 32u; first < o.keys; first += LANES * 32u) {
        quantize_group(o, first);
    }
    storageBarrier();
    workgroupBarrier();
    let limit = term_limit((o.keys + 31u) / 32u);
    var count = 0u;
    for (var w = lane; w < p.dim / 2u; w += LANES) {
        var sum = vec2<u32>();
        for (var first = 0u; first < o.keys; first += 32u) {
            // Mantissas beyond the last key are zero: stop before them, not to read other slots.
            let pairs = (min(o.keys - first, 32u) + 1u) / 2u;
            var d = vec2<i32>();
            for (var i = 0u; i < pairs; i++) {
                let m = bitcast<u32>(scores[o.at + first + i]);
                let key = ((o.first_key + first + 2u * i) * p.kv_heads + o.kv_head) * p.words + w;
                let even = values[key];
                let odd = values[key + p.kv_heads * p.words];
                d += lo16(m) * vec2<i32>(lo16(even), hi16(even));
                d += hi16(m) * vec2<i32>(lo16(odd), hi16(odd));
            }
            let shift = -(scores[o.at + first + 16u] + ACTIVATION_FRACTION);
            let t = vec2<i32>(flush(d.x, shift), flush(d.y, shift));
            count += select(0u, 1u, abs(t.x) > limit) + select(0u, 1u, abs(t.y) > limit);
            sum += bitcast<vec2<u32>>(t);
        }
        let to = (o.row * p.all_heads + o.head) * p.dim + 2u * w;
        out[to] = sat(bitcast<i32>(sum.x));
        out[to + 1u] = sat(bitcast<i32>(sum.y));
    }
    tally(SITE_MATMUL, count);
}
