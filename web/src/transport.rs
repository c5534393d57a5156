//! libp2p over a browser's `WebSocket`, in a page or a worker.
//!
//! Everything that the browser tells by an event is taken by the event. That room has come for
//! writing is not told: only while a writer waits for room does a short timer look.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::future::{Pending, poll_fn};
use std::io;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};

use futures::{AsyncRead, AsyncWrite};
use js_sys::{ArrayBuffer, Uint8Array};
use libp2p::core::transport::{DialOpts, ListenerId, Transport, TransportError, TransportEvent};
use libp2p::multiaddr::{Multiaddr, Protocol};
use send_wrapper::SendWrapper;
use wasm_bindgen::prelude::*;
use web_sys::{BinaryType, MessageEvent, WebSocket};

use crate::browser;

/// Bytes that may wait to be sent.
const UNSENT_BYTES_MAX: u32 = 1 << 20;
/// Bytes handed to the browser at a time.
const WRITE_BYTES_MAX: usize = 64 << 10;
/// Bytes that have arrived and nobody has read: a browser offers no way to slow the sender down,
/// but every stream's window does. Beyond this the peer breaks its word, and is left.
const UNREAD_BYTES_MAX: usize = 64 << 20;
/// Between two looks for room.
const LOOK_MS: u32 = 4;

/// What came of a socket.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Stage {
    Opening,
    Open,
    Closed,
    Overrun,
}

struct State {
    stage: Stage,
    unread: VecDeque<u8>,
    reader: Option<Waker>,
    writer: Option<Waker>,
    opener: Option<Waker>,
    traffic: Traffic,
}

impl State {
    fn wake(&mut self) {
        let wakers = [self.reader.take(), self.writer.take(), self.opener.take()];
        wakers.into_iter().flatten().for_each(Waker::wake);
    }
}

/// Bytes in and out, of all sockets.
#[derive(Clone, Default)]
pub struct Traffic(Rc<RefCell<(u64, u64)>>);

impl Traffic {
    /// Bytes that came in and went out.
    pub fn read(&self) -> (u64, u64) {
        *self.0.borrow()
    }
}

/// A connection; closed when it is dropped.
pub struct Connection(SendWrapper<Socket>);

struct Socket {
    socket: WebSocket,
    state: Rc<RefCell<State>>,
    // Kept alive as long as the socket calls them.
    _listeners: [Closure<dyn FnMut(MessageEvent)>; 3],
}

impl Drop for Socket {
    fn drop(&mut self) {
        self.socket.set_onopen(None);
        self.socket.set_onclose(None);
        self.socket.set_onmessage(None);
        // It may be closed already.
        let _ = self.socket.close();
    }
}

impl Socket {
    fn open(url: &str, traffic: &Traffic) -> Result<Self, io::Error> {
        let refused = |e: JsValue| io::Error::other(browser::text(&e));
        let socket = WebSocket::new(url).map_err(refused)?;
        socket.set_binary_type(BinaryType::Arraybuffer);
        let state = Rc::new(RefCell::new(State {
            stage: Stage::Opening,
            unread: VecDeque::new(),
            reader: None,
            writer: None,
            opener: None,
            traffic: traffic.clone(),
        }));
        let set = |stage| {
            let state = state.clone();
            Closure::<dyn FnMut(MessageEvent)>::new(move |_| {
                let mut state = state.borrow_mut();
                state.stage = stage;
                state.wake();
            })
        };
        let (opened, closed) = (set(Stage::Open), set(Stage::Closed));
        let (received, closing) = (state.clone(), socket.clone());
        let message = Closure::<dyn FnMut(MessageEvent)>::new(move |event: MessageEvent| {
            let Ok(buffer) = event.data().dyn_into::<ArrayBuffer>() else { return };
            let bytes = Uint8Array::new(&buffer).to_vec();
            let mut state = received.borrow_mut();
            state.traffic.0.borrow_mut().0 += bytes.len() as u64;
            if state.unread.len() + bytes.len() > UNREAD_BYTES_MAX {
                state.stage = Stage::Overrun;
                let _ = closing.close();
            } else {
                state.unread.extend(bytes);
            }
            state.wake();
        });
        socket.set_onopen(Some(opened.as_ref().unchecked_ref()));
        socket.set_onclose(Some(closed.as_ref().unchecked_ref()));
        socket.set_onmessage(Some(message.as_ref().unchecked_ref()));
        Ok(Self { socket, state, _listeners: [opened, closed, message] })
    }

    fn poll_open(&self, context: &Context<'_>) -> Poll<io::Result<()>> {
        let mut state = self.state.borrow_mut();
        match state.stage {
            Stage::Opening => {
                state.opener = Some(context.waker().clone());
                Poll::Pending
            }
            Stage::Open => Poll::Ready(Ok(())),
            Stage::Closed | Stage::Overrun => {
                Poll::Ready(Err(io::ErrorKind::ConnectionRefused.into()))
            }
        }
    }
}

impl AsyncRead for Connection {
    fn poll_read(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        out: &mut [u8],
    ) -> Poll<io::Result<usize>> {
        let mut state = self.0.state.borrow_mut();
        if !state.unread.is_empty() {
            // Reading from a queue of bytes never fails.
            return Poll::Ready(io::Read::read(&mut state.unread, out));
        }
        match state.stage {
            Stage::Closed => Poll::Ready(Ok(0)),
            Stage::Overrun => {
                let text = format!("over {UNREAD_BYTES_MAX} bytes came at once");
                Poll::Ready(Err(io::Error::other(text)))
            }
            _ => {
                state.reader = Some(context.waker().clone());
                Poll::Pending
            }
        }
    }
}

impl AsyncWrite for Connection {
    fn poll_write(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let this = &*self.0;
        let mut state = this.state.borrow_mut();
        if state.stage != Stage::Open {
            return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()));
        }
        if this.socket.buffered_amount() >= UNSENT_BYTES_MAX {
            let waiting = state.writer.replace(context.waker().clone()).is_some();
            if !waiting {
                look_later(this.socket.clone(), this.state.clone());
            }
            return Poll::Pending;
        }
        let bytes = &bytes[..bytes.len().min(WRITE_BYTES_MAX)];
        let sent = this.socket.send_with_u8_array(bytes);
        sent.map_err(|e| io::Error::other(browser::text(&e)))?;
        state.traffic.0.borrow_mut().1 += bytes.len() as u64;
        Poll::Ready(Ok(bytes.len()))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        // The browser sends what it has as soon as it can.
        Poll::Ready(Ok(()))
    }

    fn poll_close(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        let _ = self.0.socket.close();
        Poll::Ready(Ok(()))
    }
}

/// Wakes the writer once there is room, or nothing more to wait for.
fn look_later(socket: WebSocket, state: Rc<RefCell<State>>) {
    wasm_bindgen_futures::spawn_local(async move {
        loop {
            browser::sleep(LOOK_MS).await;
            let mut state = state.borrow_mut();
            if state.stage != Stage::Open || socket.buffered_amount() < UNSENT_BYTES_MAX {
                state.writer.take().into_iter().for_each(Waker::wake);
                return;
            }
        }
    });
}

/// Dials `ws` and `wss` addresses, with or without a path. It does not listen.
pub struct Dialer(SendWrapper<Traffic>);

impl Dialer {
    /// One whose connections count their bytes.
    pub fn new(traffic: Traffic) -> Self {
        Self(SendWrapper::new(traffic))
    }
}

impl Transport for Dialer {
    type Output = Connection;
    type Error = io::Error;
    type ListenerUpgrade = Pending<io::Result<Connection>>;
    type Dial = Pin<Box<dyn Future<Output = io::Result<Connection>> + Send>>;

    fn listen_on(
        &mut self,
        _: ListenerId,
        address: Multiaddr,
    ) -> Result<(), TransportError<io::Error>> {
        Err(TransportError::MultiaddrNotSupported(address))
    }

    fn remove_listener(&mut self, _: ListenerId) -> bool {
        false
    }

    fn dial(
        &mut self,
        address: Multiaddr,
        _: DialOpts,
    ) -> Result<Self::Dial, TransportError<io::Error>> {
        let Some(url) = url(&address) else {
            return Err(TransportError::MultiaddrNotSupported(address));
        };
        let traffic = self.0.clone();
        let dial = async move {
            let socket = Socket::open(&url, &traffic)?;
            poll_fn(|context| socket.poll_open(context)).await?;
            Ok(Connection(SendWrapper::new(socket)))
        };
        Ok(Box::pin(SendWrapper::new(dial)))
    }

    fn poll(
        self: Pin<&mut Self>,
        _: &mut Context<'_>,
    ) -> Poll<TransportEvent<Self::ListenerUpgrade, io::Error>> {
        Poll::Pending
    }
}

/// The address as browsers write it.
fn url(address: &Multiaddr) -> Option<String> {
    let mut parts = address.iter();
    let host = match parts.next()? {
        Protocol::Ip4(ip) => ip.to_string(),
        Protocol::Ip6(ip) => format!("[{ip}]"),
        Protocol::Dns(name) | Protocol::Dns4(name) | Protocol::Dns6(name) => name.to_string(),
        _ => return None,
    };
    let Protocol::Tcp(port) = parts.next()? else { return None };
    let (scheme, path) = match parts.next()? {
        Protocol::Ws(path) => ("ws", path),
        Protocol::Wss(path) => ("wss", path),
        Protocol::Tls => match parts.next()? {
            Protocol::Ws(path) => ("wss", path),
            _ => return None,
        },
        _ => return None,
    };
    Some(format!("{scheme}://{host}:{port}{path}"))
}
