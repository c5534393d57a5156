//! A large blob on loopback: plain TCP, the least that an encrypted transport with checked blobs
//! must do, then the network's uploads and fetches by each transport.
//!
//! Ours encrypts, hashes, checks and, in fetches, reads and writes files; plain TCP does none.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use manyhands_core::swarm::ids::Hash;
use ring::aead::{Aad, CHACHA20_POLY1305, LessSafeKey, NONCE_LEN, Nonce, UnboundKey};

use super::{Row, Table, median};
use crate::blobs::BlobStore;
use crate::identity::Identity;
use crate::net::{Limits, Net, NetConfig, NetEvent};

const BLOB_BYTES: usize = 64 << 20;
/// Of plain TCP: what is read and written at once.
const BUFFER_BYTES: usize = 256 << 10;
/// Of sealed TCP: a record of Noise, the largest that fits whole into the blob with its tag.
const RECORD_BYTES: usize = 32 << 10;
/// What comes before the transports: nothing but TCP, and encryption and hash without a network.
const BASES: [&str; 2] = ["plain tcp", "sealed tcp"];
/// Name, and where to listen.
const TRANSPORTS: [(&str, &str); 3] = [
    ("tcp", "/ip4/127.0.0.1/tcp/0"),
    ("quic", "/ip4/127.0.0.1/udp/0/quic-v1"),
    ("websocket", "/ip4/127.0.0.1/tcp/0/ws"),
];

/// Measures all, alternating, so that a busy moment of the machine hits all alike.
pub(super) fn run(table: &mut Table, threads: usize, rounds: usize) -> Result<()> {
    let runtime = tokio::runtime::Runtime::new().context("cannot start tokio")?;
    let dir = Scratch::new()?;
    let bytes: Vec<u8> = (0..BLOB_BYTES).map(|i| (i * 31 % 251) as u8 ^ (i >> 12) as u8).collect();
    let mut bases = [Link::connect(false)?, Link::connect(true)?];
    let mut pairs = Vec::new();
    for (index, (_, listen)) in TRANSPORTS.iter().enumerate() {
        let dir = dir.path.join(index.to_string());
        pairs.push(runtime.block_on(Pair::connect(&dir, listen, &bytes))?);
    }
    // Put and get of the bases, then of each transport.
    let mut times = vec![(Vec::new(), Vec::new()); bases.len() + pairs.len()];
    // The first round warms up: connections open their windows, files enter the cache.
    for round in 0..=rounds.max(1) {
        let mut push = |which: usize, put, get| {
            if round > 0 {
                times[which].0.push(put);
                times[which].1.push(get);
            }
        };
        for (index, link) in bases.iter_mut().enumerate() {
            push(index, link.put(&bytes)?, link.get()?);
        }
        for (index, pair) in pairs.iter_mut().enumerate() {
            let (put, get) = runtime
                .block_on(async { anyhow::Ok((pair.put(&bytes).await?, pair.get().await?)) })?;
            push(BASES.len() + index, put, get);
        }
    }
    let medians: Vec<_> = times.into_iter().map(|(p, g)| (median(p), median(g))).collect();
    let names = BASES.into_iter().chain(TRANSPORTS.map(|(name, _)| name));
    for (name, (put, get)) in names.zip(&medians) {
        for (way, seconds, base) in [("put", *put, medians[0].0), ("get", *get, medians[0].1)] {
            let note = match name {
                "plain tcp" => String::new(),
                "sealed tcp" => "of plain tcp; ChaCha20-Poly1305 and BLAKE3, nothing else".into(),
                _ => dir.note(way),
            };
            table.push(Row {
                name: "blob".into(),
                shape: format!("{way} {} MiB", BLOB_BYTES >> 20),
                threads,
                engine: name.into(),
                adapter: "loopback".into(),
                median_s: seconds,
                rate: (BLOB_BYTES >> 20) as f64 / seconds,
                unit: "MiB/s",
                ratio: (name != "plain tcp").then_some(base / seconds),
                note,
            });
        }
    }
    Ok(())
}

/// A directory in memory where there is one, that goes with the bench.
pub(super) struct Scratch {
    pub(super) path: PathBuf,
}

impl Scratch {
    pub(super) fn new() -> Result<Self> {
        let memory = Path::new("/dev/shm");
        let parent = if memory.is_dir() { memory.into() } else { std::env::temp_dir() };
        let path = parent.join(format!("manyhands-bench-{}", std::process::id()));
        std::fs::create_dir_all(&path)
            .with_context(|| format!("cannot make {}", path.display()))?;
        Ok(Self { path })
    }

    fn note(&self, way: &str) -> String {
        let place = self.path.parent().unwrap_or(&self.path).display();
        let stored =
            if way == "get" { format!(", from and to files in {place}") } else { String::new() };
        format!("of plain tcp; encrypted and hashed{stored}")
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_dir_all(&self.path) {
            eprintln!("warning: cannot remove {}: {error}", self.path.display());
        }
    }
}

/// One end of a TCP connection.
struct Link {
    stream: TcpStream,
    buffer: Vec<u8>,
    /// Encrypts in one way and the other, and numbers the records.
    key: Option<LessSafeKey>,
    records: u64,
}

impl Link {
    /// Connected to a thread that takes a blob, then gives one, again and again.
    fn connect(sealed: bool) -> Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").context("cannot listen")?;
        let ours = TcpStream::connect(listener.local_addr()?).context("cannot connect")?;
        let (theirs, _) = listener.accept().context("cannot accept")?;
        let [link, mut other] = [ours, theirs].map(|stream| {
            let key = UnboundKey::new(&CHACHA20_POLY1305, &[7; 32]).ok().filter(|_| sealed);
            let key = key.map(LessSafeKey::new);
            Self { stream, buffer: Vec::new(), key, records: 0 }
        });
        thread::spawn(move || -> Result<()> {
            let blob = vec![7; BLOB_BYTES];
            // Ends with the connection.
            loop {
                other.receive()?;
                other.stream.write_all(&[0])?;
                other.stream.read_exact(&mut [0])?;
                other.send(&blob)?;
            }
        });
        Ok(link)
    }

    fn put(&mut self, bytes: &[u8]) -> Result<f64> {
        let started = Instant::now();
        self.send(bytes)?;
        self.stream.read_exact(&mut [0])?;
        Ok(started.elapsed().as_secs_f64())
    }

    fn get(&mut self) -> Result<f64> {
        let started = Instant::now();
        self.stream.write_all(&[0])?;
        self.receive()?;
        Ok(started.elapsed().as_secs_f64())
    }

    fn nonce(&mut self) -> Nonce {
        self.records += 1;
        let mut bytes = [0; NONCE_LEN];
        bytes[..8].copy_from_slice(&self.records.to_le_bytes());
        Nonce::assume_unique_for_key(bytes)
    }

    fn send(&mut self, blob: &[u8]) -> Result<()> {
        if self.key.is_none() {
            return Ok(blob.chunks(BUFFER_BYTES).try_for_each(|p| self.stream.write_all(p))?);
        }
        for piece in blob.chunks(RECORD_BYTES) {
            let nonce = self.nonce();
            let Some(key) = &self.key else { bail!("a sealed link has a key") };
            self.buffer.clear();
            self.buffer.extend_from_slice(piece);
            let sealed = key.seal_in_place_append_tag(nonce, Aad::empty(), &mut self.buffer);
            sealed.ok().context("cannot seal")?;
            self.stream.write_all(&self.buffer)?;
        }
        Ok(())
    }

    fn receive(&mut self) -> Result<()> {
        if self.key.is_none() {
            self.buffer.resize(BUFFER_BYTES, 0);
            let mut pieces = 0..BLOB_BYTES / BUFFER_BYTES;
            return Ok(pieces.try_for_each(|_| self.stream.read_exact(&mut self.buffer))?);
        }
        let mut hasher = blake3::Hasher::new();
        self.buffer.resize(RECORD_BYTES + CHACHA20_POLY1305.tag_len(), 0);
        for _ in 0..BLOB_BYTES / RECORD_BYTES {
            let nonce = self.nonce();
            let Some(key) = &self.key else { bail!("a sealed link has a key") };
            self.stream.read_exact(&mut self.buffer)?;
            let opened = key.open_in_place(nonce, Aad::empty(), &mut self.buffer);
            hasher.update(opened.ok().context("cannot open")?);
        }
        std::hint::black_box(hasher.finalize());
        Ok(())
    }
}

/// A node that has the blob and expects it, and one that is connected to it.
struct Pair {
    server: Net,
    events: tokio::sync::mpsc::Receiver<NetEvent>,
    client: Net,
    store: BlobStore,
    hash: Hash,
}

impl Pair {
    async fn connect(dir: &Path, listen: &str, bytes: &[u8]) -> Result<Self> {
        let blobs = BlobStore::open(&dir.join("server"), 2 * BLOB_BYTES as u64)?;
        let hash = blobs.put(bytes)?;
        let config = |seed, listen, blobs| NetConfig {
            identity: Identity::from_seed([seed; 32]),
            listen,
            limits: Limits::default(),
            blobs,
            trust: Vec::new(),
        };
        let listen = vec![listen.parse().context("cannot read an address")?];
        let (server, events) = Net::start(config(1, listen, Some(Arc::new(blobs)))).await?;
        let (client, _) = Net::start(config(2, vec![], None)).await?;
        client.dial(server.addresses()).await?;
        let store = BlobStore::open(&dir.join("client"), 2 * BLOB_BYTES as u64)?;
        Ok(Self { server, events, client, store, hash })
    }

    async fn put(&mut self, bytes: &[u8]) -> Result<f64> {
        let (unit, bytes) = (Hash::of(b"bench"), bytes.to_vec());
        self.server.expect(self.client.key(), unit, self.hash, bytes.len() as u64)?;
        let started = Instant::now();
        self.client.send_result(self.server.key(), unit, bytes).await?;
        let seconds = started.elapsed().as_secs_f64();
        loop {
            match self.events.recv().await {
                Some(NetEvent::Result { outcome: Ok(_), .. }) => return Ok(seconds),
                Some(NetEvent::Connected { .. }) => {}
                other => bail!("the upload ended with {other:?}"),
            }
        }
    }

    async fn get(&self) -> Result<f64> {
        let started = Instant::now();
        self.client.fetch(&[self.server.key()], self.hash, &self.store, |_, _| ()).await?;
        let seconds = started.elapsed().as_secs_f64();
        ensure!(self.store.contains(&self.hash), "the blob did not arrive");
        self.store.remove(&self.hash)?;
        Ok(seconds)
    }
}
