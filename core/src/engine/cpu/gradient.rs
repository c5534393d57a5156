//! Accumulators of gradients.
//!
//! Sums are i64. Those of large products stay in i32 for as long as exponents prove that they fit,
//! which halves what every micro-batch reads and writes. Neither comes from the engine's pool: it
//! would keep as much as the model has parameters while nobody needs it.

use std::sync::{Mutex, PoisonError};

use super::buffer::Buffer;
use super::path::simd;
use super::{Cpu, Path};

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
    pub(super) fn narrow(&mut self, path: Path, bound: i64) -> &mut [i32] {
        let room = i64::from(manyhands_shaders::x1::LIM) - bound;
        if let Some((sums, _)) = self.narrow.take_if(|(_, held)| *held > room) {
            add_totals(path, self.wide(), &sums);
        }
        let (sums, held) = self.narrow.get_or_insert_with(|| (Buffer::zeros(self.len), 0));
        *held += bound;
        sums
    }

    /// A copy of the sums.
    pub(super) fn sums(&self, path: Path) -> Vec<i64> {
        let mut out = self.wide.clone();
        out.resize(self.len, 0);
        self.narrow.iter().for_each(|(narrow, _)| add_totals(path, &mut out, narrow));
        out
    }
}

/// The sums of each list of gradients of one length, each read and written once.
pub(super) fn sums(cpu: &Cpu, lists: Vec<Vec<Gradient>>) -> Vec<Vec<i64>> {
    let cost = lists.iter().flatten().map(Gradient::len).sum();
    let places: Vec<Mutex<(Vec<Gradient>, Vec<i64>)>> =
        lists.into_iter().map(|list| Mutex::new((list, Vec::new()))).collect();
    cpu.workers.each(places.len(), cost, |i| {
        let mut place = places[i].lock().unwrap_or_else(PoisonError::into_inner);
        place.1 = sum(cpu.path, std::mem::take(&mut place.0));
    });
    let into_sum =
        |place: Mutex<(_, Vec<i64>)>| place.into_inner().unwrap_or_else(PoisonError::into_inner).1;
    places.into_iter().map(into_sum).collect()
}

/// The sum of gradients of one length.
fn sum(path: Path, list: Vec<Gradient>) -> Vec<i64> {
    let len = list.first().map_or(0, Gradient::len);
    let (mut wide, mut narrow) = (Vec::new(), Vec::new());
    for gradient in list {
        wide.extend(Some(gradient.wide).filter(|sums| !sums.is_empty()));
        narrow.extend(gradient.narrow.map(|(sums, _)| sums));
    }
    let mut wide = wide.into_iter();
    let mut narrow = narrow.iter();
    let mut out = wide.next().unwrap_or_else(|| match (narrow.next(), narrow.next()) {
        (Some(a), Some(b)) => {
            a.iter().zip(&**b).map(|(a, b)| i64::from(*a) + i64::from(*b)).collect()
        }
        (Some(a), None) => a.iter().map(|a| i64::from(*a)).collect(),
        _ => vec![0; len],
    });
    wide.for_each(|sums| out.iter_mut().zip(sums).for_each(|(out, x)| *out += x));
    narrow.for_each(|sums| add_totals(path, &mut out, sums));
    out
}

simd! {
    /// `to += from`, over the length of `to`.
    pub(super) fn add_totals(to: &mut [i64], from: &[i32]) {
        for (to, from) in to.iter_mut().zip(from) {
            *to += i64::from(*from);
        }
    }
}

#[cfg(all(test, target_arch = "x86_64"))]
mod tests {
    use super::*;
    use crate::model::config::ModelConfig;

    /// Breaks if a lane's sums are lost or read twice, whichever of them it has.
    #[test]
    fn sums_of_lanes_are_those_of_their_parts() {
        const LEN: usize = 70;
        let model = ModelConfig::preset("tiny", 64, 64).expect("a preset");
        let cpu = Cpu::new(model.constants(), 2, None);
        let lane = |seed: i64, is_wide: bool, is_narrow: bool| {
            let mut gradient = Gradient::zeros(LEN);
            let value = |i: usize| seed * 1_000_003 + i as i64;
            if is_wide {
                let sums = gradient.wide().iter_mut().enumerate();
                sums.for_each(|(i, x)| *x += value(i) << 20);
            }
            if is_narrow {
                let sums = gradient.narrow(cpu.path, 1 << 29).iter_mut().enumerate();
                sums.for_each(|(i, x)| *x += value(i) as i32);
            }
            gradient
        };
        for lanes in 1..4 {
            let kinds = 1_usize << (2 * lanes);
            let lists = || -> Vec<Vec<Gradient>> {
                let kind = |k: usize, i: usize| k >> (2 * i) & 3;
                let list = |k: usize| {
                    let lane = |i| lane(i as i64 + 1, kind(k, i) & 1 == 1, kind(k, i) & 2 == 2);
                    (0..lanes).map(lane).collect()
                };
                (0..kinds).map(list).collect()
            };
            let expected: Vec<Vec<i64>> = lists()
                .iter()
                .map(|list| {
                    let each: Vec<Vec<i64>> = list.iter().map(|g| g.sums(cpu.path)).collect();
                    (0..LEN).map(|i| each.iter().map(|sums| sums[i]).sum()).collect()
                })
                .collect();
            assert_eq!(sums(&cpu, lists()), expected, "{lanes} lanes");
            assert_eq!(expected[0], [0; LEN]);
            assert_eq!(expected[3][1], (1_000_004 << 20) + 1_000_004);
        }
    }
}
