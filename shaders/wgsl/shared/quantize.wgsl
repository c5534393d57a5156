// Quantisation of one block of 32 values to block floating point, by one invocation.

const ACTIVATION_BITS: u32 = 11u;
const WEIGHT_BITS: u32 = 10u;
const ACTIVATION_FRACTION: i32 = 16;
const GRADIENT_FRACTION: i32 = 20;
// The top of a block of zeros: below every other.
const NO_TOP: i32 = -0x7fffffff;

// The block. Entry points fill all 32 values (zeros beyond the edge).
var<private> block: array<i32, 32>;
// Its mantissas as pairs, the even one in the low half.
var<private> block_words: array<u32, 16>;

fn mantissa(x: i32, s: i32, bits: u32) -> u32 {
    let top = (1i << ((bits - 1u) & 31u)) - 1;
    return bitcast<u32>(clamp(rne(x, s), -top, top)) & 0xffffu;
}

// Exponent of the bit above the value x * 2^e.
fn top_of(x: i32, e: i32) -> i32 {
    return select(bl(x) + e, NO_TOP, x == 0);
}

// The exponent of a block whose values' tops reach `top`: 0 for a block of zeros.
fn exponent_below(top: i32, bits: u32) -> i32 {
    return select(top - i32(bits) + 1, 0, top == NO_TOP);
}

// Fills `block_words` from block[i] * 2^-fraction, and returns the exponent.
fn quantize_block(bits: u32, fraction: i32) -> i32 {
    var largest = 0u;
    for (var i = 0u; i < 32u; i++) {
        largest = max(largest, mag(block[i]));
    }
    let exponent = exponent_below(top_of(bitcast<i32>(largest), -fraction), bits);
    let shift = exponent + fraction;
    for (var i = 0u; i < 16u; i++) {
        let even = mantissa(block[2u * i], shift, bits);
        block_words[i] = even | (mantissa(block[2u * i + 1u], shift, bits) << 16u);
    }
    return exponent;
}
