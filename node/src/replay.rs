//! `manyhands replay`: derives a run again from a host's ledger and blobs, and says what is wrong.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::str::FromStr;
use std::sync::Arc;

use anyhow::{Context, Error, Result, ensure};
use clap::Args;
use indicatif::ProgressBar;
use manyhands_core::engine::EngineError;
use manyhands_core::engine::cpu::Cpu;
use manyhands_core::model::decoder::{Decoder, Loader};
use manyhands_core::run::execute::execute;
use manyhands_core::run::job::Version;
use manyhands_core::run::problems::Problems;
use manyhands_core::run::work::{Output, Work};
use manyhands_core::swarm::coordinator::Blobs;
use manyhands_core::swarm::ids::Hash;
use manyhands_core::swarm::replay::{Recompute, Replay, Sources, replay};

use crate::engines::thread_count;
use crate::imported;
use crate::remote::{Remote, RemoteRecords, is_url, trusted};
use crate::storage::{RECORDS_READ_MAX, STORAGE_FILE, Storage};
use crate::store::read_bounded;

/// Largest problem file.
const FILE_BYTES_MAX: u64 = 256 << 20;
/// Versions that are kept on the engine.
const DECODERS_MAX: usize = 3;

/// How many units are computed again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Share {
    Count(u64),
    All,
}

impl FromStr for Share {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "all" => Ok(Self::All),
            _ => text.parse().map(Self::Count).map_err(|_| "give a number, or `all`".into()),
        }
    }
}

/// Arguments of `replay`.
#[derive(Debug, Args)]
pub struct ReplayArgs {
    /// A host's directory (the host must not be running), or the address of a host that is.
    #[arg(value_name = "DIR|URL")]
    source: String,
    /// Units to compute again, chosen by chance: a number, or `all`.
    #[arg(long, value_name = "N|all", default_value = "16")]
    recompute: Share,
    /// Seed of the choice of units, to repeat one [default: a new one].
    #[arg(long)]
    seed: Option<u64>,
    /// Directory that the run file's paths of problem files start from, where the host has no
    /// copy of them.
    #[arg(long, value_name = "DIR", default_value = ".")]
    files: PathBuf,
    /// Threads; 0 takes all cores.
    #[arg(long, default_value_t = 0)]
    threads: usize,
    /// Trust this certificate authority (PEM) for https, instead of those that the system trusts.
    #[arg(long, value_name = "FILE")]
    ca: Option<PathBuf>,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

/// Runs `replay`.
pub fn run(args: &ReplayArgs) -> Result<ExitCode> {
    let seed = match args.seed {
        Some(seed) => seed,
        None => getrandom::u64().map_err(std::io::Error::from)?,
    };
    let found = if is_url(&args.source) {
        let remote = Remote::new(&args.source, &trusted(&args.source, args.ca.as_deref())?)?;
        let mut records = RemoteRecords::new(&remote);
        let found = derive(args, seed, &mut records, &remote);
        records.error.map_or(Ok(()), Err).context("cannot read the ledger")?;
        found?
    } else {
        let dir = Path::new(&args.source);
        let storage = open_ledger(dir)?;
        let blobs = HostBlobs { storage: &storage, dir: dir.join("blobs") };
        let mut records = Records::new(&storage);
        let found = derive(args, seed, &mut records, &blobs);
        records.error.map_or(Ok(()), Err).context("cannot read the ledger")?;
        found?
    };
    show(&found, seed, args.json)?;
    Ok(if found.ok { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn derive(
    args: &ReplayArgs,
    seed: u64,
    records: &mut dyn Iterator<Item = Vec<u8>>,
    blobs: &dyn Blobs,
) -> Result<Replay> {
    let recompute = match args.recompute {
        Share::Count(count) => Recompute::Some { count, seed },
        Share::All => Recompute::All,
    };
    let bar = ProgressBar::new(0);
    let mut machine = Machine {
        threads: args.threads,
        engine: None,
        loader: Loader::default(),
        decoders: Vec::new(),
    };
    let sources = Sources {
        files: &mut |path| read_text(&args.files.join(path)).map_err(|e| format!("{e:#}")),
        import: &mut |config, find| {
            imported::from_blobs(config, find).map_err(|e| format!("{e:#}"))
        },
        blobs,
        recompute,
        execute: &mut |problems, version, work| machine.execute(problems, version, work),
        progress: &mut |done, all| {
            bar.set_length(all);
            bar.set_position(done);
        },
    };
    let found = replay(records, sources);
    bar.finish_and_clear();
    Ok(found?)
}

fn show(found: &Replay, seed: u64, json: bool) -> Result<()> {
    if json {
        println!("{}", serde_json::to_string(found)?);
        return Ok(());
    }
    println!("records     {}", found.entries);
    println!("versions    {} derived as the ledger says", found.versions);
    println!("recomputed  {} units (seed {seed})", found.recomputed);
    if let Some(weights) = found.weights {
        println!("weights     {weights}");
    }
    match &found.first_wrong {
        None => println!("everything is as the ledger says"),
        Some((sequence, why)) => println!("WRONG       record {sequence}: {why}"),
    }
    Ok(())
}

/// The ledger of a host that is not running.
pub(crate) fn open_ledger(dir: &Path) -> Result<Storage> {
    let file = dir.join(STORAGE_FILE);
    ensure!(file.is_file(), "{} is no host's directory: it has no {STORAGE_FILE}", dir.display());
    Storage::open(dir).with_context(|| {
        format!(
            "cannot open the ledger in {}; a host that is running must be stopped",
            dir.display()
        )
    })
}

fn read_text(path: &Path) -> Result<String> {
    let bytes = read_bounded(path, FILE_BYTES_MAX)
        .context("the run needs a problem file; say with --files where it is")?;
    String::from_utf8(bytes).with_context(|| format!("{} is not UTF-8", path.display()))
}

/// All records of a ledger, page by page.
pub(crate) struct Records<'a> {
    storage: &'a Storage,
    next: u64,
    /// Last first.
    page: Vec<Vec<u8>>,
    /// Why the records end before their end.
    pub(crate) error: Option<Error>,
}

impl<'a> Records<'a> {
    /// From the first record on.
    pub(crate) fn new(storage: &'a Storage) -> Self {
        Self { storage, next: 0, page: Vec::new(), error: None }
    }
}

impl Iterator for Records<'_> {
    type Item = Vec<u8>;

    fn next(&mut self) -> Option<Vec<u8>> {
        if self.page.is_empty() {
            match self.storage.records(self.next, RECORDS_READ_MAX) {
                Ok(page) => self.page = page,
                Err(error) => self.error = Some(error),
            }
            self.page.reverse();
            self.next += self.page.len() as u64;
        }
        self.page.pop()
    }
}

/// Small blobs are in the database, large ones are files. Nothing here is changed, damaged or not.
struct HostBlobs<'a> {
    storage: &'a Storage,
    dir: PathBuf,
}

impl Blobs for HostBlobs<'_> {
    fn get(&self, hash: &Hash) -> Option<Vec<u8>> {
        let name = hash.to_string();
        let small = self.storage.blob(hash).ok().flatten();
        small.or_else(|| std::fs::read(self.dir.join(&name[..2]).join(&name)).ok())
    }
}

/// The CPU engine and the versions that are on it, most recently used last.
struct Machine {
    threads: usize,
    engine: Option<Cpu>,
    loader: Loader<Cpu>,
    decoders: Vec<(Arc<Version>, Decoder<Cpu>)>,
}

impl Machine {
    fn execute(
        &mut self,
        problems: &Problems,
        version: &Arc<Version>,
        work: &Work,
    ) -> Result<Output, EngineError> {
        let constants = version.weights.config.constants();
        let threads = thread_count(self.threads);
        let engine = self.engine.get_or_insert_with(|| Cpu::new(constants, threads, None));
        let known = self.decoders.iter().position(|(v, _)| Arc::ptr_eq(v, version));
        let (version, decoder) = match known {
            Some(i) => self.decoders.remove(i),
            None => {
                let imported = problems.imported().map(AsRef::as_ref);
                (version.clone(), self.loader.load(engine, &version.weights, imported))
            }
        };
        let output = pollster::block_on(execute(engine, &decoder, work, |_| ()));
        self.decoders.push((version, decoder));
        let surplus = self.decoders.len().saturating_sub(DECODERS_MAX);
        self.decoders.drain(..surplus);
        output
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn share_reads_numbers_and_all_and_nothing_else() {
        assert_eq!("all".parse(), Ok(Share::All));
        assert_eq!("12".parse(), Ok(Share::Count(12)));
        assert!("-1".parse::<Share>().is_err() && "some".parse::<Share>().is_err());
    }

    /// A directory that is mistaken for a host's is neither made nor filled.
    #[test]
    fn open_ledger_of_another_directory_is_refused_and_leaves_it_alone() {
        let dir = tempfile::tempdir().unwrap();
        assert!(open_ledger(dir.path()).unwrap_err().to_string().contains("no host's directory"));
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    #[test]
    fn open_ledger_of_a_running_host_says_that_it_must_be_stopped() {
        let dir = tempfile::tempdir().unwrap();
        let running = Storage::open(dir.path()).unwrap();
        let error = format!("{:#}", open_ledger(dir.path()).unwrap_err());
        assert!(error.contains("must be stopped"), "{error}");
        drop(running);
        open_ledger(dir.path()).unwrap();
    }
}
