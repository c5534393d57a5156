//! Writes what the Hugging Face hub keeps: `config.json` and safetensors, and adapters as PEFT
//! keeps them.

use std::collections::HashMap;

use safetensors::tensor::{Dtype, TensorView};
use serde_json::{Value, json};

use super::numbers::{Numbers, Precision};
use super::{ExportError, File, Model, Tensor, architecture, split_factor};
use crate::import::dequantize::Encoding;
use crate::import::names::{Container, foreign, tensor_name};
use crate::model::adapter::{Adapter, Projection};
use crate::model::config::ModelConfig;
use crate::parallel;

/// `config.json` of a model whose texts begin and end with these tokens.
pub fn config(c: &ModelConfig, begin: Option<u32>, end: u32, precision: Precision) -> Value {
    json!({
        "architectures": [if c.bias { "Qwen2ForCausalLM" } else { "LlamaForCausalLM" }],
        "model_type": architecture(c),
        "vocab_size": c.vocabulary,
        "hidden_size": c.width,
        "intermediate_size": c.ffn,
        "num_hidden_layers": c.layers,
        "num_attention_heads": c.heads,
        "num_key_value_heads": c.kv_heads,
        "head_dim": c.head_dim,
        "max_position_embeddings": c.context,
        "rms_norm_eps": c.rms_epsilon,
        "rope_theta": c.rope_base,
        "hidden_act": "silu",
        "attention_bias": c.bias,
        "mlp_bias": false,
        "tie_word_embeddings": c.tied,
        "bos_token_id": begin,
        "eos_token_id": end,
        "torch_dtype": if precision == Precision::F16 { "float16" } else { "float32" },
    })
}

/// `model.safetensors`.
pub fn model(model: &Model, precision: Precision) -> Result<File, ExportError> {
    let name = |tensor: &Tensor| tensor_name(&tensor.shape, Container::Hub);
    file(&model.tensors, &name, precision)
}

/// `adapter_config.json` of an adapter to the model that `base` names.
pub fn adapter_config(adapter: &Adapter, base: &str, revision: Option<&str>) -> Value {
    let own = |target: &Projection| {
        let name = foreign(target.name(), Container::Hub);
        name.rsplit('.').next().unwrap_or_default().to_string()
    };
    json!({
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "revision": revision,
        "r": adapter.rank,
        "lora_alpha": adapter.alpha,
        "lora_dropout": 0.0,
        "target_modules": adapter.targets.iter().map(own).collect::<Vec<_>>(),
        "bias": "none",
        "fan_in_fan_out": false,
        "use_rslora": false,
        "use_dora": false,
        "inference_mode": true,
    })
}

/// `adapter_model.safetensors`, in single precision.
pub fn adapter(factors: &Model) -> Result<File, ExportError> {
    let name = |tensor: &Tensor| {
        let (matrix, factor) = split_factor(&tensor.shape.name);
        let matrix = foreign(matrix, Container::Hub);
        format!("base_model.model.{matrix}.lora_{}.weight", factor.to_uppercase())
    };
    file(&factors.tensors, &name, Precision::F32)
}

fn file(
    tensors: &[Tensor],
    name: &(impl Fn(&Tensor) -> String + Sync),
    precision: Precision,
) -> Result<File, ExportError> {
    let entry = |tensor: &Tensor| {
        let name = name(tensor);
        let numbers = Numbers::new(&name, &tensor.values, precision)?;
        let (rows, cols) = (tensor.shape.rows, tensor.shape.cols);
        Ok((name, if rows == 1 { vec![cols] } else { vec![rows, cols] }, numbers))
    };
    let entries = parallel::map(tensors.iter().collect(), entry);
    let entries = entries.into_iter().collect::<Result<Vec<_>, _>>()?;
    let views = entries.iter().map(|(name, dims, numbers)| {
        let dtype = if numbers.encoding == Encoding::F16 { Dtype::F16 } else { Dtype::F32 };
        let view = TensorView::new(dtype, dims.clone(), &numbers.bytes);
        (name, view.expect("the bytes have the stated shape"))
    });
    // `transformers` reads no file that does not say where it comes from.
    let metadata = HashMap::from([("format".to_string(), "pt".to_string())]);
    let bytes = safetensors::serialize(views, Some(metadata)).expect("names are unique");
    let rounded = entries.iter().map(|e| e.2.rounded).sum();
    Ok(File { bytes, tensors: entries.len(), rounded })
}
