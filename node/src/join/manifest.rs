//! What a host says about joining: one request, over http or https.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use manyhands_core::swarm::protocol::PROTOCOL;
use rustls::pki_types::CertificateDer;
use ureq::tls::{Certificate, RootCerts, TlsConfig};

use crate::host::Manifest;
use crate::http::read_certificates;

/// Largest manifest that is read.
const MANIFEST_BYTES_MAX: u64 = 1 << 20;
/// In which a host answers.
const TIMEOUT: Duration = Duration::from_secs(20);

/// Certificate authorities for https: those of the file if there is one, else those that the system
/// trusts. Empty: the system has none, and the program's own list counts.
pub(super) fn trusted(url: &str, ca: Option<&Path>) -> Result<Vec<CertificateDer<'static>>> {
    match ca {
        Some(path) => read_certificates(path),
        None if url.starts_with("https://") => Ok(rustls_native_certs::load_native_certs().certs),
        None => Ok(Vec::new()),
    }
}

/// Reads where the run can be joined.
pub(super) fn read(url: &str, trusted: &[CertificateDer<'_>]) -> Result<Manifest> {
    let url = url.trim_end_matches('/');
    if !url.starts_with("http://") && !url.starts_with("https://") {
        bail!(
            "{url:?} is no address of a run; it begins with http:// or https://, as the host printed it"
        );
    }
    let roots = match trusted {
        [] => RootCerts::WebPki,
        some => {
            let own = some.iter().map(|c| Certificate::from_der(c).to_owned());
            RootCerts::Specific(Arc::new(own.collect()))
        }
    };
    let agent: ureq::Agent = ureq::Agent::config_builder()
        .timeout_global(Some(TIMEOUT))
        .tls_config(TlsConfig::builder().root_certs(roots).build())
        .build()
        .into();
    let mut answer = agent.get(format!("{url}/api/manifest")).call().map_err(explain(url))?;
    let text = answer.body_mut().with_config().limit(MANIFEST_BYTES_MAX).read_to_string();
    let manifest: Manifest = serde_json::from_str(&text?)
        .with_context(|| format!("{url} is no coordination peer of this program's version"))?;
    if manifest.protocol != PROTOCOL {
        let theirs = manifest.protocol;
        bail!("the host speaks protocol {theirs}, this program {PROTOCOL}; use the same version");
    }
    Ok(manifest)
}

/// What a failed request means and what to do.
fn explain(url: &str) -> impl Fn(ureq::Error) -> anyhow::Error {
    let url = url.to_string();
    move |error| {
        let text = error.to_string();
        let advice = if text.contains("UnknownIssuer") {
            "its certificate is from an authority that this machine does not trust; give that authority's certificate with --ca"
        } else if text.contains("certificate") {
            "its certificate is not good; the operator can say why"
        } else {
            "check the address, and that the host is running and reachable from here"
        };
        anyhow::Error::from(error).context(format!("cannot reach {url}; {advice}"))
    }
}
