//! Blobs by hash: streamed, resumable, cacheable for ever because a hash names one content.

use std::io::SeekFrom;

use axum::body::{Body, Bytes};
use axum::extract::{Path, State};
use axum::http::header::{
    ACCEPT_RANGES, CACHE_CONTROL, CONTENT_LENGTH, CONTENT_RANGE, CONTENT_TYPE, ETAG, RANGE,
};
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse, Response};
use futures::stream;
use manyhands_core::swarm::ids::Hash;
use tokio::fs::File;
use tokio::io::{AsyncReadExt, AsyncSeekExt};

use super::error::ApiError;
use super::{Blob, HttpState};

/// Bytes of a file that are in memory at once for one client.
pub const BLOB_CHUNK_BYTES: usize = 128 << 10;

/// `GET /api/blobs/{hash}`.
pub(super) async fn blob(
    State(state): State<HttpState>,
    Path(name): Path<String>,
    headers: HeaderMap,
) -> Result<Response, ApiError> {
    let hash = Hash::parse(&name).ok_or_else(|| {
        ApiError::new(
            StatusCode::BAD_REQUEST,
            "that is no hash: 64 hexadecimal digits, such as those in /api/ledger",
        )
    })?;
    let found = (state.blob)(&hash).ok_or_else(|| missing(&hash))?;
    let (length, source) = match found {
        Blob::Bytes(bytes) => (bytes.len() as u64, Source::Bytes(bytes)),
        Blob::File(path) => {
            let file = File::open(&path).await.map_err(|_| missing(&hash))?;
            let length = file.metadata().await.map_err(|_| missing(&hash))?.len();
            (length, Source::File(file))
        }
    };
    let asked = headers.get(RANGE).and_then(|v| v.to_str().ok());
    let range = asked.map_or(Range::Whole, |text| parse_range(text, length));
    let (status, first, count) = match range {
        Range::Whole => (StatusCode::OK, 0, length),
        Range::Part { first, count } => (StatusCode::PARTIAL_CONTENT, first, count),
        Range::Outside => {
            let range = [(CONTENT_RANGE, format!("bytes */{length}"))];
            let error = ApiError::new(
                StatusCode::RANGE_NOT_SATISFIABLE,
                format!("the blob has {length} bytes, the range lies outside"),
            );
            return Ok((range, error).into_response());
        }
    };
    let body = source.part(first, count).await.map_err(|_| missing(&hash))?;
    let common = [
        (CONTENT_TYPE, "application/octet-stream".to_string()),
        (CONTENT_LENGTH, count.to_string()),
        (ACCEPT_RANGES, "bytes".into()),
        (ETAG, format!("\"{hash}\"")),
        (CACHE_CONTROL, "public, max-age=31536000, immutable".into()),
    ];
    let mut response = (status, common, body).into_response();
    if let Range::Part { first, count } = range {
        let text = format!("bytes {first}-{}/{length}", first + count - 1);
        let value = text.parse().expect("digits and ASCII punctuation make a header");
        response.headers_mut().insert(CONTENT_RANGE, value);
    }
    Ok(response)
}

fn missing(hash: &Hash) -> ApiError {
    ApiError::new(
        StatusCode::NOT_FOUND,
        format!("this peer does not have {hash}; another coordination peer of the run may"),
    )
}

/// An open blob.
enum Source {
    Bytes(Bytes),
    File(File),
}

impl Source {
    /// `count` bytes from `first`, which lie inside.
    async fn part(self, first: u64, count: u64) -> std::io::Result<Body> {
        match self {
            Self::Bytes(bytes) => {
                let range = usize::try_from(first).ok().zip(usize::try_from(first + count).ok());
                let (first, end) = range.ok_or(std::io::ErrorKind::InvalidInput)?;
                Ok(Body::from(bytes.slice(first..end)))
            }
            Self::File(mut file) => {
                file.seek(SeekFrom::Start(first)).await?;
                Ok(Body::from_stream(stream::try_unfold((file, count), read_chunk)))
            }
        }
    }
}

/// The next piece of a file. One that became shorter breaks the connection off, because the
/// length was promised.
async fn read_chunk(
    (mut file, left): (File, u64),
) -> std::io::Result<Option<(Bytes, (File, u64))>> {
    if left == 0 {
        return Ok(None);
    }
    let size = usize::try_from(left).unwrap_or(BLOB_CHUNK_BYTES).min(BLOB_CHUNK_BYTES);
    let mut chunk = vec![0; size];
    let read = file.read(&mut chunk).await?;
    if read == 0 {
        return Err(std::io::ErrorKind::UnexpectedEof.into());
    }
    chunk.truncate(read);
    Ok(Some((chunk.into(), (file, left - read as u64))))
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Range {
    Whole,
    Part { first: u64, count: u64 },
    Outside,
}

/// Reads a `Range` header. What is not one plain range of bytes is ignored, as RFC 9110 allows.
fn parse_range(text: &str, length: u64) -> Range {
    let parse = || -> Option<Range> {
        let (first, last) = text.strip_prefix("bytes=")?.trim().split_once('-')?;
        if first.is_empty() {
            let count = last.parse::<u64>().ok()?.min(length);
            let part = Range::Part { first: length - count, count };
            return Some(if count == 0 { Range::Outside } else { part });
        }
        let first = first.parse::<u64>().ok()?;
        let last = if last.is_empty() { u64::MAX } else { last.parse().ok()? };
        if last < first {
            return None;
        }
        if first >= length {
            return Some(Range::Outside);
        }
        Some(Range::Part { first, count: last.min(length - 1) - first + 1 })
    };
    parse().unwrap_or(Range::Whole)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn range_header_is_cut_to_the_blob_or_ignored() {
        let part = |first, count| Range::Part { first, count };
        for (text, expected) in [
            ("bytes=0-0", part(0, 1)),
            ("bytes=2-5", part(2, 4)),
            ("bytes=8-", part(8, 2)),
            ("bytes=8-99", part(8, 2)),
            ("bytes=-3", part(7, 3)),
            ("bytes=-99", part(0, 10)),
            ("bytes=10-", Range::Outside),
            ("bytes=-0", Range::Outside),
            ("bytes=5-2", Range::Whole),
            ("bytes=1-2,4-5", Range::Whole),
            ("bytes=18446744073709551616-", Range::Whole),
            ("items=0-1", Range::Whole),
            ("bytes=", Range::Whole),
        ] {
            assert_eq!(parse_range(text, 10), expected, "{text}");
        }
        assert_eq!(parse_range("bytes=0-", 0), Range::Outside);
        assert_eq!(parse_range("bytes=-5", 0), Range::Outside);
    }
}
