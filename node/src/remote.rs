//! What a coordination peer serves over HTTP to whoever reads: manifest, ledger, blobs. Blocking.
//!
//! Nothing that comes back is trusted: records prove themselves by their chain, blobs by their
//! hash.

use std::io::Read;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Error, Result, bail, ensure};
use jiff::Timestamp;
use manyhands_core::swarm::chain::RECORD_BYTES_MAX;
use manyhands_core::swarm::chunks::BLOB_BYTES_MAX;
use manyhands_core::swarm::coordinator::Blobs;
use manyhands_core::swarm::ids::Hash;
use manyhands_core::swarm::protocol::PROTOCOL;
use rustls::pki_types::CertificateDer;
use ureq::http::Response;
use ureq::tls::{Certificate, RootCerts, TlsConfig};
use ureq::{Agent, Body};

use crate::clock;
use crate::host::Manifest;
use crate::http::{RECORDS_PAGE_BYTES_MAX, read_certificates};

/// In which a small answer is there, and a large one has begun.
const TIMEOUT: Duration = Duration::from_secs(20);
/// In which a blob is there.
const BLOB_TIMEOUT: Duration = Duration::from_secs(600);
/// Largest manifest.
const MANIFEST_BYTES_MAX: u64 = 1 << 20;

/// A coordination peer, by the address that it printed.
#[derive(Clone, Debug)]
pub struct Remote {
    url: String,
    agent: Agent,
}

impl Remote {
    /// The peer at `url`; nothing is sent yet. `trust` are the certificate authorities for https;
    /// if there are none, the program's own list counts.
    ///
    /// # Errors
    /// When that is no address of a run.
    pub fn new(url: &str, trust: &[CertificateDer<'_>]) -> Result<Self> {
        let url = url.trim_end_matches('/').to_string();
        if !is_url(&url) {
            bail!(
                "{url:?} is no address of a run; it begins with http:// or https://, as the host printed it"
            );
        }
        let roots = match trust {
            [] => RootCerts::WebPki,
            some => {
                let own = some.iter().map(|c| Certificate::from_der(c).to_owned());
                RootCerts::Specific(Arc::new(own.collect()))
            }
        };
        let agent = Agent::config_builder()
            .tls_config(TlsConfig::builder().root_certs(roots).build())
            .timeout_recv_response(Some(TIMEOUT))
            .timeout_connect(Some(TIMEOUT))
            .timeout_global(Some(BLOB_TIMEOUT))
            .http_status_as_error(false)
            .build();
        Ok(Self { url, agent: agent.into() })
    }

    /// Its address.
    pub fn url(&self) -> &str {
        &self.url
    }

    /// Where the run can be joined.
    ///
    /// # Errors
    /// When it cannot be reached, or speaks another protocol.
    pub fn manifest(&self) -> Result<Manifest> {
        let path = "/api/manifest";
        let answer = self.ask(path)?;
        let date = answer.as_ref().and_then(|a| a.headers().get("date")?.to_str().ok());
        if let Some(told) = date.and_then(|date| clock::difference(Timestamp::now(), date)) {
            eprintln!("warning: {told}");
        }
        let bytes = answer.map(|a| self.read(path, a, MANIFEST_BYTES_MAX)).transpose()?;
        let manifest: Option<Manifest> = bytes.and_then(|b| serde_json::from_slice(&b).ok());
        let manifest = manifest.with_context(|| {
            format!("{} is no coordination peer of this program's version", self.url)
        })?;
        let theirs = manifest.protocol;
        ensure!(
            theirs == PROTOCOL,
            "the host speaks protocol {theirs}, this program {PROTOCOL}; use the same version"
        );
        Ok(manifest)
    }

    /// Records of the ledger from `from` on, as many as it gives at once; none at the end.
    ///
    /// # Errors
    /// When it cannot be reached.
    pub fn records(&self, from: u64) -> Result<Vec<Vec<u8>>> {
        let path = format!("/api/ledger/raw?from={from}");
        // Each record comes with its length.
        let bytes_max = RECORDS_PAGE_BYTES_MAX + RECORD_BYTES_MAX + 4;
        let bytes = self.get(&path, bytes_max as u64)?;
        let bytes = bytes.with_context(|| format!("{} serves no records", self.url))?;
        split(&bytes).with_context(|| format!("{} sent what are no records", self.url))
    }

    /// A blob; `None` if the peer does not have it.
    ///
    /// # Errors
    /// When it cannot be reached, or sends other bytes.
    pub fn blob(&self, hash: &Hash) -> Result<Option<Vec<u8>>> {
        let Some(bytes) = self.get(&format!("/api/blobs/{hash}"), BLOB_BYTES_MAX)? else {
            return Ok(None);
        };
        ensure!(Hash::of(&bytes) == *hash, "{} sent other bytes for blob {hash}", self.url);
        Ok(Some(bytes))
    }

    /// The body of an answer; `None` where there is no such thing.
    fn get(&self, path: &str, bytes_max: u64) -> Result<Option<Vec<u8>>> {
        self.ask(path)?.map(|answer| self.read(path, answer, bytes_max)).transpose()
    }

    fn ask(&self, path: &str) -> Result<Option<Response<Body>>> {
        let url = &self.url;
        let answer = self.agent.get(format!("{url}{path}")).call().map_err(explain(url))?;
        match answer.status().as_u16() {
            200 => Ok(Some(answer)),
            404 => Ok(None),
            status => bail!("{url}{path} answers with status {status}"),
        }
    }

    fn read(&self, path: &str, answer: Response<Body>, bytes_max: u64) -> Result<Vec<u8>> {
        let url = &self.url;
        let mut bytes = Vec::new();
        let mut reader = answer.into_body().into_reader().take(bytes_max + 1);
        reader.read_to_end(&mut bytes).with_context(|| format!("{url}{path} broke off"))?;
        ensure!(bytes.len() as u64 <= bytes_max, "{url}{path} is over {bytes_max} bytes");
        Ok(bytes)
    }
}

/// Certificate authorities for https: those of the file if there is one, else those that the system
/// trusts.
pub fn trusted(url: &str, ca: Option<&Path>) -> Result<Vec<CertificateDer<'static>>> {
    match ca {
        Some(path) => read_certificates(path),
        None if url.starts_with("https://") => Ok(rustls_native_certs::load_native_certs().certs),
        None => Ok(Vec::new()),
    }
}

/// What a failed request means and what to do.
fn explain(url: &str) -> impl Fn(ureq::Error) -> Error {
    let url = url.to_string();
    move |error| {
        let text = error.to_string();
        let advice = if text.contains("UnknownIssuer") {
            "its certificate is from an authority that this machine does not trust; give that authority's certificate with --ca"
        } else if text.contains("Expired") || text.contains("NotValidYet") {
            "its certificate is out of its time; check this machine's clock, then tell the operator"
        } else if text.contains("certificate") {
            "its certificate is not good; the operator can say why"
        } else {
            "check the address, and that the host is running and reachable from here"
        };
        Error::from(error).context(format!("cannot reach {url}; {advice}"))
    }
}

/// Whether an argument is the address of a peer, and no directory.
pub fn is_url(text: &str) -> bool {
    text.starts_with("http://") || text.starts_with("https://")
}

/// Records as `/api/ledger/raw` sends them: each a 4-byte length and its bytes.
fn split(mut bytes: &[u8]) -> Option<Vec<Vec<u8>>> {
    let mut records = Vec::new();
    while !bytes.is_empty() {
        let (length, rest) = bytes.split_at_checked(4)?;
        let length = u32::from_le_bytes(length.try_into().ok()?) as usize;
        let (record, rest) = rest.split_at_checked(length)?;
        records.push(record.to_vec());
        bytes = rest;
    }
    Some(records)
}

/// All records of a peer's ledger, page by page.
pub struct RemoteRecords<'a> {
    remote: &'a Remote,
    next: u64,
    /// Last first.
    page: Vec<Vec<u8>>,
    /// Why the records end before their end.
    pub error: Option<Error>,
}

impl<'a> RemoteRecords<'a> {
    /// From the first record on.
    pub fn new(remote: &'a Remote) -> Self {
        Self { remote, next: 0, page: Vec::new(), error: None }
    }
}

impl Iterator for RemoteRecords<'_> {
    type Item = Vec<u8>;

    fn next(&mut self) -> Option<Vec<u8>> {
        if self.page.is_empty() {
            match self.remote.records(self.next) {
                Ok(page) => self.page = page,
                Err(error) => self.error = Some(error),
            }
            self.page.reverse();
            self.next += self.page.len() as u64;
        }
        self.page.pop()
    }
}

impl Blobs for Remote {
    fn get(&self, hash: &Hash) -> Option<Vec<u8>> {
        self.blob(hash).unwrap_or_else(|error| {
            eprintln!("warning: {error:#}");
            None
        })
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::net::TcpListener;

    use super::*;

    #[test]
    fn records_are_split_and_broken_ones_refused() {
        let of = |records: &[&[u8]]| -> Vec<u8> {
            let framed = |r: &&[u8]| [&(r.len() as u32).to_le_bytes()[..], r].concat();
            records.iter().flat_map(framed).collect()
        };
        assert_eq!(split(&of(&[b"ab", b"", b"c"])).unwrap(), [&b"ab"[..], b"", b"c"]);
        assert_eq!(split(&[]).unwrap(), Vec::<Vec<u8>>::new());
        let whole = of(&[b"ab", b"cd"]);
        for end in (1..whole.len()).filter(|end| *end != 6) {
            assert_eq!(split(&whole[..end]), None, "{end}");
        }
        assert_eq!(split(&[255; 9]), None);
    }

    /// A peer that answers every request with so many bytes.
    fn peer(length: u64) -> Remote {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}/", listener.local_addr().unwrap());
        std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let _ = stream.read(&mut [0; 4096]);
            let head = format!("HTTP/1.1 200 OK\r\nContent-Length: {length}\r\n\r\n");
            // Whoever has read enough may hang up.
            let _ = stream.write_all(head.as_bytes());
            let _ = stream.write_all(&vec![b'x'; length as usize]);
        });
        Remote::new(&url, &[]).unwrap()
    }

    /// A peer that answers without end, or something else, is no peer.
    #[test]
    fn answer_over_its_bound_is_refused() {
        let error = |found: Result<()>| format!("{:#}", found.unwrap_err());
        let told = error(peer(MANIFEST_BYTES_MAX + 1).manifest().map(drop));
        assert!(told.contains("is over"), "{told}");
        let told = error(peer(9).manifest().map(drop));
        assert!(told.contains("no coordination peer"), "{told}");
        let page = (RECORDS_PAGE_BYTES_MAX + RECORD_BYTES_MAX + 4) as u64;
        let told = error(peer(page + 1).records(0).map(drop));
        assert!(told.contains("is over"), "{told}");
        let told = error(peer(9).records(0).map(drop));
        assert!(told.contains("no records"), "{told}");
        let told = error(peer(9).blob(&Hash::of(b"another")).map(drop));
        assert!(told.contains("other bytes"), "{told}");
    }

    #[test]
    fn address_that_is_none_is_refused_with_a_hint() {
        for bad in ["localhost:8420", "runs/demo", "ftp://x", ""] {
            let error = Remote::new(bad, &[]).unwrap_err().to_string();
            assert!(error.contains("http://"), "{error}");
        }
        assert_eq!(Remote::new("http://h:1/", &[]).unwrap().url(), "http://h:1");
    }
}
