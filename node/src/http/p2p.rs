//! The tunnel of tabs: `GET /p2p` becomes a connection to this host's own libp2p listener for
//! WebSocket, so that a tab needs one address only, the one that served its page. Whatever proxy
//! and TLS stand before the page stand before the swarm too.
//!
//! The handshake is made again towards the listener, which answers it; then bytes go both ways
//! unread. A tunnel keeps its connection's seat for as long as it lasts.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use axum::extract::{Request, State};
use axum::http::header::{
    CONNECTION, SEC_WEBSOCKET_ACCEPT, SEC_WEBSOCKET_KEY, SEC_WEBSOCKET_VERSION, UPGRADE,
};
use axum::http::{HeaderMap, HeaderName, HeaderValue, StatusCode};
use axum::response::{IntoResponse, Response};
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncReadExt, AsyncWriteExt, copy_bidirectional};
use tokio::net::TcpStream;
use tokio::sync::Semaphore;
use tokio::time::timeout;

use super::HttpState;
use super::error::ApiError;
use super::seats::{CONNECTIONS_MAX, Seat};

/// Tunnels at once. The other connections are left for pages.
pub const TUNNELS_MAX: usize = CONNECTIONS_MAX * 3 / 4;
/// In which the own listener answers.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);
/// Longest answer of the own listener.
const ANSWER_BYTES_MAX: usize = 2048;
/// What ends the header of an answer.
const END: &[u8] = b"\r\n\r\n";

/// Where tunnels lead, and how many there may be.
#[derive(Debug)]
pub struct Tunnel {
    listener: SocketAddr,
    free: Arc<Semaphore>,
}

impl Tunnel {
    /// Tunnels to the own listener for WebSocket at this address.
    pub fn to(listener: SocketAddr) -> Self {
        Self { listener, free: Arc::new(Semaphore::new(TUNNELS_MAX)) }
    }
}

/// `GET /p2p`.
pub(super) async fn p2p(
    State(state): State<HttpState>,
    mut request: Request,
) -> Result<Response, ApiError> {
    let unavailable = |text: &str| ApiError::new(StatusCode::SERVICE_UNAVAILABLE, text);
    let Some(key) = key(request.headers()) else {
        let text = "this address takes WebSocket connections of tabs only; open the page instead";
        return Err(ApiError::new(StatusCode::UPGRADE_REQUIRED, text));
    };
    let tunnel = state.p2p.ok_or_else(|| unavailable("this host has no listener for tabs"))?;
    let Ok(permit) = tunnel.free.clone().try_acquire_owned() else {
        return Err(unavailable("as many tabs take part as this host can serve; try again later"));
    };
    let handshake = timeout(HANDSHAKE_TIMEOUT, handshake(tunnel.listener, &key)).await;
    let Ok(Ok((mut listener, accept, early))) = handshake else {
        return Err(unavailable("the host's own listener does not answer; try again later"));
    };
    let seat = request.extensions().get::<Arc<Seat>>().cloned();
    let upgraded = hyper::upgrade::on(&mut request);
    tokio::spawn(async move {
        let (_seat, _permit) = (seat, permit);
        let Ok(tab) = upgraded.await else { return };
        let mut tab = TokioIo::new(tab);
        let ended = async {
            tab.write_all(&early).await?;
            copy_bidirectional(&mut tab, &mut listener).await
        };
        if let Err(error) = ended.await {
            tracing::debug!(%error, "a tab's tunnel ended early");
        }
    });
    let headers = [
        (CONNECTION, HeaderValue::from_static("upgrade")),
        (UPGRADE, HeaderValue::from_static("websocket")),
        (SEC_WEBSOCKET_ACCEPT, accept),
    ];
    Ok((StatusCode::SWITCHING_PROTOCOLS, headers).into_response())
}

/// The key of a handshake, if these are the headers of one.
fn key(headers: &HeaderMap) -> Option<HeaderValue> {
    let has = |name: HeaderName, word: &str| {
        let value = headers.get(name).and_then(|v| v.to_str().ok()).unwrap_or_default();
        value.split(',').any(|v| v.trim().eq_ignore_ascii_case(word))
    };
    let is_handshake =
        has(UPGRADE, "websocket") && has(CONNECTION, "upgrade") && has(SEC_WEBSOCKET_VERSION, "13");
    headers.get(SEC_WEBSOCKET_KEY).filter(|_| is_handshake).cloned()
}

/// Shakes hands with the listener: the connection, its answer to the key, and what it sent after.
async fn handshake(
    address: SocketAddr,
    key: &HeaderValue,
) -> std::io::Result<(TcpStream, HeaderValue, Vec<u8>)> {
    let mut stream = TcpStream::connect(address).await?;
    stream.set_nodelay(true)?;
    let begin = format!("GET / HTTP/1.1\r\nHost: {address}\r\nConnection: Upgrade\r\n");
    // A header's value has no line ends.
    let request = [
        begin.as_bytes(),
        b"Upgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: ",
        key.as_bytes(),
        END,
    ];
    stream.write_all(&request.concat()).await?;
    let mut answer = Vec::with_capacity(ANSWER_BYTES_MAX);
    let end = loop {
        if let Some(at) = answer.windows(END.len()).position(|w| w == END) {
            break at;
        }
        if answer.len() >= ANSWER_BYTES_MAX || stream.read_buf(&mut answer).await? == 0 {
            return Err(std::io::ErrorKind::InvalidData.into());
        }
    };
    let early = answer.split_off(end + END.len());
    let accept = accept(&answer).ok_or(std::io::ErrorKind::ConnectionRefused)?;
    Ok((stream, accept, early))
}

/// What a listener that agrees answers to the key.
fn accept(answer: &[u8]) -> Option<HeaderValue> {
    let mut lines = std::str::from_utf8(answer).ok()?.lines();
    lines.next()?.strip_prefix("HTTP/1.1 101")?;
    let value = lines.find_map(|line| {
        let (name, value) = line.split_once(':')?;
        name.eq_ignore_ascii_case(SEC_WEBSOCKET_ACCEPT.as_str()).then(|| value.trim())
    })?;
    HeaderValue::from_str(value).ok()
}
