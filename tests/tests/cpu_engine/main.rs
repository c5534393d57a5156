//! The CPU engine equals the twin in every bit and every saturation count, for every instruction
//! path of this machine, with one thread and with two.
//!
//! A program is a function over [`Engine`] that records named outputs; it runs on the twin and on
//! each variant of the CPU engine, and the records are compared. Blocks, norms, queries and caches
//! are seen through the operations that read them.

mod lanes;
mod models;
mod operations;

use manyhands_core::engine::cpu::{Cpu, Path};
use manyhands_core::engine::twin::Twin;
use manyhands_core::engine::{Batch, Constants, Engine, Tiles};
use manyhands_core::model::config::ModelConfig;
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
    record.push((name.into(), block_on(e.read_gradient(x)).expect("read")));
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
