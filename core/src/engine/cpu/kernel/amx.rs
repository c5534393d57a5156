//! Products of 32 rows by 32 columns on the tile unit (Intel AMX).
//!
//! The unit multiplies bf16, 8 significant bits, and adds in f32. A mantissa of up to 10 bits is
//! the sum of two bf16, its upper 8 bits and the rest, both of its sign: a product of mantissas is
//! the sum of four exact products of that sign. So any sum of any of them, in whatever order the
//! unit adds, is at most the sum of the magnitudes of 32 products, an integer below 2^24: exact in
//! f32. Digits carry their block's exponent: a power of two changes no rounding, and exponents, of
//! which none is below -60 or above 40, leave f32 nothing subnormal or infinite. What comes out of
//! the unit is therefore `d * 2^-s` itself, and one conversion rounds it to nearest even.
//!
//! Operands are digits, `[block][digit][half][16][32]`: of the left 16 rows of 32 terms a half, of
//! the right 16 pairs of terms by 16 columns.

use std::arch::asm;
use std::arch::x86_64::*;
use std::mem::offset_of;
use std::sync::OnceLock;

use manyhands_shaders::x1::LIM;

/// Rows of a left and columns of a right operand.
pub(crate) const SIDE: usize = 32;
/// Digits of one block of an operand.
pub(crate) const DIGITS: usize = 2 * SIDE * 32;

/// Whether this machine has tiles of bf16, and the system lets this process use them.
pub(crate) fn is_available() -> bool {
    static AVAILABLE: OnceLock<bool> = OnceLock::new();
    *AVAILABLE.get_or_init(|| {
        const BF16_AND_TILES: u32 = 1 << 22 | 1 << 24;
        // The leaf exists where AVX-512 does, which the caller has found.
        __cpuid_count(7, 0).edx & BF16_AND_TILES == BF16_AND_TILES && permitted()
    })
}

/// Asks Linux for the tiles' state, which is large and therefore given on request only.
#[cfg(target_os = "linux")]
fn permitted() -> bool {
    const ARCH_REQ_XCOMP_PERM: i64 = 0x1023;
    const XTILEDATA: i64 = 18;
    // SAFETY: the call takes two numbers and changes only what this process may use.
    unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XTILEDATA) == 0 }
}

#[cfg(not(target_os = "linux"))]
fn permitted() -> bool {
    false
}

/// The palette, and the size of each tile.
#[repr(C, align(64))]
struct Config {
    palette: u8,
    start: u8,
    reserved: [u8; 14],
    row_bytes: [u16; 16],
    rows: [u8; 16],
}

/// A thread's tile unit, configured until dropped.
pub(crate) struct Unit(());

impl Unit {
    /// Configures 8 tiles of 16 rows of 64 bytes.
    ///
    /// # Safety
    /// The unit [`is_available`].
    pub(crate) unsafe fn new() -> Self {
        let mut config =
            Config { palette: 1, start: 0, reserved: [0; 14], row_bytes: [0; 16], rows: [0; 16] };
        config.row_bytes[..8].fill(64);
        config.rows[..8].fill(16);
        // SAFETY: the instruction reads 64 bytes, a valid configuration.
        unsafe { asm!("ldtilecfg [{}]", in(reg) &raw const config, options(nostack, readonly)) };
        Self(())
    }
}

impl Drop for Unit {
    fn drop(&mut self) {
        // SAFETY: the unit exists, or there would be no value to drop.
        unsafe { asm!("tilerelease", options(nostack, nomem)) };
    }
}

/// A product's left operand, and the place of its output.
#[repr(C)]
pub(crate) struct At {
    pub(crate) a: *const u16,
    pub(crate) out: *mut i32,
    /// Rows of the output, up to 32.
    pub(crate) rows: usize,
}

/// Products of left operands with one right one.
pub(crate) struct Products<'a> {
    pub(crate) list: &'a [At],
    /// The right operand.
    pub(crate) b: *const u16,
    /// Blocks of all operands, at least one.
    pub(crate) blocks: usize,
    /// Values from one row of an output to the next.
    pub(crate) stride: usize,
    /// Columns of the outputs, up to 32.
    pub(crate) width: usize,
    /// `out = sat(out + product)` instead of `out = product`.
    pub(crate) add: bool,
    /// What is read after this, to be brought to L2: any address.
    pub(crate) next: *const i16,
}

/// Sums of 32 rows by 32 columns, and what the assembly needs beside registers.
#[repr(C, align(64))]
pub(crate) struct Sums {
    /// `[row half][column half][16][16]`, without the last block.
    sums: [i32; SIDE * SIDE],
    /// The terms of the last block, in the same order.
    terms: [f32; SIDE * SIDE],
    /// A row of output that nobody reads.
    unread: [i32; SIDE],
    /// Clamps of each lane.
    clamps: [i32; 16],
    b: *const u16,
    blocks: usize,
    row: usize,
    end: *const u8,
    limits: [i32; 2],
}

/// Products of a list, each finished while the next is made.
macro_rules! list {
    ($self:ident, $at:expr, $next:ident, $finish:ident) => {
        asm!(
            "tilezero tmm0",
            "tilezero tmm1",
            "tilezero tmm2",
            "tilezero tmm3",
            "vpbroadcastd zmm4, [{s} + {limits}]",
            "vpbroadcastd zmm5, [{s} + {limits} + 4]",
            "vpxord zmm6, zmm6, zmm6",
            "vpternlogd zmm7, zmm7, zmm7, 255",
            ".p2align 5",
            "2:",
            "mov {a}, [{list}]",
            "mov {near}, [{list} + 8]",
            "mov {b}, [{s} + {right}]",
            "mov {n}, [{s} + {blocks}]",
            "mov {step}, [{s} + {rows}]",
            "mov {left:e}, 4",
            whole_block!($finish),
            "mov {out}, [{list} + 8]",
            "mov {row}, [{s} + {rows}]",
            "dec {n}",
            "jz 4f",
            whole_block!(begin),
            "dec {n}",
            "jz 3f",
            ".p2align 5",
            "5:",
            whole_block!(flush),
            "dec {n}",
            "jnz 5b",
            "3:",
            "mov {out}, [{list} + 8]",
            "4:",
            "add {list}, {size}",
            "cmp {list}, [{s} + {end}]",
            "jne 2b",
            "tilestored [{s} + {stride}*1 + 4096], tmm0",
            "tilestored [{s} + {stride}*1 + 5120], tmm1",
            "tilestored [{s} + {stride}*1 + 6144], tmm2",
            "tilestored [{s} + {stride}*1 + 7168], tmm3",
            "vmovdqa64 [{s} + {clamps}], zmm6",
            s = in(reg) &raw mut *$self,
            list = inout(reg) $at => _,
            out = inout(reg) (&raw mut $self.unread) => _,
            row = inout(reg) 0_usize => _,
            next = inout(reg) $next => _,
            stride = in(reg) 64_usize,
            a = out(reg) _, b = out(reg) _, n = out(reg) _,
            near = out(reg) _, step = out(reg) _, left = out(reg) _,
            size = const size_of::<At>(),
            limits = const offset_of!(Self, limits),
            right = const offset_of!(Self, b),
            blocks = const offset_of!(Self, blocks),
            rows = const offset_of!(Self, row),
            end = const offset_of!(Self, end),
            clamps = const offset_of!(Self, clamps),
            out("zmm0") _, out("zmm1") _, out("zmm4") _, out("zmm5") _, out("zmm6") _,
            out("zmm7") _, out("k1") _,
            out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
            out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
            options(nostack),
        )
    };
}

impl Sums {
    /// Zeros.
    pub(crate) const fn new() -> Self {
        Self {
            sums: [0; SIDE * SIDE],
            terms: [0.0; SIDE * SIDE],
            unread: [0; SIDE],
            clamps: [0; 16],
            b: std::ptr::null(),
            blocks: 0,
            row: 0,
            end: std::ptr::null(),
            limits: [-LIM, LIM],
        }
    }

    /// The products of a list: the rounded terms of all blocks are summed, wrapping. All but the
    /// last are finished, each while the next is made; the last stays in `self`. Brings outputs
    /// near. Returns the number of clamps.
    ///
    /// # Safety
    /// As [`Self::run`]; the list is not empty, and all outputs but the last are 32 by 32.
    unsafe fn products(&mut self, p: &Products<'_>, list: &[At]) -> u64 {
        debug_assert!(p.blocks > 0 && !list.is_empty(), "a product without terms");
        // What the first product finishes, and what a single block is added to.
        self.sums.fill(0);
        (self.b, self.blocks, self.row) = (p.b, p.blocks, p.stride * 4);
        let (list, next) = (list.as_ptr_range(), p.next);
        self.end = list.end.cast();
        // SAFETY: reads the caller's digits, writes `self` and the outputs, and tells of all
        // registers it changes. No code but this assembly uses tiles.
        unsafe {
            if p.add {
                list!(self, list.start, next, add);
            } else {
                list!(self, list.start, next, store);
            }
        }
        self.clamps.iter().map(|&n| n as u64).sum()
    }

    /// 16 sums of row `r`.
    #[inline]
    #[target_feature(enable = "avx512f")]
    fn vector(&self, r: usize, half: usize) -> __m512i {
        let at = (r / 16 * 2 + half) * 256 + r % 16 * 16;
        let (sums, terms) = (&self.sums[at..at + 16], &self.terms[at..at + 16]);
        // SAFETY: 16 values each.
        unsafe {
            let terms = _mm512_cvtps_epi32(_mm512_load_ps(terms.as_ptr()));
            _mm512_add_epi32(_mm512_load_si512(sums.as_ptr().cast()), terms)
        }
    }

    /// `out = sat(a b)`, or `out = sat(out + sat(a b))`, for each of a list. Returns the number of
    /// clamps of the second.
    ///
    /// # Safety
    /// All operands have [`DIGITS`] digits a block; terms are below 2^31, and all outputs are the
    /// caller's alone.
    #[target_feature(enable = "avx512f")]
    pub(crate) unsafe fn run(&mut self, _unit: &Unit, p: &Products<'_>) -> u64 {
        let &Products { stride, width, add, .. } = p;
        let (high, low) = (_mm512_set1_epi32(LIM), _mm512_set1_epi32(-LIM));
        let saturate = |x| _mm512_min_epi32(_mm512_max_epi32(x, low), high);
        let mut count = 0;
        for (list, last) in pieces(p.list, width) {
            // SAFETY: the caller's promise.
            count += unsafe { self.products(p, list) };
            for (r, half) in (0..last.rows).flat_map(|r| [(r, 0), (r, 1)]) {
                let mask = mask(width, half);
                // SAFETY: the mask keeps inside the caller's rows.
                unsafe {
                    let to = last.out.wrapping_add(r * stride + half * 16);
                    let mut x = saturate(self.vector(r, half));
                    if add {
                        // Both are below 2^30: the sum cannot wrap.
                        let sum = _mm512_add_epi32(x, _mm512_maskz_loadu_epi32(mask, to));
                        x = saturate(sum);
                        count +=
                            u64::from(_mm512_mask_cmpneq_epi32_mask(mask, x, sum).count_ones());
                    }
                    _mm512_mask_storeu_epi32(to, mask, x);
                }
            }
        }
        count
    }
}

/// A list in pieces of which only the last output, given as well, is less than 32 by 32.
fn pieces(list: &[At], width: usize) -> impl Iterator<Item = (&[At], &At)> {
    let whole = move |u: &At| width == SIDE && u.rows == SIDE;
    list.split_inclusive(move |u| !whole(u)).filter_map(|list| Some((list, list.last()?)))
}

/// Which of 16 columns are among the first `width` of 32.
#[inline(always)]
fn mask(width: usize, half: usize) -> u16 {
    (((1_u64 << width) - 1) >> (16 * half)) as u16
}

/// 16 rows of 32 pairs as 32 rows of 16 pairs.
#[target_feature(enable = "avx512f")]
pub(crate) fn transpose(x: &[[u32; SIDE]; 16]) -> [[u32; 16]; SIDE] {
    let mut out = [[0; 16]; SIDE];
    for half in 0..2 {
        // SAFETY: 16 values of each row from 0 or 16.
        let m: [__m512i; 16] = std::array::from_fn(|i| unsafe {
            _mm512_loadu_si512(x[i].as_ptr().add(half * 16).cast())
        });
        // Quarters of 4x4: first inside them, then the quarters themselves.
        let mut t = m;
        for i in 0..8 {
            t[2 * i] = _mm512_unpacklo_epi32(m[2 * i], m[2 * i + 1]);
            t[2 * i + 1] = _mm512_unpackhi_epi32(m[2 * i], m[2 * i + 1]);
        }
        let mut u = t;
        for i in 0..4 {
            for j in 0..2 {
                u[4 * i + 2 * j] = _mm512_unpacklo_epi64(t[4 * i + j], t[4 * i + 2 + j]);
                u[4 * i + 2 * j + 1] = _mm512_unpackhi_epi64(t[4 * i + j], t[4 * i + 2 + j]);
            }
        }
        for j in 0..4 {
            let low = _mm512_shuffle_i32x4::<0x88>(u[j], u[4 + j]);
            let high = _mm512_shuffle_i32x4::<0xdd>(u[j], u[4 + j]);
            let low2 = _mm512_shuffle_i32x4::<0x88>(u[8 + j], u[12 + j]);
            let high2 = _mm512_shuffle_i32x4::<0xdd>(u[8 + j], u[12 + j]);
            let columns = [
                _mm512_shuffle_i32x4::<0x88>(low, low2),
                _mm512_shuffle_i32x4::<0x88>(high, high2),
                _mm512_shuffle_i32x4::<0xdd>(low, low2),
                _mm512_shuffle_i32x4::<0xdd>(high, high2),
            ];
            for (quarter, column) in columns.into_iter().enumerate() {
                let to = &mut out[half * 16 + quarter * 4 + j];
                // SAFETY: 16 values.
                unsafe { _mm512_storeu_si512(to.as_mut_ptr().cast(), column) };
            }
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn transposing_exchanges_rows_and_columns() {
        if !std::is_x86_feature_detected!("avx512f") {
            return;
        }
        let x: [[u32; SIDE]; 16] =
            std::array::from_fn(|i| std::array::from_fn(|j| (i * 100 + j) as u32));
        // SAFETY: the feature was found.
        let t = unsafe { transpose(&x) };
        for (j, row) in t.iter().enumerate() {
            for (i, &value) in row.iter().enumerate() {
                assert_eq!(value, x[i][j], "({i}, {j})");
            }
        }
    }
}
