//! Every site counts at its limit, and a count of zero means what it says.

use manyhands_shaders::bfp::{ACTIVATION_BITS, Bfp, Tiles, WEIGHT_BITS};
use manyhands_shaders::twin::attention::{self, AttentionConstants, Cache, HeadVectors};
use manyhands_shaders::twin::logits::{self, SeedRow, temperature_scale};
use manyhands_shaders::twin::matmul::{self, term_limit};
use manyhands_shaders::twin::rmsnorm::{self, NormConstants};
use manyhands_shaders::twin::rope::{RopeTable, rotate};
use manyhands_shaders::twin::{
    SITE_COUNT, Saturations, Segment, Site, add, attention_backward, embedding, swiglu,
};
use manyhands_shaders::x1::LIM;

/// The count at one site; all others must be zero.
fn only(site: Site, f: impl FnOnce(&mut Saturations)) -> u64 {
    let mut s = Saturations::default();
    f(&mut s);
    for (i, &count) in s.0.iter().enumerate() {
        assert!(i == site as usize || count == 0, "{site:?} alone should count: {s:?}");
    }
    s.0[site as usize]
}

/// The largest value that fits, then one more.
#[test]
fn residual_counts_beyond_the_limit_only() {
    for (a, b, count, sum) in [
        (LIM - 1, 1, 0, LIM),
        (LIM, 1, 1, LIM),
        (-LIM, 0, 0, -LIM),
        (-LIM, -1, 1, -LIM),
        (LIM, LIM, 1, LIM),
        (LIM, -LIM, 0, 0),
    ] {
        let mut x = [a];
        assert_eq!(only(Site::Residual, |s| add(&mut x, &[b], s)), count, "{a} + {b}");
        assert_eq!(x, [sum]);
    }
}

/// The limit of a term shrinks with the number of blocks, so that no sum can wrap.
#[test]
fn matmul_counts_terms_that_could_take_a_sum_out_of_range() {
    for blocks in [1, 2, 7, 256] {
        let limit = i64::from(term_limit(blocks));
        assert!(limit * blocks as i64 <= i64::from(LIM), "{blocks} blocks: a sum could wrap");
        assert!((limit + 1) * blocks as i64 >= i64::from(LIM), "{blocks} blocks: too strict");
        assert!(limit < i64::from(LIM), "{blocks} blocks: a clamped term would not count");
        let cols = blocks * 32;
        // One product a block: a term is 512 * 2^f.
        let operand = |m: i16, e: i8, bits: u32| {
            assert!(i32::from(m) < 1 << (bits - 1));
            let mut x = Bfp::zeros(1, cols);
            for b in 0..blocks {
                x.mantissas[b * 32] = m;
                x.exponents[b] = e;
            }
            x
        };
        let (a, one) = (operand(512, 0, ACTIVATION_BITS), operand(1, 0, WEIGHT_BITS));
        // Largest power of two below the limit, and the next.
        let top = 30 - i32::try_from(usize::BITS - (blocks - 1).leading_zeros()).unwrap_or(0);
        let fits = |f: i32| only(Site::Matmul, |s| drop(matmul::matmul(&a, &one, 1, f, s)));
        assert_eq!(fits(top - 9 - 1), 0, "{blocks} blocks");
        assert_eq!(fits(top - 9 + 1), blocks as u64, "{blocks} blocks");
    }
    let full = |e: i8| {
        let mut x = Bfp::zeros(1, 32);
        x.mantissas.fill(511);
        x.exponents[0] = e;
        x
    };
    let product = |e| {
        let mut out = Vec::new();
        let count = only(Site::Matmul, |s| out = matmul::matmul(&full(e), &full(0), 1, 16, s));
        (count, out[0])
    };
    assert_eq!(product(-10), (0, 32 * 511 * 511 * 64));
    assert_eq!(product(0), (1, LIM));
    assert_eq!(product(127), (1, LIM));
}

/// Weight gradients are products as well; their shares saturate at `FX(16)`.
#[test]
fn weight_gradient_counts_as_a_product() {
    let x = Bfp::from_rows(&[LIM; 4], 1, 16, ACTIVATION_BITS);
    let segment = [Segment { first_row: 0, rows: 4, slot: 0, position: 0 }];
    let run = |d: i32, grad: &mut [i64]| {
        only(Site::Matmul, |s| matmul::weight_gradient(&[d; 4], &x, &segment, 1, 1, grad, s))
    };
    let mut grad = [5];
    assert_eq!(run(1 << 16, &mut grad), 0);
    assert!(grad[0] > 1 << 20 && grad[0] < i64::from(LIM));
    let mut grad = [5];
    assert_eq!(run(LIM, &mut grad), 1);
    assert_eq!(grad[0], 5 + i64::from(LIM), "the sum itself is not clamped");
}

#[test]
fn norm_backward_counts_at_its_limits() {
    let c = NormConstants::new(64, 1e-5);
    let h: Vec<i32> = (0..64).map(|i| (i - 30) << 12).collect();
    let run = |d: i32, gain: i32| {
        only(Site::Norm, |s| {
            let gain = vec![gain; 64];
            let (unit, _, scales) = rmsnorm::forward(&h, &gain, &c, s);
            assert_eq!(s.total(), 0, "a gain below 64 never clamps forward");
            rmsnorm::backward(&vec![d; 64], &unit, &scales, &gain, &c, &mut [0; 64], s);
        })
    };
    assert_eq!(run(1 << 20, 4096), 0);
    assert!(run(LIM, 4096) >= 1, "the gradient of a gain, the projection");
    assert!(run(LIM, 262_143) >= 64, "every product with the gain");
    // The worst row for the forward pass: one channel carries everything.
    let mut spike = vec![0; 8192];
    spike[7] = LIM;
    let c = NormConstants::new(8192, 1e-7);
    let forward =
        |gain| only(Site::Norm, |s| drop(rmsnorm::forward(&spike, &vec![gain; 8192], &c, s)));
    assert_eq!(forward(262_143), 0);
    assert_eq!(forward(LIM), 1, "an impossible gain");
}

#[test]
fn rope_counts_when_a_rotation_leaves_the_range() {
    // 45 degrees: (a - b, a + b) / sqrt(2).
    let table = RopeTable { half: 1, cos: vec![11_585], sin: vec![11_585] };
    for inverse in [false, true] {
        let run = |a, b| {
            let mut x = [a, b];
            only(Site::Rope, |s| rotate(&mut x, &table, 0, inverse, s))
        };
        assert_eq!(run(LIM, 0), 0);
        assert_eq!(run(LIM / 2, LIM / 2), 0);
        assert_eq!([run(LIM, LIM), run(-LIM, LIM), run(-LIM, -LIM)], [1; 3]);
    }
}

#[test]
fn swiglu_counts_in_both_directions() {
    let big = 1 << 23;
    // silu(128) * 128 = 2^14, the range's limit in FX(16).
    assert_eq!(only(Site::Swiglu, |s| drop(swiglu::forward(&[big], &[big - 1], s))), 0);
    assert_eq!(only(Site::Swiglu, |s| drop(swiglu::forward(&[big], &[big], s))), 1);
    assert_eq!(only(Site::Swiglu, |s| drop(swiglu::forward(&[-big], &[LIM], s))), 0);
    let one = 1 << 16;
    let back = |d: i32, g, u| only(Site::Swiglu, |s| drop(swiglu::backward(&[d], &[g], &[u], s)));
    assert_eq!(back(1 << 20, one, one), 0);
    assert_eq!(back(LIM, one, 2 * one), 1, "du");
    assert_eq!(back(LIM, 2 * one, 0), 1, "dup");
    assert!(back(LIM, 4 * one, LIM) >= 2);
}

/// The softmax gradient and the sum over a group; scores are products.
#[test]
fn attention_counts_at_its_limits() {
    let c = AttentionConstants::new(2, 1, 2);
    let rope = RopeTable { half: 1, cos: vec![16_384; 4], sin: vec![0; 4] };
    let segment = [Segment { first_row: 0, rows: 2, slot: 0, position: 0 }];
    let build = |x: i32, v: [i32; 4], s: &mut Saturations| -> (HeadVectors, Cache) {
        let mut cache = Cache::new(1, 4, &c);
        let (q, k) = ([x; 8], [x, x, -x, -x]);
        let q = attention::heads(&q, &k, &v, &segment, &c, &rope, &mut cache, s);
        (q, cache)
    };
    let one = 1 << 16;
    let backward = |d: i32, v: i32, s: &mut Saturations| {
        let (q, cache) = build(one / 8, [v, -v, -v, v], s);
        attention_backward::backward(
            &[d, -d, d, -d, d, -d, d, -d],
            &q,
            &cache,
            &segment,
            &c,
            &rope,
            s,
        )
    };
    assert_eq!(only(Site::Attention, |s| drop(backward(1 << 20, one, s))), 0);
    // Two heads of a group add up beyond the range of dV.
    assert!(only(Site::Attention, |s| drop(backward(LIM / 2, one / 4096, s))) > 0, "group sum");
    // Scores out of range are products.
    let (q, cache) = build(LIM, [one; 4], &mut Saturations::default());
    let count = only(Site::Matmul, |s| drop(attention::forward(&q, &cache, &segment, &c, s)));
    assert_eq!(count, 2 * 3, "three scores a head");
}

#[test]
fn seed_counts_when_a_weight_is_too_large() {
    let row = [0, 1 << 16, -(1 << 16)];
    let run = |weight, entropy_weight| {
        let seed = SeedRow { target: 0, weight, entropy_weight, entropy_center: 30_000 };
        only(Site::Seed, |s| drop(logits::seed(&row, &seed, temperature_scale(1.0), s)))
    };
    assert_eq!([run(1 << 16, 1 << 12), run(0, 0), run(1 << 25, 0)], [0; 3]);
    assert!(run(LIM, 0) >= 1 && run(-LIM, 0) >= 1);
    assert!(run(0, LIM) >= 1);
    // Within its range an entropy weight never clamps a slope, so slopes need no count.
    let slope = (i64::from(logits::T_MAX) * i64::from(logits::ENTROPY_WEIGHT_MAX)) >> 16;
    assert!(slope < i64::from(LIM));
}

#[test]
fn embedding_counts_rows_that_do_not_fit() {
    let run = |w: f32| {
        let tiles = Tiles::quantize(&[w, 0.5, -w, 0.0], 2, 2);
        only(Site::Embedding, |s| drop(embedding::forward(&tiles, &[1, 0, 1], s)))
    };
    assert_eq!([run(1.0), run(16_000.0)], [0; 2]);
    assert_eq!([run(16_384.0), run(1e9)], [3; 2]);
}

/// Reports pair names with counts by position.
#[test]
fn saturations_names_follow_the_sites() {
    let sites = [
        Site::Matmul,
        Site::Norm,
        Site::Rope,
        Site::Attention,
        Site::Swiglu,
        Site::Residual,
        Site::Seed,
        Site::Embedding,
    ];
    assert_eq!(sites.len(), SITE_COUNT);
    let mut all = Saturations::default();
    for (i, site) in sites.into_iter().enumerate() {
        assert_eq!(format!("{site:?}").to_lowercase(), Saturations::NAMES[i]);
        let mut s = Saturations::default();
        s.add(site, i as u64 + 1);
        assert_eq!(s.0[i], i as u64 + 1);
        all.merge(&s);
    }
    assert_eq!(all.total(), 36);
}
