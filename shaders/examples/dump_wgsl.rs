//! Writes every kernel as JSON to standard output, for validators outside Rust (`tests/tint`):
//! `[{"name", "source", "entry_points": [{"name", "lanes"}]}]`.

use std::io::Write;

use manyhands_shaders::wgsl::{FAMILIES, KERNELS, Workgroup};
use serde_json::{Value, json};

fn main() -> std::io::Result<()> {
    let module = |(index, family): (usize, &manyhands_shaders::wgsl::Family)| -> Value {
        let entries = KERNELS.iter().filter(|k| k.family == index);
        let entries = entries.map(|k| {
            let lanes = (k.workgroup == Workgroup::Lanes).then_some(64);
            json!({ "name": k.entry, "lanes": lanes })
        });
        json!({
            "name": family.name,
            "source": family.source(),
            "entry_points": entries.collect::<Vec<_>>(),
        })
    };
    let all: Vec<Value> = FAMILIES.iter().enumerate().map(module).collect();
    writeln!(std::io::stdout(), "{}", Value::from(all))
}
