//! The words of an imported model: a module of its own, because tokenizers are large and a
//! volunteer needs none. A page loads it when a visitor talks to such a model.
#![cfg(target_arch = "wasm32")]

use manyhands_core::language::{Language, Marks, Message};
use manyhands_core::model::tokenizer::Tokenizer;
use serde::Deserialize;
use wasm_bindgen::prelude::*;

/// What matters here of the description of an import.
#[derive(Deserialize)]
struct Import {
    marks: Marks,
}

/// Between text and tokens.
#[wasm_bindgen]
pub struct Words(Language);

fn error(error: impl std::fmt::Display) -> JsError {
    JsError::new(&format!("{error:#}"))
}

#[wasm_bindgen]
impl Words {
    /// From the files of the imported model: what the import says of it, its tokenizer, and its
    /// chat template if it has one.
    #[wasm_bindgen(constructor)]
    pub fn new(
        import: &[u8],
        tokenizer: &[u8],
        template: Option<String>,
        vocabulary: usize,
    ) -> Result<Self, JsError> {
        let Import { marks } = serde_json::from_slice(import).map_err(error)?;
        Language::new(tokenizer, template, marks, vocabulary).map(Self).map_err(error)
    }

    /// Whether the model was trained to chat.
    pub fn chats(&self) -> bool {
        self.0.chats()
    }

    /// Tokens of a conversation (JSON: a list of `role` and `content`), up to where the answer
    /// begins. A model that does not chat goes on with the last message.
    pub fn encode(&self, messages: &str) -> Result<Vec<u32>, JsError> {
        let messages: Vec<Message> = serde_json::from_str(messages).map_err(error)?;
        let last = || messages.last().map_or("", |m| &m.content);
        let tokens =
            if self.chats() { self.0.encode_chat(&messages) } else { self.0.encode(last()) };
        tokens.map_err(error)
    }

    /// Text of the tokens of an answer.
    pub fn text(&self, tokens: &[u32]) -> String {
        self.0.decode(tokens)
    }

    /// The token that ends an answer.
    pub fn end(&self) -> u32 {
        self.0.end()
    }
}
