//! The kernel itself, over an abstract vector of i32 lanes, and the plain vector.

use manyhands_shaders::x1::{LIM, flush};

use super::{EXPONENT_SHIFT, Job, PANEL_BLOCK, PANEL_EXPONENTS, TILE, TILE_BLOCK};

/// 1.5 * 2^23: added to a float below 2^22 it rounds it to an integer, nearest even, and leaves
/// that integer in the low bits.
pub(super) const MAGIC: f32 = 12_582_912.0;
/// What is left above the integer.
const MAGIC_BITS: i32 = MAGIC.to_bits().cast_signed();
/// Shifts of 2 and more keep terms below 2^22.
const MAGIC_LIMIT: i32 = (127 - 2) << EXPONENT_SHIFT;

/// Operations on a vector of `WIDTH` i32 lanes. All wrap.
pub(super) trait Lanes {
    /// A vector.
    type V: Copy;
    /// Lanes: divides 16.
    const WIDTH: usize;
    /// Whether [`Self::flush_magic`] is the faster flush.
    const MAGIC: bool;
    /// All lanes `x`.
    unsafe fn splat(x: i32) -> Self::V;
    /// Loads from any address.
    unsafe fn load(from: *const i32) -> Self::V;
    /// Stores to any address.
    unsafe fn store(to: *mut i32, x: Self::V);
    /// `a + b`.
    unsafe fn add(a: Self::V, b: Self::V) -> Self::V;
    /// `clamp(x, -LIM, LIM)`.
    unsafe fn saturate(x: Self::V) -> Self::V;
    /// `d + x.low * w.low + x.high * w.high` on i16 halves.
    unsafe fn dot(d: Self::V, x: Self::V, w: Self::V) -> Self::V;
    /// `d * scale` to nearest even, where `scale` holds the bits of an f32 power of two and the
    /// result is within [`super::fast_limit`].
    unsafe fn flush(d: Self::V, scale: Self::V) -> Self::V;
    /// The same plus [`MAGIC_BITS`], for results below 2^22. A multiplication by a power of two is
    /// exact, so fused or not there is one rounding.
    unsafe fn flush_magic(d: Self::V, scale: Self::V) -> Self::V;
    /// The same as [`Self::flush`] for any result, clamped.
    unsafe fn flush_wide(d: Self::V, scale: Self::V) -> Self::V;
}

/// One panel times one tile. Columns go in strips of two vectors: block sums stay in registers
/// over a block, accumulators over the whole contraction where registers suffice.
#[inline(always)]
pub(super) unsafe fn micro<
    L: Lanes,
    const ROWS: usize,
    const PAIRS: bool,
    const COLUMNS: bool,
    const ADD: bool,
>(
    job: &Job,
) -> u64 {
    let mut events = 0;
    let mut column = 0;
    while column < TILE {
        // SAFETY: the caller's job covers all blocks, 32 columns and its rows; strips and blocks
        // stay inside it.
        unsafe {
            let mut acc = [[L::splat(0); 2]; ROWS];
            if ADD {
                for r in 0..ROWS {
                    for v in 0..2 {
                        acc[r][v] = L::load(job.out.add(r * job.stride + column + v * L::WIDTH));
                    }
                }
            }
            let mut magics = 0_i32;
            for block in 0..job.blocks {
                let a = job.a.add(block * PANEL_BLOCK);
                let b = job.b.add(block * TILE_BLOCK + column * 2);
                // Few rows are few chains of dependent sums: each is split to hide their latency.
                let split = const {
                    match ROWS {
                        1 => 4,
                        2 => 2,
                        _ => 1,
                    }
                };
                let mut part = [[[L::splat(0); 2]; ROWS]; 4];
                for p in 0..16 / split {
                    for k in 0..split {
                        let p = p * split + k;
                        let w0 = L::load(b.add(p * 64).cast());
                        let w1 = L::load(b.add(p * 64 + 2 * L::WIDTH).cast());
                        for r in 0..ROWS {
                            let at = if PAIRS { p * 12 + r * 2 } else { r * 32 + p * 2 };
                            let x = L::splat(a.add(at).cast::<i32>().read_unaligned());
                            part[k][r][0] = L::dot(part[k][r][0], x, w0);
                            part[k][r][1] = L::dot(part[k][r][1], x, w1);
                        }
                    }
                }
                let mut d = part[0];
                for part in &part[1..split] {
                    for r in 0..ROWS {
                        for v in 0..2 {
                            d[r][v] = L::add(d[r][v], part[r][v]);
                        }
                    }
                }
                let ea = job.a_exponents.add(block * PANEL_EXPONENTS);
                let eb = job.b_exponents.add(block * job.b_stride);
                let max = if COLUMNS { *job.b_max.add(block * job.b_max_stride) } else { *eb };
                let columns = if COLUMNS {
                    let at = eb.add(column);
                    [L::load(at), L::load(at.add(L::WIDTH))]
                } else {
                    [L::splat(*eb); 2]
                };
                let largest = (*ea.add(6)).wrapping_add(max).wrapping_add(job.bias);
                if !ADD && largest > job.limit {
                    let mut t = [[0_i32; TILE]; ROWS];
                    let mut over = 0;
                    for r in 0..ROWS {
                        for v in 0..2 {
                            let e = L::splat((*ea.add(r)).wrapping_add(job.bias));
                            let x = L::flush_wide(d[r][v], L::add(e, columns[v]));
                            L::store(t[r].as_mut_ptr().add(v * L::WIDTH), x);
                            acc[r][v] = L::add(acc[r][v], x);
                        }
                        let terms = &t[r][..2 * L::WIDTH];
                        over = terms.iter().fold(over, |m, x| x.unsigned_abs().max(m));
                    }
                    let least = (*job.count).limit.iter().copied().min().unwrap_or(0);
                    if over > least.unsigned_abs() {
                        events += count(&t, column, 2 * L::WIDTH, job);
                    }
                } else {
                    let magic = L::MAGIC && largest <= MAGIC_LIMIT;
                    magics = magics.wrapping_add(i32::from(magic));
                    for r in 0..ROWS {
                        let e = (*ea.add(r)).wrapping_add(job.bias);
                        let one = L::splat(if COLUMNS { e } else { e.wrapping_add(max) });
                        for v in 0..2 {
                            let scale = if COLUMNS { L::add(one, columns[v]) } else { one };
                            d[r][v] = if magic {
                                L::flush_magic(d[r][v], scale)
                            } else {
                                L::flush(d[r][v], scale)
                            };
                            acc[r][v] = L::add(acc[r][v], d[r][v]);
                        }
                    }
                }
            }
            let surplus = L::splat(magics.wrapping_mul(MAGIC_BITS).wrapping_neg());
            for r in 0..ROWS {
                for v in 0..2 {
                    let sum = L::add(acc[r][v], surplus);
                    let x = if ADD { sum } else { L::saturate(sum) };
                    L::store(job.out.add(r * job.stride + column + v * L::WIDTH), x);
                }
            }
        }
        column += 2 * L::WIDTH;
    }
    events
}

/// Counts the terms that are over their row's limit, in the columns that count.
#[cold]
#[inline(never)]
fn count(terms: &[[i32; TILE]], column: usize, width: usize, job: &Job) -> u64 {
    // SAFETY: the job's counting rules outlive it.
    let rules = unsafe { &*job.count };
    let mut events = 0;
    for (r, t) in terms.iter().enumerate() {
        let valid = rules.columns[r].saturating_sub(column).min(width);
        let limit = rules.limit[r].unsigned_abs();
        events += t[..valid].iter().filter(|t| t.unsigned_abs() > limit).count() as u64;
    }
    events
}

/// Four lanes of plain Rust.
pub(super) struct Plain;

impl Lanes for Plain {
    type V = [i32; 4];
    const WIDTH: usize = 4;
    const MAGIC: bool = true;

    #[inline(always)]
    unsafe fn splat(x: i32) -> [i32; 4] {
        [x; 4]
    }

    #[inline(always)]
    unsafe fn load(from: *const i32) -> [i32; 4] {
        // SAFETY: the caller's address covers the vector.
        unsafe { from.cast::<[i32; 4]>().read_unaligned() }
    }

    #[inline(always)]
    unsafe fn store(to: *mut i32, x: [i32; 4]) {
        // SAFETY: the caller's address covers the vector.
        unsafe { to.cast::<[i32; 4]>().write_unaligned(x) }
    }

    #[inline(always)]
    unsafe fn add(a: [i32; 4], b: [i32; 4]) -> [i32; 4] {
        std::array::from_fn(|i| a[i].wrapping_add(b[i]))
    }

    #[inline(always)]
    unsafe fn saturate(x: [i32; 4]) -> [i32; 4] {
        x.map(|x| x.clamp(-LIM, LIM))
    }

    #[inline(always)]
    unsafe fn dot(d: [i32; 4], x: [i32; 4], w: [i32; 4]) -> [i32; 4] {
        let low = |x: i32| i32::from(x as i16);
        std::array::from_fn(|i| {
            let pair = (low(x[i]) * low(w[i])).wrapping_add((x[i] >> 16) * (w[i] >> 16));
            d[i].wrapping_add(pair)
        })
    }

    #[inline(always)]
    unsafe fn flush(d: [i32; 4], scale: [i32; 4]) -> [i32; 4] {
        // SAFETY: no memory is accessed.
        unsafe { Self::flush_magic(d, scale) }.map(|t| t.wrapping_sub(MAGIC_BITS))
    }

    #[inline(always)]
    unsafe fn flush_magic(d: [i32; 4], scale: [i32; 4]) -> [i32; 4] {
        std::array::from_fn(|i| {
            let t = d[i] as f32 * f32::from_bits(scale[i].cast_unsigned()) + MAGIC;
            t.to_bits().cast_signed()
        })
    }

    #[inline(always)]
    unsafe fn flush_wide(d: [i32; 4], scale: [i32; 4]) -> [i32; 4] {
        std::array::from_fn(|i| flush(d[i], 127 - (scale[i] >> EXPONENT_SHIFT)))
    }
}
