//! A `tokenizer.json` as the keys of a GGUF file: the way of [`crate::import::tokenizer`],
//! backwards.

use std::collections::BTreeMap;

use anyhow::{Context, Result, bail, ensure};
use manyhands_core::export::gguf::{Keys, Value, text};
use serde::Deserialize;
use serde_json::Value as Json;

use crate::import::tokenizer::{CONTROL, PRE_TOKENIZERS, USER_DEFINED, pre_tokenizer};
use manyhands_core::language::{Marks, TOKENIZER_FILE};

/// Kinds of tokens in `tokenizer.ggml.token_type`.
const NORMAL: i64 = 1;
const UNUSED: i64 = 5;
/// What to do about a tokenizer that has no keys here.
const INSTEAD: &str = "export safetensors and let llama.cpp's convert_hf_to_gguf.py convert them";

/// What GGUF keeps of `tokenizer.json`.
#[derive(Deserialize)]
struct Tokenizer {
    #[serde(default)]
    added_tokens: Vec<Added>,
    pre_tokenizer: Json,
    model: Bpe,
}

#[derive(Deserialize)]
struct Added {
    id: usize,
    content: String,
    special: bool,
}

#[derive(Deserialize)]
struct Bpe {
    #[serde(rename = "type")]
    kind: Option<String>,
    vocab: BTreeMap<String, usize>,
    merges: Vec<Merge>,
}

/// As new and as old versions of the `tokenizers` library write it.
#[derive(Deserialize)]
#[serde(untagged)]
enum Merge {
    Pair(String, String),
    Text(String),
}

/// The keys of a tokenizer for a model of `vocabulary` tokens. `adds_begin`: texts begin with the
/// begin token.
pub(super) fn keys(json: &[u8], marks: Marks, adds_begin: bool, vocabulary: usize) -> Result<Keys> {
    let parsed: Tokenizer = serde_json::from_slice(json).with_context(|| {
        format!("{TOKENIZER_FILE} is no byte-level BPE, which is all that is written; {INSTEAD}")
    })?;
    let Tokenizer { added_tokens, pre_tokenizer, model } = parsed;
    let kind = model.kind.as_deref().unwrap_or("BPE");
    ensure!(kind == "BPE", "{TOKENIZER_FILE}: {kind} is not written, only BPE is; {INSTEAD}");
    let pre = name(&pre_tokenizer)?;
    let mut tokens = vec![None; vocabulary];
    let ordinary = model.vocab.into_iter().map(|(token, id)| (id, token, NORMAL));
    let added = added_tokens.into_iter().map(|t| {
        let kind = if t.special { CONTROL } else { USER_DEFINED };
        (t.id, t.content, kind)
    });
    for (id, token, kind) in ordinary.chain(added) {
        let place = tokens.get_mut(id).with_context(|| {
            format!("{TOKENIZER_FILE}: token {id} is beyond the model's {vocabulary} tokens")
        })?;
        *place = Some((token, kind));
    }
    // Embeddings are often padded beyond the tokens that there are.
    let unused = |id: usize| (format!("[PAD{id}]"), UNUSED);
    let tokens = tokens.into_iter().enumerate();
    let tokens = tokens.map(|(id, token)| token.unwrap_or_else(|| unused(id)));
    let (tokens, kinds): (Vec<String>, Vec<i64>) = tokens.unzip();
    let merges = model.merges.into_iter().map(|merge| match merge {
        Merge::Pair(a, b) => format!("{a} {b}"),
        Merge::Text(text) => text,
    });
    let key = |name: &str| format!("tokenizer.ggml.{name}");
    let mut keys = vec![
        text("tokenizer.ggml.model", "gpt2"),
        text("tokenizer.ggml.pre", pre),
        (key("tokens"), Value::Texts(tokens)),
        (key("token_type"), Value::Integers(kinds.into_iter().map(|k| k as i32).collect())),
        (key("merges"), Value::Texts(merges.collect())),
        (key("eos_token_id"), Value::U32(marks.end)),
        (key("add_bos_token"), Value::Bool(adds_begin)),
    ];
    if let Some(begin) = marks.begin {
        keys.push((key("bos_token_id"), Value::U32(begin)));
    }
    Ok(keys)
}

/// The name that GGUF has for a way to cut text.
fn name(pre: &Json) -> Result<&'static str> {
    for name in PRE_TOKENIZERS {
        if essence(&pre_tokenizer(name)?) == essence(pre) {
            return Ok(name);
        }
    }
    let known = PRE_TOKENIZERS.join(", ");
    bail!(
        "{TOKENIZER_FILE}: its pre_tokenizer is none of those that GGUF names and this program knows ({known}); {INSTEAD}"
    )
}

/// A pre-tokenizer without the settings that play no part in token ids.
fn essence(pre: &Json) -> Json {
    match pre {
        Json::Object(map) => {
            let settings = map.iter().filter(|(key, _)| *key != "trim_offsets");
            settings.map(|(key, value)| (key.clone(), essence(value))).collect()
        }
        Json::Array(list) => list.iter().map(essence).collect(),
        other => other.clone(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use manyhands_core::import::gguf::{Gguf, Value as Read};

    const TINY: &[u8] = include_bytes!("../../../tests/data/tiny/tiny.gguf");
    const HUB: &[u8] = include_bytes!("../../../tests/data/tiny/hub/tokenizer.json");
    const MARKS: Marks = Marks { begin: Some(1), end: 2 };

    fn find(keys: &Keys, name: &str) -> Value {
        keys.iter().find(|(key, _)| key == name).unwrap().1.clone()
    }

    /// Keys come back as the file had them, by whichever `tokenizer.json` they went.
    #[test]
    fn keys_of_a_gguf_file_come_back() {
        let file = Gguf::parse(TINY).unwrap();
        let (converted, marks) = crate::import::tokenizer::convert(&file).unwrap();
        assert_eq!(marks, MARKS);
        for json in [&*converted, HUB] {
            let keys = keys(json, marks, false, 264).unwrap();
            for (key, value) in &keys {
                let original = match file.keys.get(&**key).unwrap() {
                    Read::Text(text) => Value::Text((*text).into()),
                    Read::Texts(texts) => {
                        Value::Texts(texts.iter().map(|t| t.to_string()).collect())
                    }
                    Read::Integers(n) => Value::Integers(n.iter().map(|n| *n as i32).collect()),
                    Read::Integer(n) if key.contains("add_") => Value::Bool(*n == 1),
                    Read::Integer(n) => Value::U32(*n as u32),
                    other => panic!("{key}: {other:?}"),
                };
                assert_eq!(*value, original, "{key}");
            }
            assert_eq!(keys.len(), 8);
        }
    }

    /// Every way to cut text that an import takes from GGUF has its name in an export.
    #[test]
    fn pre_tokenizers_have_their_names() {
        for expected in PRE_TOKENIZERS {
            let mut file = Gguf::parse(TINY).unwrap();
            file.keys.insert("tokenizer.ggml.pre", Read::Text(expected));
            let (json, marks) = crate::import::tokenizer::convert(&file).unwrap();
            let keys = keys(&json, marks, true, 264).unwrap();
            assert_eq!(find(&keys, "tokenizer.ggml.pre"), Value::Text(expected.into()));
            assert_eq!(find(&keys, "tokenizer.ggml.add_bos_token"), Value::Bool(true));
        }
    }

    /// The hub's tokenizer with a change.
    fn with(change: impl FnOnce(&mut Json), vocabulary: usize) -> Result<Keys> {
        let mut json: Json = serde_json::from_slice(HUB).unwrap();
        change(&mut json);
        keys(&serde_json::to_vec(&json).unwrap(), MARKS, false, vocabulary)
    }

    /// Rows of an embedding that no token has are unused tokens; old merges are texts.
    #[test]
    fn padding_and_old_merges_are_written() {
        let keys = with(
            |json| {
                json["model"]["merges"] = serde_json::json!(["t h", "th e"]);
                json["added_tokens"][0]["special"] = false.into();
            },
            266,
        );
        let keys = keys.unwrap();
        let Value::Texts(tokens) = find(&keys, "tokenizer.ggml.tokens") else { panic!() };
        let Value::Integers(kinds) = find(&keys, "tokenizer.ggml.token_type") else { panic!() };
        assert_eq!((&*tokens[265], tokens.len(), &kinds[263..]), ("[PAD265]", 266, &[1, 5, 5][..]));
        assert_eq!(kinds[..4], [4, 3, 3, 1]);
        let merges = Value::Texts(vec!["t h".into(), "th e".into()]);
        assert_eq!(find(&keys, "tokenizer.ggml.merges"), merges);
    }

    /// A tokenizer that would become another one is refused.
    #[test]
    fn tokenizers_that_have_no_keys_are_refused() {
        type Change = fn(&mut Json);
        let cases: [(Change, &str); 4] = [
            (
                |j| j["pre_tokenizer"]["pretokenizers"][0]["individual_digits"] = false.into(),
                "pre_",
            ),
            (|j| j["pre_tokenizer"] = Json::Null, "pre_tokenizer"),
            (|j| j["model"]["type"] = "WordPiece".into(), "WordPiece"),
            (|j| j["model"]["vocab"] = serde_json::json!([["a", -1.0]]), "byte-level BPE"),
        ];
        for (change, problem) in cases {
            let error = format!("{:#}", with(change, 264).unwrap_err());
            assert!(error.contains(problem) && error.contains("convert_hf"), "{error}");
        }
        let error = with(|_| (), 263).unwrap_err().to_string();
        assert!(error.contains("token 263 is beyond"), "{error}");
    }
}
