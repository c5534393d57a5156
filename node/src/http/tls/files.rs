//! A certificate and its key from PEM files.

use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, bail, ensure};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::{ClientHello, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use rustls::{Error, InconsistentKeys};
use x509_parser::prelude::{FromDer, GeneralName, X509Certificate};

use crate::store::read_bounded;

/// Largest certificate or key file.
pub const CERTIFICATE_FILE_BYTES_MAX: u64 = 1 << 20;
/// Between two looks at the files, so that a renewed certificate needs no restart.
pub const RELOAD_EVERY: Duration = Duration::from_secs(3600);

/// A certificate that is read again when its files change.
#[derive(Debug)]
pub struct CertificateFiles {
    certificate: PathBuf,
    key: PathBuf,
    loaded: RwLock<Arc<CertifiedKey>>,
}

impl CertificateFiles {
    /// Reads both files, and checks that they belong together and are valid now.
    pub fn open(certificate: &Path, key: &Path) -> Result<Self> {
        let loaded = RwLock::new(Arc::new(load(certificate, key)?));
        Ok(Self { certificate: certificate.into(), key: key.into(), loaded })
    }

    /// Reads the files again. What is there now stays if they are no good.
    pub fn reload(&self) -> Result<()> {
        let fresh = Arc::new(load(&self.certificate, &self.key)?);
        *self.loaded.write().unwrap_or_else(PoisonError::into_inner) = fresh;
        Ok(())
    }

    /// Reads the files again every [`RELOAD_EVERY`], for as long as the program runs.
    pub async fn keep_fresh(self: Arc<Self>) {
        let mut clock = tokio::time::interval(RELOAD_EVERY);
        clock.tick().await;
        loop {
            clock.tick().await;
            if let Err(error) = self.reload() {
                tracing::warn!("the certificate cannot be read again: {error:#}");
            }
        }
    }

    /// The first name that the certificate is for, if it is no wildcard.
    pub fn name(&self) -> Option<String> {
        let loaded = self.current();
        let (_, parsed) = X509Certificate::from_der(loaded.cert.first()?).ok()?;
        let names = parsed.subject_alternative_name().ok()??;
        names.value.general_names.iter().find_map(|name| match name {
            GeneralName::DNSName(name) if !name.starts_with('*') => Some((*name).to_string()),
            _ => None,
        })
    }

    fn current(&self) -> Arc<CertifiedKey> {
        self.loaded.read().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl ResolvesServerCert for CertificateFiles {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(self.current())
    }
}

fn load(certificate: &Path, key: &Path) -> Result<CertifiedKey> {
    let chain = certificates(certificate)?;
    check_validity(certificate, &chain[0])?;
    let bytes = read_bounded(key, CERTIFICATE_FILE_BYTES_MAX)
        .with_context(|| format!("the file of --tls-key cannot be read: {}", key.display()))?;
    let Ok(private) = PrivateKeyDer::from_pem_slice(&bytes) else {
        bail!(
            "{} holds no private key; --tls-key takes an unencrypted key in PEM, which begins with -----BEGIN PRIVATE KEY----- or the like",
            key.display()
        );
    };
    let provider = rustls::crypto::ring::default_provider();
    CertifiedKey::from_der(chain, private, &provider).map_err(|error| match error {
        Error::InconsistentKeys(InconsistentKeys::KeyMismatch) => anyhow::anyhow!(
            "the key in {} is not the one of the certificate in {}; give the pair that was made together",
            key.display(),
            certificate.display()
        ),
        error => anyhow::anyhow!("{} and {}: {error}", certificate.display(), key.display()),
    })
}

/// Certificates of a PEM file, at least one.
pub(super) fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>> {
    let bytes = read_bounded(path, CERTIFICATE_FILE_BYTES_MAX)
        .with_context(|| format!("the certificate file cannot be read: {}", path.display()))?;
    let chain: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&bytes).collect();
    let chain = chain.with_context(|| format!("{} is damaged PEM", path.display()))?;
    ensure!(
        !chain.is_empty(),
        "{} holds no certificate; it should be PEM and begin with -----BEGIN CERTIFICATE-----",
        path.display()
    );
    Ok(chain)
}

/// Browsers refuse a certificate out of its time, with a page that blames the visitor's clock.
fn check_validity(path: &Path, certificate: &CertificateDer<'_>) -> Result<()> {
    let (_, parsed) = X509Certificate::from_der(certificate)
        .with_context(|| format!("{} holds a damaged certificate", path.display()))?;
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs() as i64;
    let validity = parsed.validity();
    let (from, until) = (validity.not_before, validity.not_after);
    ensure!(
        now <= until.timestamp(),
        "the certificate in {} expired on {until}; renew it and start again",
        path.display()
    );
    ensure!(
        now >= from.timestamp(),
        "the certificate in {} is valid only from {from} on; check this machine's clock",
        path.display()
    );
    Ok(())
}
