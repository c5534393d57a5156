//! Instruction paths: which SIMD instructions the CPU engine uses, found once at start.
//!
//! All paths give the same bits; they differ in speed only. [`simd!`] compiles one plain loop for
//! every path; the matrix product has kernels of its own in [`super::kernel`].

/// A set of instructions that the engine's kernels are compiled for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Path {
    /// As [`Self::Avx512Vnni`], with AMX's tile unit for large products.
    Avx512Amx,
    /// x86-64 with AVX-512 (F, BW, CD, DQ, VL) and VNNI: 512-bit pair products.
    Avx512Vnni,
    /// x86-64 with AVX2 and FMA: 256-bit pair products.
    Avx2,
    /// WebAssembly SIMD: 128-bit pair products.
    Simd128,
    /// Plain Rust, for every other machine.
    Portable,
}

impl Path {
    /// Every path, fastest first.
    const ALL: [Self; 5] =
        [Self::Avx512Amx, Self::Avx512Vnni, Self::Avx2, Self::Simd128, Self::Portable];

    /// Whether this machine has the instructions.
    pub fn is_available(self) -> bool {
        match self {
            #[cfg(target_arch = "x86_64")]
            Self::Avx512Amx => {
                Self::Avx512Vnni.is_available() && super::kernel::amx::is_available()
            }
            #[cfg(target_arch = "x86_64")]
            Self::Avx512Vnni => {
                use std::is_x86_feature_detected as has;
                has!("avx512f")
                    && has!("avx512bw")
                    && has!("avx512cd")
                    && has!("avx512dq")
                    && has!("avx512vl")
                    && has!("avx512vnni")
                    && Self::Avx2.is_available()
            }
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => {
                use std::is_x86_feature_detected as has;
                has!("avx2") && has!("fma") && has!("lzcnt") && has!("bmi1") && has!("bmi2")
            }
            Self::Simd128 => cfg!(all(target_arch = "wasm32", target_feature = "simd128")),
            Self::Portable => true,
            #[cfg(not(target_arch = "x86_64"))]
            _ => false,
        }
    }

    /// The paths of this machine, fastest first.
    pub fn available() -> Vec<Self> {
        Self::ALL.into_iter().filter(|p| p.is_available()).collect()
    }

    /// The fastest path of this machine.
    pub fn best() -> Self {
        Self::ALL.into_iter().find(|p| p.is_available()).unwrap_or(Self::Portable)
    }
}

impl std::fmt::Display for Path {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Avx512Amx => "avx512-amx",
            Self::Avx512Vnni => "avx512-vnni",
            Self::Avx2 => "avx2",
            Self::Simd128 => "wasm-simd128",
            Self::Portable => "portable",
        })
    }
}

/// Defines a function whose body is compiled once for every path: `f(path, args..)`.
///
/// The body is written as plain loops for LLVM to vectorise; integer arithmetic gives the same
/// bits whichever instructions it picks. Only paths that [`Path::is_available`] reach these
/// functions: [`super::Cpu`] checks at construction. In a body `FUSED` says whether the path has
/// fused multiplication and addition.
macro_rules! simd {
    ($(#[$meta:meta])* $vis:vis fn $name:ident($($arg:ident: $ty:ty),* $(,)?) $(-> $ret:ty)? $body:block) => {
        $(#[$meta])*
        #[cfg_attr(
            target_arch = "x86_64",
            expect(unsafe_code, reason = "calls of functions compiled for detected instructions")
        )]
        $vis fn $name(path: $crate::engine::cpu::Path, $($arg: $ty),*) $(-> $ret)? {
            #[inline(always)]
            fn body<const FUSED: bool>($($arg: $ty),*) $(-> $ret)? $body
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx512f,avx512bw,avx512cd,avx512dq,avx512vl,avx2,fma,lzcnt,bmi1,bmi2")]
            fn avx512($($arg: $ty),*) $(-> $ret)? { body::<true>($($arg),*) }
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2,fma,lzcnt,bmi1,bmi2")]
            fn avx2($($arg: $ty),*) $(-> $ret)? { body::<true>($($arg),*) }
            match path {
                #[cfg(target_arch = "x86_64")]
                // SAFETY: an engine holds a path only after `is_available`.
                $crate::engine::cpu::Path::Avx512Amx | $crate::engine::cpu::Path::Avx512Vnni => unsafe {
                    avx512($($arg),*)
                },
                #[cfg(target_arch = "x86_64")]
                // SAFETY: as above.
                $crate::engine::cpu::Path::Avx2 => unsafe { avx2($($arg),*) },
                _ => body::<false>($($arg),*),
            }
        }
    };
}
pub(crate) use simd;
