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

/// Sums of 32 rows by 32 columns.
#[repr(C, align(64))]
pub(crate) struct Sums {
    /// `[row half][column half][16][16]`, without the last block.
    sums: [i32; SIDE * SIDE],
    /// The terms of the last block, in the same order.
    terms: [f32; SIDE * SIDE],
}

/// Rounds terms and adds them to the sums: vectors at these bytes.
macro_rules! flush {
    ($($at:literal)*) => {
        concat!($(
            "vcvtps2dq zmm0, [{terms} + ", $at, "]\n",
            "vpaddd zmm0, zmm0, [{sums} + ", $at, "]\n",
            "vmovdqa64 [{sums} + ", $at, "], zmm0\n",
        )*)
    };
}

/// Clears the sums: vectors at these bytes.
macro_rules! clear {
    ($($at:literal)*) => { concat!($("vmovdqa64 [{sums} + ", $at, "], zmm0\n",)*) };
}

/// One block with the same done to all vectors, in 12 portions.
macro_rules! whole_block {
    ($each:ident; $($store:literal)*) => {
        block!(
            $($store)*;
            $each!(0 64 128 192 256),
            $each!(320 384 448 512 576),
            $each!(640 704 768 832 896 960),
            $each!(1024 1088 1152 1216 1280),
            $each!(1344 1408 1472 1536 1600),
            $each!(1664 1728 1792 1856 1920 1984),
            $each!(2048 2112 2176 2240 2304),
            $each!(2368 2432 2496 2560 2624),
            $each!(2688 2752 2816 2880 2944 3008),
            $each!(3072 3136 3200 3264 3328),
            $each!(3392 3456 3520 3584 3648),
            $each!(3712 3776 3840 3904 3968 4032)
        )
    };
}

/// Brings a row of each half of the output near.
macro_rules! prefetch {
    () => {
        concat!(
            "prefetcht0 [{upper}]\n",
            "prefetcht0 [{upper} + 64]\n",
            "prefetcht0 [{lower}]\n",
            "prefetcht0 [{lower} + 64]\n",
            "add {upper}, {row}\n",
            "add {lower}, {row}\n",
        )
    };
}

/// One block: 4 tiles of sums from 2 by 2 halves, for all 4 pairs of digits. The tiles of the
/// block before are stored one by one as each is needed, and flushed between the products: the
/// unit never waits for them.
macro_rules! block {
    ($($store:literal)*; $($flush:expr),*) => { block!(@ [$($store)*] [$($flush),*]) };
    (@ [$s0:literal $s1:literal $s2:literal $s3:literal]
        [$f0:expr, $f1:expr, $f2:expr, $f3:expr, $f4:expr, $f5:expr,
         $f6:expr, $f7:expr, $f8:expr, $f9:expr, $f10:expr, $f11:expr]) => {
        concat!(
            $s0, "tilezero tmm0\n",
            "tileloadd tmm4, [{a} + {stride}*1]\n",
            "tileloadd tmm6, [{b} + {stride}*1]\n",
            "tdpbf16ps tmm0, tmm4, tmm6\n",
            $s1, "tilezero tmm1\n",
            "tileloadd tmm7, [{b} + {stride}*1 + 1024]\n",
            "tdpbf16ps tmm1, tmm4, tmm7\n",
            $s2, "tilezero tmm2\n",
            "tileloadd tmm5, [{a} + {stride}*1 + 1024]\n",
            "tdpbf16ps tmm2, tmm5, tmm6\n",
            $s3, "tilezero tmm3\n",
            "tdpbf16ps tmm3, tmm5, tmm7\n",
            "tileloadd tmm6, [{b} + {stride}*1 + 2048]\n",
            "tdpbf16ps tmm0, tmm4, tmm6\n", $f0,
            "tileloadd tmm7, [{b} + {stride}*1 + 3072]\n",
            "tdpbf16ps tmm1, tmm4, tmm7\n", $f1, prefetch!(),
            "tdpbf16ps tmm2, tmm5, tmm6\n", $f2,
            "tdpbf16ps tmm3, tmm5, tmm7\n", $f3,
            "tileloadd tmm4, [{a} + {stride}*1 + 2048]\n",
            "tdpbf16ps tmm0, tmm4, tmm6\n", $f4, prefetch!(),
            "tdpbf16ps tmm1, tmm4, tmm7\n", $f5,
            "tileloadd tmm5, [{a} + {stride}*1 + 3072]\n",
            "tdpbf16ps tmm2, tmm5, tmm6\n", $f6,
            "tdpbf16ps tmm3, tmm5, tmm7\n", $f7, prefetch!(),
            "tileloadd tmm6, [{b} + {stride}*1]\n",
            "tdpbf16ps tmm0, tmm4, tmm6\n", $f8,
            "tileloadd tmm7, [{b} + {stride}*1 + 1024]\n",
            "tdpbf16ps tmm1, tmm4, tmm7\n", $f9,
            "tdpbf16ps tmm2, tmm5, tmm6\n", $f10, prefetch!(),
            "tdpbf16ps tmm3, tmm5, tmm7\n", $f11,
            "add {a}, 4096\n",
            "add {b}, 4096\n",
            // Four blocks bring all rows; from then on the same addresses again.
            "dec {left}\n",
            "cmovz {row}, {zero}\n",
        )
    };
}

impl Sums {
    /// Zeros.
    pub(crate) const fn new() -> Self {
        Self { sums: [0; SIDE * SIDE], terms: [0.0; SIDE * SIDE] }
    }

    /// Sums the rounded products of `blocks` blocks of digits, wrapping. Brings the output near,
    /// whose rows are `row` bytes apart from `out`.
    ///
    /// # Safety
    /// `blocks > 0`, and `a` and `b` point to [`DIGITS`] digits for each. Terms are below 2^31.
    pub(crate) unsafe fn product(
        &mut self,
        _unit: &Unit,
        a: *const u16,
        b: *const u16,
        blocks: usize,
        out: *const u8,
        row: usize,
    ) {
        debug_assert!(blocks > 0, "a product without terms");
        // SAFETY: reads the caller's digits, writes `self`, and tells of all registers it changes.
        // No code but this assembly uses tiles.
        unsafe {
            asm!(
                "vpxord zmm0, zmm0, zmm0",
                whole_block!(clear; "" "" "" ""),
                "dec {blocks}",
                "jz 3f",
                ".p2align 5",
                "2:",
                whole_block!(
                    flush;
                    "tilestored [{terms} + {stride}*1], tmm0\n"
                    "tilestored [{terms} + {stride}*1 + 1024], tmm1\n"
                    "tilestored [{terms} + {stride}*1 + 2048], tmm2\n"
                    "tilestored [{terms} + {stride}*1 + 3072], tmm3\n"
                ),
                "dec {blocks}",
                "jnz 2b",
                "3:",
                "tilestored [{terms} + {stride}*1], tmm0",
                "tilestored [{terms} + {stride}*1 + 1024], tmm1",
                "tilestored [{terms} + {stride}*1 + 2048], tmm2",
                "tilestored [{terms} + {stride}*1 + 3072], tmm3",
                a = inout(reg) a => _,
                b = inout(reg) b => _,
                blocks = inout(reg) blocks => _,
                upper = inout(reg) out => _,
                lower = inout(reg) out.wrapping_add(SIDE / 2 * row) => _,
                row = inout(reg) row => _,
                left = inout(reg) 4_usize => _,
                zero = in(reg) 0_usize,
                terms = in(reg) self.terms.as_mut_ptr(),
                sums = in(reg) self.sums.as_mut_ptr(),
                stride = in(reg) 64_usize,
                out("zmm0") _,
                out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                options(nostack),
            );
        }
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

    /// `out = sat(sums)`, or with `add` `out = sat(out + sat(sums))`, over `rows` rows of `width`
    /// columns, `stride` apart. Returns the number of clamps of the second.
    ///
    /// # Safety
    /// `out` covers the rows, and nobody else accesses them now.
    #[target_feature(enable = "avx512f")]
    pub(crate) unsafe fn store(
        &self,
        out: *mut i32,
        stride: usize,
        rows: usize,
        width: usize,
        add: bool,
    ) -> u64 {
        let (high, low) = (_mm512_set1_epi32(LIM), _mm512_set1_epi32(-LIM));
        let saturate = |x| _mm512_min_epi32(_mm512_max_epi32(x, low), high);
        let mut count = 0;
        for r in 0..rows {
            for half in 0..2 {
                let mask = mask(width, half);
                // SAFETY: the mask keeps inside the caller's rows.
                unsafe {
                    let to = out.wrapping_add(r * stride + half * 16);
                    let mut x = saturate(self.vector(r, half));
                    if add {
                        // Both are below 2^30: the sum cannot wrap.
                        let sum = _mm512_add_epi32(x, _mm512_maskz_loadu_epi32(mask, to));
                        x = saturate(sum);
                        count += _mm512_mask_cmpneq_epi32_mask(mask, x, sum).count_ones();
                    }
                    _mm512_mask_storeu_epi32(to, mask, x);
                }
            }
        }
        count.into()
    }

    /// `out += sums`, over `rows` rows of `width` columns, `stride` apart.
    ///
    /// # Safety
    /// As [`Self::store`].
    #[target_feature(enable = "avx512f")]
    pub(crate) unsafe fn spill(&self, out: *mut i64, stride: usize, rows: usize, width: usize) {
        for r in 0..rows {
            for line in 2..4 {
                // What the product did not bring near, some rows ahead.
                let ahead = out.wrapping_add((r + 8) * stride + line * 8);
                _mm_prefetch::<_MM_HINT_T0>(ahead.cast());
            }
            for half in 0..2 {
                let (x, mask) = (self.vector(r, half), mask(width, half));
                let quarters = [_mm512_castsi512_si256(x), _mm512_extracti64x4_epi64::<1>(x)];
                for (i, x) in quarters.into_iter().enumerate() {
                    let mask = (mask >> (8 * i)) as u8;
                    // SAFETY: the mask keeps inside the caller's rows.
                    unsafe {
                        let to = out.wrapping_add(r * stride + half * 16 + i * 8);
                        let old = _mm512_maskz_loadu_epi64(mask, to);
                        let sum = _mm512_add_epi64(old, _mm512_cvtepi32_epi64(x));
                        _mm512_mask_storeu_epi64(to, mask, sum);
                    }
                }
            }
        }
    }
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
