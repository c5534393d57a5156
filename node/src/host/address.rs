//! Where a host is reached: its port, its certificate, its name.

use std::net::{IpAddr, Ipv4Addr, SocketAddr, UdpSocket};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result};
use axum::http::Uri;
use clap::Args;
use libp2p::multiaddr::{Multiaddr, Protocol};

use crate::http::{self, Acme, CertificateFiles, Tls, acme_config, public_url, read_certificates};

/// Port of page and API, unless it is taken.
const HTTP_PORT: u16 = 8420;
/// Where browsers and certificate authorities look for https.
const HTTPS_PORT: u16 = 443;
/// Path at which the swarm is reached through the HTTP port.
const TUNNEL_PATH: &str = "/p2p";

/// How others reach a host.
#[derive(Clone, Debug, Args)]
pub struct AddressArgs {
    /// Where the page and the API are served [default: 0.0.0.0:8420, or a free port; 0.0.0.0:443
    /// with --domain].
    #[arg(long, value_name = "ADDRESS:PORT")]
    pub http: Option<SocketAddr>,
    /// Serve https with this certificate: a PEM file with the whole chain, the host's own first.
    #[arg(long, value_name = "FILE", requires = "tls_key")]
    pub tls_cert: Option<PathBuf>,
    /// The certificate's private key: a PEM file, unencrypted.
    #[arg(long, value_name = "FILE", requires = "tls_cert")]
    pub tls_key: Option<PathBuf>,
    /// Serve https with a certificate from Let's Encrypt, obtained and renewed by itself. The name
    /// must lead to this machine, and port 443 to this program; using it accepts their terms.
    #[arg(long, value_name = "NAME", conflicts_with = "tls_cert")]
    pub domain: Option<String>,
    /// Another certificate authority than Let's Encrypt: the address of its ACME directory.
    #[arg(long, value_name = "URL", requires = "domain")]
    pub acme_directory: Option<String>,
    /// Trust this certificate authority (PEM) when talking to --acme-directory.
    #[arg(long, value_name = "FILE", requires = "acme_directory")]
    pub acme_ca: Option<PathBuf>,
    /// The address under which others see the page, behind a reverse proxy or a router.
    #[arg(long, value_name = "URL")]
    pub public_url: Option<String>,
}

/// Where the certificate comes from.
enum Source {
    None,
    Files(Arc<CertificateFiles>),
    Acme(Box<Acme>, String),
}

/// The HTTP side's site: its listener, its certificate and its address.
pub(super) struct Site {
    pub(super) listener: tokio::net::TcpListener,
    pub(super) tls: Option<Tls>,
    /// What others type, without a slash at the end.
    pub(super) url: String,
    source: Source,
}

impl Site {
    /// Reads certificates and takes the port; `dir` is the host's.
    pub(super) async fn open(args: &AddressArgs, listen: IpAddr, dir: &Path) -> Result<Self> {
        let public = args.public_url.as_deref().map(public_url).transpose()?;
        let source = source(args, dir)?;
        let listener = bind(args, listen).await?;
        let address = listener.local_addr()?;
        let own = || {
            let ip = reachable(address.ip()).to_string();
            let (scheme, name, usual) = match &source {
                Source::None => ("http", ip, 80),
                Source::Files(files) => ("https", files.name().unwrap_or(ip), HTTPS_PORT),
                Source::Acme(_, name) => ("https", name.clone(), HTTPS_PORT),
            };
            let name = if name.contains(':') { format!("[{name}]") } else { name };
            let port = address.port();
            let port = if port == usual { String::new() } else { format!(":{port}") };
            format!("{scheme}://{name}{port}")
        };
        let url = public.unwrap_or_else(own);
        let tls = match &source {
            Source::None => None,
            Source::Files(files) => Some(Tls::from_files(files.clone())),
            Source::Acme(acme, _) => Some(Tls::from_acme(acme)),
        };
        Ok(Self { listener, tls, url, source })
    }

    /// Keeps the certificate good while the program runs, and gives the rest.
    pub(super) fn start(self) -> (tokio::net::TcpListener, Option<Tls>) {
        match self.source {
            Source::None => {}
            Source::Files(files) => {
                tokio::spawn(files.keep_fresh());
            }
            Source::Acme(acme, _) => {
                tokio::spawn(acme.run(|text| eprintln!("warning: {text}")));
            }
        }
        (self.listener, self.tls)
    }
}

fn source(args: &AddressArgs, dir: &Path) -> Result<Source> {
    if let (Some(certificate), Some(key)) = (&args.tls_cert, &args.tls_key) {
        return Ok(Source::Files(Arc::new(CertificateFiles::open(certificate, key)?)));
    }
    let Some(name) = &args.domain else { return Ok(Source::None) };
    let trusted = args.acme_ca.as_deref().map(read_certificates).transpose()?;
    let config = acme_config(name, dir, args.acme_directory.as_deref(), trusted)?;
    Ok(Source::Acme(Box::new(Acme::new(name, config)), name.clone()))
}

async fn bind(args: &AddressArgs, listen: IpAddr) -> Result<tokio::net::TcpListener> {
    match (args.http, &args.domain) {
        (Some(address), _) => http::bind(address).await,
        (None, Some(_)) => http::bind(SocketAddr::from((listen, HTTPS_PORT))).await.context(
            "a certificate authority looks at port 443: give this program the right to open it, or lead port 443 to another one and name that one with --http",
        ),
        (None, None) => match http::bind(SocketAddr::from((listen, HTTP_PORT))).await {
            Ok(listener) => Ok(listener),
            Err(_) => http::bind(SocketAddr::from((listen, 0))).await,
        },
    }
}

/// The address under which others reach an unspecified one.
fn reachable(ip: IpAddr) -> IpAddr {
    if !ip.is_unspecified() {
        return ip;
    }
    // Nothing is sent: connecting a datagram socket only asks which interface would be used.
    let local = UdpSocket::bind("0.0.0.0:0").and_then(|s| {
        s.connect("192.0.2.1:9")?;
        s.local_addr()
    });
    local.map_or(IpAddr::V4(Ipv4Addr::LOCALHOST), |a| a.ip())
}

/// How the swarm is reached through the page's address: for volunteers to whom a reverse proxy
/// shows nothing else.
pub(super) fn tunnel(url: &str, peer: libp2p::PeerId) -> Option<Multiaddr> {
    let uri: Uri = url.parse().ok()?;
    let is_tls = match uri.scheme_str()? {
        "https" => true,
        "http" => false,
        _ => return None,
    };
    let host = uri.host()?.trim_start_matches('[').trim_end_matches(']');
    let port = uri.port_u16().unwrap_or(if is_tls { HTTPS_PORT } else { 80 });
    let mut address = Multiaddr::empty();
    address.push(match host.parse() {
        Ok(IpAddr::V4(ip)) => Protocol::Ip4(ip),
        Ok(IpAddr::V6(ip)) => Protocol::Ip6(ip),
        Err(_) => Protocol::Dns(host.into()),
    });
    address.push(Protocol::Tcp(port));
    if is_tls {
        address.push(Protocol::Tls);
    }
    address.push(Protocol::Ws(TUNNEL_PATH.into()));
    Some(address.with(Protocol::P2p(peer)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tunnel_of_an_address_is_what_libp2p_dials() {
        let peer = libp2p::PeerId::random();
        for (url, expected) in [
            ("https://run.example", "/dns/run.example/tcp/443/tls/x-parity-ws/%2Fp2p"),
            ("https://run.example:8443", "/dns/run.example/tcp/8443/tls/x-parity-ws/%2Fp2p"),
            ("http://10.0.0.1:8420", "/ip4/10.0.0.1/tcp/8420/x-parity-ws/%2Fp2p"),
            ("https://[2001:db8::1]", "/ip6/2001:db8::1/tcp/443/tls/x-parity-ws/%2Fp2p"),
        ] {
            let address = tunnel(url, peer).unwrap();
            assert_eq!(address.to_string(), format!("{expected}/p2p/{peer}"), "{url}");
            assert_eq!(address.to_string().parse::<Multiaddr>().unwrap(), address);
        }
        assert!(tunnel("nonsense", peer).is_none());
    }
}
