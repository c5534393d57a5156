//! Writes the JavaScript that loads the tab's WebAssembly:  manyhands-glue IN.wasm OUT-DIRECTORY

use anyhow::{Context, Result};
use wasm_bindgen_cli_support::Bindgen;

fn main() -> Result<()> {
    let mut args = std::env::args().skip(1);
    let usage = "usage: manyhands-glue IN.wasm OUT-DIRECTORY";
    let (input, output) = args.next().zip(args.next()).context(usage)?;
    Bindgen::new()
        .input_path(input)
        .web(true)?
        .typescript(false)
        // Names of functions are a seventh of what a visitor downloads, and no use to one.
        .remove_name_section(true)
        .remove_producers_section(true)
        // The page names the file; without a default the loader would not compile.
        .omit_default_module_path(false)
        .generate(output)
}
