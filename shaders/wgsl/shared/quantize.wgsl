// Quantisation of one block of 32 values to block floating point, by one invocation.

const ACTIVATION_BITS: u32 = 11u;
const WEIGHT_BITS: u32 = 10u;
const ACTIVATION_FRACTION: i32 = 16;
const GRADIENT_FRACTION: i32 = 20;

// The block: block[i] * 2^block_exponent[i]. Entry points fill all 32 (zeros beyond the edge).
var<private> block: array<i32, 32>;
var<private> block_exponent: array<i32, 32>;
// Its mantissas as pairs, the even one in the low half.
var<private> block_words: array<u32, 16>;

fn mantissa(x: i32, s: i32, bits: u32) -> u32 {
    let top = (1i << ((bits - 1u) & 31u)) - 1;
    return bitcast<u32>(clamp(rne(x, s), -top, top)) & 0xffffu;
}

// Fills `block_words` and returns the exponent: 0 for a block of zeros.
fn quantize_block(bits: u32) -> i32 {
    var top = -0x7fffffff;
    for (var i = 0u; i < 32u; i++) {
        let x = block[i];
        top = max(top, select(bl(x) + block_exponent[i], -0x7fffffff, x == 0));
    }
    let exponent = select(top - i32(bits) + 1, 0, top == -0x7fffffff);
    for (var i = 0u; i < 16u; i++) {
        let even = mantissa(block[2u * i], exponent - block_exponent[2u * i], bits);
        let odd = mantissa(block[2u * i + 1u], exponent - block_exponent[2u * i + 1u], bits);
        block_words[i] = even | (odd << 16u);
    }
    return exponent;
}
