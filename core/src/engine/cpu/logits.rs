//! Everything at the logits: `twin::logits`.
#![expect(unsafe_code, reason = "rows of the outputs are written by several threads")]

use manyhands_shaders::twin::logits::{RowStats, SeedRow, reciprocal};
use manyhands_shaders::twin::{GRADIENT_FRACTION, Site};

use super::path::simd;
use super::scalar::{mulsh_wide, sat};
use super::tables::{distance, exp2n};
use super::workers::Shared;
use super::{Cpu, Tensor};

/// Weights are in Q23.
const DOWN: u32 = 30 - 23;

#[inline(always)]
fn largest(x: &[i32]) -> i32 {
    let mut max = i32::MIN;
    for &x in x {
        max = max.max(x);
    }
    max
}

simd! {
    /// `twin::logits::stats` without the target: total, moment, first token of largest logit.
    fn sums(x: &[i32], scale: i32) -> (u64, u64, u32) {
        let max = largest(x);
        let (mut total, mut moment, mut first) = (0_u64, 0_u64, u32::MAX);
        for (i, &x) in x.iter().enumerate() {
            let t = distance(max, x, scale);
            let e = exp2n(t, DOWN);
            total += e as u64;
            moment += e as u64 * t as u64;
            first = first.min(if x == max { i as u32 } else { u32::MAX });
        }
        (total, moment, first)
    }
}

simd! {
    /// Weights of a row, and their total.
    fn weights(x: &[i32], scale: i32, e: &mut [i32]) -> u64 {
        let max = largest(x);
        let mut total = 0_u64;
        for (e, &x) in e.iter_mut().zip(x) {
            *e = exp2n(distance(max, x, scale), DOWN);
            total += *e as u64;
        }
        total
    }
}

simd! {
    /// Gradient of every logit as if none were the target; the number of clamps.
    fn slopes(
        x: &[i32],
        scale: i32,
        reciprocal: i32,
        down: u32,
        row: &SeedRow,
        out: &mut [i32],
    ) -> u64 {
        const S: u32 = (16 + 24 - GRADIENT_FRACTION) as u32;
        let max = largest(x);
        let mut count = 0;
        if row.entropy_weight == 0 {
            for (out, &x) in out.iter_mut().zip(x) {
                let p = mulsh_wide(exp2n(distance(max, x, scale), DOWN), reciprocal, down) as i32;
                *out = sat(mulsh_wide(p, row.weight, S), &mut count);
            }
        } else {
            for (out, &x) in out.iter_mut().zip(x) {
                let t = distance(max, x, scale);
                let p = mulsh_wide(exp2n(t, DOWN), reciprocal, down) as i32;
                let policy = mulsh_wide(p, row.weight, S);
                let center = row.entropy_center.wrapping_sub(t);
                let slope = sat(mulsh_wide(center, row.entropy_weight, 16), &mut 0);
                *out = sat(policy + mulsh_wide(p, slope, S), &mut count);
            }
        }
        count.cast_unsigned()
    }
}

fn row_stats(cpu: &Cpu, x: &[i32], target: u32, scale: i32) -> RowStats {
    let (total, moment, greedy) = sums(cpu.path, x, scale);
    let t = x.get(target as usize).map_or(0, |&x_t| distance(x[greedy as usize], x_t, scale));
    RowStats { t, total, moment, greedy }
}

/// `twin::logits::seed` of every row.
pub(super) fn seed(cpu: &Cpu, x: &Tensor, rows: &[SeedRow], scale: i32) -> Tensor {
    assert_eq!(x.rows(), rows.len(), "one seed a row");
    let mut out = cpu.tensor_of(x.rows(), x.cols);
    let shared = Shared::new(&mut out.data);
    cpu.workers.ranges(rows.len(), 1, x.data.len() * 4, |range| {
        let mut count = 0;
        let mut e = vec![0; x.cols];
        for r in range {
            let (x, row) = (&x.data[r * x.cols..][..x.cols], &rows[r]);
            // SAFETY: each row is visited once.
            let out = unsafe { shared.part(r * x.len(), x.len()) };
            if row.weight == 0 && row.entropy_weight == 0 {
                out.fill(0);
                continue;
            }
            let (reciprocal, down) = reciprocal(weights(cpu.path, x, scale, &mut e));
            count += slopes(cpu.path, x, scale, reciprocal, down as u32, row, out);
            // The target alone again, by the definition, in place of what was counted for it.
            let target = row.target as usize;
            if target < x.len() {
                let p = manyhands_shaders::x1::mulsh(e[target], reciprocal, down);
                let [mut without, mut with] = [0, 0];
                seed_one(row, p, 0, x, scale, &mut without);
                out[target] = seed_one(row, p, 1 << 24, x, scale, &mut with);
                count = count.wrapping_add_signed(with - without);
            }
        }
        cpu.tally.add(Site::Seed, count);
    });
    out
}

/// The gradient at the target, with or without the target's own `hot`.
fn seed_one(row: &SeedRow, p: i32, hot: i32, x: &[i32], scale: i32, count: &mut i64) -> i32 {
    const S: u32 = (16 + 24 - GRADIENT_FRACTION) as u32;
    let t = distance(largest(x), x[row.target as usize], scale);
    let slope = sat(mulsh_wide(row.entropy_center.wrapping_sub(t), row.entropy_weight, 16), &mut 0);
    sat(mulsh_wide(p - hot, row.weight, S) + mulsh_wide(p, slope, S), count)
}

/// `twin::logits::stats` of every row.
pub(super) fn stats(cpu: &Cpu, x: &Tensor, targets: &[u32], scale: i32) -> Vec<RowStats> {
    let mut out = vec![RowStats::default(); x.rows().min(targets.len())];
    let shared = Shared::new(&mut out);
    cpu.workers.ranges(targets.len(), 1, x.data.len() * 2, |range| {
        // SAFETY: ranges are disjoint.
        let out = unsafe { shared.part(range.start, range.len()) };
        for (r, out) in range.zip(out) {
            *out = row_stats(cpu, &x.data[r * x.cols..][..x.cols], targets[r], scale);
        }
    });
    out
}

/// `twin::logits::sample` of every row, with the statistics of the sampled token.
pub(super) fn sample(
    cpu: &Cpu,
    x: &Tensor,
    draws: &[Option<u64>],
    scale: i32,
) -> Vec<(u32, RowStats)> {
    let mut out = vec![(0, RowStats::default()); x.rows().min(draws.len())];
    let shared = Shared::new(&mut out);
    cpu.workers.ranges(draws.len(), 1, x.data.len() * 4, |range| {
        let mut e = vec![0; x.cols];
        // SAFETY: ranges are disjoint.
        let out = unsafe { shared.part(range.start, range.len()) };
        for (r, out) in range.zip(out) {
            let x = &x.data[r * x.cols..][..x.cols];
            let mut stats = row_stats(cpu, x, 0, scale);
            let mut token = stats.greedy;
            if let Some(draw) = draws[r] {
                let total = weights(cpu.path, x, scale, &mut e);
                let threshold = ((u128::from(draw) * u128::from(total)) >> 64) as u64;
                token = first_above(&e, threshold);
            }
            stats.t = distance(x[stats.greedy as usize], x[token as usize], scale);
            *out = (token, stats);
        }
    });
    out
}

/// The first index whose cumulative sum exceeds `threshold`.
fn first_above(e: &[i32], threshold: u64) -> u32 {
    let mut before = 0;
    for (i, chunk) in e.chunks(64).enumerate() {
        let mut cumulative = before;
        before += chunk.iter().map(|&e| e as u64).sum::<u64>();
        if before <= threshold {
            continue;
        }
        for (j, &e) in chunk.iter().enumerate() {
            cumulative += e as u64;
            if cumulative > threshold {
                return (i * 64 + j) as u32;
            }
        }
    }
    unreachable!("the threshold is below the total")
}
