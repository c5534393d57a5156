//! Blobs: from this browser's storage, verified, or chunk by chunk from the host.
//!
//! What is kept may be whole, half fetched, or damaged: every chunk of it is checked, and only
//! those that are wrong are fetched. So nothing has to remember how far a download came.

use std::cell::Cell;

use anyhow::{Result, ensure};
use js_sys::Uint8Array;
use manyhands_core::swarm::chunks::ChunkList;
use manyhands_core::swarm::ids::{Hash, PeerKey};
use manyhands_core::swarm::transfer::CHUNKS_AHEAD_MAX;
use wasm_bindgen::prelude::*;

use crate::link::Link;
use crate::volunteer::Outside;

/// Largest blob that a tab takes: memory of a tab ends at a few of them.
const TAB_BLOB_BYTES_MAX: u64 = 512 << 20;

/// The same, for the page.
#[wasm_bindgen]
pub fn blob_bytes_max() -> f64 {
    TAB_BLOB_BYTES_MAX as f64
}

/// The blob of that hash. Bytes that the host gives are added to `fetched`.
pub async fn get(
    link: &Link,
    peer: PeerKey,
    outside: &Outside,
    hash: &Hash,
    fetched: &Cell<u64>,
) -> Result<Uint8Array> {
    let name = hash.to_string();
    let kept = outside.read_blob(&name).await.dyn_into::<Uint8Array>().ok().map(|b| b.to_vec());
    if let Some(bytes) = &kept
        && Hash::of(bytes) == *hash
    {
        return Ok(Uint8Array::from(&bytes[..]));
    }
    let mut chunks = link.blob(peer, hash).await?;
    let length = chunks.list.length;
    ensure!(length <= TAB_BLOB_BYTES_MAX, "{length} bytes are more than a tab can take");
    let (mut bytes, missing) = begin(kept.as_deref(), &chunks.list);
    if kept.is_some() {
        let (wrong, all) = (missing.len(), chunks.list.count());
        outside.say(&format!(
            "a kept file was damaged or incomplete: {wrong} of its {all} pieces are fetched again"
        ));
    }
    let mut asked = missing.len().min(CHUNKS_AHEAD_MAX);
    chunks.ask(&missing[..asked]).await?;
    for &index in &missing {
        let chunk = chunks.next(index).await?;
        fetched.set(fetched.get() + chunk.len() as u64);
        if asked < missing.len() {
            chunks.ask(&missing[asked..asked + 1]).await?;
            asked += 1;
        }
        let offset = chunks.list.range(index).start;
        let piece = Uint8Array::from(&chunk[..]);
        outside.write_blob(&name, offset as f64, piece, length as f64).await;
        let at = usize::try_from(offset)?;
        bytes[at..at + chunk.len()].copy_from_slice(&chunk);
    }
    Ok(Uint8Array::from(&bytes[..]))
}

/// What is kept of a blob, in its length, and which chunks are wrong.
fn begin(kept: Option<&[u8]>, list: &ChunkList) -> (Vec<u8>, Vec<usize>) {
    let mut bytes = kept.unwrap_or_default().to_vec();
    bytes.resize(list.length as usize, 0);
    let is_wrong = |i: &usize| {
        let range = list.range(*i);
        !list.check(*i, &bytes[range.start as usize..range.end as usize])
    };
    let missing = (0..list.count()).filter(is_wrong).collect();
    (bytes, missing)
}
