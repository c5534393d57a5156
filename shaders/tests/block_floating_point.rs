//! Block floating point against exact integers and f64: quantisation, weight tiles, the 11 x 10
//! rule.

use manyhands_shaders::bfp::{
    ACTIVATION_BITS, BLOCK, Bfp, Tiles, WEIGHT_BITS, WEIGHT_EXPONENT_RANGE, padded, quantize,
};
use manyhands_shaders::x1::{LIM, philox};
use proptest::prelude::*;

/// Largest mantissa of `bits` bits.
const fn mantissa_max(bits: u32) -> i32 {
    (1 << (bits - 1)) - 1
}

/// A power of two as f64, exact for every exponent used here.
fn power(e: i32) -> f64 {
    libm::ldexp(1.0, e)
}

/// `(mantissas, exponent)` by the definition, in f64: every scaling is exact, one rounding.
fn reference(x: &[i32], e: &[i32], bits: u32) -> (Vec<i32>, i32) {
    let largest = x.iter().zip(e).map(|(&x, &e)| f64::from(x).abs() * power(e));
    let largest = largest.fold(0.0, f64::max);
    if largest == 0.0 {
        return (vec![0; x.len()], 0);
    }
    // frexp: largest = f * 2^top with f in [1/2, 1).
    let (_, top) = libm::frexp(largest);
    let exponent = top - (bits as i32 - 1);
    let max = f64::from(mantissa_max(bits));
    let mantissa = |(&x, &e): (&i32, &i32)| {
        let m = (f64::from(x) * power(e - exponent)).round_ties_even();
        m.clamp(-max, max) as i32
    };
    (x.iter().zip(e).map(mantissa).collect(), exponent)
}

fn check(x: &[i32], e: &[i32], bits: u32) {
    let mut mantissas = vec![99; x.len()];
    let exponent = quantize(x, e, bits, &mut mantissas);
    let (want, want_exponent) = reference(x, e, bits);
    assert_eq!(exponent, want_exponent, "exponent of {x:?} {e:?}");
    let wrong = (0..x.len()).find(|&i| i32::from(mantissas[i]) != want[i]);
    if let Some(i) = wrong {
        panic!("index {i}: {} instead of {}, of {x:?} {e:?}", mantissas[i], want[i]);
    }
    let largest = x.iter().zip(e).map(|(&x, &e)| f64::from(x).abs() * power(e));
    let largest = largest.fold(0.0, f64::max);
    // Half a unit by rounding, up to a whole one by the clamp of the very largest mantissa.
    let bound = largest * power(1 - bits as i32);
    for (i, (&m, (&x, &e))) in mantissas.iter().zip(x.iter().zip(e)).enumerate() {
        assert!(i32::from(m).abs() <= mantissa_max(bits), "index {i}: mantissa {m}");
        let error = (f64::from(m) * power(exponent) - f64::from(x) * power(e)).abs();
        assert!(error <= bound, "index {i}: error {error} over {bound}");
    }
}

/// Zero has one form only, whatever exponents come with it.
#[test]
fn quantize_zeros_are_canonical() {
    let mut m = [7_i16; 5];
    assert_eq!(quantize(&[0; 5], &[-40, 3, 0, 60, -60], 11, &mut m), 0);
    assert_eq!(m, [0; 5]);
    // A zero's exponent does not count.
    check(&[0, 5, 0], &[60, -3, -60], 11);
}

/// The largest mantissa rounds up to a power of two and is clamped; ties go to even.
#[test]
fn quantize_edges_equal_the_definition() {
    for bits in [WEIGHT_BITS, ACTIVATION_BITS] {
        for n in 0..30 {
            let x = 1 << n;
            check(&[x, x - 1, 1 - x, x / 2, x / 2 + x / 4, 1, -1, 0], &[-16; 8], bits);
            check(&[2 * x - 1, 1 - 2 * x, x + 1], &[-20; 3], bits);
        }
        // 1023.5 of a 10-bit mantissa's 1024: every half unit below and above a tie.
        for half in 0..2048 {
            check(&[(1 << 20) - 1, half << 10, (half << 10) + 1, (half << 10) - 1], &[0; 4], bits);
        }
        check(&[LIM, -LIM, i32::MAX, i32::MIN, 1], &[0; 5], bits);
    }
    let mut m = [0; 1];
    assert_eq!((quantize(&[2047], &[0], 11, &mut m), m[0]), (1, 1023), "clamped, exponent kept");
}

/// Exponents that differ by more than any shift: small ones vanish, none wraps.
#[test]
fn quantize_mixed_exponents_equal_the_definition() {
    for gap in 0..=120 {
        check(&[1, LIM, -3, 1023], &[60, 60 - gap, 60 - gap / 2, -60], 11);
        check(&[1, -LIM], &[60 - gap, 60], 10);
    }
}

proptest! {
    #[test]
    fn quantize_equals_the_definition(
        values in proptest::collection::vec((-LIM..=LIM, 0..31, -40..=40), 1..=BLOCK),
        narrow in any::<bool>(),
    ) {
        let x: Vec<i32> = values.iter().map(|v| v.0 >> v.1).collect();
        let e: Vec<i32> = values.iter().map(|v| v.2).collect();
        check(&x, &e, if narrow { WEIGHT_BITS } else { ACTIVATION_BITS });
    }

    #[test]
    fn tiles_quantize_equals_the_definition(
        rows in 1_usize..70, cols in 1_usize..70, seed in any::<u32>(), spread in 0..40,
    ) {
        let value = |i: usize| {
            let r = philox([i as u32, seed, 0, 0], [5, 6]);
            let magnitude = r[1] % (spread as u32 + 1);
            (f64::from(r[0].cast_signed()) * power(-31 - magnitude as i32)) as f32
        };
        let w: Vec<f32> = (0..rows * cols).map(value).collect();
        check_tiles(&w, rows, cols);
    }
}

/// Rows and columns are padded to blocks, padding is zero, rows do not mix.
#[test]
fn bfp_from_rows_pads_and_keeps_rows_apart() {
    let cols = 37;
    let x: Vec<i32> = (0..5 * cols).map(|i| ((i * 7919) % 4001 - 2000) << (i / cols * 4)).collect();
    let cols = cols as usize;
    let b = Bfp::from_rows(&x, cols, 16, ACTIVATION_BITS);
    assert_eq!((b.rows, b.cols), (5, padded(37)));
    for r in 0..5 {
        for block in 0..2 {
            let part = &x[r * cols + block * BLOCK..(r + 1) * cols];
            let part = &part[..part.len().min(BLOCK)];
            let (want, exponent) = reference(part, &vec![-16; part.len()], ACTIVATION_BITS);
            assert_eq!(b.exponent(r, block), exponent, "row {r} block {block}");
            let got: Vec<i32> = b.block(r, block).iter().map(|&m| i32::from(m)).collect();
            assert_eq!(got[..want.len()], want, "row {r} block {block}");
            assert!(got[want.len()..].iter().all(|&m| m == 0), "padding of row {r}");
        }
    }
    assert_eq!([padded(0), padded(1), padded(32), padded(33)], [0, 32, 32, 64]);
}

/// Every weight of every tile, the padding, and both orientations.
fn check_tiles(w: &[f32], rows: usize, cols: usize) {
    let tiles = Tiles::quantize(w, rows, cols);
    assert_eq!(tiles.mantissas.len(), padded(rows) * padded(cols));
    let (low, high) = (*WEIGHT_EXPONENT_RANGE.start(), *WEIGHT_EXPONENT_RANGE.end());
    let max = f64::from(mantissa_max(WEIGHT_BITS));
    let (forward, backward) = (tiles.forward(), tiles.backward());
    for row in 0..padded(rows) {
        for col in 0..padded(cols) {
            let inside = row < rows && col < cols;
            let (r0, c0) = (row / BLOCK * BLOCK, col / BLOCK * BLOCK);
            let mut largest = 0.0_f64;
            for r in r0..rows.min(r0 + BLOCK) {
                for c in c0..cols.min(c0 + BLOCK) {
                    largest = largest.max(f64::from(w[r * cols + c]).abs());
                }
            }
            let at = format!("({row}, {col}) of ({rows}, {cols})");
            let exponent = match largest {
                0.0 => 0,
                x => (libm::frexp(x).1 - (WEIGHT_BITS as i32 - 1)).clamp(low, high),
            };
            assert_eq!(tiles.exponent(row, col), exponent, "exponent {at}");
            let value = if inside { f64::from(w[row * cols + col]) } else { 0.0 };
            let m = (value * power(-exponent)).round_ties_even().clamp(-max, max);
            assert_eq!(f64::from(tiles.mantissa(row, col)), m, "mantissa {at}");
            assert_eq!(tiles.value(row, col), m * power(exponent), "value {at}");
            let fixed = (m * power(exponent + 16)).round_ties_even();
            let fixed = fixed.clamp(-f64::from(LIM), f64::from(LIM));
            assert_eq!(f64::from(tiles.fixed(row, col)), fixed, "fixed {at}");
            assert_eq!(forward.block(row, col / BLOCK)[col % BLOCK], m as i16, "forward {at}");
            assert_eq!(forward.exponent(row, col / BLOCK), exponent, "forward {at}");
            assert_eq!(backward.block(col, row / BLOCK)[row % BLOCK], m as i16, "backward {at}");
            assert_eq!(backward.exponent(col, row / BLOCK), exponent, "backward {at}");
        }
    }
    assert_eq!((forward.rows, forward.cols), (padded(rows), padded(cols)));
    assert_eq!((backward.rows, backward.cols), (padded(cols), padded(rows)));
}

/// Subnormals, huge values, zero tiles, single outliers, ties, ragged shapes.
#[test]
fn tiles_extremes_equal_the_definition() {
    let pattern = |i: usize| match i % 11 {
        0 => f32::from_bits(1),
        1 => -f32::MIN_POSITIVE / 2.0,
        2 => 0.0,
        3 => -0.0,
        4 => 511.5 / 512.0,
        5 => -(510.5 / 512.0),
        6 => 2.5 / 512.0,
        7 => -3.5 / 512.0,
        _ => (i as f32 * 0.37).sin(),
    };
    for (rows, cols) in [(1, 1), (31, 33), (32, 32), (33, 31), (2, 100), (64, 1)] {
        let base: Vec<f32> = (0..rows * cols).map(pattern).collect();
        check_tiles(&base, rows, cols);
        for scale in [0.0, 1e-44, 1e-30, 1e-12, 1e-6, 1.0, 2048.0, 1e6, 1e30] {
            let scaled: Vec<f32> = base.iter().map(|w| w * scale).collect();
            check_tiles(&scaled, rows, cols);
        }
        let mut outlier = base;
        let last = outlier.len() - 1;
        for huge in [f32::MAX, -f32::MAX, 1_046_528.0, 1_047_552.0, 4096.0] {
            outlier[last] = huge;
            check_tiles(&outlier, rows, cols);
        }
    }
    assert_eq!(Tiles::quantize(&[0.0; 40 * 40], 40, 40).exponents, [0; 4]);
}

/// 32 x 1023 x 511 < 2^24: with one bit more on either side, a sum of f32 would round.
#[test]
fn block_products_fit_exactly_into_f32() {
    let (a, b) = (mantissa_max(ACTIVATION_BITS), mantissa_max(WEIGHT_BITS));
    let largest = BLOCK as i64 * i64::from(a) * i64::from(b);
    assert_eq!(largest, 16_728_096);
    assert!(largest < 1 << 24);
    assert!(BLOCK as i64 * i64::from(2 * a + 1) * i64::from(b) > 1 << 24);
    // Any order and any fusing gives the integer.
    for seed in 0..2000 {
        let mantissa = |i: usize, max: i32, which: u32| {
            let r = philox([i as u32, seed, which, 0], [8, 9]);
            match seed % 3 {
                0 => max,
                1 => max * (1 - 2 * (r[0] & 1).cast_signed()),
                _ => r[0].cast_signed() % (max + 1),
            }
        };
        let x: Vec<(i32, i32)> =
            (0..BLOCK).map(|i| (mantissa(i, a, 1), mantissa(i, b, 2))).collect();
        let exact: i64 = x.iter().map(|&(x, y)| i64::from(x) * i64::from(y)).sum();
        let products = || x.iter().map(|&(x, y)| x as f32 * y as f32);
        let forward: f32 = products().sum();
        let backward: f32 = products().rev().sum();
        let fused = x.iter().fold(0.0_f32, |s, &(x, y)| (x as f32).mul_add(y as f32, s));
        let halves: Vec<f32> = products().collect();
        let tree: f32 = (0..16).map(|i| halves[i] + halves[i + 16]).sum();
        for (name, sum) in
            [("forward", forward), ("backward", backward), ("fused", fused), ("tree", tree)]
        {
            assert_eq!(sum as i64, exact, "seed {seed}: {name}");
        }
    }
}
