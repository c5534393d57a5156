//! The accept loop, with a bound on everything that a stranger could hold open.

use std::future::Future;
use std::io::ErrorKind;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use hyper::Request;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::{Service, service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;

use super::seats::{CONNECTIONS_MAX, Seats};
use super::{HttpState, router};

/// A client that has not sent a request's header after this time, on a new connection or on one
/// that is kept alive, is hung up on.
pub const HEADER_TIMEOUT: Duration = Duration::from_secs(20);
/// Most bytes of a request's header.
pub const HEADER_BYTES_MAX: usize = 16 << 10;
/// After an accept that failed for want of files or memory.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// What a client gets that is one too many.
const FULL: &[u8] = b"HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\nContent-Length: 70\r\nConnection: close\r\n\r\n{\"error\": \"too many connections are open; try again in a few minutes\"}";

/// Takes an address to listen on.
pub async fn bind(address: SocketAddr) -> Result<TcpListener> {
    let port = address.port();
    TcpListener::bind(address).await.map_err(|error| match error.kind() {
        ErrorKind::AddrInUse => anyhow!(
            "port {port} is taken by another program; choose another with --http, such as --http {}:{}",
            address.ip(),
            if port == u16::MAX { port - 1 } else { port + 1 }
        ),
        ErrorKind::PermissionDenied => anyhow!(
            "port {port} is reserved to administrators; choose one from 1024 up with --http"
        ),
        ErrorKind::AddrNotAvailable => anyhow!(
            "{} is no address of this machine; choose one with --http, such as --http 0.0.0.0:{port}",
            address.ip()
        ),
        _ => anyhow!(error).context(format!("cannot listen on {address} (--http)")),
    })
}

/// Serves until `shutdown` is ready, then drops every connection.
pub async fn serve(
    listener: TcpListener,
    state: HttpState,
    shutdown: impl Future<Output = ()>,
) -> Result<()> {
    listener.local_addr().context("the HTTP listener has no address")?;
    let service = TowerToHyperService::new(router(state));
    let seats = Arc::new(Seats::default());
    let mut connections = JoinSet::new();
    let mut shutdown = std::pin::pin!(shutdown);
    loop {
        let accepted = tokio::select! {
            () = &mut shutdown => return Ok(()),
            // Finished connections must leave the set, or it grows for ever.
            Some(_) = connections.join_next() => continue,
            accepted = listener.accept() => accepted,
        };
        let (stream, address) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                tracing::warn!(%error, "cannot accept an HTTP connection");
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        let Some(seat) = seats.take(address.ip()) else {
            refuse(&stream);
            continue;
        };
        debug_assert!(connections.len() <= CONNECTIONS_MAX);
        let (service, seat) = (service.clone(), Arc::new(seat));
        connections.spawn(async move {
            // A tunnel outlives its request, and keeps the seat.
            let service = service_fn(move |mut request: Request<Incoming>| {
                request.extensions_mut().insert(seat.clone());
                service.call(request)
            });
            let served = http1::Builder::new()
                .timer(TokioTimer::new())
                .header_read_timeout(HEADER_TIMEOUT)
                .max_buf_size(HEADER_BYTES_MAX)
                .serve_connection(TokioIo::new(stream), service)
                .with_upgrades();
            if let Err(error) = served.await {
                tracing::debug!(%error, peer = %address, "an HTTP connection ended early");
            }
        });
    }
}

/// Says why and hangs up. The answer fits any socket's buffer, so nothing waits for the client.
fn refuse(stream: &TcpStream) {
    // A client that is gone already needs no answer.
    let _ = stream.try_write(FULL);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn full_answer_states_its_length() {
        let text = std::str::from_utf8(FULL).unwrap();
        let (header, body) = text.split_once("\r\n\r\n").unwrap();
        assert!(header.contains(&format!("Content-Length: {}", body.len())), "{}", body.len());
        serde_json::from_str::<serde_json::Value>(body).unwrap();
    }
}
