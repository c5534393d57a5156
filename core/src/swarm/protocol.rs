//! What volunteers and coordination peers say to each other. Every request gets one response.
//!
//! A session: [`Request::Hello`], then [`Request::Take`] again and again; a computed unit is
//! announced by [`Request::Receipt`], and if the answer is [`Response::Upload`] its bytes follow on
//! a stream. Bytes are little-endian with variable-length integers (bincode), bounded by
//! [`REQUEST_BYTES_MAX`] and [`RESPONSE_BYTES_MAX`].

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::ids::{Hash, PeerKey, Signature};
use super::ledger::Offence;
use super::unit::UNIT_BYTES_MAX;

/// Version of the protocol. Peers of different versions refuse each other.
pub const PROTOCOL: u32 = 1;
/// Largest request.
pub const REQUEST_BYTES_MAX: usize = 64 << 10;
/// Largest response: a unit and its envelope, or a page of the ledger.
pub const RESPONSE_BYTES_MAX: usize = UNIT_BYTES_MAX + (4 << 20);
/// Longest free text.
pub const TEXT_BYTES_MAX: usize = 128;
/// Records of the ledger in one response.
pub const RECORDS_MAX: u32 = 4096;
/// Weights that a volunteer may say it has.
pub const HAVE_MAX: usize = 8;
/// Addresses of a coordination peer.
pub const ADDRESSES_MAX: usize = 16;

/// From a volunteer, or a follower, to a coordination peer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum Request {
    /// Begins a session.
    Hello {
        /// [`PROTOCOL`].
        protocol: u32,
        /// Digest of the conformance suite on the engine that will compute.
        digest: String,
        /// Program and version.
        agent: String,
        /// Engine and adapter.
        engine: String,
        /// Measured speed in multiply-adds a second.
        speed: f64,
    },
    /// Asks for work.
    Take,
    /// Shows life while computing; asks whether these units are still wanted.
    Beat {
        /// Units that are held.
        units: Vec<Hash>,
    },
    /// Announces a result, before its bytes.
    Receipt {
        /// Hash of the unit.
        unit: Hash,
        /// Hash of the result.
        receipt: Hash,
        /// Size of the result.
        bytes: u64,
        /// Over [`receipt_message`](super::ledger::receipt_message).
        signature: Signature,
    },
    /// Gives units back.
    Release {
        /// Units that will not be computed.
        units: Vec<Hash>,
    },
    /// Asks how to get weights.
    Weights {
        /// Their hash.
        want: Hash,
        /// Hashes of weights that are there.
        have: Vec<Hash>,
    },
    /// Asks for a page of the ledger.
    Ledger {
        /// First record.
        from: u64,
        /// At most so many.
        limit: u32,
    },
    /// Asks who coordinates, and who follows.
    Peers,
    /// Asks to be a follower.
    Follow {
        /// The operator's token.
        token: String,
        /// Where the follower can be reached.
        addresses: Vec<String>,
    },
}

/// From a coordination peer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum Response {
    /// The session is open.
    Welcome(Welcome),
    /// The session is not, or the request makes no sense.
    Refused(Refusal),
    /// Work.
    Unit {
        /// The unit's bytes.
        unit: Vec<u8>,
        /// Accepted since the last word: unit and position in the ledger.
        accepted: Vec<(Hash, u64)>,
    },
    /// No work at the moment.
    Idle {
        /// When to ask again.
        retry_ms: u32,
        /// What the run is doing.
        why: Idle,
        /// Accepted since the last word.
        accepted: Vec<(Hash, u64)>,
    },
    /// Heard.
    Beat {
        /// Units that nobody waits for.
        unwanted: Vec<Hash>,
    },
    /// Send the bytes.
    Upload,
    /// Keep them: the receipt was enough, or nobody waits for them.
    Keep,
    /// Blobs that make the weights, to be applied in this order.
    Weights {
        /// Hash of the weights that the first blob changes; `None` if it needs none.
        base: Option<Hash>,
        /// Blobs, by hash.
        blobs: Vec<Hash>,
    },
    /// Records of the ledger, in order.
    Records(Vec<Vec<u8>>),
    /// Who coordinates, first, and who follows.
    Peers(Vec<PeerAddress>),
    /// Done.
    Done,
}

/// What a session begins with.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Welcome {
    /// The run.
    pub run: Hash,
    /// The run file, as JSON.
    pub config: String,
    /// Steps of all phases so far.
    pub ordinal: u64,
    /// Pause between two signs of life.
    pub beat_ms: u32,
    /// Who coordinates, first, and who follows.
    pub peers: Vec<PeerAddress>,
}

/// Where a coordination peer can be reached.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PeerAddress {
    /// Who.
    pub peer: PeerKey,
    /// Multiaddresses.
    pub addresses: Vec<String>,
}

/// Why there is no work.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Idle {
    /// Everything is given out; more comes.
    Waiting,
    /// The operator paused the run.
    Paused,
    /// The run is complete.
    Done,
}

/// Why a request is refused.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
pub enum Refusal {
    /// Another version of the protocol.
    #[error(
        "this coordination peer speaks protocol {0}; install the version of the program that it runs"
    )]
    Protocol(u32),
    /// The engine computes other bits.
    #[error("the engine does not compute the right bits; `manyhands doctor` tells more")]
    Digest,
    /// Expelled for good.
    #[error("expelled for {0:?}")]
    Expelled(Offence),
    /// No session is open: say hello.
    #[error("say hello first")]
    NoSession,
    /// Too many volunteers.
    #[error("this coordination peer serves as many volunteers as it can; try again later")]
    Full,
    /// The token is not the operator's.
    #[error(
        "the token is not the operator's; it is in the file admin-token of the host's directory"
    )]
    Token,
    /// This peer only follows.
    #[error("this peer follows another coordination peer")]
    Follower,
    /// Weights that this peer does not know.
    #[error("unknown weights")]
    UnknownWeights,
    /// A request beyond its bounds.
    #[error("the request is beyond its bounds")]
    Bounds,
}

/// Bytes that are no message.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the bytes are no message of protocol {PROTOCOL}")]
pub struct NoMessage;

fn encode<T: Serialize>(message: &T) -> Vec<u8> {
    bincode::serde::encode_to_vec(message, bincode::config::standard()).expect("plain data")
}

/// Responses up to this length are short.
const SHORT_BYTES: usize = 64 << 10;

fn decode<T: DeserializeOwned, const MAX: usize>(bytes: &[u8]) -> Result<T, NoMessage> {
    if bytes.len() > MAX / 4 {
        return Err(NoMessage);
    }
    // The limit counts every integer in full, though most take fewer bytes.
    let config = bincode::config::standard().with_limit::<MAX>();
    match bincode::serde::decode_from_slice(bytes, config) {
        Ok((message, read)) if read == bytes.len() => Ok(message),
        _ => Err(NoMessage),
    }
}

impl Request {
    /// The bytes on the wire.
    pub fn encode(&self) -> Vec<u8> {
        encode(self)
    }

    /// Reads a request and checks its bounds.
    pub fn decode(bytes: &[u8]) -> Result<Self, NoMessage> {
        let request: Self = decode::<_, { 4 * REQUEST_BYTES_MAX }>(bytes)?;
        let text = |t: &str| t.len() <= TEXT_BYTES_MAX;
        let fits = match &request {
            Self::Hello { digest, agent, engine, speed, .. } => {
                text(digest) && text(agent) && text(engine) && speed.is_finite() && *speed >= 0.0
            }
            Self::Beat { units } | Self::Release { units } => units.len() <= HAVE_MAX,
            Self::Weights { have, .. } => have.len() <= HAVE_MAX,
            Self::Ledger { limit, .. } => *limit <= RECORDS_MAX,
            Self::Follow { token, addresses } => {
                text(token)
                    && addresses.len() <= ADDRESSES_MAX
                    && addresses.iter().all(|a| a.len() <= 2 * TEXT_BYTES_MAX)
            }
            Self::Take | Self::Receipt { .. } | Self::Peers => true,
        };
        if fits { Ok(request) } else { Err(NoMessage) }
    }
}

impl Response {
    /// The bytes on the wire.
    pub fn encode(&self) -> Vec<u8> {
        encode(self)
    }

    /// Reads a response.
    pub fn decode(bytes: &[u8]) -> Result<Self, NoMessage> {
        // A text is given the room that it claims: a short message must not claim much.
        if bytes.len() <= SHORT_BYTES {
            return decode::<_, { 16 * SHORT_BYTES }>(bytes);
        }
        decode::<_, { 4 * RESPONSE_BYTES_MAX }>(bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A short response and a long one are read alike, whatever the mix of small numbers in it.
    #[test]
    fn response_of_any_length_is_read() {
        for length in [0, 1000, SHORT_BYTES - 8, SHORT_BYTES, 3 * SHORT_BYTES] {
            let unit =
                Response::Unit { unit: vec![1; length], accepted: vec![(Hash([0; 32]), 1); 9] };
            assert_eq!(Response::decode(&unit.encode()), Ok(unit.clone()), "{length}");
            let blobs = vec![Hash([0; 32]); length / 32];
            let weights = Response::Weights { base: None, blobs };
            assert_eq!(Response::decode(&weights.encode()), Ok(weights.clone()), "{length}");
        }
    }

    fn hello(agent: usize, speed: f64) -> Request {
        let text = |n: usize| "x".repeat(n);
        Request::Hello {
            protocol: PROTOCOL,
            digest: text(32),
            agent: text(agent),
            engine: text(TEXT_BYTES_MAX),
            speed,
        }
    }

    /// At each bound a request is read, and one beyond it is no message.
    #[test]
    fn request_beyond_any_of_its_bounds_is_no_message() {
        let hashes = |n: usize| vec![Hash([3; 32]); n];
        let follow = |token: usize, count: usize, length: usize| Request::Follow {
            token: "t".repeat(token),
            addresses: vec!["a".repeat(length); count],
        };
        let weights = |n| Request::Weights { want: Hash([1; 32]), have: hashes(n) };
        let ledger = |limit| Request::Ledger { from: u64::MAX, limit };
        let pairs = [
            (hello(TEXT_BYTES_MAX, 1.0), hello(TEXT_BYTES_MAX + 1, 1.0)),
            (hello(0, f64::MAX), hello(0, f64::INFINITY)),
            (hello(0, 0.0), hello(0, -1.0)),
            (Request::Beat { units: hashes(HAVE_MAX) }, Request::Beat { units: hashes(9) }),
            (Request::Release { units: hashes(HAVE_MAX) }, Request::Release { units: hashes(9) }),
            (weights(HAVE_MAX), weights(HAVE_MAX + 1)),
            (ledger(RECORDS_MAX), ledger(RECORDS_MAX + 1)),
            (follow(TEXT_BYTES_MAX, 1, 1), follow(TEXT_BYTES_MAX + 1, 1, 1)),
            (follow(1, ADDRESSES_MAX, 1), follow(1, ADDRESSES_MAX + 1, 1)),
            (follow(1, 1, 2 * TEXT_BYTES_MAX), follow(1, 1, 2 * TEXT_BYTES_MAX + 1)),
        ];
        for (good, bad) in pairs {
            assert_eq!(Request::decode(&good.encode()).as_ref(), Ok(&good));
            assert_eq!(Request::decode(&bad.encode()), Err(NoMessage), "{bad:?}");
        }
    }

    /// Bytes after a message, and messages that are too long as a whole, are refused unread.
    #[test]
    fn message_longer_than_its_bound_is_refused() {
        let mut bytes = Request::Take.encode();
        bytes.push(0);
        assert_eq!(Request::decode(&bytes), Err(NoMessage));
        let response = |n| Response::Unit { unit: vec![7; n], accepted: Vec::new() };
        let largest = response(UNIT_BYTES_MAX);
        assert_eq!(Response::decode(&largest.encode()), Ok(largest));
        let beyond = response(RESPONSE_BYTES_MAX).encode();
        assert!(beyond.len() > RESPONSE_BYTES_MAX);
        assert_eq!(Response::decode(&beyond), Err(NoMessage));
        assert_eq!(Request::decode(&vec![0; REQUEST_BYTES_MAX + 1]), Err(NoMessage));
    }
}
