//! Names of things in the swarm: hashes, identities and signatures.

use std::fmt;

use ed25519_dalek::{Signer, SigningKey, VerifyingKey};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// A 32-byte value that people read as hexadecimal.
macro_rules! bytes_newtype {
    ($(#[$doc:meta])* $name:ident, $size:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(pub [u8; $size]);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.iter().try_for_each(|b| write!(f, "{b:02x}"))
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{}({})", stringify!($name), self.short())
            }
        }

        impl $name {
            /// The first four bytes, for logs and tables.
            pub fn short(&self) -> String {
                self.0[..4].iter().map(|b| format!("{b:02x}")).collect()
            }

            /// Reads hexadecimal, of either case.
            pub fn parse(text: &str) -> Option<Self> {
                // Rust's integers would take a plus sign too.
                if text.len() != 2 * $size || !text.bytes().all(|b| b.is_ascii_hexdigit()) {
                    return None;
                }
                let mut out = [0; $size];
                for (i, byte) in out.iter_mut().enumerate() {
                    *byte = u8::from_str_radix(text.get(2 * i..2 * i + 2)?, 16).ok()?;
                }
                Some(Self(out))
            }
        }

        /// Text in JSON, bytes in binary formats.
        impl Serialize for $name {
            fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
                if s.is_human_readable() {
                    return s.collect_str(self);
                }
                serde::ser::SerializeTuple::end({
                    let mut tuple = s.serialize_tuple($size)?;
                    for byte in &self.0 {
                        serde::ser::SerializeTuple::serialize_element(&mut tuple, byte)?;
                    }
                    tuple
                })
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
                struct Visitor;
                impl<'de> serde::de::Visitor<'de> for Visitor {
                    type Value = $name;

                    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                        write!(f, "{} bytes", $size)
                    }

                    fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<$name, E> {
                        $name::parse(text).ok_or_else(|| E::custom("not hexadecimal of the right length"))
                    }

                    fn visit_seq<A: serde::de::SeqAccess<'de>>(
                        self,
                        mut seq: A,
                    ) -> Result<$name, A::Error> {
                        let mut out = [0; $size];
                        for (i, byte) in out.iter_mut().enumerate() {
                            let next = seq.next_element()?;
                            *byte = next.ok_or_else(|| serde::de::Error::invalid_length(i, &self))?;
                        }
                        Ok($name(out))
                    }
                }
                if d.is_human_readable() {
                    return d.deserialize_str(Visitor);
                }
                d.deserialize_tuple($size, Visitor)
            }
        }
    };
}

bytes_newtype!(
    /// BLAKE3 of some bytes.
    Hash,
    32
);
bytes_newtype!(
    /// Who: the Ed25519 public key of a volunteer or a coordination peer.
    PeerKey,
    32
);
bytes_newtype!(
    /// An Ed25519 signature.
    Signature,
    64
);

impl Hash {
    /// BLAKE3 of `bytes`.
    pub fn of(bytes: &[u8]) -> Self {
        blake3::hash(bytes).into()
    }
}

impl From<blake3::Hash> for Hash {
    fn from(hash: blake3::Hash) -> Self {
        Self(*hash.as_bytes())
    }
}

impl PeerKey {
    /// Whether `signature` is this identity's, over `message` (strict: no malleable encodings).
    pub fn verifies(&self, message: &[u8], signature: &Signature) -> bool {
        let Ok(key) = VerifyingKey::from_bytes(&self.0) else { return false };
        key.verify_strict(message, &ed25519_dalek::Signature::from_bytes(&signature.0)).is_ok()
    }
}

/// A private key. Signatures are deterministic: they need no randomness.
#[derive(Clone)]
pub struct Secret(SigningKey);

impl Secret {
    /// The key of a 32-byte seed.
    pub fn from_seed(seed: &[u8; 32]) -> Self {
        Self(SigningKey::from_bytes(seed))
    }

    /// The public half.
    pub fn key(&self) -> PeerKey {
        PeerKey(self.0.verifying_key().to_bytes())
    }

    /// Signs a message.
    pub fn sign(&self, message: &[u8]) -> Signature {
        Signature(self.0.sign(message).to_bytes())
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Secret of {:?}", self.key())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hash_survives_json_and_hexadecimal() {
        let hash = Hash::of(b"x");
        let text = serde_json::to_string(&hash).unwrap();
        assert_eq!(text, format!("\"{}\"", blake3::hash(b"x").to_hex()));
        assert_eq!(serde_json::from_str::<Hash>(&text).unwrap(), hash);
        assert_eq!(Hash::parse(&hash.to_string().to_uppercase()), Some(hash));
        let [accents, signs] = ["é", "+b"].map(|two| format!("\"{}\"", two.repeat(32)));
        for bad in ["\"00\"", "\"zz\"", "3", &accents, &signs] {
            assert!(serde_json::from_str::<Hash>(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn signature_of_another_message_or_key_is_refused() {
        let (a, b) = (Secret::from_seed(&[1; 32]), Secret::from_seed(&[2; 32]));
        let signature = a.sign(b"message");
        assert!(a.key().verifies(b"message", &signature));
        assert!(!a.key().verifies(b"massage", &signature));
        assert!(!b.key().verifies(b"message", &signature));
    }
}
