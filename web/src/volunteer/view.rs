//! The volunteer as the page shows it.

use manyhands_core::swarm::ids::{Hash, PeerKey};
use serde::Serialize;

use super::{Inner, RATE_MS};
use crate::browser;
use crate::hand::kind;

/// The unit in hand, as the page shows it.
#[derive(Serialize)]
struct UnitView {
    hash: Hash,
    kind: &'static str,
    policy: Hash,
    done: u64,
    total: u64,
    started_ms: f64,
}

/// What the page shows of all this.
#[derive(Serialize)]
pub(super) struct View {
    stage: &'static str,
    reason: Option<String>,
    run: Hash,
    name: String,
    peer: PeerKey,
    unit: Option<UnitView>,
    tokens_per_second: Option<f64>,
    bytes_in: u64,
    bytes_out: u64,
    /// Of what came in, pieces of weights.
    weights_in: u64,
}

impl Inner {
    pub(super) fn view(&self) -> View {
        let (stage, reason) = match (&self.ended, &self.rest, &self.hand) {
            (Some((why, true)), ..) => ("failed", Some(why.clone())),
            (Some((why, false)), ..) => ("stopped", Some(why.clone())),
            (_, Some(why), Some(_)) => {
                ("resting", Some(format!("{why}; the unit in hand is finished first")))
            }
            (_, Some(why), None) => ("resting", Some(why.clone())),
            (_, None, Some(_)) => ("working", None),
            _ if !self.connected => {
                ("connecting", Some("the host does not answer yet; trying again by itself".into()))
            }
            _ if self.machine.held_count() > 0 => ("waiting", Some("fetching weights".into())),
            _ => ("waiting", Some("everything is given out at the moment; more comes".into())),
        };
        let unit = self.hand.as_ref().map(|hand| {
            let (done, total) = hand.tokens();
            UnitView {
                hash: hand.hash,
                kind: kind(&hand.unit.work),
                policy: hand.unit.weights,
                done,
                total,
                started_ms: hand.started_ms,
            }
        });
        let now = browser::now_ms();
        let recent = self.rate.iter().filter(|(at, _)| now - at < RATE_MS);
        let tokens: u64 = recent.map(|(_, tokens)| tokens).sum();
        let (bytes_in, bytes_out) = self.traffic.read();
        View {
            stage,
            reason,
            run: self.setup.manifest.run,
            name: self.setup.manifest.name.clone(),
            peer: self.secret.key(),
            unit,
            tokens_per_second: (tokens > 0).then_some(tokens as f64 * 1e3 / RATE_MS),
            bytes_in,
            bytes_out,
            weights_in: self.weights_in.get(),
        }
    }
}
