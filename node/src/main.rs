//! Entry point of `manyhands`.

use std::process::ExitCode;

fn main() -> ExitCode {
    match manyhands_node::cli::run() {
        Ok(code) => code,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
