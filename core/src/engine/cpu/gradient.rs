//! Accumulators of gradients.
//!
//! Sums are i64. Those of large products stay in i32 for as long as exponents prove that they fit,
//! which halves what every micro-batch reads and writes. Neither comes from the engine's pool: it
//! would keep as much as the model has parameters while nobody needs it.

use super::Cpu;
use super::buffer::Buffer;
use super::path::simd;

/// A gradient (R, C).
pub struct Gradient {
    len: usize,
    /// Empty as long as all are zero.
    wide: Vec<i64>,
    /// Sums that are not yet in `wide`, and a bound on their magnitudes.
    narrow: Option<(Buffer<i32>, i64)>,
}

impl Gradient {
    /// Zeros.
    pub(super) fn zeros(len: usize) -> Self {
        Self { len, wide: Vec::new(), narrow: None }
    }

    /// The number of sums.
    pub(super) fn len(&self) -> usize {
        self.len
    }

    /// The sums, to add to.
    pub(super) fn wide(&mut self) -> &mut [i64] {
        if self.wide.is_empty() {
            self.wide = vec![0; self.len];
        }
        &mut self.wide
    }

    /// Sums to add up to `bound` to, after which they are at most `LIM`; only zeros if `bound` alone
    /// is more.
    #[cfg(target_arch = "x86_64")] // whose tile unit has large products
    pub(super) fn narrow(&mut self, cpu: &Cpu, bound: i64) -> &mut [i32] {
        let room = i64::from(manyhands_shaders::x1::LIM) - bound;
        if self.narrow.as_ref().is_some_and(|(_, held)| *held > room) {
            self.settle(cpu);
        }
        let (sums, held) = self.narrow.get_or_insert_with(|| (Buffer::zeros(self.len), 0));
        *held += bound;
        sums
    }

    /// Brings all sums to `wide`.
    fn settle(&mut self, cpu: &Cpu) {
        let Some((sums, _)) = self.narrow.take() else { return };
        if self.wide.is_empty() {
            self.wide = sums.iter().map(|&x| x.into()).collect();
        } else {
            add_totals(cpu.path, &mut self.wide, &sums);
        }
    }

    /// A copy of the sums.
    pub(super) fn sums(&self, cpu: &Cpu) -> Vec<i64> {
        let mut out = Self { len: self.len, wide: self.wide.clone(), narrow: None };
        let sums = out.wide();
        if let Some((narrow, _)) = &self.narrow {
            add_totals(cpu.path, sums, narrow);
        }
        out.wide
    }

    /// The sums.
    pub(super) fn into_sums(mut self, cpu: &Cpu) -> Vec<i64> {
        self.settle(cpu);
        self.wide();
        self.wide
    }
}

simd! {
    /// `to += from`, over the length of `to`.
    pub(super) fn add_totals(to: &mut [i64], from: &[i32]) {
        for (to, from) in to.iter_mut().zip(from) {
            *to += i64::from(*from);
        }
    }
}
