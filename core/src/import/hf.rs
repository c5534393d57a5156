//! Reads a model as the Hugging Face hub keeps it: `config.json` and safetensors files.

use std::collections::BTreeMap;

use safetensors::SafeTensors;
use safetensors::tensor::Dtype;
use serde::Deserialize;
use serde_json::Value;

use super::dequantize::{Encoding, TensorView};
use super::{ImportError, error};
use crate::model::config::{CONTEXT_MAX, ModelConfig};

/// The file of shapes.
pub const CONFIG_FILE: &str = "config.json";

/// What `config.json` says of the Llama family; everything else in it plays no part.
#[derive(Debug, Deserialize)]
struct Config {
    model_type: String,
    vocab_size: usize,
    hidden_size: usize,
    intermediate_size: usize,
    num_hidden_layers: usize,
    num_attention_heads: usize,
    num_key_value_heads: Option<usize>,
    head_dim: Option<usize>,
    max_position_embeddings: usize,
    rms_norm_eps: f64,
    rope_theta: Option<f64>,
    rope_scaling: Option<Value>,
    rope_parameters: Option<Value>,
    hidden_act: Option<String>,
    #[serde(default)]
    tie_word_embeddings: bool,
    /// Positions that a token sees; Qwen2 states it without using it.
    sliding_window: Option<usize>,
    #[serde(default)]
    use_sliding_window: bool,
}

/// Architecture and shape that `config.json` states.
pub fn config(json: &[u8]) -> Result<(String, ModelConfig), ImportError> {
    let fail = |key: &str, problem: String| error(format!("{CONFIG_FILE}: {key}"), problem);
    let c: Config = serde_json::from_slice(json).map_err(|e| error(CONFIG_FILE, e.to_string()))?;
    if c.hidden_act.as_deref().is_some_and(|a| a != "silu") {
        return Err(fail("hidden_act", "only silu is computed".into()));
    }
    if c.use_sliding_window {
        return Err(fail("use_sliding_window", "sliding windows are not computed".into()));
    }
    for (key, value) in [("rope_scaling", &c.rope_scaling), ("rope_parameters", &c.rope_parameters)]
    {
        let kind = value.as_ref().and_then(|v| v.get("rope_type").or(v.get("type")));
        let plain =
            kind.is_none_or(|k| k == "default") && (key != "rope_scaling" || kind.is_some());
        if value.as_ref().is_some_and(|v| !v.is_null()) && !plain {
            return Err(fail(key, "scaled rotary frequencies are not computed".into()));
        }
    }
    // Within its window a Mistral is this decoder.
    let window = c.sliding_window.filter(|_| c.model_type == "mistral").unwrap_or(CONTEXT_MAX);
    let theta = c.rope_parameters.as_ref().and_then(|p| p.get("rope_theta")?.as_f64());
    let heads = c.num_attention_heads;
    let head_dim = match (c.head_dim, heads) {
        (Some(d), _) => d,
        (None, 0) => return Err(fail("num_attention_heads", "there are none".into())),
        (None, heads) => c.hidden_size / heads,
    };
    let config = ModelConfig {
        vocabulary: c.vocab_size,
        layers: c.num_hidden_layers,
        width: c.hidden_size,
        heads,
        kv_heads: c.num_key_value_heads.unwrap_or(heads),
        head_dim,
        ffn: c.intermediate_size,
        context: c.max_position_embeddings.min(CONTEXT_MAX).min(window),
        rope_base: c.rope_theta.or(theta).unwrap_or(10_000.0),
        rms_epsilon: c.rms_norm_eps,
        tied: c.tie_word_embeddings,
        // Whether there are any, the tensors say.
        bias: false,
        adapter: None,
    };
    config.validate().map_err(|e| fail(e.key, e.problem))?;
    Ok((c.model_type, config))
}

/// The tensors of all shards, each a file's name and bytes.
pub fn tensors(
    shards: &[(String, Vec<u8>)],
) -> Result<BTreeMap<String, TensorView<'_>>, ImportError> {
    let mut out = BTreeMap::new();
    for (file, bytes) in shards {
        let shard = SafeTensors::deserialize(bytes)
            .map_err(|e| error(file, format!("{e}; the file is damaged, copy it again")))?;
        for (name, view) in shard.iter() {
            let encoding = match view.dtype() {
                Dtype::F32 => Encoding::F32,
                Dtype::F16 => Encoding::F16,
                Dtype::BF16 => Encoding::Bf16,
                // Buffers such as masks may be of any type; a weight that is needed is missed.
                _ => continue,
            };
            let view = TensorView { encoding, dims: view.shape().to_vec(), bytes: view.data() };
            if out.insert(name.to_string(), view).is_some() {
                return Err(error(name, format!("the tensor is in {file} and in another file")));
            }
        }
    }
    Ok(out)
}
