//! The GPU engine equals the twin: every operation, every bit, every saturation count.
//!
//! Each scenario is written once over [`Engine`] and leaves a trace of all it computed; the traces
//! of the twin and of the GPU must be equal. One device serves all tests, one test at a time,
//! because the saturation counters belong to the device. No adapter is a loud skip, and a failure
//! when `GPU_REQUIRED=1`.

mod gpu_support;

use gpu_support::{Random, Scenario, Trace, blocks, same, whole, with_device, with_gpu};
use manyhands_core::engine::gpu::{Gpu, MatmulVariant, Profile};
use manyhands_core::engine::twin::Twin;
use manyhands_core::engine::{Back, Batch, Constants, Engine, SeedRow, Tiles};
use manyhands_core::model::config::ModelConfig;
use manyhands_shaders::twin::Saturations;
use manyhands_shaders::twin::logits::temperature_scale;
use manyhands_shaders::x1::LIM;
use pollster::block_on;

fn config(width: usize, heads: usize, kv_heads: usize, head_dim: usize) -> ModelConfig {
    ModelConfig {
        vocabulary: 41,
        layers: 2,
        width,
        heads,
        kv_heads,
        head_dim,
        ffn: 48,
        context: 140,
        rope_base: 10_000.0,
        rms_epsilon: 1e-5,
        tied: true,
        bias: false,
        adapter: None,
    }
}

/// Runs a scenario on both engines.
fn compare<F>(name: &str, gpu: &Gpu, constants: &Constants, scenario: F)
where
    F: Scenario,
{
    let twin = Twin::new(constants.clone());
    let gpu = gpu.for_model(constants.clone()).expect("buffers fit");
    same(name, &block_on(whole(&twin, &scenario)), &block_on(whole(&gpu, &scenario)));
}

/// Products with all their gradients, in shapes (N, O, C).
struct Products {
    n: usize,
    o: usize,
    c: usize,
    /// Whether operands drive block terms to their clamps.
    extreme: bool,
}

impl Scenario for Products {
    async fn run<E: Engine>(&self, e: &E, out: &mut Trace) {
        let (n, o, c) = (self.n, self.o, self.c);
        let mut r = Random((n * 1_000_000 + o * 1000 + c) as u64);
        let bits = if self.extreme { 30 } else { 20 };
        let mut batch = Batch::default();
        let cut = r.below(n + 1);
        for (slot, rows) in [cut, n - cut].into_iter().filter(|&rows| rows > 0).enumerate() {
            batch.push(slot, 0, &vec![0; rows]);
        }
        let x = blocks(e, &mut r, n, c, bits);
        let tiles: [Tiles; 2] = std::array::from_fn(|_| r.tiles(o, c, self.extreme));
        let w = [e.weight(&tiles[0]), e.weight(&tiles[1])];
        let y = e.linear(&x, [&w[0], &w[1]]);
        out.tensor(e, "linear 0", &y[0]).await;
        out.tensor(e, "linear 1", &y[1]).await;
        let mut h = e.tensor(&r.values(n * o, bits), o);
        e.linear_add(&x, &w[0], &mut h);
        out.tensor(e, "linear_add", &h).await;
        let dy = [r.values(n * o, bits), r.values(n * o, bits)].map(|d| e.tensor(&d, o));
        let mut grads: [E::Gradient; 2] = std::array::from_fn(|_| e.gradient(o, c));
        for name in ["linear_backward", "linear_backward again"] {
            let back = dy.iter().zip(&w).zip(&mut grads);
            let back = back.map(|((dy, w), grad)| Back { dy, w, grad: Some(grad) }).collect();
            let dx = e.linear_backward(&x, &batch, back);
            out.tensor(e, name, &dx).await;
            out.gradient(e, "weight gradient 0", &grads[0]).await;
            out.gradient(e, "weight gradient 1", &grads[1]).await;
        }
        // What is not trained passes gradients on, and has none.
        let frozen = Back { dy: &dy[0], w: &w[0], grad: None };
        let trained = Back { dy: &dy[1], w: &w[1], grad: Some(&mut grads[1]) };
        let dx = e.linear_backward(&x, &batch, vec![frozen, trained]);
        out.tensor(e, "linear_backward, one frozen", &dx).await;
        out.gradient(e, "weight gradient 0, frozen", &grads[0]).await;
        out.gradient(e, "weight gradient 1", &grads[1]).await;
        let frozen = vec![Back { dy: &dy[0], w: &w[0], grad: None }];
        out.tensor(e, "linear_backward, frozen", &e.linear_backward(&x, &batch, frozen)).await;
        // A product of a product, as an adapter's.
        let [z] = e.linear(&e.blocks(&y[0]), [&e.weight(&r.tiles(c, o, self.extreme))]);
        out.tensor(e, "linear of blocks", &z).await;
        out.saturations(e, "products").await;
    }
}

/// Breaks if a product kernel differs at any tile edge, or counts a padded row or column.
#[test]
fn products_every_variant_equals_twin() {
    with_gpu(|gpu| {
        let constants = config(64, 2, 2, 32).constants();
        let shapes = [(1, 1, 1), (2, 7, 31), (3, 17, 32), (7, 16, 33), (8, 15, 96), (9, 64, 65)];
        let shapes = shapes.into_iter().chain([(63, 33, 40), (65, 65, 64), (130, 9, 130)]);
        let shapes: Vec<_> = shapes.collect();
        for variant in MatmulVariant::ALL {
            gpu.set_matmul_variant(variant);
            for &(n, o, c) in &shapes {
                for extreme in [false, true] {
                    let name = format!("{variant:?} {n}x{o}x{c} extreme={extreme}");
                    compare(&name, gpu, &constants, Products { n, o, c, extreme });
                }
            }
        }
        gpu.set_matmul_variant(MatmulVariant::BlockedI32);
    });
}

/// RMSNorm and its gradient.
struct Norms {
    rows: usize,
    width: usize,
}

impl Scenario for Norms {
    async fn run<E: Engine>(&self, e: &E, out: &mut Trace) {
        let (n, c) = (self.rows, self.width);
        let mut r = Random((n * 1000 + c) as u64);
        // Rows of every magnitude: zeros, single values, all at the limit, random.
        let mut h = Vec::new();
        for row in 0..n {
            let bits = (row as u32 * 5 + 1) % 31;
            match row % 5 {
                0 => h.extend(vec![0; c]),
                1 => h.extend((0..c).map(|i| if i == c / 2 { LIM } else { 0 })),
                2 => h.extend((0..c).map(|i| if i % 2 == 0 { LIM } else { -LIM })),
                _ => h.extend(r.values(c, bits)),
            }
        }
        let gain = e.gain(&r.values(c, 18));
        let (x, norm) = e.rmsnorm(&e.tensor(&h, c), &gain);
        let w = e.weight(&r.tiles(5, c, false));
        out.tensor(e, "blocks", &e.linear(&x, [&w])[0]).await;
        let mut grad = e.gradient(1, c);
        for (name, bits, dh_bits) in [("small", 16, None), ("large", 30, Some(30))] {
            let dn = e.tensor(&r.values(n * c, bits), c);
            let dh = dh_bits.map(|b| e.tensor(&r.values(n * c, b), c));
            let dh = e.rmsnorm_backward(&dn, &norm, &gain, Some(&mut grad), dh);
            out.tensor(e, name, &dh).await;
            out.gradient(e, "gain", &grad).await;
        }
        out.saturations(e, "norm").await;
    }
}

/// Breaks if a row's scale, a gradient or the count of a row's clamps differs.
#[test]
fn rmsnorm_any_magnitude_equals_twin() {
    with_gpu(|gpu| {
        for (rows, width) in [(1, 16), (70, 31), (11, 32), (12, 33), (6, 576), (3, 2048)] {
            let constants = config(width, 2, 2, 16).constants();
            compare(&format!("norm {rows}x{width}"), gpu, &constants, Norms { rows, width });
        }
    });
}

/// Attention over two ragged sequences, its gradient, and decoding steps after it.
struct Attend {
    lengths: Vec<usize>,
    bits: u32,
}

impl Scenario for Attend {
    async fn run<E: Engine>(&self, e: &E, out: &mut Trace) {
        let c = e.constants().attention.clone();
        let (q_width, kv_width) = (c.heads * c.head_dim, c.kv_heads * c.head_dim);
        let mut r = Random(self.lengths.iter().sum::<usize>() as u64 + u64::from(self.bits));
        let capacity = self.lengths.iter().max().expect("not empty") + 2;
        let mut cache = e.cache(self.lengths.len(), capacity);
        let w = e.weight(&r.tiles(7, q_width, false));
        let mut qkv = |e: &E, rows: usize| {
            [q_width, kv_width, kv_width]
                .map(|width| e.tensor(&r.values(rows * width, self.bits), width))
        };
        let mut batch = Batch::default();
        for (slot, &length) in self.lengths.iter().enumerate() {
            batch.push(slot, 0, &vec![0; length]);
        }
        let q = e.heads(&qkv(e, batch.rows()), &batch, &mut cache);
        let y = e.attention(&q, &cache, &batch);
        out.tensor(e, "forward", &e.linear(&y, [&w])[0]).await;
        out.saturations(e, "forward").await;
        let [d_out, _, _] = qkv(e, batch.rows());
        let d = e.attention_backward(&d_out, &q, &cache, &batch);
        for (name, d) in ["dq", "dk", "dv"].into_iter().zip(&d) {
            out.tensor(e, name, d).await;
        }
        out.saturations(e, "backward").await;
        for step in 0..2 {
            let mut batch = Batch::default();
            for (slot, &length) in self.lengths.iter().enumerate().rev() {
                batch.push(slot, length + step, &[0]);
            }
            let q = e.heads(&qkv(e, batch.rows()), &batch, &mut cache);
            let y = e.attention(&q, &cache, &batch);
            out.tensor(e, "decode", &e.linear(&y, [&w])[0]).await;
        }
        out.saturations(e, "decode").await;
    }
}

/// Breaks if a head, a group, a key block's edge or a mask is treated differently.
#[test]
fn attention_heads_groups_and_lengths_equal_twin() {
    with_gpu(|gpu| {
        let heads = [(4, 2, 16), (4, 2, 32), (4, 2, 64), (3, 1, 10), (2, 2, 48)];
        for (i, (heads, kv_heads, head_dim)) in heads.into_iter().enumerate() {
            let constants = config(64, heads, kv_heads, head_dim).constants();
            let lengths = [vec![1, 5], vec![31, 32, 33], vec![65, 2], vec![64], vec![1]];
            for bits in [17, 22, 30] {
                let lengths = lengths[i % lengths.len()].clone();
                let name =
                    format!("{heads} heads of {kv_heads} x {head_dim}, {bits} bits {lengths:?}");
                compare(&name, gpu, &constants, Attend { lengths, bits });
            }
        }
    });
}

/// SwiGLU, embedding, gathering of rows.
struct Elementwise {
    n: usize,
    c: usize,
}

impl Scenario for Elementwise {
    async fn run<E: Engine>(&self, e: &E, out: &mut Trace) {
        let (n, c) = (self.n, self.c);
        let mut r = Random((n * 77 + c) as u64);
        for bits in [18, 24, 30] {
            let gate_up = [r.values(n * c, bits), r.values(n * c, bits)].map(|x| e.tensor(&x, c));
            let w = e.weight(&r.tiles(3, c, false));
            out.tensor(e, "swiglu", &e.linear(&e.swiglu(&gate_up), [&w])[0]).await;
            let da = e.tensor(&r.values(n * c, bits), c);
            let [dg, du] = e.swiglu_backward(&da, &gate_up);
            out.tensor(e, "d gate", &dg).await;
            out.tensor(e, "d up", &du).await;
            out.saturations(e, "swiglu").await;

            let vocabulary = 37;
            let embedding = e.weight(&r.tiles(vocabulary, c, bits == 30));
            let mut batch = Batch::default();
            let tokens: Vec<u32> = (0..n).map(|_| r.below(vocabulary) as u32).collect();
            batch.push(0, 0, &tokens);
            let h = e.embed(&embedding, &batch);
            out.tensor(e, "embed", &h).await;
            let picked: Vec<u32> = (0..n + 3).map(|_| r.below(n) as u32).collect();
            out.tensor(e, "rows", &e.rows(&h, &picked)).await;
            let mut grad = e.gradient(vocabulary, c);
            for _ in 0..2 {
                let dh = e.tensor(&r.values(n * c, bits), c);
                e.embed_backward(&dh, &batch, &mut grad);
            }
            out.gradient(e, "embedding gradient", &grad).await;
            out.saturations(e, "embedding").await;
        }
    }
}

/// Breaks if an elementwise operation, a clamp or a 64-bit carry differs.
#[test]
fn elementwise_operations_equal_twin() {
    with_gpu(|gpu| {
        let constants = config(64, 2, 2, 32).constants();
        for (n, c) in [(1, 1), (3, 31), (9, 32), (5, 97)] {
            compare(&format!("elementwise {n}x{c}"), gpu, &constants, Elementwise { n, c });
        }
    });
}

/// Statistics, samples and seeds at the logits.
struct AtLogits {
    n: usize,
    v: usize,
    temperature: f64,
}

impl Scenario for AtLogits {
    async fn run<E: Engine>(&self, e: &E, out: &mut Trace) {
        let (n, v, scale) = (self.n, self.v, temperature_scale(self.temperature));
        let mut r = Random((n * 31 + v) as u64);
        for bits in [4, 17, 20, 30] {
            let mut x = r.values(n * v, bits);
            // Ties for the largest logit: the lowest token must win.
            x[v - 1] = x[..v].iter().copied().max().expect("not empty");
            let x = e.tensor(&x, v);
            let targets: Vec<u32> = (0..n).map(|_| r.below(v) as u32).collect();
            out.stats(
                "stats",
                e.stats(&x, &targets, scale).await.expect("read").into_iter().map(|s| (0, s)),
            );
            let draw = |i: usize, r: &mut Random| match i % 5 {
                0 => None,
                1 => Some(0),
                2 => Some(u64::MAX),
                _ => Some(r.next()),
            };
            let draws: Vec<Option<u64>> = (0..n).map(|i| draw(i, &mut r)).collect();
            out.stats("sample", e.sample(&x, &draws, scale).await.expect("read").into_iter());
            let limits = [(0, 0), (1 << 16, 0), (-(1 << 20), 1 << 14), (LIM, -LIM), (0, 1 << 16)];
            let rows: Vec<SeedRow> = (0..n)
                .map(|i| SeedRow {
                    target: targets[i],
                    weight: limits[i % 5].0,
                    entropy_weight: limits[i % 5].1,
                    entropy_center: r.values(1, 22)[0],
                })
                .collect();
            out.tensor(e, "seed", &e.seed(&x, &rows, scale)).await;
            out.saturations(e, "seed").await;
        }
    }
}

/// Breaks if a total, a moment, a sampled token or a seed differs.
#[test]
fn logits_statistics_samples_and_seeds_equal_twin() {
    with_gpu(|gpu| {
        let constants = config(64, 2, 2, 32).constants();
        for (n, v, temperature) in [(1, 2, 1.0), (7, 41, 0.7), (10, 300, 1.0), (5, 1025, 0.05)] {
            let name = format!("logits {n}x{v} at {temperature}");
            compare(&name, gpu, &constants, AtLogits { n, v, temperature });
        }
    });
}

/// Breaks if wide workgroups, or the lanes that share a column there, differ from the twin.
#[test]
fn hardware_profile_equals_twin() {
    with_device(|d| {
        let constants = config(33, 4, 2, 16).constants();
        let profile = Profile::Hardware;
        let gpu = Gpu::new(d.device.clone(), d.queue.clone(), profile, constants.clone());
        let gpu = gpu.expect("buffers fit");
        for (n, o, c) in [(1, 65, 600), (2, 130, 33), (9, 33, 64)] {
            compare("product", &gpu, &constants, Products { n, o, c, extreme: true });
        }
        compare("norm", &gpu, &constants, Norms { rows: 6, width: 33 });
        let attend = Attend { lengths: vec![65, 3, 32], bits: 30 };
        compare("attention", &gpu, &constants, attend);
        compare("elementwise", &gpu, &constants, Elementwise { n: 3, c: 70 });
        compare("logits", &gpu, &constants, AtLogits { n: 7, v: 300, temperature: 0.7 });
    });
}

/// Breaks if the scenarios above no longer drive every site to its clamps: then equal counts would
/// prove nothing.
#[test]
fn scenarios_saturate_every_site() {
    let twin = Twin::new(config(33, 4, 2, 16).constants());
    let traces = [
        block_on(whole(&twin, &Products { n: 9, o: 33, c: 64, extreme: true })),
        block_on(whole(&twin, &Norms { rows: 6, width: 33 })),
        block_on(whole(&twin, &Attend { lengths: vec![31, 3], bits: 30 })),
        block_on(whole(&twin, &Elementwise { n: 3, c: 31 })),
        block_on(whole(&twin, &AtLogits { n: 7, v: 41, temperature: 0.7 })),
    ];
    for (site, name) in Saturations::NAMES.iter().enumerate() {
        let count: i64 = traces.iter().map(|t| t.total_saturations()[site]).sum();
        assert!(count > 0, "no scenario saturates {name}");
    }
}
