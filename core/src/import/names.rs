//! Finds the tensors of a Llama-like decoder under the names that GGUF and the hub give them.
//!
//! Everything that would change the function is refused by name: other architectures, scaled
//! rotary frequencies, tensors that the decoder has no place for, shapes that do not fit.

use std::collections::{BTreeMap, BTreeSet};

use super::dequantize::TensorView;
use super::gguf::{Gguf, Value};
use super::{ImportError, error, hf};
use crate::model::config::{CONTEXT_MAX, ModelConfig};
use crate::model::weights::{Shape, bias_matrix, shapes};

/// Architectures whose blocks are this decoder's.
const ARCHITECTURES: [&str; 3] = ["llama", "mistral", "qwen2"];

/// Whose names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Container {
    /// `blk.0.attn_q`.
    Gguf,
    /// `model.layers.0.self_attn.q_proj`.
    Hub,
}

/// The name of the tensor that [`shapes`] calls `name`.
pub(crate) fn tensor_name(shape: &Shape, container: Container) -> String {
    let ending = if shape.is_bias() { "bias" } else { "weight" };
    format!("{}.{ending}", foreign(&shape.name, container))
}

/// The same without `.weight` or `.bias`.
pub(crate) fn foreign(name: &str, container: Container) -> String {
    let mut parts = name.rsplit('.');
    let (own, layer) = (parts.next().unwrap_or_default(), parts.next().unwrap_or_default());
    let found = NAMES.iter().find(|n| n.0 == own);
    let pattern = found.map_or("", |n| if container == Container::Gguf { n.1 } else { n.2 });
    pattern.replace("{}", layer)
}

/// Our names, those of GGUF and those of the hub; `{}` is the layer.
const NAMES: [(&str, &str, &str); 15] = [
    ("embedding", "token_embd", "model.embed_tokens"),
    ("attention_norm", "blk.{}.attn_norm", "model.layers.{}.input_layernorm"),
    ("query", "blk.{}.attn_q", "model.layers.{}.self_attn.q_proj"),
    ("key", "blk.{}.attn_k", "model.layers.{}.self_attn.k_proj"),
    ("value", "blk.{}.attn_v", "model.layers.{}.self_attn.v_proj"),
    ("output", "blk.{}.attn_output", "model.layers.{}.self_attn.o_proj"),
    ("query_bias", "blk.{}.attn_q", "model.layers.{}.self_attn.q_proj"),
    ("key_bias", "blk.{}.attn_k", "model.layers.{}.self_attn.k_proj"),
    ("value_bias", "blk.{}.attn_v", "model.layers.{}.self_attn.v_proj"),
    ("ffn_norm", "blk.{}.ffn_norm", "model.layers.{}.post_attention_layernorm"),
    ("gate", "blk.{}.ffn_gate", "model.layers.{}.mlp.gate_proj"),
    ("up", "blk.{}.ffn_up", "model.layers.{}.mlp.up_proj"),
    ("down", "blk.{}.ffn_down", "model.layers.{}.mlp.down_proj"),
    ("final_norm", "output_norm", "model.norm"),
    ("head", "output", "lm_head"),
];

/// One tensor of the decoder, where it is.
#[derive(Clone, Debug)]
pub struct Found<'a> {
    /// Its place in the decoder.
    pub shape: Shape,
    /// Its name in the file.
    pub name: String,
    view: TensorView<'a>,
    /// Heads whose rows lie in pairs (0, D/2, 1, D/2 + 1, ...), as a llama's in GGUF; else 0.
    paired_heads: usize,
}

impl Found<'_> {
    /// (rows, cols) values, rotary halves one after the other.
    pub fn read(&self) -> Result<Vec<f32>, ImportError> {
        let mut values = self.view.read(&self.name)?;
        if self.paired_heads != 0 {
            let cols = values.len() / self.shape.rows;
            let rows = paired_rows(self.shape.rows, self.paired_heads);
            values = rows.flat_map(|row| &values[row * cols..][..cols]).copied().collect();
        }
        Ok(if self.shape.is_bias() { bias_matrix(&values) } else { values })
    }

    /// Number format in the file.
    pub fn encoding(&self) -> &'static str {
        self.view.encoding.name()
    }
}

/// A foreign model: its shape, and where its tensors are.
#[derive(Clone, Debug)]
pub struct Source<'a> {
    /// As the file names it.
    pub architecture: String,
    /// Shape of the decoder.
    pub config: ModelConfig,
    /// In the order of [`shapes`].
    pub tensors: Vec<Found<'a>>,
}

impl<'a> Source<'a> {
    /// Finds a model in a GGUF file.
    pub fn from_gguf(file: &Gguf<'a>) -> Result<Self, ImportError> {
        let architecture = file.text("general.architecture")?.to_string();
        check_architecture("general.architecture", &architecture)?;
        let key = |name: &str| format!("{architecture}.{name}");
        let size = |name: &str| file.size(&key(name));
        let optional = |name: &str, default: usize| match file.keys.contains_key(&*key(name)) {
            true => size(name),
            false => Ok(default),
        };
        let scaling = key("rope.scaling.type");
        if file.keys.get(&*scaling).is_some_and(|v| *v != Value::Text("none")) {
            return Err(error(scaling, "scaled rotary frequencies are not computed"));
        }
        let names: BTreeMap<String, TensorView<'a>> =
            file.tensors.iter().map(|(n, v)| (n.to_string(), v.clone())).collect();
        let Some(embedding) = names.get("token_embd.weight") else {
            return Err(error("token_embd.weight", "the tensor is missing"));
        };
        let (width, heads) = (size("embedding_length")?, size("attention.head_count")?);
        if heads == 0 {
            return Err(error(key("attention.head_count"), "there are no heads"));
        }
        let head_dim = optional("attention.key_length", width / heads)?;
        let rotated = optional("rope.dimension_count", head_dim)?;
        if rotated != head_dim || optional("attention.value_length", head_dim)? != head_dim {
            let problem = format!("{rotated} of {head_dim} channels; only whole heads are rotated");
            return Err(error(key("rope.dimension_count"), problem));
        }
        let config = ModelConfig {
            vocabulary: embedding.dims[0],
            layers: size("block_count")?,
            width,
            heads,
            kv_heads: optional("attention.head_count_kv", heads)?,
            head_dim,
            ffn: size("feed_forward_length")?,
            context: size("context_length")?.min(CONTEXT_MAX),
            rope_base: match file.keys.contains_key(&*key("rope.freq_base")) {
                true => shortest(file.float(&key("rope.freq_base"))?),
                false => 10_000.0,
            },
            rms_epsilon: shortest(file.float(&key("attention.layer_norm_rms_epsilon"))?),
            tied: !names.contains_key("output.weight"),
            bias: has_bias(&names, Container::Gguf),
            adapter: None,
        };
        config.validate().map_err(|e| error(format!("{architecture}: {}", e.key), e.problem))?;
        // GGUF's converter interleaves the rotary halves of a llama, and of nothing else here.
        let pairs = architecture == "llama";
        Self::find(architecture, config, names, Container::Gguf, pairs)
    }

    /// Finds a model in `config.json` and the tensors of its safetensors files.
    pub fn from_hf(
        json: &[u8],
        mut names: BTreeMap<String, TensorView<'a>>,
    ) -> Result<Self, ImportError> {
        let (architecture, mut config) = hf::config(json)?;
        config.bias = has_bias(&names, Container::Hub);
        check_architecture("config.json: model_type", &architecture)?;
        // Old exports keep the rotary frequencies; some keep a tied head twice.
        names.retain(|n, _| !n.ends_with("rotary_emb.inv_freq"));
        if config.tied {
            names.remove("lm_head.weight");
        }
        Self::find(architecture, config, names, Container::Hub, false)
    }

    fn find(
        architecture: String,
        config: ModelConfig,
        mut names: BTreeMap<String, TensorView<'a>>,
        container: Container,
        pairs: bool,
    ) -> Result<Self, ImportError> {
        let mut tensors = Vec::new();
        for shape in shapes(&config) {
            let name = tensor_name(&shape, container);
            let Some(view) = names.remove(&name) else {
                return Err(error(name, "the tensor is missing"));
            };
            let expected = match (shape.rows, shape.cols) {
                (1, size) => vec![size],
                (size, _) if shape.is_bias() => vec![size],
                (rows, cols) => vec![rows, cols],
            };
            if view.dims != expected {
                let problem = format!("its shape is {:?}, not {expected:?}", view.dims);
                return Err(error(name, problem));
            }
            let paired_heads = if pairs { rotated_heads(&shape.name, &config) } else { 0 };
            tensors.push(Found { shape, name, view, paired_heads });
        }
        if let Some(name) = names.keys().next() {
            let problem = "the decoder has no such tensor; it computes Llama, Mistral and Qwen2, of biases those of queries, keys and values";
            return Err(error(name, problem));
        }
        Ok(Self { architecture, config, tensors })
    }

    /// Number formats in the files, in the order of their names.
    pub fn encodings(&self) -> BTreeSet<&'static str> {
        self.tensors.iter().map(Found::encoding).collect()
    }
}

/// Whether the first layer's queries have a bias. If others have none, they will be missed.
fn has_bias(names: &BTreeMap<String, TensorView<'_>>, container: Container) -> bool {
    names.contains_key(&format!("{}.bias", foreign("layers.0.query", container)))
}

/// Heads in the rows of a matrix whose output is rotated, or of its bias; 0 for others.
pub(crate) fn rotated_heads(name: &str, config: &ModelConfig) -> usize {
    match name.rsplit('.').next() {
        Some("query" | "query_bias") => config.heads,
        Some("key" | "key_bias") => config.kv_heads,
        _ => 0,
    }
}

/// Where GGUF keeps each row of a llama's rotated matrix: halves one after the other in ours, in
/// pairs there.
pub(crate) fn paired_rows(rows: usize, heads: usize) -> impl Iterator<Item = usize> {
    let dim = rows / heads;
    (0..rows).map(move |r| r / dim * dim + r % dim % (dim / 2) * 2 + r % dim / (dim / 2))
}

fn check_architecture(key: &str, architecture: &str) -> Result<(), ImportError> {
    if ARCHITECTURES.contains(&architecture) {
        return Ok(());
    }
    let known = ARCHITECTURES.join(", ");
    Err(error(key, format!("{architecture:?} is not computed; {known} are")))
}

/// The shortest decimal that is the same single-precision number: 1e-5 rather than
/// 9.999999747378752e-6, as the hub writes it.
fn shortest(x: f64) -> f64 {
    (x as f32).to_string().parse().unwrap_or(x)
}
