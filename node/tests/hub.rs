//! `import hf:OWNER/NAME` against a hub of our own: the requests are those of the hub's client.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on should stop")]

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use serde_json::{Value, json};

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

fn data() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/data/tiny/hub")
}

/// The model `tiny/llama`, beside files that an import does not want; counts what is fetched.
fn serve(fetched: Arc<AtomicUsize>) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = format!("http://{}", listener.local_addr().unwrap());
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let fetched = fetched.clone();
            std::thread::spawn(move || answer(stream, &fetched));
        }
    });
    address
}

fn answer(mut stream: TcpStream, fetched: &AtomicUsize) {
    let mut lines = BufReader::new(stream.try_clone().unwrap()).lines().map_while(Result::ok);
    let Some(request) = lines.next() else { return };
    let headers: Vec<String> = lines.take_while(|l| !l.is_empty()).collect();
    let path = request.split(' ').nth(1).unwrap_or_default().to_string();
    let found = if path == "/api/models/tiny/llama/revision/main" {
        let names = fs::read_dir(data()).unwrap();
        let names = names.map(|e| e.unwrap().file_name().into_string().unwrap());
        let more = ["README.md", "onnx/model.safetensors"].map(str::to_string);
        let siblings: Vec<Value> = names.chain(more).map(|n| json!({"rfilename": n})).collect();
        Some(json!({"siblings": siblings, "sha": COMMIT}).to_string().into_bytes())
    } else {
        let name = path.strip_prefix("/tiny/llama/resolve/main/");
        name.and_then(|n| fs::read(data().join(n)).ok())
    };
    let Some(body) = found else {
        let _ = write!(
            stream,
            "HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"
        );
        return;
    };
    let range = headers.iter().find_map(|h| {
        let (from, to) = h
            .to_lowercase()
            .strip_prefix("range: bytes=")?
            .split_once('-')
            .map(|(a, b)| (a.to_string(), b.to_string()))?;
        Some((from.parse::<usize>().ok()?, to.parse::<usize>().map_or(body.len(), |to| to + 1)))
    });
    let (from, to) = range.unwrap_or((0, body.len()));
    if to - from > 1 && path.starts_with("/tiny") {
        fetched.fetch_add(1, Ordering::SeqCst);
    }
    let _ = write!(
        stream,
        "HTTP/1.1 206 Partial Content\r\ncontent-length: {}\r\ncontent-range: bytes {from}-{}/{}\r\netag: \"{}\"\r\nx-repo-commit: {COMMIT}\r\nconnection: close\r\n\r\n",
        to - from,
        to - 1,
        body.len(),
        blake3::hash(&body).to_hex(),
    );
    let _ = stream.write_all(&body[from..to]);
}

fn import(dir: &Path, source: &str, out: &str, endpoint: &str) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_manyhands"));
    command.current_dir(dir).args(["import", source, "--out", out, "--no-report", "--json"]);
    command.args(["--engine", "cpu", "--threads", "1"]);
    command.env("HF_ENDPOINT", endpoint).env("HF_HOME", dir.join("cache"));
    command.output().unwrap()
}

/// What comes from the hub is what lies in a directory; nothing else is fetched, nothing twice, and
/// what was fetched is found again when the hub is away.
#[test]
fn import_fetches_from_the_hub_once() {
    let dir = tempfile::tempdir().unwrap();
    let fetched = Arc::new(AtomicUsize::new(0));
    let hub = serve(fetched.clone());
    let weights = |output: Output| -> Value {
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        serde_json::from_slice::<Value>(&output.stdout).unwrap()["weights"].clone()
    };
    let local = weights(import(dir.path(), data().to_str().unwrap(), "local", &hub));
    assert_eq!(weights(import(dir.path(), "hf:tiny/llama", "one", &hub)), local);
    assert_eq!(fetched.load(Ordering::SeqCst), 5);
    assert_eq!(weights(import(dir.path(), "hf:tiny/llama", "two", &hub)), local);
    assert_eq!(weights(import(dir.path(), "hf:tiny/llama", "away", "http://127.0.0.1:1")), local);
    assert_eq!(fetched.load(Ordering::SeqCst), 5);

    let missing = import(dir.path(), "hf:tiny/none", "three", &hub);
    let error = String::from_utf8_lossy(&missing.stderr).into_owned();
    assert!(!missing.status.success() && error.contains("cannot fetch tiny/none"), "{error}");
}
