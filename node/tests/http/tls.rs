//! https on the HTTP port: certificates that are good, and those that are not.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use manyhands_node::http::{CertificateFiles, Tls, acme_config, bind, serve};
use rcgen::{BasicConstraints, Certificate, CertificateParams, IsCa, KeyPair, date_time_ymd};
use rustls::pki_types::ServerName;
use rustls::{ClientConfig, RootCertStore};
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;

use crate::support::peer;

/// A certificate authority of this test, and a directory for what it signs.
struct Authority {
    dir: TempDir,
    key: KeyPair,
    root: Certificate,
}

/// In which years a certificate is good.
const NOW: [i32; 2] = [2020, 2120];

impl Authority {
    fn new() -> Self {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new(Vec::<String>::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let root = params.self_signed(&key).unwrap();
        Self { dir: tempfile::tempdir().unwrap(), key, root }
    }

    /// Files with a certificate for `localhost` and its key.
    fn issue(&self, name: &str, [from, until]: [i32; 2]) -> (PathBuf, PathBuf) {
        let mut params = CertificateParams::new(vec!["localhost".to_string()]).unwrap();
        params.not_before = date_time_ymd(from, 1, 1);
        params.not_after = date_time_ymd(until, 1, 1);
        let key = KeyPair::generate().unwrap();
        let signed = params.signed_by(&key, &self.root, &self.key).unwrap();
        let (c, k) = (self.path(&format!("{name}.pem")), self.path(&format!("{name}.key")));
        fs::write(&c, signed.pem()).unwrap();
        fs::write(&k, key.serialize_pem()).unwrap();
        (c, k)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Asks over https, trusting this authority only.
    async fn get(&self, address: std::net::SocketAddr, path: &str) -> std::io::Result<String> {
        let mut roots = RootCertStore::empty();
        roots.add(self.root.der().clone()).unwrap();
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let config = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(roots)
            .with_no_client_auth();
        let tcp = TcpStream::connect(address).await?;
        let name = ServerName::try_from("localhost").unwrap();
        let mut tls = TlsConnector::from(Arc::new(config)).connect(name, tcp).await?;
        let request =
            format!("GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n");
        tls.write_all(request.as_bytes()).await?;
        let mut answer = Vec::new();
        tls.read_to_end(&mut answer).await?;
        Ok(String::from_utf8_lossy(&answer).into_owned())
    }
}

fn refusal(certificate: &Path, key: &Path) -> String {
    format!("{:#}", CertificateFiles::open(certificate, key).unwrap_err())
}

#[tokio::test]
async fn https_answers_and_a_renewed_certificate_needs_no_restart() {
    let (first, second) = (Authority::new(), Authority::new());
    let (certificate, key) = first.issue("host", NOW);
    let files = Arc::new(CertificateFiles::open(&certificate, &key).unwrap());
    assert_eq!(files.name().as_deref(), Some("localhost"));
    let listener = bind("127.0.0.1:0".parse().unwrap()).await.unwrap();
    let address = listener.local_addr().unwrap();
    let tls = Some(Tls::from_files(files.clone()));
    let served = tokio::spawn(serve(listener, peer().state, tls, std::future::pending()));
    let answer = first.get(address, "/api/status").await.unwrap();
    assert!(answer.starts_with("HTTP/1.1 200") && answer.contains("\"steps\":90"), "{answer}");
    assert!(second.get(address, "/").await.is_err(), "an authority that is not trusted");

    let (new_certificate, new_key) = second.issue("new", NOW);
    fs::copy(&new_certificate, &certificate).unwrap();
    assert!(files.reload().is_err(), "the old key does not fit");
    assert!(first.get(address, "/api/status").await.is_ok(), "the old pair still counts");
    fs::copy(&new_key, &key).unwrap();
    files.reload().unwrap();
    assert!(second.get(address, "/api/status").await.is_ok());
    served.abort();
}

/// The most common mistake gets words, not silence.
#[tokio::test]
async fn https_port_tells_plain_http_what_it_is() {
    let authority = Authority::new();
    let (certificate, key) = authority.issue("host", NOW);
    let files = Arc::new(CertificateFiles::open(&certificate, &key).unwrap());
    let listener = bind("127.0.0.1:0".parse().unwrap()).await.unwrap();
    let address = listener.local_addr().unwrap();
    let tls = Some(Tls::from_files(files));
    let served = tokio::spawn(serve(listener, peer().state, tls, std::future::pending()));
    let mut tcp = TcpStream::connect(address).await.unwrap();
    tcp.write_all(b"G").await.unwrap();
    let mut answer = [0; 12];
    tcp.read_exact(&mut answer).await.unwrap();
    assert_eq!(&answer, b"HTTP/1.1 400");
    // Garbage that looks like TLS ends the connection and nothing else.
    let mut tcp = TcpStream::connect(address).await.unwrap();
    tcp.write_all(&[0x16, 3, 1, 0xff, 0xff, 0, 0, 0, 0]).await.unwrap();
    tcp.shutdown().await.unwrap();
    let mut rest = Vec::new();
    let _ = tcp.read_to_end(&mut rest).await;
    assert!(authority.get(address, "/api/status").await.is_ok());
    served.abort();
}

#[tokio::test]
async fn certificates_that_are_no_good_say_why() {
    let authority = Authority::new();
    let (certificate, key) = authority.issue("a", NOW);
    let (_, other_key) = authority.issue("b", NOW);
    let empty = authority.path("empty");
    fs::write(&empty, "").unwrap();
    let damaged = authority.path("damaged");
    let text = "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n";
    fs::write(&damaged, text).unwrap();
    let absent = authority.path("absent");
    let (expired, expired_key) = authority.issue("expired", [2020, 2021]);
    let (future, future_key) = authority.issue("future", [2110, 2120]);
    for (certificate, key, words) in [
        (&absent, &key, "cannot be read"),
        (&certificate, &absent, "--tls-key"),
        (&certificate, &other_key, "is not the one of the certificate"),
        (&key, &certificate, "holds no certificate"),
        (&certificate, &certificate, "holds no private key"),
        (&empty, &key, "holds no certificate"),
        (&damaged, &key, "damaged"),
        (&expired, &expired_key, "expired on"),
        (&future, &future_key, "valid only from"),
    ] {
        let text = refusal(certificate, key);
        assert!(text.contains(words), "{words}: {text}");
    }
}

#[test]
fn acme_takes_names_that_an_authority_knows() {
    let dir = tempfile::tempdir().unwrap();
    for bad in ["localhost", "10.0.0.1", "a..b", "run.example/", "*.example.org", "a b.example", ""]
    {
        let error = acme_config(bad, dir.path(), None, None).unwrap_err();
        assert!(error.to_string().contains("--domain"), "{bad}");
    }
    acme_config("run.example.org", dir.path(), None, None).unwrap();
    assert!(dir.path().join("acme").is_dir());
}
