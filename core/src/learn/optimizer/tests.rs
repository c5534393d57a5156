//! Golden bits, an independent reference, and the properties the run relies on.

use super::super::golden::assert_close;
use super::super::schedule::Shape;
use super::*;
use manyhands_shaders::x1::philox;
use proptest::prelude::*;

const SCALE: GradientScale = GradientScale { loss_scale_log2: 3, divisor: 57.0 };

fn config() -> AdamWConfig {
    AdamWConfig {
        learning_rate: 1e-3,
        weight_decay: 0.1,
        schedule: Schedule {
            warmup_steps: 10,
            shape: Shape::Cosine { decay_steps: 90, floor: 0.1 },
        },
        ..AdamWConfig::default()
    }
}

/// Integer noise whose magnitude spreads over 20 binary orders, with zeros.
fn gradient(step: u64, tensor: u32, len: usize) -> Vec<i64> {
    (0..len)
        .map(|i| {
            let r = philox([i as u32, step as u32, tensor, 0], [1, 2]);
            let wide = (i64::from(r[0]) - (1 << 31)) << 8;
            if r[1].is_multiple_of(16) { 0 } else { wide >> (r[2] % 20) }
        })
        .collect()
}

/// A matrix of a little more than two norm chunks, and a gain vector.
fn fresh() -> AdamW {
    let master = |tensor: u32, len: usize| -> Vec<f32> {
        gradient(0, tensor, len).iter().map(|&g| g as f32 * 1e-13).collect()
    };
    let matrix = TensorState::new(master(7, 2 * NORM_CHUNK + 13), true);
    AdamW::new(vec![matrix, TensorState::new(master(8, 65), false)])
}

fn run(optimizer: &mut AdamW, steps: std::ops::RangeInclusive<u64>) -> UpdatePlan {
    let mut last = None;
    for step in steps {
        let lens: Vec<usize> = optimizer.tensors.iter().map(|t| t.master.len()).collect();
        let gradients: Vec<Vec<i64>> =
            lens.iter().enumerate().map(|(k, &len)| gradient(step, k as u32, len)).collect();
        let views: Vec<&[i64]> = gradients.iter().map(Vec::as_slice).collect();
        last = Some(optimizer.step(&config(), SCALE, &views).unwrap());
    }
    last.unwrap()
}

fn digest(optimizer: &AdamW) -> String {
    let mut hasher = blake3::Hasher::new();
    for tensor in &optimizer.tensors {
        for values in [&tensor.master, &tensor.first_moment, &tensor.second_moment] {
            for value in values {
                hasher.update(&value.to_bits().to_le_bytes());
            }
        }
    }
    hasher.finalize().to_hex()[..32].to_string()
}

/// Another machine, another compiler or another target proves equality by this hash.
#[test]
fn adamw_hundred_steps_have_golden_bits() {
    let mut optimizer = fresh();
    let plan = run(&mut optimizer, 1..=100);
    assert!(plan.is_clipped && optimizer.update_count == 100);
    assert_eq!(digest(&optimizer), "2dff938896fd15a02147e8f4c77d7a2b");
}

/// The textbook, in f64 throughout, for one tensor at a time.
#[test]
fn adamw_agrees_with_an_independent_f64_reference() {
    let mut optimizer = fresh();
    let config = config();
    let mut x: Vec<Vec<f64>> = optimizer
        .tensors
        .iter()
        .map(|t| t.master.iter().map(|&w| f64::from(w)).collect())
        .collect();
    let start = x.clone();
    let mut m: Vec<Vec<f64>> = x.iter().map(|t| vec![0.0; t.len()]).collect();
    let mut v = m.clone();
    for step in 1..=100_i32 {
        let plan = run(&mut optimizer, step as u64..=step as u64);
        let g: Vec<Vec<f64>> = (0..2)
            .map(|k| {
                let ints = gradient(step as u64, k, x[k as usize].len());
                ints.iter().map(|&g| g as f64 / (65536.0 * 8.0 * 57.0)).collect()
            })
            .collect();
        let norm = g.concat().iter().map(|g| g * g).sum::<f64>().sqrt();
        assert_close("norm", &[plan.grad_norm / norm], &[1.0], 1e-12);
        let clip = (1.0 / norm).min(1.0);
        let lr = config.learning_rate * config.schedule.factor(step as u64);
        for k in 0..2 {
            let decay = if k == 0 { 0.1 } else { 0.0 };
            for i in 0..x[k].len() {
                let g = g[k][i] * clip;
                m[k][i] = 0.9 * m[k][i] + 0.1 * g;
                v[k][i] = 0.999 * v[k][i] + 0.001 * g * g;
                let (m, v) =
                    (m[k][i] / (1.0 - 0.9f64.powi(step)), v[k][i] / (1.0 - 0.999f64.powi(step)));
                x[k][i] -= lr * (decay * x[k][i] + m / (v.sqrt() + 1e-8));
            }
        }
    }
    for k in 0..2 {
        let got: Vec<f64> = optimizer.tensors[k].master.iter().map(|&w| f64::from(w)).collect();
        // A hundred roundings to f32 of weights below 0.2: at most 100 * 2^-27 each, plus moments.
        assert_close("master", &got, &x[k], 2e-6);
        let moved = got.iter().zip(&start[k]).filter(|(a, b)| (*a - *b).abs() > 1e-3).count();
        assert!(moved > got.len() / 2, "the test must be able to fail");
    }
}

#[test]
fn adamw_split_updates_have_equal_bits() {
    let mut whole = fresh();
    let mut split = fresh();
    for step in 1..=3 {
        run(&mut whole, step..=step);
        let lens = split.tensors.iter().map(|t| t.master.len()).collect::<Vec<_>>();
        let g: Vec<Vec<i64>> = (0..2).map(|k| gradient(step, k, lens[k as usize])).collect();
        let mut sums = square_sums(&g[0][..NORM_CHUNK]);
        sums.extend(square_sums(&g[0][NORM_CHUNK..]));
        sums.extend(square_sums(&g[1]));
        let plan = split.begin(&config(), SCALE, &sums).unwrap();
        for (t, g) in split.tensors.iter_mut().zip(&g) {
            let cut = g.len() / 3;
            let (m, v) = (&mut t.first_moment, &mut t.second_moment);
            for range in [cut..g.len(), 0..cut] {
                let at = range.clone();
                update(
                    &plan,
                    t.decays,
                    &g[at],
                    &mut t.master[range.clone()],
                    &mut m[range.clone()],
                    &mut v[range],
                );
            }
        }
    }
    assert_eq!(digest(&whole), digest(&split));
}

#[test]
fn adamw_resumes_to_equal_bits() {
    let mut straight = fresh();
    run(&mut straight, 1..=20);
    let mut first = fresh();
    run(&mut first, 1..=9);
    let text = serde_json::to_string(&first).unwrap();
    let mut resumed: AdamW = serde_json::from_str(&text).unwrap();
    run(&mut resumed, 10..=20);
    assert_eq!(digest(&straight), digest(&resumed));
    assert_eq!(straight, resumed);
}

#[test]
fn adamw_decay_touches_matrices_only() {
    let mut optimizer = AdamW::new(vec![
        TensorState::new(vec![2.0; 3], true),
        TensorState::new(vec![2.0; 3], false),
    ]);
    let config = AdamWConfig { learning_rate: 0.5, weight_decay: 0.5, ..AdamWConfig::default() };
    optimizer.step(&config, SCALE, &[&[0; 3], &[0; 3]]).unwrap();
    assert_eq!(optimizer.tensors[0].master, [1.5; 3]);
    assert_eq!(optimizer.tensors[1].master, [2.0; 3]);
}

#[test]
fn adamw_clip_scales_down_to_the_norm_and_never_up() {
    let mut optimizer = AdamW::new(vec![TensorState::new(vec![0.0; 2], false)]);
    let scale = GradientScale { loss_scale_log2: 0, divisor: 1.0 };
    let config = AdamWConfig { grad_norm_max: Some(2.5), ..AdamWConfig::default() };
    let plan = optimizer.step(&config, scale, &[&[3 << 16, 4 << 16]]).unwrap();
    assert_eq!((plan.grad_norm, plan.is_clipped), (5.0, true));
    assert_close("m", &[f64::from(optimizer.tensors[0].first_moment[0])], &[0.15], 1e-8);
    let plan = optimizer.step(&config, scale, &[&[3 << 14, 4 << 14]]).unwrap();
    assert_eq!((plan.grad_norm, plan.is_clipped), (1.25, false));
    assert_eq!(plan.gradient_factor, 1.0 / 65536.0);
}

/// v1 clears the optimizer at a reset, v2 leaves every bit: algorithms §1.5.2.
#[test]
fn adamw_reset_clears_moments_and_bias_correction_only() {
    let mut optimizer = fresh();
    run(&mut optimizer, 1..=5);
    let before = optimizer.clone();
    optimizer.reset();
    assert_eq!((optimizer.moment_step, optimizer.update_count), (0, 5));
    for (after, before) in optimizer.tensors.iter().zip(&before.tensors) {
        assert_eq!(after.master, before.master);
        assert!(before.second_moment.iter().any(|&v| v != 0.0));
        assert!(after.first_moment.iter().chain(&after.second_moment).all(|&v| v.to_bits() == 0));
    }
}

#[test]
fn adamw_refuses_empty_batches_and_wrong_shapes() {
    let mut optimizer = fresh();
    let before = optimizer.clone();
    let empty = GradientScale { loss_scale_log2: 0, divisor: 0.0 };
    assert_eq!(optimizer.begin(&config(), empty, &[]), Err(OptimizerError::Divisor(0.0)));
    let error = optimizer.step(&config(), SCALE, &[&[1, 2]]).unwrap_err();
    assert_eq!(error, OptimizerError::Shape { tensor: 0, got: 2, expected: 2 * NORM_CHUNK + 13 });
    assert_eq!(optimizer, before);
    let bad = AdamWConfig { beta2: 1.0, ..AdamWConfig::default() };
    assert!(bad.validate().unwrap_err().to_string().contains("optimizer.beta2"));
    assert!(serde_json::from_str::<AdamWConfig>(r#"{"lr":1}"#).is_err());
}

proptest! {
    /// The lane order is a definition: it must be what the doc says, for every length.
    #[test]
    fn square_sums_follow_their_definition(len in 0..3 * NORM_CHUNK) {
        let g = gradient(3, 1, len);
        let mut expected = vec![];
        for chunk in g.chunks(NORM_CHUNK) {
            let mut total = 0.0;
            for lane in 0..8 {
                let mut sum = 0.0;
                for i in (lane..chunk.len()).step_by(8) {
                    sum += chunk[i] as f64 * chunk[i] as f64;
                }
                total += sum;
            }
            expected.push(total);
        }
        prop_assert_eq!(square_sums(&g), expected);
    }
}
