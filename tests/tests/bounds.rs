//! `BOUNDS.md` is what the code says: every bound is in it, with its value and a test that exists.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// Rust files below a directory of the repository: path from its root, and text.
fn sources(dir: &str, into: &mut BTreeMap<String, String>) {
    for entry in fs::read_dir(root().join(dir)).expect("the repository is complete") {
        let entry = entry.expect("the repository can be read");
        let path = format!("{dir}/{}", entry.file_name().to_string_lossy());
        if entry.path().is_dir() {
            sources(&path, into);
        } else if path.ends_with(".rs") {
            into.insert(path, fs::read_to_string(entry.path()).expect("sources are UTF-8"));
        }
    }
}

/// Name and value of the bounds of a file: constants, and the defaults of `Limits`.
fn bounds(text: &str) -> BTreeSet<(String, String)> {
    let constant = |line: &str| {
        let (_, rest) = line.split_once("const ")?;
        let (name, rest) = rest.split_once(": ")?;
        let (_, value) = rest.split_once(" = ")?;
        let is_bound = name.ends_with("_MAX") && !name.contains(' ');
        is_bound.then(|| (name.to_string(), value.trim_end_matches(';').to_string()))
    };
    let field = |line: &str| {
        let (name, value) = line.trim().split_once(": ")?;
        let digits = value.trim_end_matches(',');
        let is_bound = name.ends_with("_max") && digits.parse::<u64>().is_ok();
        is_bound.then(|| (name.to_string(), digits.to_string()))
    };
    let code = text.split("#[cfg(test)]\nmod tests {").next().unwrap_or_default();
    let defaults = code.split("impl Default for Limits").nth(1).unwrap_or_default();
    code.lines().filter_map(constant).chain(defaults.lines().filter_map(field)).collect()
}

#[test]
fn every_bound_is_in_the_table_with_its_value_and_a_test() {
    let mut all = BTreeMap::new();
    for dir in ["core/src/import", "core/src/swarm", "node/src", "node/tests", "tests/tests"] {
        sources(dir, &mut all);
    }
    let language = "core/src/language.rs";
    let text = fs::read_to_string(root().join(language)).expect("the repository is complete");
    all.insert(language.into(), text);
    let mut missing: BTreeSet<(String, String, String)> = all
        .iter()
        .filter(|(path, _)| path.contains("/src/"))
        .flat_map(|(path, text)| bounds(text).into_iter().map(|(n, v)| (n, v, path.clone())))
        .collect();
    let table = fs::read_to_string(root().join("BOUNDS.md")).expect("there is a table");
    for row in table.lines().filter(|l| l.starts_with("| `")) {
        let cells: Vec<&str> = row.trim_matches('|').split('|').map(str::trim).collect();
        let [name, value, path, beyond, test] = cells[..] else { panic!("cells of {row}") };
        let code = |cell: &str| cell.trim_matches('`').to_string();
        let key = (code(name), code(value), code(path));
        assert!(missing.remove(&key), "not in the code, or twice in the table: {row}");
        assert!(!beyond.is_empty(), "what happens beyond it? {row}");
        if let Some(reason) = test.strip_prefix("none: ") {
            assert!(!reason.is_empty(), "why is there no test? {row}");
            continue;
        }
        let test = format!("fn {}(", code(test));
        assert!(all.values().any(|text| text.contains(&test)), "no such test: {row}");
    }
    assert!(missing.is_empty(), "add rows to BOUNDS.md for {missing:#?}");
}
