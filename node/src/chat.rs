//! A chat with an imported model in the terminal: lines in, text out as it is sampled.

use std::io::{BufRead, IsTerminal, Write};

use anyhow::{Context, Result};
use manyhands_core::engine::Engine;
use manyhands_core::model::decoder::Decoder;
use manyhands_core::model::tokenizer::Tokenizer;

use crate::sample::{SampleArgs, answer, conversation};
use manyhands_core::language::{Language, Message, Role};

/// Marks the random streams of chats.
const STREAM: u32 = 3 << 24;
/// Longest line that is read, in bytes.
const LINE_BYTES_MAX: u64 = 1 << 20;

/// Chats until the input ends. A model without a chat template continues each line by itself.
pub(crate) fn run<E: Engine>(
    engine: &E,
    decoder: &Decoder<E>,
    language: &Language,
    args: &SampleArgs,
) -> Result<()> {
    let mut input = std::io::stdin().lock();
    let is_person = input.is_terminal();
    if is_person {
        println!("Ctrl-D ends; /new forgets what was said.");
    }
    let mut messages: Vec<Message> = Vec::new();
    for turn in 0.. {
        if is_person {
            print!("> ");
            std::io::stdout().flush()?;
        }
        let mut line = String::new();
        let read = std::io::Read::take(&mut input, LINE_BYTES_MAX).read_line(&mut line);
        if read.context("cannot read the line")? == 0 {
            break;
        }
        let line = line.trim();
        if line == "/new" || line.is_empty() {
            messages.truncate(if line.is_empty() { messages.len() } else { 0 });
            continue;
        }
        let tokens = if language.chats() {
            match messages.is_empty() {
                true => messages = conversation(args, line),
                false => messages.push(Message::user(line)),
            }
            language.encode_chat(&messages)?
        } else {
            language.encode(line)?
        };
        let end = language.end();
        let stream = [turn, STREAM, 0];
        let said = answer(engine, decoder, &tokens, stream, end, args, Some(language.stream()));
        println!();
        match said {
            Ok(said) => {
                let content = language.decode(&said.tokens);
                messages.push(Message { role: Role::Assistant, content });
            }
            Err(error) => {
                eprintln!("{error:#}; the chat begins anew");
                messages.clear();
            }
        }
    }
    Ok(())
}
