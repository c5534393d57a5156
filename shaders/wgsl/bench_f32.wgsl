// A plain f32 matrix product with the blocking of `matmul.wgsl`: the yardstick of its speed.
//
// Equations: out[m, n] = sum over k of a[m, k] * b[n, k], rounded in whatever order. Never part of
//   a result: benches only.
// Shapes: a (M, K/4) and b (N, K/4) vectors of four, out (M, N).
// Dispatch: x counts column groups of 2 LANES, z row groups of 8; N a multiple of 2 LANES, M of 8.
// Writes: out `=`; no aliasing.
// Numerics: f32, not exact.
// Twin: none

override LANES: u32 = 64u;

struct Params {
    rows: u32,
    cols: u32,
    quads: u32,
}

@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(3) var<storage, read> a: array<vec4<f32>>;
@group(0) @binding(4) var<storage, read> b: array<vec4<f32>>;
@group(0) @binding(5) var<storage, read_write> out: array<f32>;

@compute @workgroup_size(LANES)
fn product(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let col = group.x * 2u * LANES + lane;
    let row = group.z * 8u;
    let k = p.quads;
    var x0 = vec4<f32>();
    var x1 = vec4<f32>();
    var y0 = vec4<f32>();
    var y1 = vec4<f32>();
    for (var i = 0u; i < k; i++) {
        let x = b[col * k + i];
        let y = b[(col + LANES) * k + i];
        let r0 = a[row * k + i];
        let r1 = a[(row + 1u) * k + i];
        let r2 = a[(row + 2u) * k + i];
        let r3 = a[(row + 3u) * k + i];
        x0 += vec4<f32>(dot(r0, x), dot(r1, x), dot(r2, x), dot(r3, x));
        y0 += vec4<f32>(dot(r0, y), dot(r1, y), dot(r2, y), dot(r3, y));
        let r4 = a[(row + 4u) * k + i];
        let r5 = a[(row + 5u) * k + i];
        let r6 = a[(row + 6u) * k + i];
        let r7 = a[(row + 7u) * k + i];
        x1 += vec4<f32>(dot(r4, x), dot(r5, x), dot(r6, x), dot(r7, x));
        y1 += vec4<f32>(dot(r4, y), dot(r5, y), dot(r6, y), dot(r7, y));
    }
    for (var j = 0u; j < 4u; j++) {
        out[(row + j) * p.cols + col] = x0[j];
        out[(row + j) * p.cols + col + LANES] = y0[j];
        out[(row + 4u + j) * p.cols + col] = x1[j];
        out[(row + 4u + j) * p.cols + col + LANES] = y1[j];
    }
}
