//! Certificates from a certificate authority that speaks ACME, such as Let's Encrypt: obtained at
//! the first start, renewed by themselves, kept in the host's directory.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use futures::StreamExt;
use rustls::pki_types::CertificateDer;
use rustls::{ClientConfig, RootCertStore, ServerConfig};
use rustls_acme::caches::DirCache;
use rustls_acme::{AcmeConfig, AcmeState, ResolvesServerCertAcme};

/// Directory below the host's for certificates and the account's key.
const CACHE_DIR: &str = "acme";

type State = AcmeState<std::io::Error>;

/// An order of certificates for one name.
pub struct Acme {
    name: String,
    state: State,
}

impl std::fmt::Debug for Acme {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Acme({})", self.name)
    }
}

/// The settings of an order: for `name`, cached below `dir`, from Let's Encrypt or from another
/// `directory`, whose own certificate may come from a private authority.
pub fn acme_config(
    name: &str,
    dir: &Path,
    directory: Option<&str>,
    trusted: Option<Vec<CertificateDer<'static>>>,
) -> Result<AcmeConfig<std::io::Error>> {
    let is_name = name.contains('.')
        && name.parse::<std::net::IpAddr>().is_err()
        && name.split('.').all(|label| !label.is_empty() && label.bytes().all(is_label_byte));
    ensure!(
        is_name,
        "{name:?} is no name that a certificate authority would know; --domain takes one such as run.example.org, which leads to this machine"
    );
    let cache: PathBuf = dir.join(CACHE_DIR);
    create_private_dir(&cache).with_context(|| format!("cannot make {}", cache.display()))?;
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = match trusted {
        None => AcmeConfig::new_with_provider([name], provider),
        Some(certificates) => {
            let mut roots = RootCertStore::empty();
            let (added, _) = roots.add_parsable_certificates(certificates);
            ensure!(added > 0, "the file of --acme-ca holds no usable certificate");
            let client = ClientConfig::builder_with_provider(provider)
                .with_safe_default_protocol_versions()
                .context("ring has no protocol versions")?
                .with_root_certificates(roots)
                .with_no_client_auth();
            AcmeConfig::new_with_client_config([name], Arc::new(client))
        }
    };
    let config = match directory {
        Some(url) => config.directory(url),
        None => config.directory_lets_encrypt(true),
    };
    Ok(config.cache(DirCache::new(cache)))
}

#[cfg(unix)]
fn create_private_dir(path: &Path) -> std::io::Result<()> {
    use std::os::unix::fs::DirBuilderExt;
    std::fs::DirBuilder::new().recursive(true).mode(0o700).create(path)
}

#[cfg(not(unix))]
fn create_private_dir(path: &Path) -> std::io::Result<()> {
    std::fs::create_dir_all(path)
}

fn is_label_byte(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || byte == b'-'
}

impl Acme {
    /// Prepares the order; [`Self::run`] carries it out.
    pub fn new(name: &str, config: AcmeConfig<std::io::Error>) -> Self {
        Self { name: name.into(), state: config.state() }
    }

    pub(super) fn resolver(&self) -> Arc<ResolvesServerCertAcme> {
        self.state.resolver()
    }

    pub(super) fn challenge(&self) -> Arc<ServerConfig> {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        self.state.challenge_rustls_config_with_provider(provider)
    }

    /// Obtains and renews for as long as the program runs, and says how it goes.
    pub async fn run(mut self, say: impl Fn(&str) + Send) {
        while let Some(event) = self.state.next().await {
            match event {
                Ok(done) => tracing::info!(name = self.name, ?done, "certificate"),
                Err(error) => say(&format!(
                    "no certificate for {} yet: {error}; the name must lead to this machine, and port 443 to this program; trying again",
                    self.name
                )),
            }
        }
    }
}
