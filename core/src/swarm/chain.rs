//! The ledger's chain: the bytes of records, writing them and checking them.
//!
//! A record is its bytes as bincode writes them (variable-length integers), the signature last.
//! What is signed is `MESSAGE` and the bytes before the signature; what the next record names is
//! the hash of all of them. Both are taken over the bytes as received, never over an encoding
//! made again; that a record has one encoding only is checked besides.
//!
//! The run's identity is the hash of its first record. Here is decided whether records are an
//! unbroken chain by the coordination peers that it names; what entries mean is not, nor whether
//! a new coordination peer may take over.

use super::ids::{Hash, PeerKey, Secret, Signature};
use super::ledger::{Entry, Record};

/// Bytes of the largest record. Only `Entry::Open` comes near: it holds the run file.
pub const RECORD_BYTES_MAX: usize = 1 << 20;

/// What bincode may charge for decoding: it counts eight bytes for every integer, however short.
const DECODE_LIMIT: usize = 2 * RECORD_BYTES_MAX;
/// What a signature of a record is over, before the record's own bytes.
const MESSAGE: &[u8] = b"manyhands record 1";
/// Bytes of the signature at a record's end.
const SIGNATURE_BYTES: usize = 64;

/// Why bytes are not a record, or not the next one.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ChainError {
    /// Over [`RECORD_BYTES_MAX`].
    #[error("{0} bytes are more than the {RECORD_BYTES_MAX} that a record may have")]
    TooLong(u64),
    /// Not a record.
    #[error("not a record: {0}")]
    Malformed(String),
    /// A record, but not as [`encode`] writes it.
    #[error("the record is not in its one encoding")]
    NotCanonical,
    /// A record is missing, or comes again.
    #[error("it is record {got}")]
    Sequence {
        /// The sequence number that it bears.
        got: u64,
    },
    /// It follows another record than the one before it.
    #[error("it follows record {got}, the record before it is {expected}")]
    Previous {
        /// Hash of the record before.
        expected: Hash,
        /// The hash that it bears.
        got: Hash,
    },
    /// The first entry does not open a run.
    #[error("the first entry does not open a run")]
    NotOpen,
    /// A run is opened again.
    #[error("the run is already open")]
    OpenAgain,
    /// The signature is not the coordination peer's.
    #[error("the signature is not that of {signer}")]
    Signature {
        /// Who should have signed.
        signer: PeerKey,
    },
}

/// The first record that is wrong, and why.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("record {sequence} of the ledger: {error}")]
pub struct BrokenChain {
    /// Its position, from 0.
    pub sequence: u64,
    /// What is wrong.
    pub error: ChainError,
}

/// The bytes of a record.
pub fn encode(record: &Record) -> Vec<u8> {
    bincode::serde::encode_to_vec(record, bincode::config::standard())
        .expect("a record is plain data, and memory takes any of it")
}

/// The record of these bytes, all of them and in their one encoding. No length that the bytes
/// claim allocates more than twice [`RECORD_BYTES_MAX`]. The signature is not checked.
pub fn decode(bytes: &[u8]) -> Result<Record, ChainError> {
    if bytes.len() > RECORD_BYTES_MAX {
        return Err(ChainError::TooLong(bytes.len() as u64));
    }
    let config = bincode::config::standard().with_limit::<DECODE_LIMIT>();
    let (record, read): (Record, usize) = bincode::serde::decode_from_slice(bytes, config)
        .map_err(|e| ChainError::Malformed(e.to_string()))?;
    if read != bytes.len() || encode(&record) != bytes {
        return Err(ChainError::NotCanonical);
    }
    Ok(record)
}

/// What the next record names: the hash of a record's bytes.
pub fn record_hash(bytes: &[u8]) -> Hash {
    Hash::of(bytes)
}

/// What a record's signature is over. `bytes` are all of the record's.
fn message(bytes: &[u8]) -> Vec<u8> {
    [MESSAGE, &bytes[..bytes.len() - SIGNATURE_BYTES]].concat()
}

/// Appends records to a chain.
#[derive(Clone, Debug)]
pub struct Writer {
    run: Option<Hash>,
    secret: Secret,
    sequence: u64,
    previous: Hash,
}

impl Writer {
    /// At the beginning of a new chain.
    pub fn new(secret: Secret) -> Self {
        Self::after(&Verifier::default(), secret)
    }

    /// At the end of the chain that was verified. If `secret` is not that of
    /// [`Verifier::signer`], the first entry to append is `Entry::Promoted`.
    pub fn after(chain: &Verifier, secret: Secret) -> Self {
        Self { run: chain.run, secret, sequence: chain.sequence, previous: chain.previous }
    }

    /// The run's identity, once its first record is written.
    pub fn run(&self) -> Option<Hash> {
        self.run
    }

    /// Whose signature the records bear.
    pub fn coordinator(&self) -> PeerKey {
        self.secret.key()
    }

    /// The sequence number of the next record: how many there are.
    pub fn sequence(&self) -> u64 {
        self.sequence
    }

    /// The next record and its bytes.
    ///
    /// # Panics
    /// If the first entry is not `Open` or a later one is, and if the record is longer than
    /// [`RECORD_BYTES_MAX`]: bound the run file by half of it, which leaves room for file names.
    pub fn append(&mut self, time_ms: u64, entry: Entry) -> (Record, Vec<u8>) {
        let opens = matches!(entry, Entry::Open { .. });
        assert_eq!(opens, self.sequence == 0, "a chain has one opening entry, the first");
        let signature = Signature([0; SIGNATURE_BYTES]);
        let (sequence, previous) = (self.sequence, self.previous);
        let mut record = Record { sequence, previous, time_ms, entry, signature };
        let mut bytes = encode(&record);
        assert!(bytes.len() <= RECORD_BYTES_MAX, "a record of {} bytes", bytes.len());
        record.signature = self.secret.sign(&message(&bytes));
        let unsigned = bytes.len() - SIGNATURE_BYTES;
        bytes[unsigned..].copy_from_slice(&record.signature.0);
        self.previous = record_hash(&bytes);
        self.sequence += 1;
        self.run.get_or_insert(self.previous);
        (record, bytes)
    }
}

/// Checks the records of a chain, one after another.
#[derive(Clone, Debug)]
pub struct Verifier {
    run: Option<Hash>,
    signer: Option<PeerKey>,
    sequence: u64,
    previous: Hash,
}

impl Default for Verifier {
    fn default() -> Self {
        Self { run: None, signer: None, sequence: 0, previous: Hash([0; 32]) }
    }
}

impl Verifier {
    /// Takes the bytes of the next record. A refused record changes nothing: the right one may
    /// still follow.
    pub fn push(&mut self, bytes: &[u8]) -> Result<Record, BrokenChain> {
        let broken = |error| BrokenChain { sequence: self.sequence, error };
        let record = decode(bytes).map_err(broken)?;
        let signer = self.check(&record, bytes).map_err(broken)?;
        self.signer = Some(signer);
        self.previous = record_hash(bytes);
        self.sequence += 1;
        self.run.get_or_insert(self.previous);
        Ok(record)
    }

    /// Who signs from this record on.
    fn check(&self, record: &Record, bytes: &[u8]) -> Result<PeerKey, ChainError> {
        let (expected, got) = (self.previous, record.previous);
        if record.sequence != self.sequence {
            return Err(ChainError::Sequence { got: record.sequence });
        }
        if got != expected {
            return Err(ChainError::Previous { expected, got });
        }
        let signer = match (&record.entry, self.signer) {
            (Entry::Open { coordinator, .. }, None) => *coordinator,
            (Entry::Open { .. }, Some(_)) => return Err(ChainError::OpenAgain),
            (_, None) => return Err(ChainError::NotOpen),
            (Entry::Promoted { coordinator }, Some(_)) => *coordinator,
            (_, Some(signer)) => signer,
        };
        if !signer.verifies(&message(bytes), &record.signature) {
            return Err(ChainError::Signature { signer });
        }
        Ok(signer)
    }

    /// The run's identity: the hash of the first record, once there is one.
    pub fn run(&self) -> Option<Hash> {
        self.run
    }

    /// The coordination peer whose signature the next record bears, unless it is a promotion.
    pub fn signer(&self) -> Option<PeerKey> {
        self.signer
    }

    /// How many records there are.
    pub fn sequence(&self) -> u64 {
        self.sequence
    }
}

#[cfg(test)]
mod tests;
