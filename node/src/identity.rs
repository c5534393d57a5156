//! The node's identity: an Ed25519 seed in a file, and the names that libp2p gives the same keys.

use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use libp2p::PeerId;
use libp2p::identity::{Keypair, PublicKey, ed25519};
use manyhands_core::swarm::ids::{PeerKey, Secret};

/// Bytes of the seed, and of its file.
const SEED_BYTES: usize = 32;
/// Code of a multihash that holds its input unchanged.
const IDENTITY_MULTIHASH: u64 = 0;

/// Who this node is.
#[derive(Clone)]
pub struct Identity {
    seed: [u8; SEED_BYTES],
}

impl Identity {
    /// The identity of a seed.
    pub fn from_seed(seed: [u8; SEED_BYTES]) -> Self {
        Self { seed }
    }

    /// Reads the identity of this node; makes one on first use.
    pub fn load_or_create(path: &Path) -> Result<Self> {
        if path.exists() {
            return Self::load(path);
        }
        let mut seed = [0; SEED_BYTES];
        getrandom::fill(&mut seed).map_err(std::io::Error::from).context("cannot draw a key")?;
        write_private(path, &seed).with_context(|| format!("cannot write {}", path.display()))?;
        Ok(Self { seed })
    }

    fn load(path: &Path) -> Result<Self> {
        let name = path.display();
        let file = File::open(path).with_context(|| format!("cannot open the key {name}"))?;
        refuse_public(&file, path)?;
        let bytes = crate::store::read_bounded(path, SEED_BYTES as u64);
        let Some(seed) = bytes.ok().and_then(|b| <[u8; SEED_BYTES]>::try_from(b).ok()) else {
            bail!(
                "the key {name} is damaged: it must be {SEED_BYTES} bytes; restore it from a \
                 backup, or remove it to start with a new identity"
            );
        };
        Ok(Self { seed })
    }

    /// The key that signs.
    pub fn secret(&self) -> Secret {
        Secret::from_seed(&self.seed)
    }

    /// Who others see.
    pub fn key(&self) -> PeerKey {
        self.secret().key()
    }

    /// The same key for libp2p.
    pub fn keypair(&self) -> Keypair {
        Keypair::ed25519_from_bytes(self.seed).expect("any 32 bytes are an Ed25519 seed")
    }

    /// The identity of a libp2p key; only Ed25519 is known here.
    pub fn from_keypair(keypair: &Keypair) -> Result<Self> {
        let pair = keypair.clone().try_into_ed25519().context("the key is not Ed25519")?;
        let seed = <[u8; SEED_BYTES]>::try_from(pair.secret().as_ref())
            .context("the key is not of 32 bytes")?;
        Ok(Self { seed })
    }
}

impl std::fmt::Debug for Identity {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Identity of {:?}", self.key())
    }
}

/// The libp2p name of a key; an error where the bytes are no point of the curve.
pub fn peer_id(key: &PeerKey) -> Result<PeerId> {
    let public = ed25519::PublicKey::try_from_bytes(&key.0)
        .with_context(|| format!("{} is no Ed25519 key", key.short()))?;
    Ok(PublicKey::from(public).to_peer_id())
}

/// The key inside a libp2p name. Names that only hash their key (RSA) are refused.
pub fn peer_key(id: &PeerId) -> Result<PeerKey> {
    let multihash: &libp2p::multihash::Multihash<64> = id.as_ref();
    ensure!(multihash.code() == IDENTITY_MULTIHASH, "the peer {id} does not name its key");
    let public = PublicKey::try_decode_protobuf(multihash.digest())
        .with_context(|| format!("the peer {id} does not name its key"))?;
    let public = public.try_into_ed25519().with_context(|| format!("{id} is not Ed25519"))?;
    Ok(PeerKey(public.to_bytes()))
}

/// Writes a file that only its owner can read, whole or not at all.
fn write_private(path: &Path, bytes: &[u8]) -> std::io::Result<()> {
    if let Some(parent) = path.parent().filter(|p| !p.as_os_str().is_empty()) {
        fs::create_dir_all(parent)?;
    }
    let temporary = path.with_extension(format!("tmp{}", std::process::id()));
    let mut options = OpenOptions::new();
    options.write(true).create_new(true);
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
    let mut file = options.open(&temporary)?;
    file.write_all(bytes)?;
    file.sync_all()?;
    fs::rename(&temporary, path)
}

/// Refuses a key that other users of the machine can read.
#[cfg(unix)]
fn refuse_public(file: &File, path: &Path) -> Result<()> {
    use std::os::unix::fs::PermissionsExt;
    let metadata = file.metadata().with_context(|| format!("cannot read {}", path.display()))?;
    ensure!(
        metadata.permissions().mode() & 0o077 == 0,
        "others can read the key {}; run `chmod 600 {}`, or remove it to start with a new identity",
        path.display(),
        path.display()
    );
    Ok(())
}

/// Access lists of other systems follow the directory, which belongs to the user.
#[cfg(not(unix))]
fn refuse_public(_: &File, _: &Path) -> Result<()> {
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn identity_made_once_is_found_again() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("deep/key");
        let made = Identity::load_or_create(&path).unwrap();
        assert_eq!(Identity::load_or_create(&path).unwrap().key(), made.key());
        let other = Identity::load_or_create(&dir.path().join("other")).unwrap();
        assert_ne!(other.key(), made.key());
    }

    #[cfg(unix)]
    #[test]
    fn identity_that_others_can_read_is_refused() {
        use std::os::unix::fs::PermissionsExt;
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("key");
        Identity::load_or_create(&path).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        fs::set_permissions(&path, fs::Permissions::from_mode(0o640)).unwrap();
        let error = Identity::load_or_create(&path).unwrap_err().to_string();
        assert!(error.contains("chmod 600"), "{error}");
    }

    #[test]
    fn identity_of_a_wrong_length_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        for length in [0, 31, 33, 4096] {
            let path = dir.path().join(format!("key{length}"));
            write_private(&path, &vec![7; length]).unwrap();
            let error = Identity::load_or_create(&path).unwrap_err().to_string();
            assert!(error.contains("damaged"), "{length}: {error}");
        }
    }

    #[test]
    fn keys_convert_both_ways() {
        let identity = Identity::from_seed([9; 32]);
        let id = identity.keypair().public().to_peer_id();
        assert_eq!(peer_key(&id).unwrap(), identity.key());
        assert_eq!(peer_id(&identity.key()).unwrap(), id);
        assert_eq!(Identity::from_keypair(&identity.keypair()).unwrap().key(), identity.key());
    }

    #[test]
    fn peer_ids_without_a_key_inside_are_refused() {
        // SHA-256 of something, as RSA identities have.
        let mut hashed = vec![0x12, 0x20];
        hashed.extend([5; 32]);
        // An inlined key that is not Ed25519 (type 2: secp256k1).
        let other = [&[0x00, 0x25, 0x08, 0x02, 0x12, 0x21][..], &[3; 33]].concat();
        for bytes in [hashed, other] {
            let id = PeerId::from_bytes(&bytes).unwrap();
            assert!(peer_key(&id).is_err(), "{id}");
        }
        // y = 2 has no x on the curve.
        let mut no_point = [0; 32];
        no_point[0] = 2;
        assert!(peer_id(&PeerKey(no_point)).is_err());
    }
}
