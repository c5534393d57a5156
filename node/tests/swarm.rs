//! A swarm of real processes: a host that is killed, volunteers that come and go, one that lies.
//! The weights are those of one machine, and the ledger replays.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on should stop")]

mod processes;

use std::fs;
use std::path::Path;

use processes::{Process, join, lines, manyhands, output, peer, solo, stdout, summary, wait_for};

/// A coordination peer that ends with the run, and writes a summary.
fn host(dir: &Path) -> Process {
    let (run, summary) = (dir.join("run.toml"), dir.join("summary.json"));
    let text = |path: &Path| path.to_str().unwrap().to_string();
    peer(dir, "host", &["--once", "--json", &text(&summary), &text(&run)])
}

#[test]
fn host_killed_and_volunteers_that_change_give_the_weights_of_one_machine() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let solo = solo(dir);

    let mut first = host(dir);
    let _stays = join(dir, "host", "stays");
    let mut goes = join(dir, "host", "goes");
    wait_for(dir, "some steps are done", || lines(dir, "host") > 15);
    goes.0.kill().unwrap();
    first.0.kill().unwrap();
    first.0.wait().unwrap();
    let before = lines(dir, "host");
    assert!(before < 60, "the run was over before the host was killed");

    let mut second = host(dir);
    let _late = join(dir, "host", "late");
    wait_for(dir, "the run is complete", || second.0.try_wait().unwrap().is_some());
    assert_eq!(summary(dir)["weights"], solo.as_str());

    let replay = output(manyhands().arg("replay").arg(dir.join("host")).args([
        "--recompute",
        "20",
        "--json",
    ]));
    let replay: serde_json::Value = serde_json::from_str(&stdout(&replay)).unwrap();
    assert_eq!((&replay["ok"], &replay["weights"]), (&true.into(), &solo.as_str().into()));
    assert_eq!(replay["recomputed"], 20);
    let receipts = fs::read_to_string(dir.join("stays/receipts.jsonl")).unwrap();
    assert!(receipts.lines().count() > 5, "the volunteer keeps its receipts");
}

/// Only in a build with volunteers that can lie.
#[cfg(feature = "attacks")]
#[test]
fn liar_is_expelled_and_changes_nothing() {
    for attack in ["sign-flip", "random"] {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path();
        let solo = solo(dir);
        let mut host = host(dir);
        let _liar = processes::join_with(dir, "host", "liar", &["--attack", attack]);
        wait_for(dir, "the liar is expelled", || {
            fs::read_to_string(dir.join("host.log")).unwrap().contains("expelled")
        });
        let _honest = join(dir, "host", "honest");
        wait_for(dir, "the run is complete", || host.0.try_wait().unwrap().is_some());
        let summary = summary(dir);
        assert_eq!(summary["weights"], solo.as_str(), "{attack}");
        let volunteers = summary["status"]["volunteers"].as_array().unwrap();
        let expelled = volunteers.iter().filter(|v| v["standing"] == "expelled").count();
        assert_eq!(expelled, 1, "{attack}: {volunteers:?}");
    }
}
