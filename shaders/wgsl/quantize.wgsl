// Quantisation to block floating point: along channels, and along tokens for weight gradients;
// and the transposition of weights, whose tiles serve both directions.
//
// Equations: a block of 32 values x_i * 2^e_i becomes mantissas m_i = clamp(rne(x_i, E - e_i)) of
//   `bits` bits under one exponent E (see `quantize_block`).
//   rows:          blocks along the channels of x (R, C) in FX(fraction)
//   tokens:        blocks of 32 tokens of one segment, of x (N, C) in FX(fraction)
//   tokens_blocks: the same of a matrix (N, C) that is in blocks along channels already
//   transpose:     words[c, r] = source[r, c]
// Shapes: x (R, C); source (N, C/2 padded) words with source_exponents (N, C/32); token_blocks (B,
//   2): first row and number of rows of a block; words (R, C/2 padded) or (C, B * 16),
//   exponents (R, C/32) or (C, B). transpose: R and C whole blocks, source (R, C/2), words (C, R/2).
// Dispatch: one invocation a block, channels fastest; transpose: one a square of 2 x 2, channels
//   fastest, from row 2 `first_square`; x and y together count groups of LANES.
// Writes: words `=`, exponents `=`; no aliasing.
// Numerics: |x| <= LIM; exponents stay within i8; padding is mantissa 0. Nothing can saturate.
// Twin: shaders/src/bfp.rs (`Bfp::from_rows`), shaders/src/twin/matmul.rs (`weight_gradient`)

override LANES: u32 = 64u;

struct Params {
    rows: u32,
    cols: u32,
    bits: u32,
    fraction: i32,
    col_blocks: u32,
    token_blocks: u32,
    first_square: u32,
}

@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(3) var<storage, read> x: array<i32>;
@group(0) @binding(3) var<storage, read> source: array<u32>;
@group(0) @binding(4) var<storage, read> source_exponents: array<i32>;
@group(0) @binding(5) var<storage, read> token_blocks: array<vec2<u32>>;
@group(0) @binding(6) var<storage, read_write> words: array<u32>;
@group(0) @binding(7) var<storage, read_write> exponents: array<i32>;

@compute @workgroup_size(LANES)
fn rows(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let id = (group.y * groups.x + group.x) * LANES + lane;
    if (id >= p.rows * p.col_blocks) {
        return;
    }
    let row = id / p.col_blocks;
    let first = (id % p.col_blocks) * 32u;
    for (var i = 0u; i < 32u; i++) {
        block[i] = 0;
        if (first + i < p.cols) {
            block[i] = x[row * p.cols + first + i];
        }
    }
    write(id, quantize_block(p.bits, p.fraction));
}

@compute @workgroup_size(LANES)
fn tokens(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let id = (group.y * groups.x + group.x) * LANES + lane;
    if (id >= p.cols * p.token_blocks) {
        return;
    }
    let col = id % p.cols;
    let tokens = token_blocks[id / p.cols];
    for (var i = 0u; i < 32u; i++) {
        block[i] = 0;
        if (i < tokens.y) {
            block[i] = x[(tokens.x + i) * p.cols + col];
        }
    }
    write(col * p.token_blocks + id / p.cols, quantize_block(p.bits, p.fraction));
}

@compute @workgroup_size(LANES)
fn tokens_blocks(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let id = (group.y * groups.x + group.x) * LANES + lane;
    if (id >= p.cols * p.token_blocks) {
        return;
    }
    let col = id % p.cols;
    let tokens = token_blocks[id / p.cols];
    for (var i = 0u; i < 32u; i++) {
        block[i] = 0;
        block_exponent[i] = 0;
        if (i < tokens.y) {
            let row = tokens.x + i;
            let pair = source[row * p.col_blocks * 16u + col / 2u];
            block[i] = select(lo16(pair), hi16(pair), (col & 1u) == 1u);
            block_exponent[i] = source_exponents[row * p.col_blocks + col / 32u];
        }
    }
    write(col * p.token_blocks + id / p.cols, quantize_mixed_block(p.bits));
}

@compute @workgroup_size(LANES)
fn transpose(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let width = p.cols / 2u;
    let height = p.rows / 2u;
    let id = p.first_square * width + (group.y * groups.x + group.x) * LANES + lane;
    if (id >= width * height) {
        return;
    }
    let pair = id % width;
    let row = id / width;
    let upper = source[2u * row * width + pair];
    let lower = source[(2u * row + 1u) * width + pair];
    words[2u * pair * height + row] = (upper & 0xffffu) | (lower << 16u);
    words[(2u * pair + 1u) * height + row] = (upper >> 16u) | (lower & 0xffff0000u);
}

fn write(at: u32, exponent: i32) {
    exponents[at] = exponent;
    for (var i = 0u; i < 16u; i++) {
        words[at * 16u + i] = block_words[i];
    }
}
