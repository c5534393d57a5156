// Everything at the logits: softmax statistics, sampling, and gradient seeds.
//
// Equations, with t_i = (max - logit_i) * scale and e_i = exp2n(t_i) in Q23:
//   stats: Z = sum e_i, M = sum e_i t_i, the lowest token of largest logit, and t of a token that
//          is given, or the most likely one, or the first whose cumulative weight exceeds
//          floor(draw Z / 2^64)
//   seed:  w (p_i - [i = target]) + alpha p_i (center - t_i), with p = e / Z in Q24
// Shapes: logits (N, V) in FX(16); requests (N) of (mode, token, draw low, draw high); stats (N,
//   8): token, t, Z low, Z high, M low, M high, greedy, max; seeds (N) of (target, weight, entropy
//   weight, entropy center); out (N, V) in FX(20).
// Dispatch: stats: x and y together count rows, a workgroup owns one; seed: one invocation an
//   element, x and y together count groups of LANES; both from row `first_row` up to row `rows`.
// Writes: stats, out `=`; no aliasing.
// Numerics: Z is at most 2^41 and M at most 2^63 for 2^18 tokens: 64-bit sums, exact in any order.
// Twin: shaders/src/twin/logits.rs

override LANES: u32 = 64u;

const T_MAX: i32 = 2621440;
const MODE_GREEDY: u32 = 1u;
const MODE_DRAW: u32 = 2u;

struct Params {
    rows: u32,
    cols: u32,
    scale: i32,
    first_row: u32,
}

@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(3) var<storage, read> logits: array<i32>;
@group(0) @binding(4) var<storage, read> requests: array<vec4<u32>>;
@group(0) @binding(5) var<storage, read_write> stats_out: array<u32>;
@group(0) @binding(4) var<storage, read> seeds: array<vec4<i32>>;
@group(0) @binding(5) var<storage, read> stats_in: array<u32>;
@group(0) @binding(6) var<storage, read_write> out: array<i32>;

var<workgroup> top: atomic<u32>;
// Counted down from the last token, so that zero-initialised memory and a maximum will do.
var<workgroup> first_best: atomic<u32>;
var<workgroup> chosen: atomic<u32>;
var<workgroup> lane_totals: array<vec2<u32>, LANES>;
var<workgroup> moment_low: atomic<u32>;
var<workgroup> moment_high: atomic<u32>;

fn exponent_of(logit: i32, best: i32) -> i32 {
    return min(mulsh(best - logit, p.scale, 24), T_MAX);
}

// floor(draw * total / 2^64).
fn threshold(draw: vec2<u32>, total: vec2<u32>) -> vec2<u32> {
    let low = mul64(draw.x, total.x);
    let mid = mul64(draw.x, total.y);
    let more = mul64(draw.y, total.x);
    let carry = add64(add64(mid, vec2<u32>(low.y, 0u)), vec2<u32>(more.x, 0u));
    return add64(add64(mul64(draw.y, total.y), vec2<u32>(more.y, 0u)), vec2<u32>(carry.y, 0u));
}

@compute @workgroup_size(LANES)
fn stats(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let row = p.first_row + group.y * groups.x + group.x;
    if (row >= p.rows) {
        return;
    }
    let at = row * p.cols;
    // A contiguous share of the row a lane: sampling needs sums in the order of tokens.
    let share = (p.cols + LANES - 1u) / LANES;
    let begin = min(lane * share, p.cols);
    let end = min(begin + share, p.cols);
    var largest = 0u;
    for (var i = begin; i < end; i++) {
        largest = max(largest, bitcast<u32>(logits[at + i]) ^ 0x80000000u);
    }
    atomicMax(&top, largest);
    workgroupBarrier();
    let best = bitcast<i32>(atomicLoad(&top) ^ 0x80000000u);
    var sum = vec2<u32>();
    var moment = vec2<u32>();
    var countdown = 0u;
    for (var i = begin; i < end; i++) {
        let t = exponent_of(logits[at + i], best);
        let e = u32(exp2n(t, 23));
        sum = add64(sum, vec2<u32>(e, 0u));
        moment = add64(moment, mul64(e, u32(t)));
        if (logits[at + i] == best) {
            countdown = max(countdown, p.cols - i);
        }
    }
    lane_totals[lane] = sum;
    atomicMax(&first_best, countdown);
    let old = atomicAdd(&moment_low, moment.x);
    atomicAdd(&moment_high, moment.y + select(0u, 1u, old + moment.x < old));
    workgroupBarrier();
    var before = vec2<u32>();
    var total = vec2<u32>();
    for (var i = 0u; i < LANES; i++) {
        if (i == lane) {
            before = total;
        }
        total = add64(total, lane_totals[i]);
    }
    let request = requests[row];
    let greedy = p.cols - atomicLoad(&first_best);
    if (request.x == MODE_DRAW) {
        let limit = threshold(request.zw, total);
        var cumulative = before;
        var found = less64(limit, before);
        for (var i = begin; i < end; i++) {
            let e = u32(exp2n(exponent_of(logits[at + i], best), 23));
            cumulative = add64(cumulative, vec2<u32>(e, 0u));
            if (!found && less64(limit, cumulative)) {
                found = true;
                atomicStore(&chosen, i);
            }
        }
    }
    workgroupBarrier();
    if (lane == 0u) {
        var token = request.y;
        if (request.x == MODE_GREEDY) {
            token = greedy;
        }
        if (request.x == MODE_DRAW) {
            token = atomicLoad(&chosen);
        }
        var t = 0;
        if (token < p.cols) {
            t = exponent_of(logits[at + token], best);
        }
        let to = row * 8u;
        stats_out[to] = token;
        stats_out[to + 1u] = bitcast<u32>(t);
        stats_out[to + 2u] = total.x;
        stats_out[to + 3u] = total.y;
        stats_out[to + 4u] = atomicLoad(&moment_low);
        stats_out[to + 5u] = atomicLoad(&moment_high);
        stats_out[to + 6u] = greedy;
        stats_out[to + 7u] = bitcast<u32>(best);
    }
}

@compute @workgroup_size(LANES)
fn seed(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let id = p.first_row * p.cols + (group.y * groups.x + group.x) * LANES + lane;
    if (id >= p.rows * p.cols) {
        return;
    }
    let row = id / p.cols;
    let s = seeds[row];
    if (s.y == 0 && s.z == 0) {
        out[id] = 0;
        return;
    }
    let total = vec2<u32>(stats_in[row * 8u + 2u], stats_in[row * 8u + 3u]);
    // A 16-bit reciprocal of Z; the largest logit alone makes Z at least 2^23.
    let bits = bl64(total);
    let r = min(0x80000000u / max(shr64(total, u32(max(bits - 16, 0))).x, 1u), 65535u);
    let t = exponent_of(logits[id], bitcast<i32>(stats_in[row * 8u + 7u]));
    let probability = mulsh(exp2n(t, 23), i32(r), bits - 9);
    let hot = select(0, 1i << 24u, id % p.cols == bitcast<u32>(s.x));
    let policy = mulsh_wide(probability - hot, s.y, 20);
    let slope = mulsh(s.w - t, s.z, 16);
    out[id] = sat64_counted(add64(policy, mulsh_wide(probability, slope, 20)));
    tally(SITE_SEED, clamped);
}
