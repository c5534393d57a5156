//! The CPU engine equals the twin in every bit and every saturation count, for every instruction
//! path of this machine, with one thread and with two.
//!
//! A program is a function over [`Engine`] that records named outputs; it runs on the twin and on
//! each variant of the CPU engine, and the records are compared. Blocks, norms, queries and caches
//! are seen through the operations that read them.

use manyhands_core::conformance::oracle::Vectors;
use manyhands_core::engine::cpu::{Cpu, Path};
use manyhands_core::engine::twin::Twin;
use manyhands_core::engine::{Back, Batch, Constants, Engine, SeedRow, Tiles};
use manyhands_core::model::config::ModelConfig;
use manyhands_core::model::decoder::{Decoder, DeviceGradients, Keep};
use manyhands_core::model::weights::{Gradients, Weights, shapes};
use manyhands_shaders::twin::logits::temperature_scale;
use pollster::block_on;

/// Named outputs of a program.
type Record = Vec<(String, Vec<i64>)>;

/// The `SplitMix64` generator.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    fn below(&mut self, n: usize) -> usize {
        (self.next() % n as u64) as usize
    }

    /// An integer of random sign and up to `bits` bits, roughly bell-shaped.
    fn integer(&mut self, bits: u32) -> i32 {
        let max = (1_i64 << bits) - 1;
        let sum: i64 = (0..3).map(|_| (self.next() as i64) % (max + 1)).sum();
        (sum / 2).clamp(-max, max) as i32
    }

    /// (rows, cols) of up to `bits` bits: outliers in some places, some zero rows and some zero
    /// stretches; `wild` adds values at the limits of the range.
    fn tensor(&mut self, rows: usize, cols: usize, bits: u32, wild: bool) -> Vec<i32> {
        let mut out = vec![0; rows * cols];
        for row in out.chunks_exact_mut(cols) {
            if self.below(7) == 0 {
                continue;
            }
            for x in row.iter_mut() {
                *x = self.integer(bits);
            }
            let outlier = self.below(cols);
            row[outlier] = self.integer((bits + 6).min(30));
            if self.below(3) == 0 {
                let from = self.below(cols);
                let to = (from + 40).min(cols);
                row[from..to].fill(0);
            }
            if wild && self.below(2) == 0 {
                for _ in 0..3 {
                    let sign = if self.below(2) == 0 { 1 } else { -1 };
                    let at = self.below(cols);
                    row[at] = sign * ((1 << 30) - 1 - self.below(3) as i32);
                }
            }
        }
        out
    }

    fn weights(&mut self, rows: usize, cols: usize, scale: f32) -> Tiles {
        let mut w: Vec<f32> =
            (0..rows * cols).map(|_| self.integer(20) as f32 / 1_048_576.0 * scale).collect();
        // Tiles of unlike exponents, and one of zeros.
        for (i, w) in w.iter_mut().enumerate() {
            let tile = (i / cols / 32, i % cols / 32);
            *w *= [1.0, 0.125, 3.0, 0.0, 20.0][(tile.0 * 3 + tile.1 + 1) % 5];
        }
        Tiles::quantize(&w, rows, cols)
    }
}

fn wide(x: &[i32]) -> Vec<i64> {
    x.iter().map(|&x| x.into()).collect()
}

fn read<E: Engine>(e: &E, record: &mut Record, name: &str, x: &E::Tensor) {
    record.push((name.into(), wide(&block_on(e.read(x)).expect("read"))));
}

fn read_gradient<E: Engine>(e: &E, record: &mut Record, name: &str, x: &E::Gradient) {
    record.push((name.into(), block_on(e.read_gradient(x)).expect("read").into_owned()));
}

fn read_saturations<E: Engine>(e: &E, record: &mut Record, name: &str) {
    let counts = block_on(e.take_saturations()).expect("counts").0;
    record.push((format!("saturations of {name}"), counts.map(|x| x as i64).to_vec()));
}

/// Panics at the first difference.
fn compare(what: &str, expected: &Record, got: &Record) {
    assert_eq!(expected.len(), got.len(), "{what}: another number of records");
    for ((name, e), (_, g)) in expected.iter().zip(got) {
        assert_eq!(e.len(), g.len(), "{what}: {name} has another length");
        let differ: Vec<usize> = (0..e.len()).filter(|&i| e[i] != g[i]).collect();
        if let Some(&i) = differ.first() {
            panic!(
                "{what}: {name}[{i}] is {} and should be {}; {} of {} differ, the last at {}",
                g[i],
                e[i],
                differ.len(),
                e.len(),
                differ[differ.len() - 1],
            );
        }
    }
}

/// A program to run on engines of any kind.
trait Program {
    fn run<E: Engine>(&self, engine: &E) -> Record;
}

/// Runs on the twin and on every variant, and compares. Returns the twin's record.
fn check(what: &str, constants: &Constants, program: &impl Program) -> Record {
    let expected = program.run(&Twin::new(constants.clone()));
    let moved = expected.iter().any(|(n, x)| !n.starts_with("sat") && x.iter().any(|&x| x != 0));
    assert!(moved, "{what}: every output is zero");
    for path in Path::available() {
        for threads in [1, 2] {
            let engine = Cpu::new(constants.clone(), threads, Some(path));
            let what = format!("{what}, {path}, {threads} threads");
            compare(&what, &expected, &program.run(&engine));
            // Recycled buffers must not show.
            compare(&format!("{what}, again"), &expected, &program.run(&engine));
        }
    }
    expected
}

fn config(
    width: usize,
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    ffn: usize,
    vocabulary: usize,
    layers: usize,
) -> ModelConfig {
    ModelConfig {
        vocabulary,
        layers,
        width,
        heads,
        kv_heads,
        head_dim,
        ffn,
        context: 160,
        rope_base: 10_000.0,
        rms_epsilon: 1e-5,
        tied: layers.is_multiple_of(2),
        bias: false,
        adapter: None,
    }
}

/// Segments of the given lengths, in permuted slots.
fn batch(lengths: &[usize], vocabulary: usize, random: &mut Random) -> Batch {
    let mut out = Batch::default();
    for (i, &n) in lengths.iter().enumerate() {
        let tokens: Vec<u32> = (0..n).map(|_| random.below(vocabulary) as u32).collect();
        out.push((i * 2 + 1) % lengths.len().max(1), 0, &tokens);
    }
    if lengths.len().is_multiple_of(2) {
        for (i, s) in out.segments.iter_mut().enumerate() {
            s.slot = lengths.len() - 1 - i;
        }
    }
    out
}

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
            lengths: vec![4, 3],
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
        for (j, shape) in [config(96, 4, 2, 32, 70, 40, 1), config(40, 3, 3, 24, 33, 70, 1)]
            .into_iter()
            .enumerate()
        {
            let constants = shape.constants();
            let lengths = if j == 0 { vec![34, 1, 70] } else { vec![5, 33] };
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

fn model(config: &ModelConfig, seed: u64) -> Weights {
    let mut r = Random(seed);
    let master: Vec<Vec<f32>> = shapes(config)
        .iter()
        .map(|s| {
            let scale = if s.rows == 1 { 0.2 } else { 2.0 / (s.cols as f32).sqrt() };
            let offset = if s.rows == 1 { 1.0 } else { 0.0 };
            let value = |_| offset + r.integer(16) as f32 / 65536.0 * scale;
            (0..s.rows * s.cols).map(value).collect()
        })
        .collect();
    Weights::quantize(config, &master)
}

/// A training step: logits, statistics, gradients, counts.
struct Step<'a> {
    weights: &'a Weights,
    batch: Batch,
    scale: i32,
}

impl Step<'_> {
    fn gradients<E: Engine>(&self, e: &E, out: &mut Record) -> Gradients {
        let config = &self.weights.config;
        let decoder = Decoder::new(e, self.weights);
        let forward = decoder.forward(e, &self.batch, Keep::All);
        let all = self.batch.pieces(usize::MAX).remove(0);
        let head = decoder.head_forward(e, &forward.states, all);
        read(e, out, "logits", &head.logits);
        // Seeds depend on the tokens alone, so that a sequence has the same in any batch.
        let token = |i: usize| self.batch.tokens[i];
        let seeds: Vec<SeedRow> = (0..self.batch.rows())
            .map(|i| SeedRow {
                target: (token(i) * 7 + 3) % config.vocabulary as u32,
                weight: (token(i) as i32 % 5 - 2) * 40_000,
                entropy_weight: token(i) as i32 % 3 * 300,
                entropy_center: 100_000,
            })
            .collect();
        let mut grads = DeviceGradients::zeros(e, config);
        let dh = decoder.head_backward(e, head, &seeds, self.scale, &mut grads);
        decoder.backward(e, &self.batch, forward, dh, &mut grads);
        block_on(grads.read(e)).expect("gradients")
    }
}

impl Program for Step<'_> {
    fn run<E: Engine>(&self, e: &E) -> Record {
        let mut out = Record::new();
        let grads = self.gradients(e, &mut out);
        for (shape, grad) in shapes(&self.weights.config).iter().zip(grads.0) {
            out.push((shape.name.clone(), grad));
        }
        read_saturations(e, &mut out, "a step");
        out
    }
}

/// The whole decoder, forward and backward.
#[test]
fn cpu_engine_training_step_equals_the_twin() {
    for (i, (config, lengths)) in [
        (config(64, 4, 2, 16, 96, 50, 2), vec![33, 1, 40, 20]),
        (config(96, 3, 3, 32, 100, 65, 1), vec![64, 64]),
        (config(48, 2, 1, 64, 64, 20, 2), vec![70]),
    ]
    .into_iter()
    .enumerate()
    {
        let weights = model(&config, 7 + i as u64);
        let batch = batch(&lengths, config.vocabulary, &mut Random(40 + i as u64));
        let step = Step { weights: &weights, batch, scale: temperature_scale(1.0) };
        let record = check(&format!("step {i}"), &config.constants(), &step);
        for (name, x) in &record {
            assert!(name.starts_with("sat") || x.iter().any(|&x| x != 0), "{name} is all zero");
        }
    }
}

/// The oracle's own vectors, on every variant.
#[test]
fn cpu_engine_reproduces_the_oracle() {
    let files: [&[u8]; 2] = [
        include_bytes!("../data/oracle/vectors-1.safetensors"),
        include_bytes!("../data/oracle/vectors-2.safetensors"),
    ];
    for file in files {
        let vectors = Vectors::parse(file).expect("a vector file");
        for path in Path::available() {
            for threads in [1, 2] {
                let engine = Cpu::new(vectors.config().constants(), threads, Some(path));
                block_on(vectors.check(&engine)).expect("equal");
            }
        }
    }
}

/// Prefill in ragged pieces and decoding in batches give the logits of the full forward pass.
#[test]
fn cpu_engine_decoding_through_caches_equals_the_full_forward() {
    let config = config(64, 4, 2, 16, 96, 50, 2);
    let weights = model(&config, 3);
    let whole = batch(&[75, 40, 66], config.vocabulary, &mut Random(9));
    for path in Path::available() {
        for threads in [1, 2] {
            let e = Cpu::new(config.constants(), threads, Some(path));
            let decoder = Decoder::new(&e, &weights);
            let full = decoder.forward(&e, &whole, Keep::All).states;
            let full = block_on(e.read(&decoder.logits(&e, &full))).expect("logits");
            let mut caches = decoder.caches(&e, 3, 80);
            // Fill the caches with something else first: stale content must not show.
            let stale = batch(&[80, 80, 80], config.vocabulary, &mut Random(10));
            decoder.states(&e, &stale, &mut caches);
            let mut at = [0; 3];
            for step in 0.. {
                let mut part = Batch::default();
                let mut rows = Vec::new();
                for (i, s) in whole.segments.iter().enumerate() {
                    let n = [[31, 2, 1], [1, 7, 33], [5, 5, 1]][i][step.min(2)];
                    let n = n.min(s.rows - at[i]);
                    if n > 0 {
                        let first = s.first_row + at[i];
                        part.push(s.slot, at[i], &whole.tokens[first..first + n]);
                        rows.extend(first..first + n);
                        at[i] += n;
                    }
                }
                if rows.is_empty() {
                    break;
                }
                let logits = decoder.logits(&e, &decoder.states(&e, &part, &mut caches));
                let logits = block_on(e.read(&logits)).expect("logits");
                for (row, got) in rows.iter().zip(logits.chunks_exact(config.vocabulary)) {
                    let expected = &full[row * config.vocabulary..][..config.vocabulary];
                    assert_eq!(expected, got, "row {row} at step {step}, {path}, {threads}");
                }
            }
        }
    }
}

/// A sequence alone equals the sequence in a batch; gradients of a batch are sums of those alone.
#[test]
fn cpu_engine_batches_are_sums_of_their_sequences() {
    let config = config(64, 4, 2, 16, 96, 50, 2);
    let weights = model(&config, 5);
    let whole = batch(&[33, 64, 1, 45], config.vocabulary, &mut Random(11));
    let scale = temperature_scale(1.0);
    for path in Path::available() {
        let e = Cpu::new(config.constants(), 2, Some(path));
        let mut together = Record::new();
        let step = Step { weights: &weights, batch: whole.clone(), scale };
        let expected = step.gradients(&e, &mut together);
        let mut sum = Gradients::zeros(&config);
        let mut logits = Vec::new();
        for s in &whole.segments {
            let tokens = &whole.tokens[s.first_row..s.first_row + s.rows];
            let mut out = Record::new();
            let batch = Batch::sequences([tokens]);
            sum.add(&Step { weights: &weights, batch, scale }.gradients(&e, &mut out));
            logits.extend_from_slice(&out[0].1);
        }
        compare(&format!("{path}"), &together, &vec![("logits".into(), logits)]);
        assert!(expected == sum, "{path}: gradients are not additive");
        let moved = expected.0.iter().all(|g| g.iter().any(|&x| x != 0));
        assert!(moved, "{path}: some gradient is zero");
    }
}
