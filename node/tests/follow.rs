//! A second coordination peer, as real processes: it mirrors a run, and goes on with it when the
//! first one is lost for good.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on should stop")]

mod processes;

use std::fs;
use std::path::Path;

use processes::{join, lines, manyhands, output, peer, solo, stdout, summary, wait_for};
use serde_json::Value;

fn text(path: &Path) -> String {
    path.to_str().unwrap().to_string()
}

/// What a running peer says.
fn ask(dir: &Path, name: &str, path: &str) -> Value {
    let url = fs::read_to_string(dir.join(name).join("url")).unwrap();
    let answer = ureq::get(format!("{url}{path}")).call().unwrap().body_mut().read_to_string();
    serde_json::from_str(&answer.unwrap()).unwrap()
}

#[test]
fn follower_goes_on_where_a_lost_host_stopped() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let solo = solo(dir);

    let mut host = peer(dir, "host", &[&text(&dir.join("run.toml"))]);
    let url = fs::read_to_string(dir.join("host/url")).unwrap();
    let token = text(&dir.join("host/admin-token"));
    let mut follower = peer(dir, "second", &["--follow", &url, "--token", &token]);
    wait_for(dir, "the host names the follower", || {
        ask(dir, "host", "/api/manifest")["peers"].as_array().unwrap().len() == 2
    });
    // Whoever is given the follower's address takes part all the same.
    let _via_host = join(dir, "host", "a");
    let _via_follower = join(dir, "second", "b");
    wait_for(dir, "some steps are done", || lines(dir, "host") > 15);
    wait_for(dir, "the follower derives", || {
        ask(dir, "second", "/api/status")["ordinal"].as_u64().unwrap() > 12
    });
    host.0.kill().unwrap();
    host.0.wait().unwrap();
    assert!(lines(dir, "host") < 60, "the run was over before the host was lost");

    // The operator promotes the follower; nothing but its directory is needed.
    follower.0.kill().unwrap();
    follower.0.wait().unwrap();
    fs::remove_file(dir.join("run.toml")).unwrap();
    let json = text(&dir.join("summary.json"));
    let mut promoted = peer(dir, "second", &["--promote", "--once", "--json", &json]);
    wait_for(dir, "the run is complete", || promoted.0.try_wait().unwrap().is_some());
    assert_eq!(summary(dir)["weights"], solo.as_str());

    let replay = output(manyhands().arg("replay").arg(dir.join("second")).arg("--json"));
    let replay: Value = serde_json::from_str(&stdout(&replay)).unwrap();
    assert_eq!((&replay["ok"], &replay["weights"]), (&true.into(), &solo.as_str().into()));

    // Two peers that write one ledger would be two runs.
    let _second = peer(dir, "second", &["--promote"]);
    let back = manyhands()
        .args(["host", "--listen", "127.0.0.1", "--http", "127.0.0.1:0", "--dir"])
        .arg(dir.join("host"))
        .output()
        .unwrap();
    let said = String::from_utf8(back.stderr).unwrap();
    assert!(!back.status.success() && said.contains("went on with this run"), "{said}");
}

/// A ledger over HTTP is checked like one on disk.
#[test]
fn replay_and_receipts_read_a_host_that_is_running() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let solo = solo(dir);
    let _host = peer(dir, "host", &[&text(&dir.join("run.toml"))]);
    let mut volunteer = join(dir, "host", "a");
    wait_for(dir, "the run is complete", || volunteer.0.try_wait().unwrap().is_some());
    let url = fs::read_to_string(dir.join("host/url")).unwrap();
    let replay = output(manyhands().args(["replay", &url, "--recompute", "5", "--json"]));
    let replay: Value = serde_json::from_str(&stdout(&replay)).unwrap();
    assert_eq!((&replay["ok"], &replay["weights"]), (&true.into(), &solo.as_str().into()));
    assert_eq!(replay["recomputed"], 5);
    let mut receipts = manyhands();
    receipts.arg("receipts").arg(dir.join("a")).args(["--ledger", &url, "--json"]);
    let found: Value = serde_json::from_str(&stdout(&output(&mut receipts))).unwrap();
    assert!(found["total"].as_u64().unwrap() > 0);
    assert_eq!(found["total"], found["verified"], "all of a complete run is audited");
}

/// With next to no disk, old results go; the run ends as ever, and a replay computes them again.
#[test]
fn results_that_are_dropped_are_computed_again_by_a_replay() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let solo = solo(dir);
    let json = text(&dir.join("summary.json"));
    let run = text(&dir.join("run.toml"));
    let args = ["--disk", "0", "--once", "--json", json.as_str(), run.as_str()];
    let mut host = peer(dir, "host", &args);
    let _volunteer = join(dir, "host", "a");
    wait_for(dir, "the run is complete", || host.0.try_wait().unwrap().is_some());
    assert_eq!(summary(dir)["weights"], solo.as_str());
    let mut replay = manyhands();
    replay.arg("replay").arg(dir.join("host")).args(["--recompute", "0", "--json"]);
    let replay: Value = serde_json::from_str(&stdout(&output(&mut replay))).unwrap();
    assert_eq!((&replay["ok"], &replay["weights"]), (&true.into(), &solo.as_str().into()));
    assert!(replay["recomputed"].as_u64().unwrap() > 0, "nothing was dropped");
}
