//! What the machine of `core` wants, carried out: dialling, asking, fetching weights, dealing out
//! a unit, sending and keeping results.

use std::cell::RefMut;

use js_sys::Array;
use libp2p::Multiaddr;
use libp2p::multiaddr::Protocol;
use manyhands_core::swarm::ids::Hash;
use manyhands_core::swarm::ledger::receipt_message;
use manyhands_core::swarm::protocol::{PeerAddress, Response};
use manyhands_core::swarm::volunteer::{Effect, Event};
use serde::Serialize;

use super::{Inner, Setup, TabVolunteer};
use crate::blobs;
use crate::browser;
use crate::hand::{Hand, PartId};

/// A result of this volunteer, signed.
#[derive(Serialize)]
struct Receipt {
    run: Hash,
    unit: Hash,
    receipt: Hash,
    bytes: u64,
    signature: String,
    kind: &'static str,
    multiply_adds: u64,
    at_ms: f64,
}

impl TabVolunteer {
    pub(super) fn carry_out(&self, effect: Effect) {
        let mut inner = self.0.borrow_mut();
        match effect {
            Effect::Connect(peer) => self.connect(inner, peer),
            Effect::Ask(request) => {
                let Some(peer) = inner.peer else { return };
                let (this, link) = (self.clone(), inner.link.clone());
                wasm_bindgen_futures::spawn_local(async move {
                    let answer = link.request(peer, request.encode()).await;
                    let answer = answer.ok().and_then(|bytes| Response::decode(&bytes).ok());
                    this.handle(Event::Answer(answer));
                });
            }
            Effect::Load { want, base, blobs } => self.load(&inner, want, base, blobs),
            Effect::Forget(hash) => inner.outside.forget(&hash.to_string()),
            Effect::Compute { hash, unit } => {
                let Some(model) = inner.model.clone() else { return };
                let engines = inner.engines.len();
                let setup = (engines, inner.setup.speed / engines as f64, inner.duty < 1.0);
                let first = inner.next_part;
                let hand = Hand::new(hash, *unit, &model, setup, first, browser::date_ms());
                inner.next_part = first.wrapping_add(hand.waiting_count() as PartId);
                inner.hand = Some(hand);
                inner.dispatch();
            }
            Effect::Upload { unit, bytes } => {
                let Some(peer) = inner.peer else { return };
                let (this, link) = (self.clone(), inner.link.clone());
                wasm_bindgen_futures::spawn_local(async move {
                    if let Err(error) = link.send_result(peer, unit, &bytes).await {
                        let text = format!("a result could not be sent: {error:#}");
                        this.0.borrow().outside.say(&text);
                    }
                    this.handle(Event::Uploaded { unit });
                });
            }
            Effect::Keep { unit, receipt, bytes } => inner.keep(unit, receipt, bytes),
            Effect::Accepted { unit, sequence } => {
                inner.outside.accepted(&unit.to_string(), sequence as f64);
            }
            Effect::Model(config) => {
                let Ok(model) = config.model() else { return };
                inner.model_json = serde_json::to_string(&model).unwrap_or_default();
                inner.model = Some(model);
                inner.outside.model(&inner.model_json);
            }
            Effect::Finished => {
                inner.ended = Some(("the run is complete; thank you".into(), false));
            }
            Effect::Refused(refusal) => {
                let text = format!("the host refuses this volunteer: {refusal}");
                inner.outside.say(&text);
                inner.ended = Some((text, true));
            }
        }
    }

    fn connect(&self, mut inner: RefMut<'_, Inner>, peer: PeerAddress) {
        inner.peer = Some(peer.peer);
        let addresses = inner.addresses(&peer);
        let (this, link) = (self.clone(), inner.link.clone());
        drop(inner);
        wasm_bindgen_futures::spawn_local(async move {
            let event = match link.dial(peer.peer, addresses).await {
                Ok(()) => {
                    this.0.borrow_mut().connected = true;
                    Event::Connected
                }
                Err(_) => Event::Lost,
            };
            this.handle(event);
        });
    }

    fn load(&self, inner: &Inner, want: Hash, base: Option<Hash>, blobs: Vec<Hash>) {
        let Some(peer) = inner.peer else { return };
        let (this, link, outside) = (self.clone(), inner.link.clone(), inner.outside.clone());
        let (generation, fetched) = (inner.generation, inner.weights_in.clone());
        wasm_bindgen_futures::spawn_local(async move {
            let found = Array::new();
            for hash in &blobs {
                match blobs::get(&link, peer, &outside, hash, &fetched).await {
                    Ok(bytes) => drop(found.push(&bytes)),
                    Err(error) => {
                        outside.say(&format!("weights could not be fetched: {error:#}"));
                        if this.0.borrow().generation == generation {
                            this.handle(Event::Weights { hash: want, loaded: false });
                        }
                        return;
                    }
                }
            }
            let mut inner = this.0.borrow_mut();
            if inner.generation == generation {
                inner.loading = Some((want, inner.engines.len(), true));
                outside.load(&want.to_string(), base.map(|b| b.to_string()), found);
            }
        });
    }
}

impl Inner {
    /// How a tab reaches a coordination peer: the one that served the page by the page's own
    /// address, which goes through every proxy that the page came through.
    fn addresses(&self, peer: &PeerAddress) -> Vec<Multiaddr> {
        let own = self.setup.manifest.peers.first().is_some_and(|p| p.peer == peer.peer);
        if !own {
            return peer.addresses.iter().filter_map(|a| a.parse().ok()).collect();
        }
        let Setup { host, port, secure, .. } = &self.setup;
        let bare = host.trim_matches(['[', ']']);
        let host = match (bare.parse(), bare.parse()) {
            (Ok(ip), _) => Protocol::Ip4(ip),
            (_, Ok(ip)) => Protocol::Ip6(ip),
            _ => Protocol::Dns(bare.into()),
        };
        let socket =
            if *secure { Protocol::Wss("/p2p".into()) } else { Protocol::Ws("/p2p".into()) };
        vec![[host, Protocol::Tcp(*port), socket].into_iter().collect()]
    }

    fn keep(&self, unit: Hash, receipt: Hash, bytes: u64) {
        let run = self.machine.run();
        let signature = self.secret.sign(&receipt_message(&run, &unit, &receipt, bytes));
        let (kind, multiply_adds) = self.credits.get(&unit).copied().unwrap_or(("unit", 0));
        let receipt = Receipt {
            run,
            unit,
            receipt,
            bytes,
            signature: signature.to_string(),
            kind,
            multiply_adds,
            at_ms: browser::date_ms(),
        };
        self.outside.keep(&serde_json::to_string(&receipt).unwrap_or_default());
    }
}
