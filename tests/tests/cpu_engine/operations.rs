//! Every operation by itself: ordinary values, long contractions, random shapes, extremes.

use manyhands_core::engine::{Back, Engine, SeedRow};
use manyhands_core::model::config::ModelConfig;
use manyhands_shaders::twin::logits::temperature_scale;
use pollster::block_on;

use super::{Program, Random, Record, batch, check, config, read, read_gradient, read_saturations};

/// Sizes of one case of [`Ops`].
struct Ops {
    config: ModelConfig,
    lengths: Vec<usize>,
    bits: u32,
    gradient_bits: u32,
    weight_scale: f32,
    wild: bool,
    seed: u64,
}

impl Program for Ops {
    fn run<E: Engine>(&self, e: &E) -> Record {
        let c = &self.config;
        let mut r = Random(self.seed);
        let batch = batch(&self.lengths, c.vocabulary, &mut r);
        let n = batch.rows();
        let mut record = Record::new();
        let out = &mut record;
        let (bits, gbits, wild) = (self.bits, self.gradient_bits, self.wild);

        let embedding = e.weight(&r.weights(c.vocabulary, c.width, self.weight_scale * 8.0));
        read(e, out, "embed", &e.embed(&embedding, &batch));
        read_saturations(e, out, "embed");

        let gains: Vec<i32> = (0..c.width).map(|_| r.integer(13)).collect();
        let gain = e.gain(&gains);
        let h = e.tensor(&r.tensor(n, c.width, bits, wild), c.width);
        let (x, norm) = e.rmsnorm(&h, &gain);
        read_saturations(e, out, "rmsnorm");
        let (aw, kw) = (c.attention_width(), c.kv_width());
        let w: Vec<E::Weight> = [(aw, c.width), (kw, c.width), (kw, c.width)]
            .map(|(o, i)| e.weight(&r.weights(o, i, self.weight_scale)))
            .into();
        let qkv = e.linear(&x, [&w[0], &w[1], &w[2]]);
        for (name, x) in ["q", "k", "v"].iter().zip(&qkv) {
            read(e, out, name, x);
        }
        read_saturations(e, out, "linear");

        // Attention from tensors of its own, so that every magnitude occurs.
        let qkv = [aw, kw, kw].map(|cols| e.tensor(&r.tensor(n, cols, bits, wild), cols));
        let capacity = self.lengths.iter().copied().max().unwrap_or(1);
        let mut cache = e.cache(batch.segments.len(), capacity);
        let queries = e.heads(&qkv, &batch, &mut cache);
        read_saturations(e, out, "heads");
        let attended = e.attention(&queries, &cache, &batch);
        read_saturations(e, out, "attention");
        let wo = e.weight(&r.weights(c.width, aw, self.weight_scale));
        let mut h2 = e.tensor(&r.tensor(n, c.width, bits, wild), c.width);
        e.linear_add(&attended, &wo, &mut h2);
        read(e, out, "linear_add", &h2);
        read_saturations(e, out, "linear_add");
        let d_out = e.tensor(&r.tensor(n, aw, gbits, wild), aw);
        let d = e.attention_backward(&d_out, &queries, &cache, &batch);
        for (name, x) in ["dv", "dk", "dq"].iter().zip(d.iter().rev()) {
            read(e, out, name, x);
        }
        read_saturations(e, out, "attention_backward");

        let gate_up = [0, 1].map(|_| e.tensor(&r.tensor(n, c.ffn, bits, wild), c.ffn));
        let a = e.swiglu(&gate_up);
        read_saturations(e, out, "swiglu");
        let down = e.weight(&r.weights(c.width, c.ffn, self.weight_scale));
        let [y] = e.linear(&a, [&down]);
        read(e, out, "swiglu", &y);
        let da = e.tensor(&r.tensor(n, c.ffn, gbits, wild), c.ffn);
        read_saturations(e, out, "linear of swiglu");
        let [dg, du] = e.swiglu_backward(&da, &gate_up);
        read(e, out, "d_gate", &dg);
        read(e, out, "d_up", &du);
        read_saturations(e, out, "swiglu_backward");

        let dy = [aw, kw, kw].map(|cols| e.tensor(&r.tensor(n, cols, gbits, wild), cols));
        let mut grads = [aw, kw, kw].map(|rows| e.gradient(rows, c.width));
        for _ in 0..2 {
            let back = dy.iter().zip(&w).zip(&mut grads);
            let back = back.map(|((dy, w), grad)| Back { dy, w, grad: Some(grad) }).collect();
            let dx = e.linear_backward(&x, &batch, back);
            read(e, out, "linear_backward", &dx);
            read_saturations(e, out, "linear_backward");
        }
        // What is not trained passes gradients on, and has none.
        let mut back = dy.iter().zip(&w).map(|(dy, w)| Back { dy, w, grad: None });
        let back: Vec<_> = back.by_ref().collect();
        let dx = e.linear_backward(&x, &batch, back);
        read(e, out, "linear_backward, frozen", &dx);
        let [first, second, _] = &mut grads;
        let back = vec![
            Back { dy: &dy[0], w: &w[0], grad: None },
            Back { dy: &dy[1], w: &w[1], grad: Some(second) },
        ];
        read(e, out, "linear_backward, one frozen", &e.linear_backward(&x, &batch, back));
        read_gradient(e, out, "grad q, frozen", first);
        read_saturations(e, out, "linear_backward, frozen");
        // A product of a product, as an adapter's.
        let [z] = e.linear(&e.blocks(&dx), [&w[0]]);
        read(e, out, "linear of blocks", &z);
        read_saturations(e, out, "linear of blocks");
        for (name, g) in ["grad q", "grad k", "grad v"].iter().zip(&grads) {
            read_gradient(e, out, name, g);
        }

        let mut gain_grad = e.gradient(1, c.width);
        let dn = e.tensor(&r.tensor(n, c.width, gbits, wild), c.width);
        let dh = e.tensor(&r.tensor(n, c.width, gbits, wild), c.width);
        let dx = e.rmsnorm_backward(&dn, &norm, &gain, Some(&mut gain_grad), None);
        read(e, out, "rmsnorm_backward", &dx);
        let frozen = e.tensor(&r.tensor(n, c.width, gbits, wild), c.width);
        let frozen = e.rmsnorm_backward(&dn, &norm, &gain, None, Some(frozen));
        read(e, out, "rmsnorm_backward, frozen", &frozen);
        let dx = e.rmsnorm_backward(&dn, &norm, &gain, Some(&mut gain_grad), Some(dh));
        read(e, out, "rmsnorm_backward +=", &dx);
        read_gradient(e, out, "gain gradient", &gain_grad);
        read_saturations(e, out, "rmsnorm_backward");
        let mut grad = e.gradient(c.vocabulary, c.width);
        e.embed_backward(&dx, &batch, &mut grad);
        read_gradient(e, out, "embedding gradient", &grad);

        let picks: Vec<u32> = (0..5).map(|_| r.below(n) as u32).collect();
        read(e, out, "rows", &e.rows(&dx, &picks));
        self.logits(e, n, &mut r, out);
        record
    }
}

impl Ops {
    fn logits<E: Engine>(&self, e: &E, n: usize, r: &mut Random, out: &mut Record) {
        let v = self.config.vocabulary;
        let logits = e.tensor(&r.tensor(n, v, self.bits, self.wild), v);
        for temperature in [0.3, 1.0, 4.0] {
            let scale = temperature_scale(temperature);
            let targets: Vec<u32> = (0..n).map(|_| r.below(v) as u32).collect();
            let stats = block_on(e.stats(&logits, &targets, scale)).expect("stats");
            let flat = |s: &manyhands_core::engine::RowStats| {
                [s.t.into(), s.total as i64, s.moment as i64, s.greedy.into()]
            };
            out.push(("stats".into(), stats.iter().flat_map(flat).collect()));
            let draws: Vec<Option<u64>> = (0..n).map(|i| (i % 5 != 4).then(|| r.next())).collect();
            let samples = block_on(e.sample(&logits, &draws, scale)).expect("sample");
            let tokens = samples.iter().map(|s| s.0.into()).collect();
            out.push(("sampled".into(), tokens));
            let flat = samples.iter().flat_map(|s| flat(&s.1)).collect();
            out.push(("stats of sampled".into(), flat));
            let seeds: Vec<SeedRow> = (0..n)
                .map(|i| SeedRow {
                    target: r.below(v) as u32,
                    weight: if i % 3 == 0 { 0 } else { r.integer(if self.wild { 29 } else { 18 }) },
                    entropy_weight: if i % 4 < 2 { 0 } else { r.integer(16) },
                    entropy_center: r.integer(20),
                })
                .collect();
            read(e, out, "seed", &e.seed(&logits, &seeds, scale));
            read_saturations(e, out, "seed");
        }
    }
}

/// Every operation at sizes around the tiles, with ordinary values.
#[test]
fn cpu_engine_ordinary_values_equal_the_twin() {
    let cases: [(ModelConfig, &[usize]); 6] = [
        (config(64, 4, 2, 16, 96, 65, 1), &[31, 33, 1, 64]),
        (config(64, 4, 2, 32, 33, 31, 1), &[65, 5]),
        (config(31, 4, 4, 16, 100, 97, 1), &[7, 6, 5, 32, 12]),
        (config(33, 2, 1, 64, 64, 32, 1), &[97, 40]),
        (config(128, 4, 4, 32, 160, 64, 1), &[64, 64, 64]),
        (config(16, 6, 2, 6, 17, 2, 1), &[1]),
    ];
    for (i, (config, lengths)) in cases.into_iter().enumerate() {
        let constants = config.constants();
        let lengths = lengths.to_vec();
        let seed = 100 + i as u64;
        let case = Ops {
            config,
            lengths,
            bits: 17,
            gradient_bits: 16,
            weight_scale: 0.1,
            wild: false,
            seed,
        };
        check(&format!("case {i}"), &constants, &case);
    }
}

/// Contractions of more than 256 blocks, whose terms have less room.
#[test]
fn cpu_engine_long_contractions_equal_the_twin() {
    for (i, (bits, weight_scale)) in [(17, 0.1), (23, 1.0), (26, 4.0)].into_iter().enumerate() {
        let config = config(32, 2, 1, 16, 8320, 33, 1);
        let constants = config.constants();
        let case = Ops {
            config,
            // Many rows as well: they go another way, in groups.
            lengths: if i == 1 { vec![130, 70] } else { vec![4, 3] },
            bits,
            gradient_bits: bits,
            weight_scale,
            wild: false,
            seed: 300 + i as u64,
        };
        check(&format!("long contraction {i}"), &constants, &case);
    }
}

/// Shapes, lengths and magnitudes at random.
#[test]
fn cpu_engine_random_shapes_equal_the_twin() {
    for seed in 0..24 {
        let mut r = Random(1000 + seed);
        let kv_heads = 1 + r.below(3);
        let config = config(
            16 + r.below(90),
            kv_heads * (1 + r.below(3)),
            kv_heads,
            2 * (1 + r.below(36)),
            16 + r.below(120),
            2 + r.below(100),
            1,
        );
        let lengths: Vec<usize> = (0..1 + r.below(5)).map(|_| 1 + r.below(70)).collect();
        let constants = config.constants();
        let case = Ops {
            config,
            lengths,
            bits: 10 + r.below(20) as u32,
            gradient_bits: 8 + r.below(22) as u32,
            weight_scale: [0.02, 0.3, 3.0][r.below(3)],
            wild: r.below(4) == 0,
            seed,
        };
        check(&format!("random case {seed}"), &constants, &case);
    }
}

/// Magnitudes that drive the general flush, clamps and counts: the record must hold counts.
#[test]
fn cpu_engine_extreme_values_equal_the_twin() {
    let mut counted = [0_i64; 8];
    for (i, (bits, gradient_bits, weight_scale, wild)) in [
        (3, 4, 0.001, false),
        (20, 21, 1.0, false),
        (24, 24, 1.0, false),
        (29, 27, 1.0, false),
        (22, 22, 2.0, true),
        (28, 29, 4.0, true),
        (30, 30, 400.0, true),
    ]
    .into_iter()
    .enumerate()
    {
        // Few rows, many, and many of short sequences, whose gradients have the largest terms.
        for (j, (shape, lengths)) in [
            (config(96, 4, 2, 32, 70, 40, 1), vec![34, 1, 100]),
            (config(40, 3, 3, 24, 33, 70, 1), vec![5, 33]),
            (config(70, 2, 2, 24, 40, 50, 1), vec![30; 9]),
        ]
        .into_iter()
        .enumerate()
        {
            let constants = shape.constants();
            let seed = 200 + 10 * i as u64 + j as u64;
            let case =
                Ops { config: shape, lengths, bits, gradient_bits, weight_scale, wild, seed };
            let record = check(&format!("extreme case {i}.{j}"), &constants, &case);
            for (_, counts) in record.iter().filter(|(name, _)| name.starts_with("sat")) {
                counted.iter_mut().zip(counts).for_each(|(a, b)| *a += b);
            }
        }
    }
    // Otherwise the inputs could not have failed.
    assert!(counted.iter().all(|&c| c > 0), "some site never saturated: {counted:?}");
}

/// The gradient of one matrix, from operands of one sign.
struct Steep {
    lengths: Vec<usize>,
    bits: u32,
}

impl Program for Steep {
    fn run<E: Engine>(&self, e: &E) -> Record {
        const COLS: usize = 40;
        let mut r = Random(self.bits.into());
        let batch = batch(&self.lengths, 20, &mut r);
        let mut tensor = |bits: u32| {
            let value = |_| (1 << bits) - r.below(1 << (bits - 3)) as i32;
            e.tensor(&(0..batch.rows() * COLS).map(value).collect::<Vec<_>>(), COLS)
        };
        let (x, dy) = (e.blocks(&tensor(22)), tensor(self.bits));
        let w = e.weight(&r.weights(COLS, COLS, 0.001));
        let mut grad = e.gradient(COLS, COLS);
        let mut out = Record::new();
        let back = vec![Back { dy: &dy, w: &w, grad: Some(&mut grad) }];
        read(e, &mut out, "dx", &e.linear_backward(&x, &batch, back));
        read_gradient(e, &mut out, "gradient", &grad);
        read_saturations(e, &mut out, "linear_backward");
        out
    }
}

/// Sums that neither cancel nor fit in 32 bits, of terms just below and above what is counted.
#[test]
fn cpu_engine_steep_gradients_equal_the_twin() {
    let (mut longest, mut counted, mut uncounted) = (0, 0, 0);
    for lengths in [vec![30; 9], vec![160], vec![96, 64, 20]] {
        for bits in 17..26 {
            let constants = config(40, 2, 1, 20, 40, 20, 1).constants();
            let case = Steep { lengths: lengths.clone(), bits };
            let record = check(&format!("{bits} bits, {lengths:?}"), &constants, &case);
            longest = record[1].1.iter().copied().fold(longest, i64::max);
            let saturated = record[2].1.iter().any(|&x| x > 0);
            *if saturated { &mut counted } else { &mut uncounted } += 1;
        }
    }
    assert!(longest > i64::from(i32::MAX) && counted > 5 && uncounted > 5, "{counted}");
}
