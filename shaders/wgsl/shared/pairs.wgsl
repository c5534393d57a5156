// Mantissas four pairs at a time: one load of 16 bytes.

// Eight mantissas as two vectors of integers: even positions, odd positions.
struct Pairs {
    even: vec4<i32>,
    odd: vec4<i32>,
}

fn unpack(w: vec4<u32>) -> Pairs {
    let low = bitcast<vec4<i32>>(w << vec4<u32>(16u));
    return Pairs(low >> vec4<u32>(16u), bitcast<vec4<i32>>(w) >> vec4<u32>(16u));
}

fn dot8(a: Pairs, b: Pairs) -> i32 {
    return dot(a.even, b.even) + dot(a.odd, b.odd);
}
