//! The operator's token: made at the first start, kept in a file that only its owner can read.

use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::path::Path;

use anyhow::{Context, Result, anyhow};
use manyhands_core::swarm::ids::Hash;

use crate::store::read_bounded;

/// Name of the file in the directory of a coordination peer.
pub const TOKEN_FILE: &str = "admin-token";
/// Largest token file that is read: 64 digits and a line end, with room for an editor's habits.
pub const TOKEN_FILE_BYTES_MAX: u64 = 128;

/// A secret that allows `/api/admin`. 32 random bytes; not shown by `Debug`.
pub struct AdminToken {
    text: String,
}

impl std::fmt::Debug for AdminToken {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("AdminToken")
    }
}

impl AdminToken {
    /// Reads the token of a directory, or makes one.
    pub fn open(dir: &Path) -> Result<Self> {
        let path = dir.join(TOKEN_FILE);
        if path.exists() {
            let bytes = read_bounded(&path, TOKEN_FILE_BYTES_MAX)?;
            let token = std::str::from_utf8(&bytes).ok().and_then(|t| Hash::parse(t.trim()));
            let token = token.with_context(|| {
                format!(
                    "{} does not hold 64 hexadecimal digits; delete it, and a new token is made",
                    path.display()
                )
            })?;
            return Ok(Self { text: token.to_string() });
        }
        let mut secret = [0; 32];
        getrandom::fill(&mut secret)
            .map_err(|e| anyhow!("the system gives no random bytes for a token: {e}"))?;
        let text = Hash(secret).to_string();
        write_private(&path, text.as_bytes())
            .with_context(|| format!("cannot write {}", path.display()))?;
        Ok(Self { text })
    }

    /// The token, 64 hexadecimal digits.
    pub fn text(&self) -> &str {
        &self.text
    }

    /// Whether `offered` is the token. Takes the same time wherever they differ: the hashes are
    /// compared, and that comparison is constant-time.
    pub fn matches(&self, offered: &str) -> bool {
        blake3::hash(offered.as_bytes()) == blake3::hash(self.text.as_bytes())
    }
}

/// Writes a file that never exists with more rights than its owner's, nor half-written.
fn write_private(path: &Path, bytes: &[u8]) -> std::io::Result<()> {
    let temporary = path.with_extension("tmp");
    if temporary.exists() {
        fs::remove_file(&temporary)?;
    }
    let mut file = create_private(&temporary)?;
    file.write_all(bytes)?;
    file.write_all(b"\n")?;
    file.sync_all()?;
    fs::rename(&temporary, path)
}

#[cfg(unix)]
fn create_private(path: &Path) -> std::io::Result<File> {
    use std::os::unix::fs::OpenOptionsExt;
    OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)
}

#[cfg(not(unix))]
fn create_private(path: &Path) -> std::io::Result<File> {
    OpenOptions::new().write(true).create_new(true).open(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn token_reopened_is_the_same_and_private() {
        let dir = tempfile::tempdir().unwrap();
        let token = AdminToken::open(dir.path()).unwrap();
        assert_eq!(AdminToken::open(dir.path()).unwrap().text(), token.text());
        let other = AdminToken::open(tempfile::tempdir().unwrap().path()).unwrap();
        assert_ne!(other.text(), token.text());
        #[cfg(unix)]
        {
            use std::os::unix::fs::PermissionsExt;
            let mode = fs::metadata(dir.path().join(TOKEN_FILE)).unwrap().permissions().mode();
            assert_eq!(mode & 0o777, 0o600);
        }
    }

    #[test]
    fn token_matches_only_itself() {
        let dir = tempfile::tempdir().unwrap();
        let token = AdminToken::open(dir.path()).unwrap();
        assert!(token.matches(token.text()));
        for bad in ["", "0", &token.text()[..63], &format!("{}0", token.text())] {
            assert!(!token.matches(bad), "{bad}");
        }
        assert!(!format!("{token:?}").contains(token.text()));
    }

    #[test]
    fn token_file_that_is_broken_says_what_to_do() {
        let dir = tempfile::tempdir().unwrap();
        for bad in [b"secret".as_slice(), b"", &[0xff; 64], &[b'0'; 4096]] {
            fs::write(dir.path().join(TOKEN_FILE), bad).unwrap();
            assert!(AdminToken::open(dir.path()).is_err());
        }
    }
}
