// Matrix products of block floating point operands by 64 x 64 tiles in workgroup memory.
//
// Equations: those of `matmul.wgsl`, the same bits; meant for hardware with fast barriers.
//   product:          out[m, n]   = sat(sum over b of term)
//   weight_gradient:  grad[m, n] += sat(sum over b of term), once a segment of token blocks
// Shapes: as in `matmul.wgsl`.
// Dispatch: x and y together count N / 64 column groups, z counts row groups of 64; a workgroup of
//   256 owns 64 x 64 outputs, an invocation 4 x 4 of them.
// Writes: out `=`, or `= sat(out + product)` when `accumulate` is set; grad `+=` in 64 bits.
//   Nothing may alias.
// Numerics: as in `matmul.wgsl`. A tile holds one block as integers, or with F32 as the bits of
//   f32 integers below 2^11; sums of 32 products stay below 2^24.
// Twin: shaders/src/twin/matmul.rs

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

// (32 positions along K, 64 rows) of each operand: 8 KiB each.
var<workgroup> tile_a: array<array<u32, 64>, 32>;
var<workgroup> tile_b: array<array<u32, 64>, 32>;

// The 4 x 4 tile of an invocation: running sums, as bits, by column.
var<private> sums: array<vec4<u32>, 4>;
var<private> counts: u32;

struct Place {
    row: u32,
    col: u32,
    group_row: u32,
    group_col: u32,
}

fn place(group: vec3<u32>, groups: vec3<u32>, lane: u32) -> Place {
    var o: Place;
    o.group_row = p.first_row + group.z * 64u;
    o.group_col = (group.y * groups.x + group.x) * 64u;
    o.row = o.group_row + (lane / 16u) * 4u;
    o.col = o.group_col + (lane % 16u) * 4u;
    return o;
}

fn encode(x: i32) -> u32 {
    return select(bitcast<u32>(x), bitcast<u32>(f32(x)), F32);
}

// Every invocation brings 8 mantissas of a row of each operand; beyond the edge, zeros.
fn load_block(o: Place, lane: u32, block: u32) {
    let row = lane / 4u;
    let quarter = lane % 4u;
    let at = block * 4u + quarter;
    var x = vec4<u32>();
    var y = vec4<u32>();
    if (o.group_row + row < p.rows) {
        x = a[(o.group_row + row) * p.blocks * 4u + at];
    }
    if (o.group_col + row < p.cols) {
        y = b[(o.group_col + row) * p.blocks * 4u + at];
    }
    for (var i = 0u; i < 4u; i++) {
        let k = quarter * 8u + 2u * i;
        tile_a[k][row] = encode(lo16(x[i]));
        tile_a[k + 1u][row] = encode(hi16(x[i]));
        tile_b[k][row] = encode(lo16(y[i]));
        tile_b[k + 1u][row] = encode(hi16(y[i]));
    }
}

fn column(k: u32, at: u32, of_a: bool) -> vec4<u32> {
    if (of_a) {
        return vec4<u32>(tile_a[k][at], tile_a[k][at + 1u], tile_a[k][at + 2u], tile_a[k][at + 3u]);
    }
    return vec4<u32>(tile_b[k][at], tile_b[k][at + 1u], tile_b[k][at + 2u], tile_b[k][at + 3u]);
}

fn block_sums(lane: u32) -> array<vec4<i32>, 4> {
    let r = (lane / 16u) * 4u;
    let c = (lane % 16u) * 4u;
    if (F32) {
        var f = array<vec4<f32>, 4>();
        for (var k = 0u; k < 32u; k++) {
            let x = bitcast<vec4<f32>>(column(k, r, true));
            let y = bitcast<vec4<f32>>(column(k, c, false));
            f[0] += x * y.x;
            f[1] += x * y.y;
            f[2] += x * y.z;
            f[3] += x * y.w;
        }
        return array<vec4<i32>, 4>(
            vec4<i32>(f[0]), vec4<i32>(f[1]), vec4<i32>(f[2]), vec4<i32>(f[3]),
        );
    }
    var d = array<vec4<i32>, 4>();
    for (var k = 0u; k < 32u; k++) {
        let x = bitcast<vec4<i32>>(column(k, r, true));
        let y = bitcast<vec4<i32>>(column(k, c, false));
        d[0] += x * y.x;
        d[1] += x * y.y;
        d[2] += x * y.z;
        d[3] += x * y.w;
    }
    return d;
}

fn add_block(o: Place, lane: u32, block: u32, limit: i32) {
    workgroupBarrier();
    load_block(o, lane, block);
    workgroupBarrier();
    let d = block_sums(lane);
    // Rows and columns beyond the edge are zeros: their terms are 0 under any exponent.
    let rows = min(vec4<u32>(o.row) + vec4<u32>(0u, 1u, 2u, 3u), vec4<u32>(p.rows - 1u));
    let at = rows * p.blocks + block;
    let ea = vec4<i32>(a_exponents[at.x], a_exponents[at.y], a_exponents[at.z], a_exponents[at.w]);
    for (var i = 0u; i < 4u; i++) {
        let col = min(o.col + i, p.cols - 1u);
        let eb = b_exponents[(col >> p.tile) * p.blocks + block];
        let t = flush4(d[i], -(ea + eb + p.fraction));
        let over = select(vec4<u32>(0u), vec4<u32>(1u), abs(t) > vec4<i32>(limit));
        counts += over.x + over.y + over.z + over.w;
        sums[i] += bitcast<vec4<u32>>(t);
    }
}

@compute @workgroup_size(256)
fn product(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let o = place(group, groups, lane);
    for (var block = 0u; block < p.blocks; block++) {
        add_block(o, lane, block, p.limit);
    }
    tally(SITE_MATMUL, counts);
    for (var i = 0u; i < 16u; i++) {
        let row = o.row + (i & 3u);
        let col = o.col + (i >> 2u);
        if (row < p.rows && col < p.cols) {
            let at = row * p.cols + col;
            let sum = sat(bitcast<i32>(sums[i >> 2u][i & 3u]));
            if (p.accumulate != 0u) {
                out[at] = sat_counted(out[at] + sum);
            } else {
                out[at] = sum;
            }
        }
    }
    tally(SITE_RESIDUAL, clamped);
}

@compute @workgroup_size(256)
fn weight_gradient(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let o = place(group, groups, lane);
    for (var block = 0u; block < p.blocks; block++) {
        let segment = segments[block];
        add_block(o, lane, block, term_limit(segment & 0x7fffffffu));
        if (segment >= 0x80000000u) {
            add_gradient(o);
            sums = array<vec4<u32>, 4>();
        }
    }
    tally(SITE_MATMUL, counts);
}

fn add_gradient(o: Place) {
    for (var i = 0u; i < 16u; i++) {
        let row = o.row + (i & 3u);
        let col = o.col + (i >> 2u);
        if (row < p.rows && col < p.cols) {
            let at = row * p.cols + col;
            let sum = sat(bitcast<i32>(sums[i >> 2u][i & 3u]));
            let g = add64(vec2<u32>(grad_low[at], grad_high[at]), wide(sum));
            grad_low[at] = g.x;
            grad_high[at] = g.y;
        }
    }
}
