//! Uploads of results: only what is expected, no faster than memory allows, no slower than useful.
//!
//! What a stream carries is in `core::swarm::transfer`. The receiver hashes while bytes arrive, and
//! hands over only what has the hash of the receipt.

use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use anyhow::{Result, bail, ensure};
use futures::{AsyncReadExt, AsyncWriteExt};
use libp2p::Stream;
use manyhands_core::swarm::ids::{Hash, PeerKey};
use manyhands_core::swarm::transfer::{
    Ack, PIECE_BYTES, RESULT_HEADER_BYTES, read_result_header, result_header,
};
use tokio::sync::{Semaphore, mpsc};
use tokio::time::{timeout, timeout_at};

use super::NetEvent;
use super::limits::{
    EXPECTED_A_PEER_MAX, EXPECTED_MAX, Limits, Pace, REQUEST_TIMEOUT, Slots, UPLOADS_A_PEER_MAX,
};
use super::traffic::{Counters, Kind};

/// The unit in which memory is set aside.
const PERMIT_BYTES: u64 = 1024;

/// Why an upload that was expected is of no use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ResultFault {
    /// The bytes do not have the hash of the receipt.
    DiffersFromReceipt,
    /// Slower than [`Limits::upload_bytes_per_second_min`]. The peer may try again.
    TooSlow,
    /// The connection or stream ended first. The peer may try again.
    Broken,
}

#[derive(Debug)]
struct Expectation {
    receipt: Hash,
    bytes: u64,
    receiving: bool,
}

/// What peers may upload.
#[derive(Clone, Debug, Default)]
pub(super) struct Expected(Arc<Mutex<BTreeMap<(PeerKey, Hash), Expectation>>>);

impl Expected {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<(PeerKey, Hash), Expectation>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn expect(
        &self,
        peer: PeerKey,
        unit: Hash,
        receipt: Hash,
        bytes: u64,
    ) -> Result<()> {
        let mut all = self.lock();
        ensure!(all.len() < EXPECTED_MAX, "{EXPECTED_MAX} results are expected already");
        let of_peer = all.range((peer, Hash([0; 32]))..=(peer, Hash([255; 32]))).count();
        ensure!(
            of_peer < EXPECTED_A_PEER_MAX,
            "{EXPECTED_A_PEER_MAX} results of {} are expected already",
            peer.short()
        );
        all.insert((peer, unit), Expectation { receipt, bytes, receiving: false });
        Ok(())
    }

    pub(super) fn forget(&self, peer: PeerKey, unit: Hash) {
        self.lock().remove(&(peer, unit));
    }

    pub(super) fn forget_peer(&self, peer: PeerKey) {
        self.lock().retain(|(p, _), _| *p != peer);
    }

    /// Begins to receive: the receipt, where these bytes are expected and not arriving already.
    fn begin(&self, peer: PeerKey, unit: Hash, length: u64) -> Option<Hash> {
        let mut all = self.lock();
        let expectation = all.get_mut(&(peer, unit))?;
        if length > expectation.bytes || expectation.receiving {
            return None;
        }
        expectation.receiving = true;
        Some(expectation.receipt)
    }

    /// Ends it: whether it is expected still. A fault of the line leaves the peer another try.
    fn end(&self, peer: PeerKey, unit: Hash, receipt: Hash, retry: bool) -> bool {
        let mut all = self.lock();
        let Some(expectation) = all.get_mut(&(peer, unit)) else { return false };
        if expectation.receipt != receipt {
            return false;
        }
        if retry {
            expectation.receiving = false;
        } else {
            all.remove(&(peer, unit));
        }
        true
    }
}

/// Receives uploads, each in a task of its own.
#[derive(Clone)]
pub(super) struct Receiver {
    expected: Expected,
    limits: Arc<Limits>,
    counters: Counters,
    events: mpsc::Sender<NetEvent>,
    slots: Slots,
    /// Memory for bytes that are arriving.
    memory: Arc<Semaphore>,
}

impl Receiver {
    pub(super) fn new(
        expected: Expected,
        limits: Arc<Limits>,
        counters: Counters,
        events: mpsc::Sender<NetEvent>,
    ) -> Self {
        let permits = limits.receiving_bytes_max.div_ceil(PERMIT_BYTES);
        let permits = usize::try_from(permits).unwrap_or(usize::MAX).min(Semaphore::MAX_PERMITS);
        let memory = Arc::new(Semaphore::new(permits));
        Self { expected, limits, counters, events, slots: Slots::default(), memory }
    }

    pub(super) fn spawn(&self, peer: PeerKey, stream: Stream) {
        let Some(slot) = self.slots.take(peer, UPLOADS_A_PEER_MAX) else { return };
        let receiver = self.clone();
        tokio::spawn(async move {
            if let Err(error) = receiver.receive(peer, stream).await {
                tracing::debug!(peer = %peer.short(), %error, "an upload was not received");
            }
            drop(slot);
        });
    }

    async fn receive(&self, peer: PeerKey, mut stream: Stream) -> io::Result<()> {
        let mut header = [0; RESULT_HEADER_BYTES];
        timeout(self.limits.grace, stream.read_exact(&mut header)).await??;
        let (unit, length) = read_result_header(&header);
        let Some(receipt) = self.expected.begin(peer, unit, length) else {
            return self.acknowledge(stream, Ack::Unexpected).await;
        };
        let permits = u32::try_from(length.div_ceil(PERMIT_BYTES)).unwrap_or(u32::MAX);
        let memory = timeout(self.limits.grace, self.memory.acquire_many(permits)).await;
        let Ok(Ok(memory)) = memory else {
            self.expected.end(peer, unit, receipt, true);
            return self.acknowledge(stream, Ack::Busy).await;
        };
        let outcome = self.read(&mut stream, length, receipt).await;
        let ack = match &outcome {
            Ok(_) => Some(Ack::Taken),
            Err(ResultFault::DiffersFromReceipt) => Some(Ack::Differs),
            Err(ResultFault::TooSlow) => Some(Ack::TooSlow),
            Err(ResultFault::Broken) => None,
        };
        let retry = matches!(outcome, Err(ResultFault::TooSlow | ResultFault::Broken));
        if !self.expected.end(peer, unit, receipt, retry) {
            return self.acknowledge(stream, Ack::Unexpected).await;
        }
        // Only a program that has ended does not take it.
        let told = self.events.send(NetEvent::Result { peer, unit, outcome }).await;
        drop(memory);
        match (told, ack) {
            (Ok(()), Some(ack)) => self.acknowledge(stream, ack).await,
            _ => Ok(()),
        }
    }

    /// Reads the bytes and checks them. Memory for all of them has been set aside.
    async fn read(
        &self,
        stream: &mut Stream,
        length: u64,
        receipt: Hash,
    ) -> Result<Vec<u8>, ResultFault> {
        let length = usize::try_from(length).map_err(|_| ResultFault::Broken)?;
        let pace = Pace::start(&self.limits);
        let mut bytes = Vec::with_capacity(length);
        let mut piece = vec![0; PIECE_BYTES.min(length)];
        let mut hasher = blake3::Hasher::new();
        while bytes.len() < length {
            let wanted = piece.len().min(length - bytes.len());
            let read = stream.read(&mut piece[..wanted]);
            let count = match timeout_at(pace.deadline(bytes.len() as u64), read).await {
                Err(_) => return Err(ResultFault::TooSlow),
                Ok(Err(_) | Ok(0)) => return Err(ResultFault::Broken),
                Ok(Ok(count)) => count,
            };
            self.counters.add(Kind::ResultsIn, count);
            hasher.update(&piece[..count]);
            bytes.extend_from_slice(&piece[..count]);
        }
        if Hash::from(hasher.finalize()) != receipt {
            return Err(ResultFault::DiffersFromReceipt);
        }
        Ok(bytes)
    }

    async fn acknowledge(&self, mut stream: Stream, ack: Ack) -> io::Result<()> {
        let write = async {
            stream.write_all(&[ack as u8]).await?;
            stream.close().await
        };
        timeout(self.limits.grace, write).await?
    }
}

/// Uploads a result, and waits until it was taken or refused.
pub(super) async fn send(
    stream: Stream,
    unit: Hash,
    bytes: &[u8],
    limits: &Limits,
    counters: &Counters,
) -> Result<()> {
    let (mut read, mut write) = stream.split();
    let upload = async {
        let pace = Pace::start(limits);
        let length = bytes.len() as u64;
        let header = result_header(&unit, length);
        timeout_at(pace.deadline(0), write.write_all(&header)).await??;
        for (i, piece) in bytes.chunks(PIECE_BYTES).enumerate() {
            let deadline = pace.deadline(((i + 1) * PIECE_BYTES) as u64);
            timeout_at(deadline, write.write_all(piece)).await??;
            counters.add(Kind::ResultsOut, piece.len());
        }
        timeout_at(pace.deadline(length), write.close()).await?
    };
    let mut ack = [0; 1];
    let answer = read.read_exact(&mut ack);
    tokio::pin!(upload, answer);
    // A refusal comes before the end, and makes the rest of the upload pointless.
    let answered = tokio::select! {
        answered = &mut answer => answered,
        uploaded = &mut upload => match timeout(REQUEST_TIMEOUT, answer).await {
            Ok(answered) => uploaded.and(answered),
            Err(_) => bail!("the peer does not say whether it took the result"),
        },
    };
    answered?;
    Ok(Ack::read(ack[0])?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn expectations_are_bounded_and_end_once() {
        let expected = Expected::default();
        let (peer, other) = (PeerKey([1; 32]), PeerKey([2; 32]));
        let unit = |i: usize| Hash::of(&i.to_le_bytes());
        for i in 0..EXPECTED_A_PEER_MAX {
            expected.expect(peer, unit(i), unit(0), 10).unwrap();
        }
        assert!(expected.expect(peer, unit(999), unit(0), 10).is_err());
        expected.expect(other, unit(999), unit(0), 10).unwrap();
        assert_eq!(expected.begin(peer, unit(1), 11), None, "longer than expected");
        assert_eq!(expected.begin(other, unit(1), 10), None, "expected of another peer");
        assert_eq!(expected.begin(peer, unit(1), 10), Some(unit(0)));
        assert_eq!(expected.begin(peer, unit(1), 10), None, "arriving already");
        assert!(expected.end(peer, unit(1), unit(0), true));
        assert!(expected.begin(peer, unit(1), 10).is_some());
        assert!(expected.end(peer, unit(1), unit(0), false));
        assert_eq!(expected.begin(peer, unit(1), 10), None, "taken already");
        expected.forget_peer(peer);
        assert_eq!(expected.lock().len(), 1);
    }
}
