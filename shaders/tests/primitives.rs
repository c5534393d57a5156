//! Every primitive of format X1 against its mathematical definition.
//!
//! Integers are compared with wide exact arithmetic (`i128`), tables and transcendental functions
//! with soft floats. Block floating point is in `block_floating_point.rs`.

use manyhands_shaders::tables::{EXP2, SIGMOID};
use manyhands_shaders::x1::{
    LIM, bl, bl64, clamps, exp2n, flush, isqrt, mulsh, mulsh_wide, philox, rne, sat, sigmoid,
};
use proptest::prelude::*;

/// `x * 2^-s`, nearest, ties to even, from floor and remainder.
fn exact_rne(x: i128, s: i32) -> i128 {
    if s <= 0 {
        return x << -s;
    }
    if s >= 120 {
        return 0;
    }
    let unit = 1_i128 << s;
    let (floor, rest) = (x.div_euclid(unit), x.rem_euclid(unit));
    match (rest * 2).cmp(&unit) {
        std::cmp::Ordering::Less => floor,
        std::cmp::Ordering::Greater => floor + 1,
        std::cmp::Ordering::Equal => floor + floor.rem_euclid(2),
    }
}

/// Values around every power of two up to `2^top` and around every tie, both signs.
fn edges(top: u32) -> Vec<i64> {
    let mut out = vec![0];
    for bit in 0..=top {
        for other in 0..=bit {
            for d in -1..=1 {
                let x = (1_i64 << bit) + (1_i64 << other) + d;
                if x.unsigned_abs() <= 1 << top {
                    out.extend([x, -x]);
                }
            }
        }
    }
    out
}

/// Half-up, half-away and truncation all differ from the rule somewhere on these.
#[test]
fn rne_edges_equal_exact_rounding_for_every_shift() {
    for x in edges(61) {
        for s in 1..=70 {
            let got = i128::from(rne(x, s));
            assert_eq!(got, exact_rne(i128::from(x), s), "rne({x}, {s})");
        }
    }
    for x in edges(31) {
        for s in -31..=0 {
            assert_eq!(i128::from(rne(x, s)), exact_rne(i128::from(x), s), "rne({x}, {s})");
        }
    }
    assert_eq!([1, 3, 5, 7, -1, -3, -5].map(|x| rne(x, 1)), [0, 2, 2, 4, 0, -2, -2]);
}

/// The short form that the WGSL uses must be a special case.
#[test]
fn rne_short_form_agrees_on_i32() {
    for x in edges(30).into_iter().filter(|x| x.abs() <= i64::from(LIM)) {
        for s in 1..=30 {
            let y = x as i32;
            let short = (y + (1 << (s - 1)) - 1 + ((y >> s) & 1)) >> s;
            assert_eq!(rne(x, s), i64::from(short), "rne({x}, {s})");
        }
    }
}

/// A clamp that is off by one, or not counted, would differ between engines.
#[test]
fn sat_and_clamps_agree_at_the_limit() {
    let lim = i64::from(LIM);
    assert_eq!(lim, (1 << 30) - 1);
    for (x, want, counted) in [
        (lim, LIM, 0),
        (lim + 1, LIM, 1),
        (-lim, -LIM, 0),
        (-lim - 1, -LIM, 1),
        (i64::MAX, LIM, 1),
        (i64::MIN, -LIM, 1),
        (0, 0, 0),
    ] {
        assert_eq!((sat(x), clamps(x)), (want, counted), "{x}");
    }
}

/// A 32-bit intermediate, or rounding after the clamp, would show.
#[test]
fn mulsh_edges_equal_the_exact_product() {
    let values: Vec<i32> =
        edges(30).into_iter().map(|x| x as i32).filter(|x| x.abs() <= LIM).collect();
    let some = values.iter().step_by(13);
    for &a in some {
        for &b in values.iter().step_by(17) {
            for s in [0, 1, 8, 12, 14, 16, 20, 24, 31, 32, 33, 59, 60, 61, 62, 63] {
                let exact = exact_rne(i128::from(a) * i128::from(b), s);
                assert_eq!(i128::from(mulsh_wide(a, b, s)), exact, "mulsh_wide({a}, {b}, {s})");
                let clamped = exact.clamp(-i128::from(LIM), i128::from(LIM));
                assert_eq!(i128::from(mulsh(a, b, s)), clamped, "mulsh({a}, {b}, {s})");
            }
        }
    }
    // Intermediates of the norm's backward pass reach twice the limit.
    let wide = 2 * LIM;
    assert_eq!(i128::from(mulsh_wide(-wide, 1 << 15, 16)), exact_rne(-i128::from(wide) << 15, 16));
}

/// Definition on the unbounded value: the right shifts that give 0, the left shifts that clamp.
#[test]
fn flush_equals_its_definition_on_the_unbounded_value() {
    const BLOCK_SUM_MAX: i64 = 1 << 24;
    let mut clamped = 0;
    for d in edges(24) {
        assert!(d.abs() <= BLOCK_SUM_MAX);
        for s in (-90..=90).chain([-127, 127, -1000, 1000]) {
            // Beyond 80 places to the left everything but 0 is far over the limit.
            let exact = exact_rne(i128::from(d), s.max(-80));
            let want = exact.clamp(-i128::from(LIM), i128::from(LIM));
            clamped += u32::from(want != exact);
            assert_eq!(i128::from(flush(d as i32, s)), want, "flush({d}, {s})");
        }
    }
    assert!(clamped > 1000, "the left shifts must reach the clamp");
    let top = 1 << 24;
    for (d, s, want) in [
        (top, 24, 1),
        (top, 25, 0),
        (top, 26, 0),
        (top, 31, 0),
        (top, 32, 0),
        (top - 1, 1, 1 << 23),
        (1, -29, 1 << 29),
        (1, -30, LIM),
        (-1, -31, -LIM),
        (0, -31, 0),
        (3, -28, 3 << 28),
        (-4, -28, -LIM),
    ] {
        assert_eq!(flush(d, s), want, "flush({d}, {s})");
    }
}

/// A wrong bit length moves an exponent, and with it every mantissa of a block.
#[test]
fn bit_lengths_equal_their_definition() {
    assert_eq!((bl(0), bl64(0)), (0, 0));
    for n in 0..31 {
        let x = 1_i32 << n;
        assert_eq!([bl(x), bl(-x), bl(x | (x - 1)), bl(-x - (x - 1))], [n + 1; 4], "2^{n}");
    }
    assert_eq!([bl(i32::MIN), bl(i32::MAX), bl(LIM), bl(-LIM)], [32, 31, 30, 30]);
    for n in 0..64 {
        assert_eq!([bl64(1 << n), bl64((1 << n) | ((1 << n) - 1))], [n + 1; 2], "2^{n}");
    }
}

/// All squares, and their neighbours.
#[test]
fn isqrt_is_the_floor_of_the_root_around_every_square() {
    for k in 1..=0xffff_u32 {
        let square = k * k;
        assert_eq!([isqrt(square - 1), isqrt(square)], [k - 1, k], "{k}^2");
        assert_eq!(isqrt(square + 1), k, "{k}^2 + 1");
    }
    assert_eq!([isqrt(0), isqrt(u32::MAX)], [0, 0xffff]);
}

/// Every argument of the softmax, at both precisions that the kernels use.
#[test]
fn exp2n_is_accurate_and_monotone_for_every_argument() {
    const ERROR_MAX: f64 = 1e-6;
    for fo in [23, 24] {
        let one = f64::from(1 << fo);
        let mut previous = i32::MAX;
        let mut worst = (0.0, 0);
        for t in 0..41 << 16 {
            let y = exp2n(t, fo);
            assert!(y <= previous, "exp2n({t}, {fo}) = {y} after {previous}");
            assert!(y >= 0, "exp2n({t}, {fo}) = {y}");
            previous = y;
            let error = (f64::from(y) / one - libm::exp2(-f64::from(t) / 65536.0)).abs();
            if error > worst.0 {
                worst = (error, t);
            }
        }
        assert!(worst.0 < ERROR_MAX, "fo {fo}: error {} at {}", worst.0, worst.1);
        assert_eq!(exp2n(0, fo), 1 << fo);
        for n in 0..=fo {
            assert_eq!(exp2n(n << 16, fo), 1 << (fo - n), "2^-{n}");
        }
        assert_eq!([exp2n((40 << 16) - 1, fo), exp2n(40 << 16, fo), exp2n(i32::MAX, fo)], [0; 3]);
    }
}

/// Every argument up to saturation and some beyond.
#[test]
fn sigmoid_is_accurate_symmetric_and_monotone() {
    // Half a unit of the table, under a unit of the interpolation's floor, 0.2 of its curvature.
    const ERROR_MAX: f64 = 1.7 / 65536.0;
    let mut previous = -1;
    let mut worst = (0.0, 0);
    let beyond = [i32::MIN, -LIM, LIM, i32::MAX];
    for x in beyond[..2].iter().copied().chain(-17 << 16..=17 << 16).chain(beyond[2..].to_vec()) {
        let y = sigmoid(x);
        assert!(y >= previous && (0..=65536).contains(&y), "sigmoid({x}) = {y} after {previous}");
        previous = y;
        if x > i32::MIN {
            assert_eq!(sigmoid(-x), 65536 - y, "symmetry at {x}");
        }
        let exact = 1.0 / (1.0 + libm::exp(-f64::from(x) / 65536.0));
        let error = (f64::from(y) / 65536.0 - exact).abs();
        if error > worst.0 {
            worst = (error, x);
        }
    }
    assert!(worst.0 < ERROR_MAX, "error {} units at {}", worst.0 * 65536.0, worst.1);
    assert_eq!([sigmoid(0), sigmoid(LIM), sigmoid(-LIM)], [32768, 65536, 0]);
}

/// The known answers that the authors of Random123 publish (`kat_vectors`).
#[test]
fn philox_reproduces_the_published_vectors() {
    let vectors = [
        ([0; 4], [0; 2], [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]),
        ([u32::MAX; 4], [u32::MAX; 2], [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]),
        (
            [0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344],
            [0xa409_3822, 0x299f_31d0],
            [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1],
        ),
    ];
    for (counter, key, want) in vectors {
        assert_eq!(philox(counter, key), want, "{counter:x?} {key:x?}");
    }
}

/// A typing error in a table would be everywhere at once, and equal in every engine.
#[test]
fn tables_equal_their_formulas() {
    assert_eq!((EXP2.len(), SIGMOID.len()), (257, 1025));
    for (i, &y) in EXP2.iter().enumerate() {
        let exact = 1_073_741_824.0 * libm::exp2(-(i as f64) / 256.0);
        assert_eq!(f64::from(y), exact.round_ties_even(), "EXP2[{i}]");
    }
    for (i, &y) in SIGMOID.iter().enumerate() {
        let exact = 65536.0 / (1.0 + libm::exp(-(i as f64) / 64.0));
        assert_eq!(f64::from(y), exact.round_ties_even(), "SIGMOID[{i}]");
    }
}

proptest! {
    #[test]
    fn rne_equals_exact_rounding(x in -(1_i64 << 61)..=1 << 61, drop in 0..61, s in 1..70) {
        let x = x >> drop;
        prop_assert_eq!(i128::from(rne(x, s)), exact_rne(i128::from(x), s));
    }

    #[test]
    fn mulsh_equals_the_exact_product(
        a in -LIM..=LIM, b in -LIM..=LIM, da in 0..30, db in 0..30, s in 0..=63,
    ) {
        let (a, b) = (a >> da, b >> db);
        let exact = exact_rne(i128::from(a) * i128::from(b), s);
        prop_assert_eq!(i128::from(mulsh_wide(a, b, s)), exact);
        prop_assert_eq!(clamps(mulsh_wide(a, b, s)), u64::from(exact.abs() > i128::from(LIM)));
    }

    #[test]
    fn flush_equals_its_definition(d in -(1_i32 << 24)..=1 << 24, drop in 0..25, s in -80..=80) {
        let d = d >> drop;
        let want = exact_rne(i128::from(d), s).clamp(-i128::from(LIM), i128::from(LIM));
        prop_assert_eq!(i128::from(flush(d, s)), want);
    }
}
