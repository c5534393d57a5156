// Quantisation of a block whose values have exponents of their own: block[i] * 2^block_exponent[i].

var<private> block_exponent: array<i32, 32>;

// Fills `block_words` and returns the exponent.
fn quantize_mixed_block(bits: u32) -> i32 {
    var top = NO_TOP;
    for (var i = 0u; i < 32u; i++) {
        top = max(top, top_of(block[i], block_exponent[i]));
    }
    let exponent = exponent_below(top, bits);
    for (var i = 0u; i < 16u; i++) {
        let even = mantissa(block[2u * i], exponent - block_exponent[2u * i], bits);
        let odd = mantissa(block[2u * i + 1u], exponent - block_exponent[2u * i + 1u], bits);
        block_words[i] = even | (odd << 16u);
    }
    return exponent;
}
