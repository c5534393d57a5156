// Matrix products of block floating point operands, register-blocked and free of barriers.
//
// Equations, with A (M, K) and B (N, K) in blocks of 32 along K and `flush` of X1:
//   term(m, n, b)   = flush(sum of the block's 32 products, -(EA + EB + F))
//   product:          out[m, n]   = sat(sum over b of term)
//   product_row:      the same, for few rows: lanes share a column's blocks
//   weight_gradient:  grad[m, n] += sat(sum over b of term), once a segment of token blocks
// Shapes: a (M, K/8) and b (N, K/8) words of four mantissa pairs; a_exponents (M, K/32);
//   b_exponents (N >> tile, K/32): `tile` is 5 for weight tiles, 0 for one exponent a row;
//   out (M, N) or grad (M, N) as low and high words; segments (K/32): number of blocks in the
//   block's segment, with the top bit set at the segment's last block.
// Dispatch: product, weight_gradient: x and y together count N / (2 LANES) column groups, z counts
//   row groups of 8; a workgroup owns 8 x (2 LANES) outputs. product_row: x and y count
//   N / (LANES / SPLIT) column groups, z rows.
// Writes: out `=`, or `= sat(out + product)` when `accumulate` is set; grad `+=` in 64 bits.
//   Nothing may alias.
// Numerics: 11-bit times 10-bit mantissas: a block's sum stays below 2^24 in magnitude, so it is
//   exact in i32 and, with F32, in f32 whatever the order or fusing. Sums of terms wrap in u32;
//   terms above LIM / blocks are counted, and with none of them no sum leaves i32.
// Twin: shaders/src/twin/matmul.rs

override LANES: u32 = 64u;
override SPLIT: u32 = 8u;
override F32: bool = false;

struct Params {
    first_row: u32,
    rows: u32,
    cols: u32,
    blocks: u32,
    fraction: i32,
    tile: u32,
    accumulate: u32,
    limit: i32,
}

@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(3) var<storage, read> a: array<vec4<u32>>;
@group(0) @binding(4) var<storage, read> a_exponents: array<i32>;
@group(0) @binding(5) var<storage, read> b: array<vec4<u32>>;
@group(0) @binding(6) var<storage, read> b_exponents: array<i32>;
@group(0) @binding(7) var<storage, read_write> out: array<i32>;
@group(0) @binding(7) var<storage, read_write> grad_low: array<u32>;
@group(0) @binding(8) var<storage, read_write> grad_high: array<u32>;
@group(0) @binding(9) var<storage, read> segments: array<u32>;

// An 8 x 2 tile: `x` and `y` are the two columns, each of rows 0 to 3 and 4 to 7.
struct Tile {
    x0: vec4<i32>,
    x1: vec4<i32>,
    y0: vec4<i32>,
    y1: vec4<i32>,
}

fn dot8f(a: Pairs, b: Pairs) -> f32 {
    return dot(vec4<f32>(a.even), vec4<f32>(b.even)) + dot(vec4<f32>(a.odd), vec4<f32>(b.odd));
}

// Sums of one block's products; `rows` and `more` are the rows' first words.
fn block_sums(rows: vec4<u32>, more: vec4<u32>, bx: u32, by: u32, at: u32) -> Tile {
    if (F32) {
        return block_sums_f32(rows, more, bx, by, at);
    }
    var d: Tile;
    for (var i = at; i < at + 4u; i++) {
        let x = unpack(b[bx + i]);
        let y = unpack(b[by + i]);
        let r0 = unpack(a[rows.x + i]);
        let r1 = unpack(a[rows.y + i]);
        let r2 = unpack(a[rows.z + i]);
        let r3 = unpack(a[rows.w + i]);
        d.x0 += vec4<i32>(dot8(r0, x), dot8(r1, x), dot8(r2, x), dot8(r3, x));
        d.y0 += vec4<i32>(dot8(r0, y), dot8(r1, y), dot8(r2, y), dot8(r3, y));
        let r4 = unpack(a[more.x + i]);
        let r5 = unpack(a[more.y + i]);
        let r6 = unpack(a[more.z + i]);
        let r7 = unpack(a[more.w + i]);
        d.x1 += vec4<i32>(dot8(r4, x), dot8(r5, x), dot8(r6, x), dot8(r7, x));
        d.y1 += vec4<i32>(dot8(r4, y), dot8(r5, y), dot8(r6, y), dot8(r7, y));
    }
    return d;
}

// The same in f32: every value is an integer of at most 2^24 - 1 in magnitude.
fn block_sums_f32(rows: vec4<u32>, more: vec4<u32>, bx: u32, by: u32, at: u32) -> Tile {
    var x0 = vec4<f32>();
    var x1 = vec4<f32>();
    var y0 = vec4<f32>();
    var y1 = vec4<f32>();
    for (var i = at; i < at + 4u; i++) {
        let x = unpack(b[bx + i]);
        let y = unpack(b[by + i]);
        let r0 = unpack(a[rows.x + i]);
        let r1 = unpack(a[rows.y + i]);
        let r2 = unpack(a[rows.z + i]);
        let r3 = unpack(a[rows.w + i]);
        x0 += vec4<f32>(dot8f(r0, x), dot8f(r1, x), dot8f(r2, x), dot8f(r3, x));
        y0 += vec4<f32>(dot8f(r0, y), dot8f(r1, y), dot8f(r2, y), dot8f(r3, y));
        let r4 = unpack(a[more.x + i]);
        let r5 = unpack(a[more.y + i]);
        let r6 = unpack(a[more.z + i]);
        let r7 = unpack(a[more.w + i]);
        x1 += vec4<f32>(dot8f(r4, x), dot8f(r5, x), dot8f(r6, x), dot8f(r7, x));
        y1 += vec4<f32>(dot8f(r4, y), dot8f(r5, y), dot8f(r6, y), dot8f(r7, y));
    }
    return Tile(vec4<i32>(x0), vec4<i32>(x1), vec4<i32>(y0), vec4<i32>(y1));
}

// Where an invocation's 8 x 2 tile lies. Rows and columns beyond the edge repeat the last one, so
// that loads stay inside; `limit` of such a row cannot be exceeded, and its outputs are not kept.
struct Place {
    row: u32,
    col: vec2<u32>,
    rows: vec4<u32>,
    more: vec4<u32>,
}

fn place(group: vec3<u32>, groups: vec3<u32>, lane: u32) -> Place {
    var o: Place;
    let first = (group.y * groups.x + group.x) * 2u * LANES + lane;
    o.row = p.first_row + group.z * 8u;
    o.col = vec2<u32>(first, first + LANES);
    let last = vec4<u32>(p.rows - 1u);
    o.rows = min(vec4<u32>(o.row) + vec4<u32>(0u, 1u, 2u, 3u), last);
    o.more = min(vec4<u32>(o.row) + vec4<u32>(4u, 5u, 6u, 7u), last);
    return o;
}

fn row_limit(row: u32, step: vec4<u32>, limit: i32) -> vec4<i32> {
    let valid = vec4<u32>(row) + step < vec4<u32>(p.rows);
    return select(vec4<i32>(0x7fffffff), vec4<i32>(limit), valid);
}

fn exponents(rows: vec4<u32>, block: u32) -> vec4<i32> {
    let at = rows * p.blocks + block;
    return vec4<i32>(a_exponents[at.x], a_exponents[at.y], a_exponents[at.z], a_exponents[at.w]);
}

fn count_above(t: vec4<i32>, limit: vec4<i32>) -> u32 {
    let over = select(vec4<u32>(0u), vec4<u32>(1u), abs(t) > limit);
    return over.x + over.y + over.z + over.w;
}

// The running sums of a tile, as bits, and its counts by column.
var<private> sums: array<vec4<u32>, 4>;
var<private> counts: vec2<u32>;

fn add_block(o: Place, last: vec2<u32>, block: u32, low: vec4<i32>, high: vec4<i32>) {
    let words = p.blocks * 4u;
    let d = block_sums(o.rows * words, o.more * words, last.x * words, last.y * words, block * 4u);
    let e0 = -exponents(o.rows, block) - p.fraction;
    let e1 = -exponents(o.more, block) - p.fraction;
    let ex = b_exponents[(last.x >> p.tile) * p.blocks + block];
    let ey = b_exponents[(last.y >> p.tile) * p.blocks + block];
    let x0 = flush4(d.x0, e0 - ex);
    let x1 = flush4(d.x1, e1 - ex);
    let y0 = flush4(d.y0, e0 - ey);
    let y1 = flush4(d.y1, e1 - ey);
    counts += vec2<u32>(
        count_above(x0, low) + count_above(x1, high),
        count_above(y0, low) + count_above(y1, high),
    );
    sums[0] += bitcast<vec4<u32>>(x0);
    sums[1] += bitcast<vec4<u32>>(x1);
    sums[2] += bitcast<vec4<u32>>(y0);
    sums[3] += bitcast<vec4<u32>>(y1);
}

fn count_valid(o: Place) -> u32 {
    let valid = o.col < vec2<u32>(p.cols);
    return select(0u, counts.x, valid.x) + select(0u, counts.y, valid.y);
}

@compute @workgroup_size(LANES)
fn product(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let o = place(group, groups, lane);
    if (o.col.x >= p.cols) {
        return;
    }
    let last = min(o.col, vec2<u32>(p.cols - 1u));
    let low = row_limit(o.row, vec4<u32>(0u, 1u, 2u, 3u), p.limit);
    let high = row_limit(o.row, vec4<u32>(4u, 5u, 6u, 7u), p.limit);
    for (var block = 0u; block < p.blocks; block++) {
        add_block(o, last, block, low, high);
    }
    tally(SITE_MATMUL, count_valid(o));
    for (var i = 0u; i < 8u; i++) {
        store(o.row + i, o.col.x, bitcast<i32>(sums[i >> 2u][i & 3u]));
        store(o.row + i, o.col.y, bitcast<i32>(sums[2u + (i >> 2u)][i & 3u]));
    }
    tally(SITE_RESIDUAL, clamped);
}

fn store(row: u32, col: u32, sum: i32) {
    if (row >= p.rows || col >= p.cols) {
        return;
    }
    let at = row * p.cols + col;
    if (p.accumulate != 0u) {
        out[at] = sat_counted(out[at] + sat(sum));
    } else {
        out[at] = sat(sum);
    }
}

@compute @workgroup_size(LANES)
fn weight_gradient(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let o = place(group, groups, lane);
    if (o.col.x >= p.cols) {
        return;
    }
    let last = min(o.col, vec2<u32>(p.cols - 1u));
    for (var block = 0u; block < p.blocks; block++) {
        let segment = segments[block];
        let limit = term_limit(segment & 0x7fffffffu);
        let low = row_limit(o.row, vec4<u32>(0u, 1u, 2u, 3u), limit);
        let high = row_limit(o.row, vec4<u32>(4u, 5u, 6u, 7u), limit);
        add_block(o, last, block, low, high);
        if (segment >= 0x80000000u) {
            for (var i = 0u; i < 8u; i++) {
                add_gradient(o.row + i, o.col.x, bitcast<i32>(sums[i >> 2u][i & 3u]));
                add_gradient(o.row + i, o.col.y, bitcast<i32>(sums[2u + (i >> 2u)][i & 3u]));
            }
            sums = array<vec4<u32>, 4>();
        }
    }
    tally(SITE_MATMUL, count_valid(o));
}

fn add_gradient(row: u32, col: u32, sum: i32) {
    if (row >= p.rows || col >= p.cols) {
        return;
    }
    let at = row * p.cols + col;
    let g = add64(vec2<u32>(grad_low[at], grad_high[at]), wide(sat(sum)));
    grad_low[at] = g.x;
    grad_high[at] = g.y;
}

// Partial sums of a workgroup's columns; u32 addition wraps, so their order does not matter.
var<workgroup> partial: array<atomic<u32>, 64>;

@compute @workgroup_size(LANES)
fn product_row(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let slot = lane / SPLIT;
    let col = (group.y * groups.x + group.x) * (LANES / SPLIT) + slot;
    let row = p.first_row + group.z;
    let words = p.blocks * 4u;
    var sum = 0u;
    var count = 0u;
    if (col < p.cols) {
        for (var block = lane % SPLIT; block < p.blocks; block += SPLIT) {
            var d = 0;
            for (var i = block * 4u; i < block * 4u + 4u; i++) {
                d += dot8(unpack(a[row * words + i]), unpack(b[col * words + i]));
            }
            let e = a_exponents[row * p.blocks + block]
                + b_exponents[(col >> p.tile) * p.blocks + block];
            let t = flush(d, -(e + p.fraction));
            count += select(0u, 1u, abs(t) > p.limit);
            sum += bitcast<u32>(t);
        }
        tally(SITE_MATMUL, count);
    }
    if (SPLIT > 1u) {
        atomicAdd(&partial[slot], sum);
        workgroupBarrier();
        sum = atomicLoad(&partial[slot]);
    }
    if (col < p.cols && lane % SPLIT == 0u) {
        store(row, col, bitcast<i32>(sum));
        tally(SITE_RESIDUAL, clamped);
    }
}
