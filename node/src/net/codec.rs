//! Requests and responses on a stream, as `core::swarm::transfer` frames them.
//!
//! Memory grows with the bytes that arrive, never with the length that a peer claims.

use std::io;

use futures::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use libp2p::StreamProtocol;
use libp2p::request_response::Codec;
use manyhands_core::swarm::transfer::{self, MESSAGE_HEADER_BYTES, message_header};
use tokio::sync::oneshot;

use super::limits::{REQUEST_BYTES_MAX, RESPONSE_BYTES_MAX};
use super::traffic::{Counters, Kind};

/// Name and version on the wire.
pub(super) const REQUEST_PROTOCOL: StreamProtocol = StreamProtocol::new(transfer::REQUEST_PROTOCOL);

/// A response that has arrived, or one that the program has yet to give.
///
/// The stream's own task waits for it, so that nobody else has to keep a table of open requests.
#[derive(Debug)]
pub(super) enum Answer {
    Ready(Vec<u8>),
    Later(oneshot::Receiver<Vec<u8>>),
}

/// Reads and writes both.
#[derive(Clone, Debug)]
pub(super) struct BytesCodec {
    counters: Counters,
}

impl BytesCodec {
    pub(super) fn new(counters: Counters) -> Self {
        Self { counters }
    }
}

impl Codec for BytesCodec {
    type Protocol = StreamProtocol;
    type Request = Vec<u8>;
    type Response = Answer;

    async fn read_request<T>(&mut self, _: &StreamProtocol, io: &mut T) -> io::Result<Vec<u8>>
    where
        T: AsyncRead + Unpin + Send,
    {
        let bytes = read_bytes(io, REQUEST_BYTES_MAX).await?;
        self.counters.add(Kind::RequestsIn, bytes.len());
        Ok(bytes)
    }

    async fn read_response<T>(&mut self, _: &StreamProtocol, io: &mut T) -> io::Result<Answer>
    where
        T: AsyncRead + Unpin + Send,
    {
        let bytes = read_bytes(io, RESPONSE_BYTES_MAX).await?;
        self.counters.add(Kind::RequestsIn, bytes.len());
        Ok(Answer::Ready(bytes))
    }

    async fn write_request<T>(
        &mut self,
        _: &StreamProtocol,
        io: &mut T,
        request: Vec<u8>,
    ) -> io::Result<()>
    where
        T: AsyncWrite + Unpin + Send,
    {
        self.counters.add(Kind::RequestsOut, request.len());
        write_bytes(io, &request).await
    }

    async fn write_response<T>(
        &mut self,
        _: &StreamProtocol,
        io: &mut T,
        answer: Answer,
    ) -> io::Result<()>
    where
        T: AsyncWrite + Unpin + Send,
    {
        let bytes = match answer {
            Answer::Ready(bytes) => bytes,
            Answer::Later(bytes) => {
                bytes.await.map_err(|_| io::Error::other("the request is not answered"))?
            }
        };
        self.counters.add(Kind::RequestsOut, bytes.len());
        write_bytes(io, &bytes).await
    }
}

async fn read_bytes<T>(io: &mut T, max: usize) -> io::Result<Vec<u8>>
where
    T: AsyncRead + Unpin + Send,
{
    let mut header = [0; MESSAGE_HEADER_BYTES];
    io.read_exact(&mut header).await?;
    let length = transfer::message_length(header, max)
        .map_err(|e| io::Error::new(io::ErrorKind::InvalidData, e))?;
    let mut bytes = Vec::new();
    io.take(length as u64).read_to_end(&mut bytes).await?;
    if bytes.len() < length {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    Ok(bytes)
}

async fn write_bytes<T>(io: &mut T, bytes: &[u8]) -> io::Result<()>
where
    T: AsyncWrite + Unpin + Send,
{
    let header = message_header(bytes.len()).ok_or(io::ErrorKind::InvalidInput)?;
    io.write_all(&header).await?;
    io.write_all(bytes).await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn message_of_any_allowed_length_survives() {
        for length in [0, 1, 1000, REQUEST_BYTES_MAX] {
            let (message, mut wire) = (vec![3; length], Vec::new());
            write_bytes(&mut wire, &message).await.unwrap();
            let read = read_bytes(&mut wire.as_slice(), REQUEST_BYTES_MAX).await.unwrap();
            assert_eq!(read, message, "{length}");
        }
    }

    #[tokio::test]
    async fn oversized_length_is_refused_before_any_byte_is_read() {
        let length = REQUEST_BYTES_MAX as u32 + 1;
        let wire = [&length.to_le_bytes()[..], &[1; 100]].concat();
        let mut rest = wire.as_slice();
        let error = read_bytes(&mut rest, REQUEST_BYTES_MAX).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidData);
        assert_eq!(rest.len(), 100);
    }

    #[tokio::test]
    async fn message_cut_short_is_an_error() {
        let wire = [&8_000_000_u32.to_le_bytes()[..], &[1; 100]].concat();
        let error = read_bytes(&mut wire.as_slice(), RESPONSE_BYTES_MAX).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
    }
}
