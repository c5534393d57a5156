//! Embeds the page and, if it was built, the tab's program: `web/page/**` and `target/web/*`.
//!
//! Writes a table of files with their types and bytes, each also gzip-encoded where that pays, so
//! that the host neither reads nor compresses anything while it serves.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};

use flate2::Compression;
use flate2::write::GzEncoder;

/// A gzip variant is kept if it is at most this share of the file, in percent.
const WORTH_PERCENT: usize = 90;

/// Types by file name ending. What is not here does not belong into the page.
const KINDS: &[(&str, &str)] = &[
    ("html", "text/html; charset=utf-8"),
    ("js", "text/javascript; charset=utf-8"),
    ("css", "text/css; charset=utf-8"),
    ("svg", "image/svg+xml"),
    ("txt", "text/plain; charset=utf-8"),
    ("LICENSE", "text/plain; charset=utf-8"),
    ("woff2", "font/woff2"),
    ("wasm", "application/wasm"),
];

fn main() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let page = root.join("web/page");
    let tab = root.join("target/web");
    // An absent directory cannot be watched: every build would be a new one.
    fs::create_dir_all(&tab).expect("target/web can be made");
    let mut files = Vec::new();
    collect(&page, "/", &mut files);
    collect(&tab, "/pkg/", &mut files);
    files.sort();
    let out = PathBuf::from(std::env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    let mut table = String::from("&[\n");
    for (i, (path, file)) in files.iter().enumerate() {
        let bytes = fs::read(file).unwrap_or_else(|e| panic!("{}: {e}", file.display()));
        let packed = gzip(&bytes);
        let gzip = if packed.len() * 100 <= bytes.len() * WORTH_PERCENT {
            let variant = out.join(format!("{i}.gz"));
            fs::write(&variant, packed).expect("OUT_DIR can be written");
            format!("Some(include_bytes!({variant:?}))")
        } else {
            "None".into()
        };
        let kind = kind(file);
        table += &format!(
            "    File {{ path: {path:?}, kind: {kind:?}, bytes: include_bytes!({file:?}), gzip: {gzip} }},\n"
        );
    }
    fs::write(out.join("files.rs"), table + "]\n").expect("OUT_DIR can be written");
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rerun-if-changed={}", page.display());
    println!("cargo:rerun-if-changed={}", tab.display());
}

/// Files below a directory with the paths at which they are served.
fn collect(dir: &Path, prefix: &str, files: &mut Vec<(String, PathBuf)>) {
    let entries = fs::read_dir(dir).unwrap_or_else(|e| panic!("{}: {e}", dir.display()));
    for entry in entries {
        let path = entry.expect("a directory can be read").path();
        let name = path.file_name().and_then(|n| n.to_str()).expect("a file name is UTF-8");
        if path.is_dir() {
            collect(&path, &format!("{prefix}{name}/"), files);
        } else if KINDS.iter().any(|(ending, _)| name.ends_with(ending)) {
            files.push((format!("{prefix}{name}"), path));
        }
    }
}

fn kind(file: &Path) -> &'static str {
    let name = file.to_str().expect("a path is UTF-8");
    KINDS.iter().find(|(ending, _)| name.ends_with(ending)).expect("collected by its ending").1
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::best());
    encoder.write_all(bytes).and_then(|()| encoder.finish()).expect("memory can be written")
}
