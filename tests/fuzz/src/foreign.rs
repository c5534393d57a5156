//! Weights that other programs wrote: containers, number formats, names, rounding.

use manyhands_core::checkpoint::{decode_weights, encode_weights};
use manyhands_core::import::dequantize::Encoding;
use manyhands_core::import::exact::{Shifts, quantize};
use manyhands_core::import::gguf::Gguf;
use manyhands_core::import::hf;
use manyhands_core::import::names::Source;
use manyhands_core::model::config::ModelConfig;
use manyhands_core::model::weights::shapes;
use serde_json::json;

/// Rows are whole blocks of the small formats.
const WIDTH: usize = 32;

pub fn gguf(bytes: &[u8]) -> bool {
    let Ok(file) = Gguf::parse(bytes) else { return false };
    for view in file.tensors.values() {
        assert_eq!(view.encoding.bytes(&view.dims), Some(view.bytes.len()));
    }
    Source::from_gguf(&file).is_ok_and(|source| rounds(&source))
}

/// Two bytes of length, `config.json`, then a file of tensors.
pub fn hub(bytes: &[u8]) -> bool {
    let Some((length, bytes)) = bytes.split_first_chunk() else { return false };
    let Some((config, shard)) = bytes.split_at_checked(u16::from_le_bytes(*length).into()) else {
        return false;
    };
    let shards = [("shard".to_string(), shard.to_vec())];
    let Ok(tensors) = hf::tensors(&shards) else { return false };
    Source::from_hf(config, tensors).is_ok_and(|source| rounds(&source))
}

/// Whatever is found becomes weights that this program reads again, or is refused.
fn rounds(source: &Source<'_>) -> bool {
    for found in &source.tensors {
        let Ok(values) = found.read() else { return false };
        assert_eq!(values.len(), found.shape.rows * found.shape.cols);
    }
    let Ok(shifts) = Shifts::choose(source, 20_000.0) else { return false };
    let Ok(weights) = quantize(source, &shifts) else { return false };
    let again = decode_weights(&encode_weights(&weights)).expect("what was rounded is in range");
    assert_eq!(again.hash(), weights.hash());
    true
}

fn model(tied: bool) -> ModelConfig {
    ModelConfig {
        vocabulary: 34,
        layers: 1,
        width: WIDTH,
        heads: 2,
        kv_heads: 1,
        head_dim: 16,
        ffn: WIDTH,
        context: 16,
        tied,
        bias: false,
        adapter: None,
        ..ModelConfig::preset("nano", 34, 16).expect("a preset")
    }
}

/// Blocks with small scales: halves of about 0.01 wherever a scale may lie, drawn bytes elsewhere.
fn blocks(encoding: Encoding, count: usize) -> Vec<u8> {
    let (numbers, size) = encoding.block();
    let mut out: Vec<u8> = (0..count / numbers * size).map(|i| (i * 37 % 251) as u8).collect();
    for block in out.chunks_exact_mut(size) {
        match encoding {
            Encoding::F32 => block.copy_from_slice(&0.25_f32.to_le_bytes()),
            _ => block[..2].copy_from_slice(&0x2100_u16.to_le_bytes()),
        }
        if matches!(encoding, Encoding::Q4_1 | Encoding::Q5_1) {
            block[2..4].copy_from_slice(&0x9e00_u16.to_le_bytes());
        }
    }
    out
}

pub fn gguf_seeds() -> Vec<Vec<u8>> {
    use Encoding::{Bf16, F16, F32, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0};
    [[F32, F16], [Bf16, Q8_0], [Q4_0, Q4_1], [Q5_0, Q5_1]].map(|pair| gguf_seed(pair)).to_vec()
}

fn gguf_seed(encodings: [Encoding; 2]) -> Vec<u8> {
    let numbers = [(Encoding::F32, 0_u32), (Encoding::F16, 1), (Encoding::Bf16, 30)];
    let more = [(Encoding::Q8_0, 8), (Encoding::Q4_0, 2), (Encoding::Q4_1, 3)];
    let numbers: Vec<_> =
        [&numbers[..], &more, &[(Encoding::Q5_0, 6), (Encoding::Q5_1, 7)]].concat();
    let config = model(encodings[0] == Encoding::F32);
    let text = |out: &mut Vec<u8>, text: &str| {
        out.extend((text.len() as u64).to_le_bytes());
        out.extend(text.as_bytes());
    };
    let sizes = [
        ("context_length", config.context),
        ("embedding_length", config.width),
        ("block_count", config.layers),
        ("feed_forward_length", config.ffn),
        ("attention.head_count", config.heads),
        ("attention.head_count_kv", config.kv_heads),
    ];
    let names = ["attn_norm", "attn_q", "attn_k", "attn_v", "attn_output"];
    let names = [&names[..], &["ffn_norm", "ffn_gate", "ffn_up", "ffn_down"]].concat();
    let mut names: Vec<String> = names.iter().map(|n| format!("blk.0.{n}.weight")).collect();
    names.insert(0, "token_embd.weight".into());
    names.push("output_norm.weight".into());
    names.push("output.weight".into());
    let shapes = shapes(&config);
    let mut out = b"GGUF\x03\0\0\0".to_vec();
    out.extend((shapes.len() as u64).to_le_bytes());
    out.extend((sizes.len() as u64 + 3).to_le_bytes());
    text(&mut out, "general.architecture");
    out.extend(8_u32.to_le_bytes());
    text(&mut out, "llama");
    text(&mut out, "llama.attention.layer_norm_rms_epsilon");
    out.extend(6_u32.to_le_bytes());
    out.extend(1e-5_f32.to_le_bytes());
    text(&mut out, "tokenizer.ggml.tokens");
    out.extend([9_u32, 8].map(u32::to_le_bytes).concat());
    out.extend(1_u64.to_le_bytes());
    text(&mut out, "a");
    for (key, value) in sizes {
        text(&mut out, &format!("llama.{key}"));
        out.extend(4_u32.to_le_bytes());
        out.extend((value as u32).to_le_bytes());
    }
    let mut data = Vec::new();
    for (i, (name, shape)) in names.iter().zip(&shapes).enumerate() {
        let encoding = if shape.rows == 1 { Encoding::F32 } else { encodings[i % 2] };
        text(&mut out, name);
        let dims = if shape.rows == 1 { vec![shape.cols] } else { vec![shape.cols, shape.rows] };
        out.extend((dims.len() as u32).to_le_bytes());
        dims.iter().for_each(|d| out.extend((*d as u64).to_le_bytes()));
        let number = numbers.iter().find(|n| n.0 == encoding).expect("it is listed").1;
        out.extend(number.to_le_bytes());
        out.extend((data.len() as u64).to_le_bytes());
        data.extend(blocks(encoding, shape.rows * shape.cols));
        data.resize(data.len().next_multiple_of(32), 0);
    }
    out.resize(out.len().next_multiple_of(32), 0);
    [out, data].concat()
}

pub fn hub_seeds() -> Vec<Vec<u8>> {
    [Encoding::F32, Encoding::F16, Encoding::Bf16].map(|encoding| hub_seed(encoding)).to_vec()
}

fn hub_seed(encoding: Encoding) -> Vec<u8> {
    let c = model(encoding == Encoding::F32);
    let config = json!({
        "model_type": "llama", "vocab_size": c.vocabulary, "hidden_size": c.width,
        "intermediate_size": c.ffn, "num_hidden_layers": c.layers, "num_attention_heads": c.heads,
        "num_key_value_heads": c.kv_heads, "max_position_embeddings": c.context,
        "rms_norm_eps": c.rms_epsilon, "rope_theta": c.rope_base, "tie_word_embeddings": c.tied,
    });
    let own = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"];
    let ffn = ["post_attention_layernorm", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"];
    let layer = [&["input_layernorm"][..], &own, &ffn].concat();
    let mut names: Vec<String> =
        layer.iter().map(|n| format!("model.layers.0.{n}.weight")).collect();
    names.insert(0, "model.embed_tokens.weight".into());
    names.push("model.norm.weight".into());
    names.push("lm_head.weight".into());
    let (mut header, mut data) = (serde_json::Map::new(), Vec::new());
    for (name, shape) in names.iter().zip(shapes(&c)) {
        let start = data.len();
        data.extend(blocks(encoding, shape.rows * shape.cols));
        let dims = if shape.rows == 1 { vec![shape.cols] } else { vec![shape.rows, shape.cols] };
        let entry = json!({
            "dtype": encoding.name(), "shape": dims, "data_offsets": [start, data.len()],
        });
        header.insert(name.clone(), entry);
    }
    let mut header = serde_json::to_vec(&header).expect("plain data");
    header.resize(header.len().next_multiple_of(8), b' ');
    let config = serde_json::to_vec(&config).expect("plain data");
    let mut out = (config.len() as u16).to_le_bytes().to_vec();
    out.extend(config);
    out.extend((header.len() as u64).to_le_bytes());
    [out, header, data].concat()
}
