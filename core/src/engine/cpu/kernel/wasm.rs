//! Vectors of WebAssembly SIMD.

use std::arch::wasm32::*;

use manyhands_shaders::x1::LIM;

use super::lanes::{Lanes, MAGIC};
use super::{Job, Kind, select};

/// 2^30: what a conversion is clamped to, so that it fits before the exact clamp.
const ROOM: f32 = 1_073_741_824.0;

/// 4 lanes.
struct Simd128;

impl Lanes for Simd128 {
    type V = v128;
    const WIDTH: usize = 4;
    const MAGIC: bool = true;

    #[inline(always)]
    unsafe fn splat(x: i32) -> v128 {
        i32x4_splat(x)
    }

    #[inline(always)]
    unsafe fn load(from: *const i32) -> v128 {
        // SAFETY: the caller's address covers the vector.
        unsafe { v128_load(from.cast()) }
    }

    #[inline(always)]
    unsafe fn store(to: *mut i32, x: v128) {
        // SAFETY: the caller's address covers the vector.
        unsafe { v128_store(to.cast(), x) }
    }

    #[inline(always)]
    unsafe fn add(a: v128, b: v128) -> v128 {
        i32x4_add(a, b)
    }

    #[inline(always)]
    unsafe fn saturate(x: v128) -> v128 {
        i32x4_min(i32x4_max(x, i32x4_splat(-LIM)), i32x4_splat(LIM))
    }

    #[inline(always)]
    unsafe fn dot(d: v128, x: v128, w: v128) -> v128 {
        i32x4_add(d, i32x4_dot_i16x8(x, w))
    }

    #[inline(always)]
    unsafe fn flush(d: v128, scale: v128) -> v128 {
        let t = f32x4_mul(f32x4_convert_i32x4(d), scale);
        i32x4_trunc_sat_f32x4(f32x4_nearest(t))
    }

    #[inline(always)]
    unsafe fn flush_magic(d: v128, scale: v128) -> v128 {
        f32x4_add(f32x4_mul(f32x4_convert_i32x4(d), scale), f32x4_splat(MAGIC))
    }

    #[inline(always)]
    unsafe fn flush_wide(d: v128, scale: v128) -> v128 {
        let t = f32x4_mul(f32x4_convert_i32x4(d), scale);
        let t = f32x4_pmin(f32x4_pmax(t, f32x4_splat(-ROOM)), f32x4_splat(ROOM));
        // SAFETY: no memory is accessed.
        unsafe { Self::saturate(i32x4_trunc_sat_f32x4(f32x4_nearest(t))) }
    }
}

/// # Safety
/// As [`super::run`].
pub(super) unsafe fn run(kind: Kind, rows: usize, job: &Job) -> u64 {
    // SAFETY: forwarded to the caller.
    unsafe { select::<Simd128>(kind, rows, job) }
}
