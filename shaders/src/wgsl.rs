//! The kernel table: every WGSL entry point with its source, bindings and workgroup.
//!
//! A kernel's source is its family's file with the shared helpers appended; nothing is generated
//! or substituted, so an editor can check each file. Binding 0 is the uniform block of
//! [`UNIFORM_BYTES`]; a kernel's storage buffers are bound in the order of [`Kernel::bindings`].

/// Bytes of every kernel's uniform block; unused words are zero.
pub const UNIFORM_BYTES: usize = 64;
/// Rows that an invocation of the register-blocked products owns.
pub const BLOCKED_ROWS: u32 = 8;
/// Columns that an invocation of the register-blocked products owns.
pub const BLOCKED_COLS: u32 = 2;
/// Side of the tiled products' output tile.
pub const TILE: u32 = 64;
/// Rows of a chunk of `rmsnorm.backward_gain`.
pub const GAIN_ROWS: u32 = 64;
/// Words of a row of `logits.stats`.
pub const STATS_WORDS: usize = 8;
/// Words of `Row` in `shared/rows.wgsl`.
pub const ROW_WORDS: usize = 8;
/// Binding of the saturation counters.
pub const COUNTERS: u32 = 1;
/// Binding of the tables: [`crate::tables::EXP2`], then [`crate::tables::SIGMOID`].
pub const TABLES: u32 = 2;

/// A WGSL file with the shared helpers that it uses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Family {
    /// Name of the file, without its ending.
    pub name: &'static str,
    text: &'static str,
    shared: &'static [&'static str],
}

impl Family {
    /// The complete module.
    pub fn source(&self) -> String {
        [&[self.text], self.shared].concat().join("\n")
    }
}

const X1: &str = include_str!("../wgsl/shared/x1.wgsl");
const PAIRS: &str = include_str!("../wgsl/shared/pairs.wgsl");
const COUNT: &str = include_str!("../wgsl/shared/count.wgsl");
const LOOKUP: &str = include_str!("../wgsl/shared/tables.wgsl");
const QUANTIZE: &str = include_str!("../wgsl/shared/quantize.wgsl");
const MIXED: &str = include_str!("../wgsl/shared/quantize_mixed.wgsl");
const ROWS: &str = include_str!("../wgsl/shared/rows.wgsl");

/// Every family, in the order of [`KERNELS`].
pub const FAMILIES: [Family; 12] = [
    Family {
        name: "matmul",
        text: include_str!("../wgsl/matmul.wgsl"),
        shared: &[X1, PAIRS, COUNT],
    },
    Family {
        name: "matmul_tiled",
        text: include_str!("../wgsl/matmul_tiled.wgsl"),
        shared: &[X1, COUNT],
    },
    Family {
        name: "quantize",
        text: include_str!("../wgsl/quantize.wgsl"),
        shared: &[X1, QUANTIZE, MIXED],
    },
    Family {
        name: "rmsnorm",
        text: include_str!("../wgsl/rmsnorm.wgsl"),
        shared: &[X1, COUNT, QUANTIZE],
    },
    Family {
        name: "heads",
        text: include_str!("../wgsl/heads.wgsl"),
        shared: &[X1, COUNT, QUANTIZE, ROWS],
    },
    Family {
        name: "attention",
        text: include_str!("../wgsl/attention.wgsl"),
        shared: &[X1, PAIRS, COUNT, LOOKUP, QUANTIZE, MIXED, ROWS],
    },
    Family {
        name: "attention_backward",
        text: include_str!("../wgsl/attention_backward.wgsl"),
        shared: &[X1, PAIRS, COUNT, QUANTIZE, MIXED, ROWS],
    },
    Family {
        name: "swiglu",
        text: include_str!("../wgsl/swiglu.wgsl"),
        shared: &[X1, COUNT, LOOKUP, QUANTIZE],
    },
    Family {
        name: "embedding",
        text: include_str!("../wgsl/embedding.wgsl"),
        shared: &[X1, COUNT, QUANTIZE],
    },
    Family {
        name: "logits",
        text: include_str!("../wgsl/logits.wgsl"),
        shared: &[X1, COUNT, LOOKUP],
    },
    Family { name: "x1_probe", text: include_str!("../wgsl/x1_probe.wgsl"), shared: &[X1, LOOKUP] },
    Family { name: "bench_f32", text: include_str!("../wgsl/bench_f32.wgsl"), shared: &[] },
];

/// How a kernel's workgroup is set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Workgroup {
    /// By the override `LANES`: 1 to 256, 64 unless given.
    Lanes,
    /// Always this many invocations.
    Fixed(u32),
}

/// One entry point.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Kernel {
    /// Index of its family in [`FAMILIES`].
    pub family: usize,
    /// Name of the entry point.
    pub entry: &'static str,
    /// Size of the workgroup.
    pub workgroup: Workgroup,
    /// Storage bindings in the order of the caller's buffers, besides [`COUNTERS`] and [`TABLES`].
    pub bindings: &'static [u32],
    /// Whether it counts saturations.
    pub counts: bool,
    /// Whether it reads the tables.
    pub looks_up: bool,
}

impl Kernel {
    /// `family.entry`.
    pub fn name(&self) -> String {
        format!("{}.{}", FAMILIES[self.family].name, self.entry)
    }
}

/// Names of the kernels: indices into [`KERNELS`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[expect(missing_docs, reason = "each is an entry point that its WGSL file documents")]
pub enum Id {
    MatmulProduct,
    MatmulProductRow,
    MatmulWeightGradient,
    TiledProduct,
    TiledWeightGradient,
    QuantizeRows,
    QuantizeTokens,
    QuantizeTokensBlocks,
    QuantizeTranspose,
    RmsnormForward,
    RmsnormBackward,
    RmsnormBackwardGain,
    HeadsForward,
    HeadsInverse,
    AttentionProbabilities,
    AttentionForward,
    AttentionBackwardScores,
    AttentionBackwardByQuery,
    AttentionBackwardByKey,
    AttentionBackwardValueGradient,
    AttentionBackwardQueryGradient,
    AttentionBackwardKeyGradient,
    SwigluForward,
    SwigluBackward,
    EmbeddingForward,
    EmbeddingBackward,
    EmbeddingRows,
    LogitsStats,
    LogitsSeed,
    X1Probe,
    BenchF32,
}

impl Id {
    /// The kernel's row of the table.
    pub const fn kernel(self) -> &'static Kernel {
        &KERNELS[self as usize]
    }
}

const fn kernel(family: usize, entry: &'static str, bindings: &'static [u32]) -> Kernel {
    let (counts, looks_up) = (false, false);
    Kernel { family, entry, workgroup: Workgroup::Lanes, bindings, counts, looks_up }
}

const fn counting(k: Kernel) -> Kernel {
    Kernel { counts: true, ..k }
}

const fn looking_up(k: Kernel) -> Kernel {
    Kernel { looks_up: true, ..k }
}

const fn tiled(k: Kernel) -> Kernel {
    Kernel { workgroup: Workgroup::Fixed(256), ..k }
}

/// Every kernel, in the order of [`Id`].
pub const KERNELS: [Kernel; 31] = [
    counting(kernel(0, "product", &[3, 4, 5, 6, 7])),
    counting(kernel(0, "product_row", &[3, 4, 5, 6, 7])),
    counting(kernel(0, "weight_gradient", &[3, 4, 5, 6, 7, 8, 9])),
    tiled(counting(kernel(1, "product", &[3, 4, 5, 6, 7]))),
    tiled(counting(kernel(1, "weight_gradient", &[3, 4, 5, 6, 7, 8, 9]))),
    kernel(2, "rows", &[3, 6, 7]),
    kernel(2, "tokens", &[3, 5, 6, 7]),
    kernel(2, "tokens_blocks", &[3, 4, 5, 6, 7]),
    kernel(2, "transpose", &[3, 6]),
    counting(kernel(3, "forward", &[3, 4, 5, 6, 7, 8])),
    counting(kernel(3, "backward", &[3, 4, 5, 6, 7])),
    counting(kernel(3, "backward_gain", &[3, 5, 7, 8])),
    counting(kernel(4, "forward", &[3, 4, 5, 6, 7])),
    counting(kernel(4, "inverse", &[3, 4, 5])),
    looking_up(counting(kernel(5, "probabilities", &[3, 4, 5, 6, 7, 8]))),
    counting(kernel(5, "forward", &[3, 4, 5, 7, 8])),
    counting(kernel(6, "scores", &[3, 4, 5, 6, 7, 8, 9])),
    kernel(6, "by_query", &[3, 4, 7, 8, 9]),
    kernel(6, "by_key", &[3, 4, 7, 8, 9]),
    counting(kernel(6, "value_gradient", &[3, 4, 5, 6, 7, 9])),
    counting(kernel(6, "query_gradient", &[3, 4, 5, 6, 9])),
    counting(kernel(6, "key_gradient", &[3, 4, 5, 6, 9])),
    looking_up(counting(kernel(7, "forward", &[3, 4, 5, 6]))),
    looking_up(counting(kernel(7, "backward", &[3, 4, 5, 6, 7]))),
    counting(kernel(8, "forward", &[3, 4, 5, 6])),
    kernel(8, "backward", &[3, 4, 5, 6]),
    kernel(8, "rows", &[3, 4, 6]),
    looking_up(kernel(9, "stats", &[3, 4, 5])),
    looking_up(counting(kernel(9, "seed", &[3, 4, 5, 6]))),
    looking_up(kernel(10, "main", &[3, 4])),
    kernel(11, "product", &[3, 4, 5]),
];
