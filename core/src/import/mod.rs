//! Open weights into the exact formats: from the bytes of other people's files to [`Weights`].
//!
//! Pure like all of this crate, so that the fuzz targets and a tab can read the same files.
//! [`gguf`] and [`hf`] read containers, [`dequantize`] their number formats, [`names`] finds a
//! Llama's tensors among them, [`exact`] is the one rule by which they are rounded. [`mod@reference`]
//! runs the original in f32 and [`compare`] measures what the rounding cost; these two are reports
//! on one machine, and nothing that is hashed depends on them.
//!
//! [`Weights`]: crate::model::weights::Weights

pub mod compare;
pub mod dequantize;
pub mod exact;
pub mod gguf;
pub mod hf;
pub mod names;
pub mod reference;

/// Foreign weights that cannot be used: which key or tensor, and what would do.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{subject}: {problem}")]
pub struct ImportError {
    /// The key, tensor or part of the file.
    pub subject: String,
    /// What is wrong, and what to do about it.
    pub problem: String,
}

/// The error for `subject`.
fn error(subject: impl Into<String>, problem: impl Into<String>) -> ImportError {
    ImportError { subject: subject.into(), problem: problem.into() }
}
