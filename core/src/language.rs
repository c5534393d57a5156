//! The text side of an imported model: its tokenizer, its chat template, its end token.
//!
//! Both come with the weights and are not trusted: files are bounded, templates run on fuel.

use anyhow::{Context, Result, anyhow, ensure};
use minijinja::syntax::SyntaxConfig;
use minijinja::{Environment, ErrorKind, context};
use serde::{Deserialize, Serialize};

use crate::model::tokenizer::{EncodeError, Tokenizer};

/// The tokenizer, as the `tokenizers` library writes it.
pub const TOKENIZER_FILE: &str = "tokenizer.json";
/// The chat template, if the model has one.
pub const TEMPLATE_FILE: &str = "chat_template.jinja";
/// Steps that a template may take.
const TEMPLATE_FUEL: u64 = 1 << 20;
/// Longest text of a template, and longest of a rendered one, in bytes.
const TEMPLATE_BYTES_MAX: usize = 1 << 20;

/// Tokens that mean something beyond text.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Marks {
    /// Begins a text, if the model wants that.
    pub begin: Option<u32>,
    /// Ends an answer.
    pub end: u32,
}

/// Who says what in a chat.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Message {
    /// Who: anybody else than these three is no message.
    pub role: Role,
    /// The words.
    pub content: String,
}

/// A voice in a chat.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    /// Sets the scene.
    System,
    /// Asks.
    User,
    /// Answers: the model.
    Assistant,
}

impl Role {
    /// As chat templates know it.
    const fn name(self) -> &'static str {
        match self {
            Self::System => "system",
            Self::User => "user",
            Self::Assistant => "assistant",
        }
    }
}

impl Message {
    /// A message of the user.
    pub fn user(content: impl Into<String>) -> Self {
        Self { role: Role::User, content: content.into() }
    }
}

/// An imported model's language.
#[derive(Debug)]
pub struct Language {
    tokenizer: tokenizers::Tokenizer,
    template: Option<Environment<'static>>,
    marks: Marks,
    /// What problems are followed by, so that a model that knows nothing of this program answers
    /// as its scorers read.
    pub instruction: String,
}

impl Language {
    /// A language for a model of `vocabulary` tokens, from the files' contents.
    pub fn new(
        tokenizer: &[u8],
        template: Option<String>,
        marks: Marks,
        vocabulary: usize,
    ) -> Result<Self> {
        let tokenizer = tokenizers::Tokenizer::from_bytes(tokenizer)
            .map_err(|e| anyhow!("{TOKENIZER_FILE} cannot be read: {e}"))?;
        let largest = tokenizer.get_vocab(true).into_values().max().unwrap_or(0);
        ensure!(
            (largest as usize) < vocabulary,
            "{TOKENIZER_FILE} has token {largest}, but the model's vocabulary ends at {}; take the tokenizer that belongs to these weights",
            vocabulary - 1
        );
        for mark in marks.begin.iter().chain([&marks.end]) {
            ensure!(
                (*mark as usize) < vocabulary,
                "the begin or end token {mark} is outside the model's vocabulary of {vocabulary}"
            );
        }
        let template = template.map(environment).transpose()?;
        Ok(Self { tokenizer, template, marks, instruction: String::new() })
    }

    /// Whether the model was trained to chat.
    pub fn chats(&self) -> bool {
        self.template.is_some()
    }

    /// What the tokenizer calls a token.
    pub fn name(&self, token: u32) -> Option<String> {
        self.tokenizer.id_to_token(token)
    }

    /// Tokens of plain text, with the begin token if the model wants it.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        self.tokens(text, true)
    }

    fn tokens(&self, text: &str, special: bool) -> Result<Vec<u32>> {
        let encoding = self.tokenizer.encode_fast(text, special);
        let tokens = encoding.map_err(|e| anyhow!("the text cannot be tokenized: {e}"))?;
        Ok(tokens.get_ids().to_vec())
    }

    /// Tokens of a conversation, up to where the assistant begins to speak.
    pub fn encode_chat(&self, messages: &[Message]) -> Result<Vec<u32>> {
        let environment = self.template.as_ref().context("the model has no chat template")?;
        let name = |token: Option<u32>| token.and_then(|t| self.name(t)).unwrap_or_default();
        let message =
            |m: &Message| context! { role => m.role.name(), content => m.content.clone() };
        let values = context! {
            messages => messages.iter().map(message).collect::<Vec<_>>(),
            add_generation_prompt => true,
            bos_token => name(self.marks.begin),
            eos_token => name(Some(self.marks.end)),
        };
        let rendered = environment.get_template(TEMPLATE_FILE).and_then(|t| t.render(values));
        let text = rendered.map_err(|e| anyhow!("the chat template fails: {e:#}"))?;
        ensure!(text.len() <= TEMPLATE_BYTES_MAX, "the conversation is over 1 MiB");
        self.tokens(&text, false)
    }

    /// A writer of tokens as they come: each call returns the text that is complete by then.
    pub fn stream(&self) -> impl FnMut(u32) -> String + '_ {
        let mut stream = self.tokenizer.decode_stream(true);
        // A token that the tokenizer does not know has no text.
        move |token| stream.step(token).ok().flatten().unwrap_or_default()
    }
}

impl Tokenizer for Language {
    fn encode_prompt(&self, text: &str) -> Result<Vec<u32>, EncodeError> {
        let text = match &*self.instruction {
            "" => text.to_string(),
            instruction => format!("{text}\n{instruction}"),
        };
        let tokens = match self.chats() {
            true => self.encode_chat(&[Message::user(text)]),
            false => self.encode(&text),
        };
        match tokens {
            Ok(tokens) if tokens.is_empty() => {
                Err(EncodeError::Imported("the prompt is empty".into()))
            }
            Ok(tokens) => Ok(tokens),
            Err(e) => Err(EncodeError::Imported(format!("{e:#}"))),
        }
    }

    fn encode_answer(&self, text: &str) -> Result<Vec<u32>, EncodeError> {
        self.tokens(text, false).map_err(|e| EncodeError::Imported(format!("{e:#}")))
    }

    fn pieces(&self, tokens: &[u32]) -> Vec<String> {
        let mut stream = self.stream();
        tokens.iter().map(|token| stream(*token)).collect()
    }

    fn decode(&self, tokens: &[u32]) -> String {
        self.tokenizer.decode(tokens, true).unwrap_or_default()
    }

    fn end(&self) -> u32 {
        self.marks.end
    }
}

/// Jinja as `transformers` sets it up.
fn environment(template: String) -> Result<Environment<'static>> {
    ensure!(template.len() <= TEMPLATE_BYTES_MAX, "the chat template is over 1 MiB");
    let mut environment = Environment::new();
    environment.set_fuel(Some(TEMPLATE_FUEL));
    let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
    environment.set_syntax(syntax.map_err(|e| anyhow!("{e}"))?);
    environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
    environment.add_function("raise_exception", |message: String| {
        Err::<String, _>(minijinja::Error::new(ErrorKind::InvalidOperation, message))
    });
    let added = environment.add_template_owned(TEMPLATE_FILE, template);
    added.map_err(|e| anyhow!("the chat template cannot be read: {e:#}"))?;
    Ok(environment)
}

#[cfg(test)]
mod tests {
    use super::*;

    const TOKENIZER: &[u8] = include_bytes!("../../tests/data/tiny/hub/tokenizer.json");
    const MARKS: Marks = Marks { begin: None, end: 2 };

    fn with(template: &str) -> Result<Language> {
        Language::new(TOKENIZER, Some(template.into()), MARKS, 264)
    }

    /// A template from a stranger may neither run for ever nor fill the memory.
    #[test]
    fn template_is_bounded_in_steps_and_size() {
        let say = |template: &str| {
            with(template).and_then(|l| l.encode_chat(&[Message::user("hi")])).unwrap_err()
        };
        let nested = "{% for a in range(9999) %}{% for b in range(9999) %}{% endfor %}{% endfor %}";
        assert!(format!("{:#}", say(nested)).contains("fuel"), "{:#}", say(nested));
        let long = "{% for a in range(99999) %}twelve bytes{% endfor %}";
        assert!(format!("{:#}", say(long)).contains("over 1 MiB"), "{:#}", say(long));
        let raised = say("{{ raise_exception('no tools here') }}");
        assert!(format!("{raised:#}").contains("no tools here"), "{raised:#}");
        let over = " ".repeat(TEMPLATE_BYTES_MAX + 1);
        assert!(with(&over).unwrap_err().to_string().contains("over 1 MiB"));
    }

    /// Blocks take their line with them, and Python's methods work, as templates expect.
    #[test]
    fn template_renders_as_transformers_does() {
        let language = with(
            "{% for m in messages %}\n    {% if m.role == 'user' %}\n{{ m['content'].strip() }}{{ eos_token }}\n    {% endif %}\n{% endfor %}",
        );
        let tokens = language.unwrap().encode_chat(&[Message::user(" the "), Message::user("an")]);
        let expected = with("").unwrap().tokens("the<|im_end|>\nan<|im_end|>\n", false).unwrap();
        assert_eq!(tokens.unwrap(), expected);
        assert_eq!(expected.iter().filter(|t| **t == 2).count(), 2);
    }

    /// Text that arrives token by token is the text of all, characters kept whole.
    #[test]
    fn stream_joins_to_the_text() {
        let language = with("").unwrap();
        let text = "the cat 🙂 naïve";
        let tokens = language.encode(text).unwrap();
        let mut stream = language.stream();
        let pieces: Vec<String> = tokens.iter().map(|t| stream(*t)).collect();
        assert_eq!(pieces.concat(), text);
        assert!(tokens.len() < text.len() && pieces.iter().any(String::is_empty), "{pieces:?}");
    }

    #[test]
    fn tokens_beyond_the_vocabulary_are_refused() {
        let error = Language::new(TOKENIZER, None, MARKS, 263).unwrap_err().to_string();
        assert!(error.contains("token 263") && error.contains("262"), "{error}");
        let marks = Marks { begin: Some(300), ..MARKS };
        assert!(Language::new(TOKENIZER, None, marks, 264).is_err());
    }
}
