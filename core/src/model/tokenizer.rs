//! Between text and tokens: [`Tokenizer`], and the [`Bytes`] of the models that are trained from
//! nothing, where a token is a byte.
//!
//! The control bytes 1 and 2 serve as beginning and end of sequence. A vocabulary of 128 covers
//! ASCII, 256 everything. Imported models bring their own tokenizer, which only those need who read
//! or write text: units of work are token ids.

/// Begins every sequence.
pub const BEGIN: u32 = 1;
/// Ends a completion.
pub const END: u32 = 2;
/// Smallest vocabulary that covers ASCII.
pub const ASCII_VOCABULARY: usize = 128;

/// Text that cannot be spelt.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum EncodeError {
    /// A byte that is no token.
    #[error(
        "byte {byte:#04x} at offset {offset} is outside a vocabulary of {vocabulary} byte tokens; use model.vocabulary = 256, or plain ASCII"
    )]
    Byte {
        /// The byte.
        byte: u8,
        /// Where it stands.
        offset: usize,
        /// Size of the vocabulary.
        vocabulary: usize,
    },
    /// What an imported model's tokenizer or chat template says.
    #[error("{0}")]
    Imported(String),
}

/// What turns the prompts of problems into tokens, and completions into text.
pub trait Tokenizer {
    /// Tokens of a prompt, with all that a sequence begins with.
    fn encode_prompt(&self, text: &str) -> Result<Vec<u32>, EncodeError>;
    /// Tokens of an answer, without the one that ends it.
    fn encode_answer(&self, text: &str) -> Result<Vec<u32>, EncodeError>;
    /// The text of each token, which together are the text of all.
    fn pieces(&self, tokens: &[u32]) -> Vec<String>;
    /// Text of a completion; control tokens have none.
    fn decode(&self, tokens: &[u32]) -> String;
    /// Token that ends a completion.
    fn end(&self) -> u32;
}

/// The byte tokenizer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bytes {
    /// Size of the model's vocabulary.
    pub vocabulary: usize,
}

impl Tokenizer for Bytes {
    fn encode_prompt(&self, text: &str) -> Result<Vec<u32>, EncodeError> {
        encode_prompt(text, self.vocabulary)
    }

    fn encode_answer(&self, text: &str) -> Result<Vec<u32>, EncodeError> {
        encode(text, self.vocabulary)
    }

    fn pieces(&self, tokens: &[u32]) -> Vec<String> {
        pieces(tokens)
    }

    fn decode(&self, tokens: &[u32]) -> String {
        decode(tokens)
    }

    fn end(&self) -> u32 {
        END
    }
}

/// Tokens of `text`, without begin or end.
pub fn encode(text: &str, vocabulary: usize) -> Result<Vec<u32>, EncodeError> {
    let token = |(offset, byte): (usize, u8)| {
        let special = u32::from(byte) <= END;
        if special || usize::from(byte) >= vocabulary {
            return Err(EncodeError::Byte { byte, offset, vocabulary });
        }
        Ok(u32::from(byte))
    };
    text.bytes().enumerate().map(token).collect()
}

/// A prompt: begin, then the text.
pub fn encode_prompt(text: &str, vocabulary: usize) -> Result<Vec<u32>, EncodeError> {
    let mut tokens = vec![BEGIN];
    tokens.extend(encode(text, vocabulary)?);
    Ok(tokens)
}

/// Text of tokens; begin and end are left out, what is not UTF-8 is replaced.
pub fn decode(tokens: &[u32]) -> String {
    let bytes: Vec<u8> =
        tokens.iter().filter(|&&t| t > END).map(|&t| u8::try_from(t).unwrap_or(b'?')).collect();
    String::from_utf8_lossy(&bytes).into_owned()
}

/// The text of each token, which together are the text of all. A character that takes several
/// tokens belongs to the last of them; begin and end have none.
pub fn pieces(tokens: &[u32]) -> Vec<String> {
    let mut pending = Vec::new();
    let mut out = Vec::with_capacity(tokens.len());
    for (i, &token) in tokens.iter().enumerate() {
        if token > END {
            pending.push(u8::try_from(token).unwrap_or(b'?'));
        }
        let is_cut = std::str::from_utf8(&pending).is_err_and(|e| e.error_len().is_none());
        let waits = is_cut && i + 1 < tokens.len();
        out.push(if waits {
            String::new()
        } else {
            String::from_utf8_lossy(&std::mem::take(&mut pending)).into_owned()
        });
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_join_to_the_text_and_keep_characters_whole() {
        let tokens = [BEGIN, 97, 0xc3, 0xa9, 98, END];
        assert_eq!(pieces(&tokens), ["", "a", "", "é", "b", ""]);
        for tokens in [&[0xff, 97][..], &[97, 0xc3], &[0xc3, 97, 0xa9], &[0xe2, 0x82, 0xac], &[]] {
            assert_eq!(pieces(tokens).concat(), decode(tokens), "{tokens:x?}");
            assert_eq!(pieces(tokens).len(), tokens.len());
        }
    }

    #[test]
    fn encode_decode_round_trips_and_refuses_what_it_cannot_spell() {
        assert_eq!(decode(&encode_prompt("12+7=", 128).unwrap()), "12+7=");
        assert_eq!(decode(&encode("é", 256).unwrap()), "é");
        let refused = |byte, offset| Err(EncodeError::Byte { byte, offset, vocabulary: 128 });
        assert_eq!(encode("aé", 128), refused(0xc3, 1));
        assert_eq!(encode("\u{2}", 128), refused(2, 0));
    }
}
