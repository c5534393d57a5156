//! Fetches a blob from several peers at once.
//!
//! The chunk list proves itself by the blob's name, and each chunk by the list, so that it does
//! not matter whom a chunk comes from. All sources take the next chunk from one queue; what a
//! source failed to give goes back for the others.

use std::collections::{BTreeSet, VecDeque};
use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context, Result, ensure};
use futures::future::join_all;
use futures::{AsyncReadExt, AsyncWriteExt};
use libp2p::Stream;
use manyhands_core::swarm::chunks::ChunkList;
use manyhands_core::swarm::ids::{Hash, PeerKey};
use manyhands_core::swarm::transfer::{
    CHUNKS_AHEAD_MAX, FOUND, LIST_HEADER_BYTES, blob_header, read_list, read_list_header,
};
use tokio::task::{JoinHandle, spawn_blocking};
use tokio::time::timeout_at;

use super::Net;
use super::limits::Pace;
use super::streams::BLOB_PROTOCOL;
use super::traffic::Kind;
use crate::blobs::{BlobStore, Partial};

/// Sources that are asked; more would not be faster.
const SOURCES_MAX: usize = 16;

/// Why a source is not asked again.
enum Fault {
    /// This machine is at fault: no other source can help.
    Here(anyhow::Error),
    /// The source is.
    There(anyhow::Error),
}

impl From<io::Error> for Fault {
    fn from(error: io::Error) -> Self {
        Self::There(error.into())
    }
}

impl From<tokio::time::error::Elapsed> for Fault {
    fn from(_: tokio::time::error::Elapsed) -> Self {
        Self::There(anyhow::anyhow!("it stalls"))
    }
}

/// See [`Net::fetch`].
pub(super) async fn fetch(
    net: &Net,
    sources: &[PeerKey],
    hash: Hash,
    store: &BlobStore,
    progress: &(dyn Fn(u64, u64) + Send + Sync),
) -> Result<()> {
    if store.contains(&hash) {
        return Ok(());
    }
    let mut alive: VecDeque<PeerKey> = VecDeque::new();
    for source in sources {
        if !alive.contains(source) && alive.len() < SOURCES_MAX {
            alive.push_back(*source);
        }
    }
    let mut faults = Faults { hash, told: Vec::new() };
    let (list, mut opened) = loop {
        let Some(&source) = alive.front() else { return Err(faults.error()) };
        match find(net, source, &hash).await {
            Ok((list, stream)) => break (list, Some(stream)),
            Err(fault) => faults.add(source, fault)?,
        }
        alive.pop_front();
    };
    let opening = store.clone();
    let partial = spawn_blocking(move || opening.partial(&hash, list)).await??;
    let partial = Arc::new(partial);
    loop {
        let todo: BTreeSet<usize> = partial.missing().into_iter().collect();
        if todo.is_empty() {
            break;
        }
        ensure!(!alive.is_empty(), faults.error());
        let work = Work { net, hash, partial: &partial, todo: Mutex::new(todo), progress };
        // The first source's stream is open already.
        let pulls = alive.iter().map(|source| work.pull(*source, opened.take()));
        let ended = join_all(pulls).await;
        for (source, ended) in alive.clone().into_iter().zip(ended) {
            if let Err(fault) = ended {
                alive.retain(|s| *s != source);
                faults.add(source, fault)?;
            }
        }
    }
    let partial = Arc::into_inner(partial).context("a chunk is being written still")?;
    spawn_blocking(move || partial.finish()).await?
}

/// What went wrong with whom.
struct Faults {
    hash: Hash,
    told: Vec<String>,
}

impl Faults {
    fn add(&mut self, source: PeerKey, fault: Fault) -> Result<()> {
        match fault {
            Fault::Here(error) => Err(error),
            Fault::There(error) => {
                let source = source.short();
                tracing::warn!(blob = %self.hash.short(), %source, %error, "source given up");
                self.told.push(format!("{source}: {error}"));
                Ok(())
            }
        }
    }

    fn error(&self) -> anyhow::Error {
        if self.told.is_empty() {
            return anyhow::anyhow!("nobody to fetch blob {} from", self.hash);
        }
        anyhow::anyhow!("no source has all of blob {} ({})", self.hash, self.told.join("; "))
    }
}

/// Asks a source for the list, and checks it; the stream can go on with chunks.
async fn find(net: &Net, source: PeerKey, hash: &Hash) -> Result<(ChunkList, Stream), Fault> {
    let mut stream = open(net, source, hash, true).await?;
    let start = Pace::start(&net.limits);
    let mut header = [0; LIST_HEADER_BYTES];
    timeout_at(start.deadline(0), stream.read_exact(&mut header)).await??;
    let (bytes, length) = read_list_header(header).map_err(|e| Fault::There(e.into()))?;
    let mut values = Vec::new();
    let mut list = (&mut stream).take(bytes);
    timeout_at(start.deadline(bytes), list.read_to_end(&mut values)).await??;
    let list = read_list(hash, length, &values);
    let wrong = || Fault::There(anyhow::anyhow!("it sent a wrong chunk list"));
    Ok((list.ok_or_else(wrong)?, stream))
}

/// Opens a stream to a source that has the blob.
async fn open(net: &Net, source: PeerKey, hash: &Hash, list: bool) -> Result<Stream, Fault> {
    let mut stream = net.open_stream(source, BLOB_PROTOCOL).await.map_err(Fault::There)?;
    let header = blob_header(hash, list);
    let deadline = Pace::start(&net.limits).deadline(0);
    let mut status = [0];
    let ask = async {
        stream.write_all(&header).await?;
        stream.flush().await?;
        stream.read_exact(&mut status).await
    };
    timeout_at(deadline, ask).await??;
    if status != [FOUND] {
        return Err(Fault::There(anyhow::anyhow!("it does not have the blob")));
    }
    Ok(stream)
}

/// A blob that is being fetched, shared by the pulls from all its sources.
struct Work<'a> {
    net: &'a Net,
    hash: Hash,
    partial: &'a Arc<Partial>,
    todo: Mutex<BTreeSet<usize>>,
    progress: &'a (dyn Fn(u64, u64) + Send + Sync),
}

impl Work<'_> {
    fn next(&self) -> Option<usize> {
        self.todo.lock().unwrap_or_else(PoisonError::into_inner).pop_first()
    }

    /// Pulls chunks from one source until none is left, or it fails.
    async fn pull(&self, source: PeerKey, opened: Option<Stream>) -> Result<(), Fault> {
        let mut asked = VecDeque::new();
        let ended = self.pull_chunks(source, opened, &mut asked).await;
        self.todo.lock().unwrap_or_else(PoisonError::into_inner).extend(asked);
        ended
    }

    async fn pull_chunks(
        &self,
        source: PeerKey,
        opened: Option<Stream>,
        asked: &mut VecDeque<usize>,
    ) -> Result<(), Fault> {
        let Some(first) = self.next() else { return Ok(()) };
        asked.push_back(first);
        let mut stream = match opened {
            Some(stream) => stream,
            None => open(self.net, source, &self.hash, false).await?,
        };
        let mut written = 0;
        let mut keeping: Option<JoinHandle<Result<bool>>> = None;
        loop {
            while asked.len() < CHUNKS_AHEAD_MAX
                && let Some(next) = self.next()
            {
                asked.push_back(next);
            }
            let unread = usize::from(keeping.is_some());
            let read = self.exchange(&mut stream, asked, unread, &mut written).await;
            // Whatever came of it, the chunk before is done with first.
            if let Some(kept) = keeping.take() {
                self.kept(kept).await?;
                asked.pop_front();
            }
            let Some((index, bytes)) = read? else { break };
            let partial = Arc::clone(self.partial);
            // Checked and written while the next one arrives.
            keeping = Some(spawn_blocking(move || partial.keep(index, &bytes)));
        }
        // The source learns that no more is asked; what it makes of it does not matter.
        let _ = stream.close().await;
        Ok(())
    }

    /// Asks for all that has not been asked for yet, and reads the first chunk of `asked` after
    /// the `unread` one that is being kept.
    async fn exchange(
        &self,
        stream: &mut Stream,
        asked: &VecDeque<usize>,
        unread: usize,
        written: &mut usize,
    ) -> Result<Option<(usize, Vec<u8>)>, Fault> {
        for &index in asked.iter().skip(unread + *written) {
            let index = u32::try_from(index).map_err(io::Error::other)?;
            stream.write_all(&index.to_le_bytes()).await?;
            *written += 1;
        }
        stream.flush().await?;
        let Some(&index) = asked.get(unread) else { return Ok(None) };
        let bytes = self.read(stream, index).await?;
        *written -= 1;
        Ok(Some((index, bytes)))
    }

    async fn read(&self, stream: &mut Stream, index: usize) -> Result<Vec<u8>, Fault> {
        let range = self.partial.list().range(index);
        let length = range.end - range.start;
        // The list has been verified: a chunk is never longer than `CHUNK_BYTES`.
        let mut bytes = vec![0; usize::try_from(length).map_err(io::Error::other)?];
        let deadline = Pace::start(&self.net.limits).deadline(length);
        timeout_at(deadline, stream.read_exact(&mut bytes)).await??;
        self.net.counters.add(Kind::BlobsIn, bytes.len());
        Ok(bytes)
    }

    async fn kept(&self, keeping: JoinHandle<Result<bool>>) -> Result<(), Fault> {
        let kept = keeping.await.map_err(|e| Fault::Here(e.into()))?;
        if !kept.map_err(Fault::Here)? {
            return Err(Fault::There(anyhow::anyhow!("it sent a wrong chunk")));
        }
        (self.progress)(self.partial.received_bytes(), self.partial.list().length);
        Ok(())
    }
}
