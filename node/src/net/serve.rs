//! Serves blobs: first the chunk list if wanted, then any chunk that is asked for.
//!
//! What a stream carries is in `core::swarm::transfer`.

use std::io;
use std::sync::Arc;

use futures::{AsyncReadExt, AsyncWriteExt};
use libp2p::Stream;
use manyhands_core::swarm::chunks::ChunkList;
use manyhands_core::swarm::ids::{Hash, PeerKey};
use manyhands_core::swarm::transfer::{self, BLOB_HEADER_BYTES, FOUND, LACKING, read_blob_header};
use tokio::sync::Semaphore;
use tokio::task::spawn_blocking;
use tokio::time::{timeout, timeout_at};

use super::limits::{Limits, Pace, SERVES_A_PEER_MAX, SERVING_CHUNKS_MAX, Slots};
use super::traffic::{Counters, Kind};
use crate::blobs::BlobStore;

/// Serves blobs of one store, each stream in a task of its own.
#[derive(Clone)]
pub(super) struct Server {
    blobs: Arc<BlobStore>,
    limits: Arc<Limits>,
    counters: Counters,
    slots: Slots,
    /// Chunks in memory.
    chunks: Arc<Semaphore>,
    /// One list is made at a time: that takes the whole blob.
    listing: Arc<Semaphore>,
}

impl Server {
    pub(super) fn new(blobs: Arc<BlobStore>, limits: Arc<Limits>, counters: Counters) -> Self {
        let chunks = Arc::new(Semaphore::new(SERVING_CHUNKS_MAX));
        let listing = Arc::new(Semaphore::new(1));
        Self { blobs, limits, counters, slots: Slots::default(), chunks, listing }
    }

    pub(super) fn spawn(&self, peer: PeerKey, stream: Stream) {
        let Some(slot) = self.slots.take(peer, SERVES_A_PEER_MAX) else { return };
        let server = self.clone();
        tokio::spawn(async move {
            if let Err(error) = server.serve(stream).await {
                tracing::debug!(peer = %peer.short(), %error, "a blob was not served to its end");
            }
            drop(slot);
        });
    }

    async fn serve(&self, mut stream: Stream) -> io::Result<()> {
        let mut header = [0; BLOB_HEADER_BYTES];
        timeout(self.limits.grace, stream.read_exact(&mut header)).await??;
        let (hash, wants_list) = read_blob_header(&header);
        let Some(list) = self.list(hash).await? else {
            timeout(self.limits.grace, stream.write_all(&[LACKING])).await??;
            return stream.close().await;
        };
        let mut answer = vec![FOUND];
        if wants_list {
            answer.extend(transfer::list(&list));
        }
        self.write(&mut stream, &answer).await?;
        let mut index = [0; 4];
        loop {
            match timeout(self.limits.grace, stream.read_exact(&mut index)).await? {
                Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => return stream.close().await,
                read => read?,
            }
            let index = u32::from_le_bytes(index) as usize;
            if index >= list.count() {
                return Err(io::ErrorKind::InvalidData.into());
            }
            let permit = self.chunks.acquire().await.map_err(io::Error::other)?;
            let (blobs, of) = (Arc::clone(&self.blobs), Arc::clone(&list));
            let chunk = spawn_blocking(move || blobs.chunk(&hash, &of, index)).await?;
            let chunk = chunk.ok_or(io::ErrorKind::NotFound)?;
            self.write(&mut stream, &chunk).await?;
            self.counters.add(Kind::BlobsOut, chunk.len());
            drop(permit);
        }
    }

    async fn list(&self, hash: Hash) -> io::Result<Option<Arc<ChunkList>>> {
        if !self.blobs.contains(&hash) {
            return Ok(None);
        }
        let permit = self.listing.acquire().await.map_err(io::Error::other)?;
        let blobs = Arc::clone(&self.blobs);
        let list = spawn_blocking(move || blobs.chunk_list(&hash)).await?;
        drop(permit);
        Ok(list)
    }

    /// Writes and flushes, or gives up on a reader that is too slow.
    async fn write(&self, stream: &mut Stream, bytes: &[u8]) -> io::Result<()> {
        let deadline = Pace::start(&self.limits).deadline(bytes.len() as u64);
        let write = async {
            stream.write_all(bytes).await?;
            stream.flush().await
        };
        timeout_at(deadline, write).await?
    }
}
