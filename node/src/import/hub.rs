//! Fetches a model's files from the Hugging Face hub, or finds them in its cache.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use hf_hub::api::sync::ApiBuilder;
use hf_hub::{Cache, Repo, RepoType};
use manyhands_core::import::hf::CONFIG_FILE;

use super::files::TOKENIZER_CONFIG_FILE;
use manyhands_core::language::{TEMPLATE_FILE, TOKENIZER_FILE};

/// Begins the name of a model on the hub.
pub const SCHEME: &str = "hf:";

/// A model's name on the hub: `OWNER/NAME`, `OWNER/NAME@REVISION`, `OWNER/NAME/FILE.gguf`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Name {
    /// `OWNER/NAME`.
    pub repository: String,
    /// Branch, tag or commit.
    pub revision: String,
    /// One file, rather than the model's safetensors.
    pub file: Option<String>,
}

impl Name {
    /// Parses what follows [`SCHEME`].
    pub fn parse(text: &str) -> Result<Self> {
        let (path, revision) = text.split_once('@').unwrap_or((text, "main"));
        let parts: Vec<&str> = path.splitn(3, '/').collect();
        let plain = |part: &&str| {
            let letter = |b: u8| b.is_ascii_alphanumeric() || b"-_./".contains(&b);
            !part.is_empty() && part.bytes().all(letter) && !part.split('/').any(|p| p == "..")
        };
        ensure!(
            parts.len() >= 2 && parts.iter().all(plain) && plain(&revision),
            "{text:?} is no name on the hub; write {SCHEME}OWNER/NAME, with @REVISION or /FILE.gguf if need be"
        );
        Ok(Self {
            repository: format!("{}/{}", parts[0], parts[1]),
            revision: revision.into(),
            file: parts.get(2).map(|f| (*f).to_string()),
        })
    }
}

/// Fetches what an import reads; returns the directory or the file.
pub fn fetch(name: &Name) -> Result<PathBuf> {
    let unreachable = || {
        format!(
            "cannot fetch {}; check the name and the connection, or download the files by other means and import their directory",
            name.repository
        )
    };
    let api = ApiBuilder::from_env().build().context("cannot prepare the hub's client")?;
    let named =
        Repo::with_revision(name.repository.clone(), RepoType::Model, name.revision.clone());
    let repo = api.repo(named.clone());
    if let Some(file) = &name.file {
        return repo.get(file).with_context(unreachable);
    }
    let info = match repo.info() {
        Ok(info) => info,
        // What was fetched before is enough; a file that is missing will be named.
        Err(error) => {
            let cached = Cache::from_env().repo(named).get(CONFIG_FILE);
            let dir = cached.as_deref().and_then(Path::parent).map(PathBuf::from);
            return dir.ok_or(error).with_context(unreachable);
        }
    };
    let files: Vec<String> = info.siblings.into_iter().map(|s| s.rfilename).collect();
    if !files.iter().any(|f| f == CONFIG_FILE) {
        let gguf: Vec<&String> = files.iter().filter(|f| f.ends_with(".gguf")).collect();
        match gguf[..] {
            [one] => return repo.get(one).with_context(unreachable),
            [] => bail!("{} has neither {CONFIG_FILE} nor a GGUF file", name.repository),
            _ => bail!(
                "{0} has several GGUF files; name one, as {SCHEME}{0}/{1}",
                name.repository,
                gguf[0]
            ),
        }
    }
    let text = [CONFIG_FILE, TOKENIZER_FILE, TOKENIZER_CONFIG_FILE, TEMPLATE_FILE];
    // Subdirectories hold other forms of the same weights.
    let wanted = |f: &&String| {
        text.contains(&f.as_str()) || (f.ends_with(".safetensors") && !f.contains('/'))
    };
    let mut dir = None;
    for file in files.iter().filter(wanted) {
        let path = repo.get(file).with_context(unreachable)?;
        if file == CONFIG_FILE {
            dir = path.parent().map(PathBuf::from);
        }
    }
    dir.context("the hub's cache has no directory")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn name_parses_and_refuses_paths() {
        let name = Name::parse("a/b-1.5@v2").unwrap();
        assert_eq!((&*name.repository, &*name.revision, name.file), ("a/b-1.5", "v2", None));
        let name = Name::parse("a/b/c/d.gguf").unwrap();
        assert_eq!((&*name.revision, name.file.as_deref()), ("main", Some("c/d.gguf")));
        for bad in ["", "a", "a/", "a/b/../c", "a/b?c", "../b", "a/b@"] {
            assert!(Name::parse(bad).is_err(), "{bad}");
        }
    }
}
