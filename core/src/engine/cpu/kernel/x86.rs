//! Vectors of AVX-512 with VNNI and of AVX2.
//!
//! The rounding mode of conversions is the default, nearest even: Rust never changes it.

use std::arch::asm;
use std::arch::x86_64::*;

use manyhands_shaders::x1::LIM;

use super::lanes::{Lanes, MAGIC};
use super::{Job, Kind, select};

/// 2^30: what a conversion is clamped to, so that it fits before the exact clamp.
const ROOM: f32 = 1_073_741_824.0;

/// 16 lanes.
struct Avx512;

impl Lanes for Avx512 {
    type V = __m512i;
    const WIDTH: usize = 16;
    const MAGIC: bool = true;

    #[inline(always)]
    unsafe fn splat(x: i32) -> __m512i {
        // SAFETY: compiled into functions with AVX-512 only; so are all below.
        unsafe { _mm512_set1_epi32(x) }
    }

    #[inline(always)]
    unsafe fn load(from: *const i32) -> __m512i {
        // SAFETY: the caller's address covers the vector.
        unsafe { _mm512_loadu_si512(from.cast()) }
    }

    #[inline(always)]
    unsafe fn store(to: *mut i32, x: __m512i) {
        // SAFETY: the caller's address covers the vector.
        unsafe { _mm512_storeu_si512(to.cast(), x) }
    }

    #[inline(always)]
    unsafe fn add(a: __m512i, b: __m512i) -> __m512i {
        // SAFETY: see `splat`.
        unsafe { _mm512_add_epi32(a, b) }
    }

    #[inline(always)]
    unsafe fn saturate(x: __m512i) -> __m512i {
        // SAFETY: see `splat`.
        unsafe {
            let high = _mm512_set1_epi32(LIM);
            _mm512_min_epi32(_mm512_max_epi32(x, _mm512_set1_epi32(-LIM)), high)
        }
    }

    #[inline(always)]
    unsafe fn dot(d: __m512i, x: __m512i, w: __m512i) -> __m512i {
        // SAFETY: see `splat`.
        unsafe { vpdpwssd(d, x, w) }
    }

    #[inline(always)]
    unsafe fn flush(d: __m512i, scale: __m512i) -> __m512i {
        // SAFETY: see `splat`.
        unsafe {
            _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_cvtepi32_ps(d), _mm512_castsi512_ps(scale)))
        }
    }

    #[inline(always)]
    unsafe fn flush_magic(d: __m512i, scale: __m512i) -> __m512i {
        // SAFETY: see `splat`.
        unsafe {
            let (t, scale) = (_mm512_cvtepi32_ps(d), _mm512_castsi512_ps(scale));
            _mm512_castps_si512(_mm512_fmadd_ps(t, scale, _mm512_set1_ps(MAGIC)))
        }
    }

    #[inline(always)]
    unsafe fn flush_wide(d: __m512i, scale: __m512i) -> __m512i {
        // SAFETY: see `splat`.
        unsafe {
            let t = _mm512_mul_ps(_mm512_cvtepi32_ps(d), _mm512_castsi512_ps(scale));
            let t = _mm512_min_ps(_mm512_max_ps(t, _mm512_set1_ps(-ROOM)), _mm512_set1_ps(ROOM));
            Self::saturate(_mm512_cvtps_epi32(t))
        }
    }
}

/// The pair product, in assembly: LLVM rewrites chains of the intrinsic to vpmaddwd and vpaddd,
/// which is slower.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512cd,avx512dq,avx512vl,avx512vnni,avx2,fma")]
fn vpdpwssd(mut d: __m512i, x: __m512i, w: __m512i) -> __m512i {
    // SAFETY: one instruction on registers, of a target feature of this function.
    unsafe {
        asm!(
            "vpdpwssd {d}, {x}, {w}",
            d = inout(zmm_reg) d,
            x = in(zmm_reg) x,
            w = in(zmm_reg) w,
            options(pure, nomem, nostack, preserves_flags)
        );
    }
    d
}

/// 8 lanes.
struct Avx2;

impl Lanes for Avx2 {
    type V = __m256i;
    const WIDTH: usize = 8;
    const MAGIC: bool = false;

    #[inline(always)]
    unsafe fn splat(x: i32) -> __m256i {
        // SAFETY: compiled into functions with AVX2 only; so are all below.
        unsafe { _mm256_set1_epi32(x) }
    }

    #[inline(always)]
    unsafe fn load(from: *const i32) -> __m256i {
        // SAFETY: the caller's address covers the vector.
        unsafe { _mm256_loadu_si256(from.cast()) }
    }

    #[inline(always)]
    unsafe fn store(to: *mut i32, x: __m256i) {
        // SAFETY: the caller's address covers the vector.
        unsafe { _mm256_storeu_si256(to.cast(), x) }
    }

    #[inline(always)]
    unsafe fn add(a: __m256i, b: __m256i) -> __m256i {
        // SAFETY: see `splat`.
        unsafe { _mm256_add_epi32(a, b) }
    }

    #[inline(always)]
    unsafe fn saturate(x: __m256i) -> __m256i {
        // SAFETY: see `splat`.
        unsafe {
            let high = _mm256_set1_epi32(LIM);
            _mm256_min_epi32(_mm256_max_epi32(x, _mm256_set1_epi32(-LIM)), high)
        }
    }

    #[inline(always)]
    unsafe fn dot(d: __m256i, x: __m256i, w: __m256i) -> __m256i {
        // SAFETY: see `splat`.
        unsafe { _mm256_add_epi32(d, _mm256_madd_epi16(x, w)) }
    }

    #[inline(always)]
    unsafe fn flush(d: __m256i, scale: __m256i) -> __m256i {
        // SAFETY: see `splat`.
        unsafe {
            _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_cvtepi32_ps(d), _mm256_castsi256_ps(scale)))
        }
    }

    #[inline(always)]
    unsafe fn flush_magic(d: __m256i, scale: __m256i) -> __m256i {
        // SAFETY: see `splat`.
        unsafe {
            let (t, scale) = (_mm256_cvtepi32_ps(d), _mm256_castsi256_ps(scale));
            _mm256_castps_si256(_mm256_fmadd_ps(t, scale, _mm256_set1_ps(MAGIC)))
        }
    }

    #[inline(always)]
    unsafe fn flush_wide(d: __m256i, scale: __m256i) -> __m256i {
        // SAFETY: see `splat`.
        unsafe {
            let t = _mm256_mul_ps(_mm256_cvtepi32_ps(d), _mm256_castsi256_ps(scale));
            let t = _mm256_min_ps(_mm256_max_ps(t, _mm256_set1_ps(-ROOM)), _mm256_set1_ps(ROOM));
            Self::saturate(_mm256_cvtps_epi32(t))
        }
    }
}

/// # Safety
/// As [`super::run`].
#[target_feature(enable = "avx512f,avx512bw,avx512cd,avx512dq,avx512vl,avx512vnni,avx2,fma")]
pub(super) unsafe fn run_avx512(kind: Kind, rows: usize, job: &Job) -> u64 {
    // SAFETY: forwarded to the caller.
    unsafe { select::<Avx512>(kind, rows, job) }
}

/// # Safety
/// As [`super::run`].
#[target_feature(enable = "avx2,fma")]
pub(super) unsafe fn run_avx2(kind: Kind, rows: usize, job: &Job) -> u64 {
    // SAFETY: forwarded to the caller.
    unsafe { select::<Avx2>(kind, rows, job) }
}
