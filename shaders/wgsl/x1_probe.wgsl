// Runs one primitive of X1 on many inputs, for the test that compares each with its Rust twin.
//
// Equations: results[i] = primitive `op` of inputs[i], as two words.
// Shapes: inputs (N) of four words; results (N) of two.
// Dispatch: one invocation an input; x and y together count groups of LANES.
// Writes: results `=`.
// Numerics: those of the primitives.
// Twin: shaders/src/x1.rs

override LANES: u32 = 64u;

struct Params {
    count: u32,
    op: u32,
}

@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(3) var<storage, read> inputs: array<vec4<u32>>;
@group(0) @binding(4) var<storage, read_write> results: array<vec2<u32>>;

fn one(x: i32) -> vec2<u32> {
    return vec2<u32>(bitcast<u32>(x), 0u);
}

fn evaluate(i: vec4<u32>) -> vec2<u32> {
    let s = bitcast<vec4<i32>>(i);
    switch (p.op) {
        case 0u: { return one(rne(s.x, s.y)); }
        case 1u: { return vec2<u32>(bitcast<u32>(mulsh_counted(s.x, s.y, s.z)), clamped); }
        case 2u: { return mulsh_wide(s.x, s.y, s.z); }
        case 3u: { return one(flush(s.x, s.y)); }
        case 4u: {
            let f = flush4(vec4<i32>(s.x, s.x, -s.x, s.x), vec4<i32>(s.y, s.y + 1, s.y, -s.y));
            return vec2<u32>(bitcast<u32>(f.x ^ f.y), bitcast<u32>(f.z ^ f.w));
        }
        case 5u: { return one(exp2n(s.x, s.y)); }
        case 6u: { return one(sigmoid(s.x)); }
        case 7u: { return vec2<u32>(isqrt(i.x), 0u); }
        case 8u: { return one(bl(s.x)); }
        case 9u: { return mul64(i.x, i.y); }
        case 10u: { return add64(i.xy, i.zw); }
        case 11u: { return shl64(i.xy, i.z & 63u); }
        case 12u: { return shr64(i.xy, i.z & 63u); }
        case 13u: {
            return vec2<u32>(bitcast<u32>(bl64(i.xy)), select(0u, 1u, less64(i.xy, i.zw)));
        }
        case 14u: { return rne64(i.xy, i.z & 63u); }
        case 15u: { return rne64_signed(i.xy, i.z & 63u); }
        case 16u: { return vec2<u32>(bitcast<u32>(sat64_counted(i.xy)), clamped); }
        case 17u: { return vec2<u32>(bitcast<u32>(sat_counted(s.x)), clamped); }
        default: { return neg64(wide(s.x)); }
    }
}

@compute @workgroup_size(LANES)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let id = (group.y * groups.x + group.x) * LANES + lane;
    if (id < p.count) {
        results[id] = evaluate(inputs[id]);
    }
}
