// Scalar primitives of format X1: the twins of `x1.rs`, in u32 and i32 only.
//
// Numerics: 64-bit values are `vec2<u32>(low, high)`; signed ones are in two's complement. Dynamic
// shift amounts stay below 32 by a branch or by `& 31u`, because naga does not mask them. Functions
// with `_counted` add every clamp to `clamped`, which an entry point hands to `tally` at its end.

const LIM: i32 = 1073741823;

// Clamps of this invocation.
var<private> clamped: u32;

fn sat(x: i32) -> i32 {
    return clamp(x, -LIM, LIM);
}

fn sat_counted(x: i32) -> i32 {
    clamped += select(0u, 1u, mag(x) > u32(LIM));
    return sat(x);
}

// |x|, also of the most negative integer.
fn mag(x: i32) -> u32 {
    let u = bitcast<u32>(x);
    return select(u, 0u - u, x < 0);
}

fn negate_if(u: u32, negative: bool) -> i32 {
    return bitcast<i32>(select(u, 0u - u, negative));
}

// Bit length of |x|; 0 for 0.
fn bl(x: i32) -> i32 {
    return 32 - i32(countLeadingZeros(mag(x)));
}

// x * 2^-s to nearest even, |x| <= LIM. s <= 0 shifts left (the caller guarantees room); s >= 31
// gives 0, as the quotient is then below one half.
fn rne(x: i32, s: i32) -> i32 {
    if (s <= 0) {
        return bitcast<i32>(bitcast<u32>(x) << (u32(-max(s, -31)) & 31u));
    }
    if (s >= 31) {
        return 0;
    }
    let t = u32(s) & 31u;
    return (x + (1i << ((t - 1u) & 31u)) - 1 + ((x >> t) & 1)) >> t;
}

// An exact block sum d (|d| <= 2^24) times 2^-s, nearest even, clamped to LIM on the unbounded
// value. Without branches: the left shift acts on the rounded value, which is d itself when s <= 0.
fn flush(d: i32, s: i32) -> i32 {
    let r = u32(clamp(s, 0, 26)) + 1u;
    let l = u32(clamp(-s, 0, 31));
    let x = d * 2;
    let t = (x + (1i << (r - 1u)) - 1 + ((x >> r) & 1)) >> r;
    return select(t << l, select(LIM, -LIM, t < 0), abs(t) > (LIM >> l));
}

// `flush` of four sums with a shift each.
fn flush4(d: vec4<i32>, s: vec4<i32>) -> vec4<i32> {
    let r = vec4<u32>(clamp(s, vec4<i32>(0), vec4<i32>(26))) + 1u;
    let l = vec4<u32>(clamp(-s, vec4<i32>(0), vec4<i32>(31)));
    let x = d * 2;
    let t = (x + (vec4<i32>(1) << (r - 1u)) - 1 + ((x >> r) & vec4<i32>(1))) >> r;
    let limit = vec4<i32>(LIM) >> l;
    let bound = select(vec4<i32>(LIM), vec4<i32>(-LIM), t < vec4<i32>(0));
    return select(t << l, bound, abs(t) > limit);
}

// The largest block term that was not clamped and cannot take a sum of `blocks` terms out of range.
fn term_limit(blocks: u32) -> i32 {
    return min(LIM / i32(max(blocks, 1u)), LIM - 1);
}

fn lo16(w: u32) -> i32 {
    return bitcast<i32>(w << 16u) >> 16u;
}

fn hi16(w: u32) -> i32 {
    return bitcast<i32>(w) >> 16u;
}

// ---- 64 bits

fn mul64(a: u32, b: u32) -> vec2<u32> {
    let al = a & 0xffffu;
    let ah = a >> 16u;
    let b0 = b & 0xffffu;
    let b1 = b >> 16u;
    let ll = al * b0;
    let lh = al * b1;
    let hl = ah * b0;
    let mid = (ll >> 16u) + (lh & 0xffffu) + (hl & 0xffffu);
    return vec2<u32>(
        (ll & 0xffffu) | (mid << 16u),
        ah * b1 + (lh >> 16u) + (hl >> 16u) + (mid >> 16u),
    );
}

fn add64(a: vec2<u32>, b: vec2<u32>) -> vec2<u32> {
    let lo = a.x + b.x;
    return vec2<u32>(lo, a.y + b.y + select(0u, 1u, lo < a.x));
}

fn neg64(p: vec2<u32>) -> vec2<u32> {
    return add64(~p, vec2<u32>(1u, 0u));
}

// Sign extension.
fn wide(x: i32) -> vec2<u32> {
    return vec2<u32>(bitcast<u32>(x), bitcast<u32>(x >> 31u));
}

fn less64(a: vec2<u32>, b: vec2<u32>) -> bool {
    return a.y < b.y || (a.y == b.y && a.x < b.x);
}

fn shl64(p: vec2<u32>, s: u32) -> vec2<u32> {
    if (s == 0u) {
        return p;
    }
    if (s >= 32u) {
        return vec2<u32>(0u, p.x << ((s - 32u) & 31u));
    }
    return vec2<u32>(p.x << (s & 31u), (p.y << (s & 31u)) | (p.x >> ((32u - s) & 31u)));
}

fn shr64(p: vec2<u32>, s: u32) -> vec2<u32> {
    if (s == 0u) {
        return p;
    }
    if (s >= 32u) {
        return vec2<u32>(p.y >> ((s - 32u) & 31u), 0u);
    }
    return vec2<u32>((p.x >> (s & 31u)) | (p.y << ((32u - s) & 31u)), p.y >> (s & 31u));
}

// Bit length of an unsigned value; 0 for 0.
fn bl64(p: vec2<u32>) -> i32 {
    if (p.y != 0u) {
        return 64 - i32(countLeadingZeros(p.y));
    }
    return 32 - i32(countLeadingZeros(p.x));
}

// Unsigned p * 2^-s to nearest even, for 0 <= s <= 63.
fn rne64(p: vec2<u32>, s: u32) -> vec2<u32> {
    if (s == 0u) {
        return p;
    }
    let q = shr64(p, s);
    let half = 1u << ((s - 1u) & 31u);
    let odd = (q.x & 1u) == 1u;
    var up: bool;
    if (s <= 32u) {
        let mask = select((1u << (s & 31u)) - 1u, 0xffffffffu, s == 32u);
        let r = p.x & mask;
        up = r > half || (r == half && odd);
    } else {
        let r = p.y & ((1u << ((s - 32u) & 31u)) - 1u);
        up = r > half || (r == half && (p.x != 0u || odd));
    }
    return add64(q, vec2<u32>(select(0u, 1u, up), 0u));
}

// |a * b| * 2^-s to nearest even; 0 from s = 62 on.
fn mulsh_magnitude(a: i32, b: i32, s: i32) -> vec2<u32> {
    if (s >= 62) {
        return vec2<u32>(0u);
    }
    return rne64(mul64(mag(a), mag(b)), u32(max(s, 0)));
}

// The exact product a * b, times 2^-s, to nearest even, in 64 bits.
fn mulsh_wide(a: i32, b: i32, s: i32) -> vec2<u32> {
    let p = mulsh_magnitude(a, b, s);
    return select(p, neg64(p), vec2<bool>((a < 0) != (b < 0)));
}

// `mulsh_wide`, clamped.
fn mulsh(a: i32, b: i32, s: i32) -> i32 {
    let p = mulsh_magnitude(a, b, s);
    let v = select(p.x, u32(LIM), p.y != 0u || p.x > u32(LIM));
    return negate_if(v, (a < 0) != (b < 0));
}

fn mulsh_counted(a: i32, b: i32, s: i32) -> i32 {
    let p = mulsh_magnitude(a, b, s);
    let over = p.y != 0u || p.x > u32(LIM);
    clamped += select(0u, 1u, over);
    return negate_if(select(p.x, u32(LIM), over), (a < 0) != (b < 0));
}

// A signed 64-bit value, clamped.
fn sat64_counted(p: vec2<u32>) -> i32 {
    let negative = (p.y >> 31u) == 1u;
    let m = select(p, neg64(p), vec2<bool>(negative));
    let over = m.y != 0u || m.x > u32(LIM);
    clamped += select(0u, 1u, over);
    return negate_if(select(m.x, u32(LIM), over), negative);
}

// A signed 64-bit value times 2^-s to nearest even.
fn rne64_signed(p: vec2<u32>, s: u32) -> vec2<u32> {
    let negative = (p.y >> 31u) == 1u;
    let m = rne64(select(p, neg64(p), vec2<bool>(negative)), s);
    return select(m, neg64(m), vec2<bool>(negative));
}

// floor(sqrt(v)) by 16 binary digits.
fn isqrt(v: u32) -> u32 {
    var q = 0u;
    for (var b = 0x8000u; b != 0u; b = b >> 1u) {
        let c = q | b;
        if (c * c <= v) {
            q = c;
        }
    }
    return q;
}
