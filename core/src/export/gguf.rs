//! Writes GGUF 3: what llama.cpp and its kin run.

use super::numbers::{Numbers, Precision};
use super::{ExportError, File, Model, Tensor, architecture, split_factor};
use crate::import::dequantize::Encoding;
use crate::import::names::{Container, foreign, paired_rows, rotated_heads, tensor_name};
use crate::model::adapter::Adapter;
use crate::model::config::ModelConfig;
use crate::parallel;

/// Bytes of whose multiples tensors begin at.
const ALIGNMENT: usize = 32;

/// A value under a key.
#[derive(Clone, Debug, PartialEq)]
pub enum Value {
    /// An unsigned integer of 32 bits.
    U32(u32),
    /// Single precision.
    F32(f32),
    /// A truth value.
    Bool(bool),
    /// UTF-8.
    Text(String),
    /// Texts.
    Texts(Vec<String>),
    /// Integers of 32 bits.
    Integers(Vec<i32>),
}

/// Keys and their values, in the order of the file.
pub type Keys = Vec<(String, Value)>;

/// A key and a text.
pub fn text(key: &str, text: impl Into<String>) -> (String, Value) {
    (key.into(), Value::Text(text.into()))
}

/// A tensor as the file has it.
struct Entry {
    name: String,
    /// Dimensions, the contiguous one first.
    dims: Vec<usize>,
    numbers: Numbers,
}

/// A whole model; `about` are the keys on its name, licence and tokenizer. Gains are in single
/// precision, as llama.cpp wants them; `precision` is that of the matrices.
pub fn model(model: &Model, about: Keys, precision: Precision) -> Result<File, ExportError> {
    let entry = |tensor: &Tensor| {
        let name = tensor_name(&tensor.shape, Container::Gguf);
        let heads = paired_heads(&tensor.shape.name, &model.config);
        entry(name, tensor, heads, precision)
    };
    let entries = parallel::map(model.tensors.iter().collect(), entry);
    let entries = entries.into_iter().collect::<Result<Vec<_>, _>>()?;
    let halves = entries.iter().any(|e| e.numbers.encoding == Encoding::F16);
    let mut keys = vec![
        text("general.architecture", architecture(&model.config)),
        text("general.type", "model"),
        // LLAMA_FTYPE_ALL_F32 or LLAMA_FTYPE_MOSTLY_F16.
        ("general.file_type".into(), Value::U32(halves.into())),
    ];
    keys.extend(shape_keys(&model.config));
    keys.extend(about);
    Ok(file(&keys, &entries))
}

/// An adapter's factors, as llama.cpp loads them beside the original model. They stay in single
/// precision.
pub fn adapter(factors: &Model, adapter: &Adapter) -> Result<File, ExportError> {
    let entry = |tensor: &Tensor| {
        let (matrix, factor) = split_factor(&tensor.shape.name);
        let name = format!("{}.weight.lora_{factor}", foreign(matrix, Container::Gguf));
        let heads = if factor == "b" { paired_heads(matrix, &factors.config) } else { 0 };
        entry(name, tensor, heads, Precision::F32)
    };
    let entries = factors.tensors.iter().map(entry).collect::<Result<Vec<_>, _>>()?;
    let keys = [
        text("general.architecture", architecture(&factors.config)),
        text("general.type", "adapter"),
        text("adapter.type", "lora"),
        ("adapter.lora.alpha".into(), Value::F32(adapter.alpha as f32)),
    ];
    Ok(file(&keys, &entries))
}

/// Heads whose rows GGUF keeps in pairs: those of a llama that are rotated; 0 for others.
fn paired_heads(name: &str, config: &ModelConfig) -> usize {
    if architecture(config) == "llama" { rotated_heads(name, config) } else { 0 }
}

/// `heads` of rows are brought from halves to pairs, unless it is 0.
fn entry(
    name: String,
    tensor: &Tensor,
    heads: usize,
    precision: Precision,
) -> Result<Entry, ExportError> {
    let (rows, cols) = (tensor.shape.rows, tensor.shape.cols);
    let (dims, precision) =
        if rows == 1 { (vec![cols], Precision::F32) } else { (vec![cols, rows], precision) };
    let numbers = if heads == 0 {
        Numbers::new(&name, &tensor.values, precision)?
    } else {
        let mut paired = vec![0.0; tensor.values.len()];
        for (from, to) in tensor.values.chunks(cols).zip(paired_rows(rows, heads)) {
            paired[to * cols..][..cols].copy_from_slice(from);
        }
        Numbers::new(&name, &paired, precision)?
    };
    Ok(Entry { name, dims, numbers })
}

fn shape_keys(c: &ModelConfig) -> Keys {
    let sizes = [
        ("vocab_size", c.vocabulary),
        ("context_length", c.context),
        ("embedding_length", c.width),
        ("block_count", c.layers),
        ("feed_forward_length", c.ffn),
        ("attention.head_count", c.heads),
        ("attention.head_count_kv", c.kv_heads),
        ("attention.key_length", c.head_dim),
        ("attention.value_length", c.head_dim),
        ("rope.dimension_count", c.head_dim),
    ];
    let floats =
        [("attention.layer_norm_rms_epsilon", c.rms_epsilon), ("rope.freq_base", c.rope_base)];
    let sizes = sizes.map(|(key, size)| (key, Value::U32(size as u32)));
    let floats = floats.map(|(key, x)| (key, Value::F32(x as f32)));
    let all = sizes.into_iter().chain(floats);
    let architecture = architecture(c);
    all.map(|(key, value)| (format!("{architecture}.{key}"), value)).collect()
}

/// Header, keys, table of tensors, and their bytes.
fn file(keys: &[(String, Value)], entries: &[Entry]) -> File {
    let mut out = b"GGUF".to_vec();
    out.extend(3_u32.to_le_bytes());
    push_size(&mut out, entries.len());
    push_size(&mut out, keys.len());
    for (key, value) in keys {
        push_text(&mut out, key);
        push_value(&mut out, value);
    }
    let mut offset = 0;
    for e in entries {
        push_text(&mut out, &e.name);
        out.extend((e.dims.len() as u32).to_le_bytes());
        e.dims.iter().for_each(|d| push_size(&mut out, *d));
        out.extend(e.numbers.encoding.ggml().to_le_bytes());
        push_size(&mut out, offset);
        offset += e.numbers.bytes.len().next_multiple_of(ALIGNMENT);
    }
    for e in entries {
        out.resize(out.len().next_multiple_of(ALIGNMENT), 0);
        out.extend(&e.numbers.bytes);
    }
    // The last tensor is padded too: some readers map whole blocks.
    out.resize(out.len().next_multiple_of(ALIGNMENT), 0);
    let rounded = entries.iter().map(|e| e.numbers.rounded).sum();
    File { bytes: out, tensors: entries.len(), rounded }
}

fn push_size(out: &mut Vec<u8>, size: usize) {
    out.extend((size as u64).to_le_bytes());
}

fn push_text(out: &mut Vec<u8>, text: &str) {
    push_size(out, text.len());
    out.extend(text.as_bytes());
}

fn push_value(out: &mut Vec<u8>, value: &Value) {
    let mut kind = |number: u32| out.extend(number.to_le_bytes());
    match value {
        Value::U32(n) => {
            kind(4);
            out.extend(n.to_le_bytes());
        }
        Value::F32(x) => {
            kind(6);
            out.extend(x.to_le_bytes());
        }
        Value::Bool(b) => {
            kind(7);
            out.push((*b).into());
        }
        Value::Text(text) => {
            kind(8);
            push_text(out, text);
        }
        Value::Texts(texts) => {
            kind(9);
            kind(8);
            push_size(out, texts.len());
            texts.iter().for_each(|text| push_text(out, text));
        }
        Value::Integers(integers) => {
            kind(9);
            kind(5);
            push_size(out, integers.len());
            integers.iter().for_each(|n| out.extend(n.to_le_bytes()));
        }
    }
}
