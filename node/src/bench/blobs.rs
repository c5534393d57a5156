//! A large blob on loopback: plain TCP, then the network's uploads and fetches by each transport.
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

use super::{Row, Table, median};
use crate::blobs::BlobStore;
use crate::identity::Identity;
use crate::net::{Limits, Net, NetConfig, NetEvent};

const BLOB_BYTES: usize = 64 << 20;
/// Of plain TCP: what is read and written at once.
const BUFFER_BYTES: usize = 256 << 10;
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
    let mut plain = Plain::connect()?;
    let mut pairs = Vec::new();
    for (index, (_, listen)) in TRANSPORTS.iter().enumerate() {
        let dir = dir.path.join(index.to_string());
        pairs.push(runtime.block_on(Pair::connect(&dir, listen, &bytes))?);
    }
    // Put and get of plain TCP, then of each transport.
    let mut times = vec![(Vec::new(), Vec::new()); 1 + pairs.len()];
    // The first round warms up: connections open their windows, files enter the cache.
    for round in 0..=rounds.max(1) {
        let mut push = |which: usize, put, get| {
            if round > 0 {
                times[which].0.push(put);
                times[which].1.push(get);
            }
        };
        push(0, plain.put(&bytes)?, plain.get()?);
        for (index, pair) in pairs.iter_mut().enumerate() {
            let (put, get) = runtime
                .block_on(async { anyhow::Ok((pair.put(&bytes).await?, pair.get().await?)) })?;
            push(1 + index, put, get);
        }
    }
    let medians: Vec<_> = times.into_iter().map(|(p, g)| (median(p), median(g))).collect();
    let names = ["plain tcp"].into_iter().chain(TRANSPORTS.map(|(name, _)| name));
    for (name, (put, get)) in names.zip(&medians) {
        for (way, seconds, base) in [("put", *put, medians[0].0), ("get", *get, medians[0].1)] {
            let ours = name != "plain tcp";
            table.push(Row {
                name: "blob".into(),
                shape: format!("{way} {} MiB", BLOB_BYTES >> 20),
                threads,
                engine: name.into(),
                adapter: "loopback".into(),
                median_s: seconds,
                rate: (BLOB_BYTES >> 20) as f64 / seconds,
                unit: "MiB/s",
                ratio: ours.then_some(base / seconds),
                note: if ours { dir.note(way) } else { String::new() },
            });
        }
    }
    Ok(())
}

/// A directory for the stores, in memory where the system has such; removed when dropped.
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

/// A TCP connection to a thread that takes a blob, then gives one, again and again.
struct Plain {
    stream: TcpStream,
    buffer: Vec<u8>,
}

impl Plain {
    fn connect() -> Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").context("cannot listen")?;
        let stream = TcpStream::connect(listener.local_addr()?).context("cannot connect")?;
        let (mut other, _) = listener.accept().context("cannot accept")?;
        thread::spawn(move || -> std::io::Result<()> {
            let mut buffer = vec![0; BUFFER_BYTES];
            // Ends with the connection.
            loop {
                for _ in 0..BLOB_BYTES / BUFFER_BYTES {
                    other.read_exact(&mut buffer)?;
                }
                other.write_all(&[0])?;
                other.read_exact(&mut [0])?;
                for _ in 0..BLOB_BYTES / BUFFER_BYTES {
                    other.write_all(&buffer)?;
                }
            }
        });
        Ok(Self { stream, buffer: vec![0; BUFFER_BYTES] })
    }

    fn put(&mut self, bytes: &[u8]) -> Result<f64> {
        let started = Instant::now();
        for piece in bytes.chunks(BUFFER_BYTES) {
            self.stream.write_all(piece)?;
        }
        self.stream.read_exact(&mut [0])?;
        Ok(started.elapsed().as_secs_f64())
    }

    fn get(&mut self) -> Result<f64> {
        let started = Instant::now();
        self.stream.write_all(&[0])?;
        for _ in 0..BLOB_BYTES / BUFFER_BYTES {
            self.stream.read_exact(&mut self.buffer)?;
        }
        Ok(started.elapsed().as_secs_f64())
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
