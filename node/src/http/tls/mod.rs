//! https: the HTTP port speaks TLS, with a certificate from files or from a certificate authority.
//!
//! Start at [`Tls`]. What a handshake may cost is bounded in [`super::serve`].

mod acme;
mod files;

use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, Result};
use axum::http::uri::Authority;
use rustls::ServerConfig;
use rustls::server::{ClientHello, ResolvesServerCert};
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt};
use tokio_rustls::LazyConfigAcceptor;
use tokio_rustls::server::TlsStream;

pub use acme::{Acme, acme_config};
pub use files::{CERTIFICATE_FILE_BYTES_MAX, CertificateFiles, RELOAD_EVERY};

/// The only protocol that is spoken inside.
const HTTP: &[u8] = b"http/1.1";

/// How connections are encrypted.
#[derive(Clone, Debug)]
pub struct Tls {
    config: Arc<ServerConfig>,
    /// Answers a certificate authority's challenge, if certificates come from one.
    challenge: Option<Arc<ServerConfig>>,
}

impl Tls {
    /// With a certificate from files, which are read again now and then.
    pub fn from_files(files: Arc<CertificateFiles>) -> Self {
        Self { config: config(files), challenge: None }
    }

    /// With a certificate that [`Acme`] obtains and renews.
    pub fn from_acme(acme: &Acme) -> Self {
        Self { config: config(acme.resolver()), challenge: Some(acme.challenge()) }
    }

    /// Shakes hands. `None`: it was a certificate authority that only wanted to see the answer to
    /// its challenge.
    pub(super) async fn accept<S>(&self, stream: S) -> std::io::Result<Option<TlsStream<S>>>
    where
        S: AsyncRead + AsyncWrite + Unpin,
    {
        let start = LazyConfigAcceptor::new(rustls::server::Acceptor::default(), stream).await?;
        if let Some(challenge) = &self.challenge
            && is_challenge(&start.client_hello())
        {
            start.into_stream(challenge.clone()).await?.shutdown().await?;
            return Ok(None);
        }
        start.into_stream(self.config.clone()).await.map(Some)
    }
}

fn is_challenge(hello: &ClientHello<'_>) -> bool {
    rustls_acme::is_tls_alpn_challenge(hello)
}

fn config(resolver: Arc<dyn ResolvesServerCert>) -> Arc<ServerConfig> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .expect("ring has cipher suites of TLS 1.2 and 1.3")
        .with_no_client_auth()
        .with_cert_resolver(resolver);
    config.alpn_protocols = vec![HTTP.to_vec()];
    Arc::new(config)
}

/// Checks the address under which a reverse proxy serves a host; without a slash at its end.
pub fn public_url(text: &str) -> Result<String> {
    let text = text.trim().trim_end_matches('/');
    let rest = text.strip_prefix("https://").or_else(|| text.strip_prefix("http://"));
    let is_host = rest.is_some_and(|rest| rest.parse::<Authority>().is_ok());
    is_host.then(|| text.to_string()).with_context(|| {
        format!("{text:?} is no address of a page: use https://NAME or https://NAME:PORT, without a path")
    })
}

/// Certificates of a PEM file, at least one.
pub fn read_certificates(path: &Path) -> Result<Vec<rustls::pki_types::CertificateDer<'static>>> {
    files::certificates(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn public_url_is_a_host_and_nothing_else() {
        for (given, expected) in [
            ("https://run.example/", "https://run.example"),
            ("https://run.example:8443", "https://run.example:8443"),
            ("http://10.0.0.1", "http://10.0.0.1"),
        ] {
            assert_eq!(public_url(given).unwrap(), expected);
        }
        for bad in ["run.example", "https://", "ftp://x", "https://a/b", "https://a b", ""] {
            assert!(public_url(bad).is_err(), "{bad}");
        }
    }
}
