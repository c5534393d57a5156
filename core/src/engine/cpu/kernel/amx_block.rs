//! Assembly of one block of [`super::amx`]: products on tiles, and what is done to the block before.
//!
//! Operands of the assembly: `s` a [`super::amx::Sums`], which begins with its sums and its terms;
//! `a` and `b` digits; `out` and `row` the output of the block before; `near`, `step` and `left`
//! the next output's rows to be brought near; `next` what is read afterwards. zmm4 and zmm5 are the
//! limits, zmm6 counts clamps, zmm7 is -1.

/// A vector of the sums (0) or of the terms (4096): its row and half.
macro_rules! at {
    ($base:literal $row:literal $half:literal) => {
        concat!("[{s} + ", $base, " + ", $row, " + ", $half, "]")
    };
}

/// Rounds the first terms: they are the sums.
macro_rules! begin {
    ($row:literal $half:literal $_to:literal) => {
        concat!(
            concat!("vcvtps2dq zmm0, ", at!(4096 $row $half), "\n"),
            concat!("vmovdqa64 ", at!(0 $row $half), ", zmm0\n"),
        )
    };
}

/// Rounds terms and adds the sums, to zmm0.
macro_rules! total {
    ($row:literal $half:literal) => {
        concat!(
            concat!("vcvtps2dq zmm0, ", at!(4096 $row $half), "\n"),
            concat!("vpaddd zmm0, zmm0, ", at!(0 $row $half), "\n"),
        )
    };
}

/// Rounds terms and adds them to the sums.
macro_rules! flush {
    ($row:literal $half:literal $_to:literal) => {
        concat!(total!($row $half), "vmovdqa64 ", at!(0 $row $half), ", zmm0\n")
    };
}

/// `out = sat(sums)`.
macro_rules! store {
    ($row:literal $half:literal $to:literal) => {
        concat!(
            total!($row $half),
            "vpmaxsd zmm0, zmm0, zmm4\n",
            "vpminsd zmm0, zmm0, zmm5\n",
            concat!("vmovdqu32 [{out} + ", $to, "], zmm0\n"),
        )
    };
}

/// `out = sat(out + sat(sums))`. The sum of two values within the limits cannot wrap.
macro_rules! add {
    ($row:literal $half:literal $to:literal) => {
        concat!(
            total!($row $half),
            "vpmaxsd zmm0, zmm0, zmm4\n",
            "vpminsd zmm0, zmm0, zmm5\n",
            concat!("vpaddd zmm0, zmm0, [{out} + ", $to, "]\n"),
            "vpmaxsd zmm1, zmm0, zmm4\n",
            "vpminsd zmm1, zmm1, zmm5\n",
            "vpcmpneqd k1, zmm0, zmm1\n",
            "vpsubd zmm6 {{k1}}, zmm6, zmm7\n",
            concat!("vmovdqu32 [{out} + ", $to, "], zmm1\n"),
        )
    };
}

/// Rows at these bytes, one after the other.
macro_rules! rows {
    ($each:ident $($at:literal)*) => {
        concat!($($each!($at 0 0), $each!($at 1024 64), "add {out}, {row}\n",)*)
    };
}

/// One block with the same done to all vectors of the block before, in 12 portions.
macro_rules! whole_block {
    ($each:ident) => {
        block!(
            rows!($each 0 64 128),
            rows!($each 192 256 320),
            rows!($each 384 448),
            rows!($each 512 576 640),
            rows!($each 704 768 832),
            rows!($each 896 960),
            rows!($each 2048 2112 2176),
            rows!($each 2240 2304 2368),
            rows!($each 2432 2496),
            rows!($each 2560 2624 2688),
            rows!($each 2752 2816 2880),
            rows!($each 2944 3008)
        )
    };
}

/// Brings two rows of the output near, and two lines of what comes next.
macro_rules! prefetch {
    () => {
        concat!(
            "prefetcht1 [{next}]\n",
            "prefetcht1 [{next} + 64]\n",
            "add {next}, 128\n",
            "prefetcht0 [{near}]\n",
            "prefetcht0 [{near} + 64]\n",
            "prefetcht0 [{near} + {step}]\n",
            "prefetcht0 [{near} + {step} + 64]\n",
            "lea {near}, [{near} + 2*{step}]\n",
        )
    };
}

/// One block: 4 tiles of sums from 2 by 2 halves, for all 4 pairs of digits. The tiles of the
/// block before are stored one by one as each is needed, and rounded between the products: the
/// unit never waits for them.
macro_rules! block {
    ($f0:expr, $f1:expr, $f2:expr, $f3:expr, $f4:expr, $f5:expr,
     $f6:expr, $f7:expr, $f8:expr, $f9:expr, $f10:expr, $f11:expr) => {
        concat!(
            "tilestored [{s} + {stride}*1 + 4096], tmm0\n",
            "tilezero tmm0\n",
            "tileloadd tmm4, [{a} + {stride}*1]\n",
            "tileloadd tmm6, [{b} + {stride}*1]\n",
            "tdpbf16ps tmm0, tmm4, tmm6\n",
            "tilestored [{s} + {stride}*1 + 5120], tmm1\n",
            "tilezero tmm1\n",
            "tileloadd tmm7, [{b} + {stride}*1 + 1024]\n",
            "tdpbf16ps tmm1, tmm4, tmm7\n",
            "tilestored [{s} + {stride}*1 + 6144], tmm2\n",
            "tilezero tmm2\n",
            "tileloadd tmm5, [{a} + {stride}*1 + 1024]\n",
            "tdpbf16ps tmm2, tmm5, tmm6\n",
            "tilestored [{s} + {stride}*1 + 7168], tmm3\n",
            "tilezero tmm3\n",
            "tdpbf16ps tmm3, tmm5, tmm7\n",
            "tileloadd tmm6, [{b} + {stride}*1 + 2048]\n",
            "tdpbf16ps tmm0, tmm4, tmm6\n",
            $f0,
            "tileloadd tmm7, [{b} + {stride}*1 + 3072]\n",
            "tdpbf16ps tmm1, tmm4, tmm7\n",
            $f1,
            prefetch!(),
            "tdpbf16ps tmm2, tmm5, tmm6\n",
            $f2,
            "tdpbf16ps tmm3, tmm5, tmm7\n",
            $f3,
            "tileloadd tmm4, [{a} + {stride}*1 + 2048]\n",
            "tdpbf16ps tmm0, tmm4, tmm6\n",
            $f4,
            prefetch!(),
            "tdpbf16ps tmm1, tmm4, tmm7\n",
            $f5,
            "tileloadd tmm5, [{a} + {stride}*1 + 3072]\n",
            "tdpbf16ps tmm2, tmm5, tmm6\n",
            $f6,
            "tdpbf16ps tmm3, tmm5, tmm7\n",
            $f7,
            prefetch!(),
            "tileloadd tmm6, [{b} + {stride}*1]\n",
            "tdpbf16ps tmm0, tmm4, tmm6\n",
            $f8,
            "tileloadd tmm7, [{b} + {stride}*1 + 1024]\n",
            "tdpbf16ps tmm1, tmm4, tmm7\n",
            $f9,
            "tdpbf16ps tmm2, tmm5, tmm6\n",
            $f10,
            prefetch!(),
            "tdpbf16ps tmm3, tmm5, tmm7\n",
            $f11,
            "add {a}, 4096\n",
            "add {b}, 4096\n",
            // Four blocks bring all rows; from then on the same addresses again.
            "dec {left}\n",
            "cmovz {step}, {left}\n",
        )
    };
}
