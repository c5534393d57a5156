//! Finds the tensors of a Llama-like decoder under the names that GGUF and the hub give them.
//!
//! Everything that would change the function is refused by name: other architectures, scaled
//! rotary frequencies, tensors that the decoder has no place for, shapes that do not fit.

use std::collections::{BTreeMap, BTreeSet};

use super::dequantize::TensorView;
use super::gguf::{Gguf, Value};
use super::{ImportError, error, hf};
use crate::model::config::{CONTEXT_MAX, ModelConfig};
use crate::model::weights::{Shape, shapes};

/// Architectures whose blocks are this decoder's.
const ARCHITECTURES: [&str; 3] = ["llama", "mistral", "qwen2"];

/// Our names, those of GGUF and those of the hub; `{}` is the layer.
const NAMES: [(&str, &str, &str); 12] = [
    ("embedding", "token_embd", "model.embed_tokens"),
    ("attention_norm", "blk.{}.attn_norm", "model.layers.{}.input_layernorm"),
    ("query", "blk.{}.attn_q", "model.layers.{}.self_attn.q_proj"),
    ("key", "blk.{}.attn_k", "model.layers.{}.self_attn.k_proj"),
    ("value", "blk.{}.attn_v", "model.layers.{}.self_attn.v_proj"),
    ("output", "blk.{}.attn_output", "model.layers.{}.self_attn.o_proj"),
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
        let values = self.view.read(&self.name)?;
        if self.paired_heads == 0 {
            return Ok(values);
        }
        let cols = self.shape.cols;
        let dim = self.shape.rows / self.paired_heads;
        let mut out = Vec::with_capacity(values.len());
        for head in 0..self.paired_heads {
            for i in 0..dim {
                let row = head * dim + i % (dim / 2) * 2 + i / (dim / 2);
                out.extend_from_slice(&values[row * cols..][..cols]);
            }
        }
        Ok(out)
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
        };
        config.validate().map_err(|e| error(format!("{architecture}: {}", e.key), e.problem))?;
        // GGUF's converter interleaves the rotary halves of a llama, and of nothing else here.
        let pairs = architecture == "llama";
        Self::find(architecture, config, names, |n| n.1, pairs)
    }

    /// Finds a model in `config.json` and the tensors of its safetensors files.
    pub fn from_hf(
        json: &[u8],
        mut names: BTreeMap<String, TensorView<'a>>,
    ) -> Result<Self, ImportError> {
        let (architecture, config) = hf::config(json)?;
        check_architecture("config.json: model_type", &architecture)?;
        // Old exports keep the rotary frequencies; some keep a tied head twice.
        names.retain(|n, _| !n.ends_with("rotary_emb.inv_freq"));
        if config.tied {
            names.remove("lm_head.weight");
        }
        Self::find(architecture, config, names, |n| n.2, false)
    }

    fn find(
        architecture: String,
        config: ModelConfig,
        mut names: BTreeMap<String, TensorView<'a>>,
        column: fn(&(&'static str, &'static str, &'static str)) -> &'static str,
        pairs: bool,
    ) -> Result<Self, ImportError> {
        let mut tensors = Vec::new();
        for shape in shapes(&config) {
            let mut parts = shape.name.rsplit('.');
            let (own, layer) = (parts.next().unwrap_or_default(), parts.next().unwrap_or_default());
            let pattern = NAMES.iter().find(|n| n.0 == own).map_or("", column);
            let name = format!("{}.weight", pattern.replace("{}", layer));
            let Some(view) = names.remove(&name) else {
                return Err(error(name, "the tensor is missing"));
            };
            let expected =
                if shape.rows == 1 { vec![shape.cols] } else { vec![shape.rows, shape.cols] };
            if view.dims != expected {
                let problem = format!("its shape is {:?}, not {expected:?}", view.dims);
                return Err(error(name, problem));
            }
            let paired_heads = match own {
                "query" if pairs => config.heads,
                "key" if pairs => config.kv_heads,
                _ => 0,
            };
            tensors.push(Found { shape, name, view, paired_heads });
        }
        if let Some(name) = names.keys().next() {
            let problem = "the decoder has no such tensor; it computes Llama, Mistral and Qwen2 without biases";
            return Err(error(name, problem));
        }
        Ok(Self { architecture, config, tensors })
    }

    /// Number formats in the files, in the order of their names.
    pub fn encodings(&self) -> BTreeSet<&'static str> {
        self.tensors.iter().map(Found::encoding).collect()
    }
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
