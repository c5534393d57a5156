//! The page and the tab's program, embedded by `build.rs`.

use std::collections::BTreeMap;
use std::sync::LazyLock;

use axum::http::header::{
    ACCEPT_ENCODING, CONTENT_ENCODING, CONTENT_TYPE, ETAG, IF_NONE_MATCH, VARY,
};
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse, Response};

/// A file of the page.
struct File {
    path: &'static str,
    kind: &'static str,
    bytes: &'static [u8],
    gzip: Option<&'static [u8]>,
}

const FILES: &[File] = include!(concat!(env!("OUT_DIR"), "/files.rs"));

/// Files by path, with their entity tags.
static TABLE: LazyLock<BTreeMap<&'static str, (&'static File, String)>> = LazyLock::new(|| {
    let tagged = |file: &'static File| {
        let hash = blake3::hash(file.bytes).to_hex();
        (file.path, (file, format!("\"{}\"", &hash[..32])))
    };
    FILES.iter().map(tagged).collect()
});

/// Size of one file of the page, bytes.
#[derive(Clone, Copy, Debug)]
pub struct FileSize {
    /// Where it is served.
    pub path: &'static str,
    /// As it is.
    pub bytes: usize,
    /// As it is sent to a browser that takes gzip.
    pub sent_bytes: usize,
}

/// Sizes of all embedded files.
pub fn file_sizes() -> Vec<FileSize> {
    let size = |f: &File| FileSize {
        path: f.path,
        bytes: f.bytes.len(),
        sent_bytes: f.gzip.unwrap_or(f.bytes).len(),
    };
    FILES.iter().map(size).collect()
}

/// The file at `path`, if there is one.
pub(super) fn file(path: &str, headers: &HeaderMap) -> Option<Response> {
    let path = if path == "/" { "/index.html" } else { path };
    let (file, tag) = TABLE.get(path)?;
    let text = |name| headers.get(name).and_then(|v| v.to_str().ok()).unwrap_or_default();
    let common = [(ETAG, tag.as_str()), (VARY, "accept-encoding")];
    // A proxy may have weakened the tag because it packed the bytes itself.
    let has_it = text(IF_NONE_MATCH).split(',').any(|t| t.trim().trim_start_matches("W/") == tag);
    if has_it {
        return Some((StatusCode::NOT_MODIFIED, common).into_response());
    }
    let kind = [(CONTENT_TYPE, file.kind)];
    match file.gzip.filter(|_| takes_gzip(text(ACCEPT_ENCODING))) {
        Some(gzip) => Some((common, kind, [(CONTENT_ENCODING, "gzip")], gzip).into_response()),
        None => Some((common, kind, file.bytes).into_response()),
    }
}

/// Whether an `Accept-Encoding` header asks for gzip.
fn takes_gzip(accepted: &str) -> bool {
    accepted.split(',').any(|item| {
        let (name, quality) = item.split_once(';').unwrap_or((item, ""));
        let refused = quality.trim().trim_start_matches("q=").parse::<f32>() == Ok(0.0);
        matches!(name.trim(), "gzip" | "*") && !refused
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gzip_is_taken_only_when_it_is_accepted() {
        for yes in ["gzip", "br, gzip", "gzip;q=0.5", "*", "deflate, gzip;q=1.0, *;q=0.5"] {
            assert!(takes_gzip(yes), "{yes}");
        }
        for no in ["", "br", "gzip;q=0", "identity", "gzip;q=0.0, br"] {
            assert!(!takes_gzip(no), "{no}");
        }
    }
}
