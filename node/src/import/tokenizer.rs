//! The tokenizer that a GGUF file describes in its keys, as a `tokenizer.json`.

use anyhow::{Context, Result, bail, ensure};
use manyhands_core::import::gguf::{Gguf, Value};
use serde_json::{Map, Value as Json, json};

use manyhands_core::language::Marks;

/// Kinds of tokens in `tokenizer.ggml.token_type`.
pub(crate) const CONTROL: i64 = 3;
pub(crate) const USER_DEFINED: i64 = 4;

/// Ways to cut text that are known.
pub(crate) const PRE_TOKENIZERS: [&str; 4] = ["gpt-2", "smollm", "llama-bpe", "qwen2"];

/// GPT-4's way of cutting text, with up to `digits` digits a piece.
fn gpt4(digits: &str) -> String {
    format!(
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
}

/// How text is cut before merging: the rules that `tokenizer.ggml.pre` names.
pub(crate) fn pre_tokenizer(name: &str) -> Result<Json> {
    let byte_level = |use_regex: bool| json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": use_regex});
    let split = |pattern: String| json!({"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": false});
    let sequence =
        |first: Json, then: Json| json!({"type": "Sequence", "pretokenizers": [first, then]});
    Ok(match name {
        "gpt-2" => byte_level(true),
        "smollm" => {
            sequence(json!({"type": "Digits", "individual_digits": true}), byte_level(true))
        }
        "llama-bpe" => sequence(split(gpt4("{1,3}")), byte_level(false)),
        "qwen2" => sequence(split(gpt4("")), byte_level(false)),
        _ => bail!(
            "tokenizer.ggml.pre: {name:?} is not known ({} are); import the safetensors files with their tokenizer.json instead",
            PRE_TOKENIZERS.join(", ")
        ),
    })
}

/// `tokenizer.json`, and the marks.
pub fn convert(file: &Gguf<'_>) -> Result<(Vec<u8>, Marks)> {
    let model = file.text("tokenizer.ggml.model")?;
    ensure!(
        model == "gpt2",
        "tokenizer.ggml.model: {model:?} is not read from GGUF, only gpt2 is; import the safetensors files with their tokenizer.json instead"
    );
    let pre = file.text("tokenizer.ggml.pre")?;
    let tokens = file.texts("tokenizer.ggml.tokens")?;
    let kinds = file.integers("tokenizer.ggml.token_type")?;
    ensure!(
        kinds.len() == tokens.len(),
        "tokenizer.ggml.token_type: {} kinds for {} tokens",
        kinds.len(),
        tokens.len()
    );
    let mut vocabulary = Map::new();
    let mut added = Vec::new();
    for (id, (token, kind)) in tokens.iter().zip(kinds).enumerate() {
        let twice = vocabulary.insert((*token).to_string(), json!(id)).is_some();
        ensure!(!twice, "tokenizer.ggml.tokens: {token:?} is there twice");
        if [CONTROL, USER_DEFINED].contains(kind) {
            added.push(json!({
                "id": id, "content": token, "single_word": false, "lstrip": false,
                "rstrip": false, "normalized": false, "special": *kind == CONTROL,
            }));
        }
    }
    let merges = file.texts("tokenizer.ggml.merges")?.iter().map(|merge| {
        let (a, b) = merge
            .split_once(' ')
            .with_context(|| format!("tokenizer.ggml.merges: {merge:?} is no pair"))?;
        Ok(json!([a, b]))
    });
    let merges = merges.collect::<Result<Vec<Json>>>()?;
    let mark = |key: &str| -> Result<Option<u32>> {
        let Some(Value::Integer(id)) = file.keys.get(key) else { return Ok(None) };
        let id = usize::try_from(*id).ok().filter(|id| *id < tokens.len());
        Ok(Some(id.with_context(|| format!("{key}: is no token"))? as u32))
    };
    let begin = mark("tokenizer.ggml.bos_token_id")?;
    let end = mark("tokenizer.ggml.eos_token_id")?;
    let end = end.context("tokenizer.ggml.eos_token_id: the key is missing")?;
    let adds_begin = file.keys.get("tokenizer.ggml.add_bos_token") == Some(&Value::Integer(1));
    let post = begin.filter(|_| adds_begin).map(|id| template(id, tokens[id as usize]));
    let json = json!({
        "version": "1.0",
        "added_tokens": added,
        "normalizer": (pre == "qwen2").then(|| json!({"type": "NFC"})),
        "pre_tokenizer": pre_tokenizer(pre)?,
        "post_processor": post,
        "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true},
        "model": {
            "type": "BPE", "vocab": vocabulary, "merges": merges,
            "ignore_merges": pre == "llama-bpe",
        },
    });
    Ok((serde_json::to_vec(&json)?, Marks { begin, end }))
}

/// A post-processor that puts the begin token in front.
fn template(id: u32, token: &str) -> Json {
    let begin = json!({"SpecialToken": {"id": token, "type_id": 0}});
    let text = |name: &str, kind: u32| json!({"Sequence": {"id": name, "type_id": kind}});
    let mut special = Map::new();
    special.insert(token.into(), json!({"id": token, "ids": [id], "tokens": [token]}));
    json!({
        "type": "TemplateProcessing",
        "single": [begin, text("A", 0)],
        "pair": [begin, text("A", 0), text("B", 1)],
        "special_tokens": special,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokenizers::{OffsetReferential, OffsetType, PreTokenizedString, PreTokenizer, Tokenizer};

    const TINY: &[u8] = include_bytes!("../../../tests/data/tiny/tiny.gguf");

    /// The file with one key replaced.
    fn with<'a>(key: &'a str, value: Value<'a>) -> Result<(Vec<u8>, Marks)> {
        let mut file = Gguf::parse(TINY).unwrap();
        file.keys.insert(key, value);
        convert(&file)
    }

    /// Where each pre-tokenizer cuts: digits, contractions, spaces, line ends.
    #[test]
    fn pre_tokenizers_cut_as_their_models_were_trained() {
        let text = "I'LL pay 12345 now!\n\n  ok";
        let cases = [
            ("gpt-2", "I|'|LL| pay| 12345| now|!|\n\n | ok"),
            ("smollm", "I|'|LL| pay| |1|2|3|4|5| now|!|\n\n | ok"),
            ("llama-bpe", "I|'LL| pay| |123|45| now|!\n\n| | ok"),
            ("qwen2", "I|'LL| pay| |1|2|3|4|5| now|!\n\n| | ok"),
        ];
        for (pre, expected) in cases {
            let (json, _) = with("tokenizer.ggml.pre", Value::Text(pre)).unwrap();
            let tokenizer = Tokenizer::from_bytes(&json).unwrap();
            let mut pieces = PreTokenizedString::from(text);
            tokenizer.get_pre_tokenizer().unwrap().pre_tokenize(&mut pieces).unwrap();
            let splits = pieces.get_splits(OffsetReferential::Original, OffsetType::Byte);
            let cut: Vec<&str> =
                splits.iter().map(|(_, (from, to), _)| &text[*from..*to]).collect();
            assert_eq!(cut.join("|"), expected, "{pre}");
        }
    }

    /// A model that wants a begin token gets one, and only once.
    #[test]
    fn begin_token_is_added_where_the_file_says_so() {
        let ids = |json: &[u8]| {
            let tokenizer = Tokenizer::from_bytes(json).unwrap();
            let ids = |special| tokenizer.encode("the", special).unwrap().get_ids().to_vec();
            [ids(true), ids(false)]
        };
        let (json, marks) = with("tokenizer.ggml.add_bos_token", Value::Integer(1)).unwrap();
        let [special, plain] = ids(&json);
        assert_eq!(special, [&[1][..], &plain].concat());
        assert_eq!(marks, Marks { begin: Some(1), end: 2 });
        let (json, _) = with("tokenizer.ggml.add_bos_token", Value::Integer(0)).unwrap();
        assert_eq!(ids(&json), [plain.clone(), plain]);
    }

    /// Keys that make no tokenizer are named.
    #[test]
    fn keys_that_do_not_fit_are_named() {
        let cases = [
            ("tokenizer.ggml.model", Value::Text("llama")),
            ("tokenizer.ggml.pre", Value::Text("unheard-of")),
            ("tokenizer.ggml.token_type", Value::Integers(vec![1])),
            ("tokenizer.ggml.tokens", Value::Texts(vec!["a"; 264])),
            ("tokenizer.ggml.merges", Value::Texts(vec!["nopair"])),
            ("tokenizer.ggml.eos_token_id", Value::Integer(-1)),
            ("tokenizer.ggml.bos_token_id", Value::Integer(264)),
        ];
        for (key, value) in cases {
            let error = with(key, value).unwrap_err().to_string();
            assert!(error.contains(key), "{error:?} does not name {key}");
        }
    }
}
