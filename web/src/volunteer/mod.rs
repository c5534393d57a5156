//! The volunteer of a tab: carries out what the machine of `core` wants, over the network and on
//! engines in other workers. It lives in the network worker and never computes.
//!
//! Here is what the worker's script calls; `effects` carries out, `outside` is what the script
//! does in turn, `view` what the page shows.

mod effects;
mod outside;
mod view;

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::rc::Rc;

use anyhow::{Context, Result};
use js_sys::Uint8Array;
use manyhands_core::model::config::ModelConfig;
use manyhands_core::swarm::ids::{Hash, PeerKey, Secret};
use manyhands_core::swarm::protocol::{PROTOCOL, PeerAddress};
use manyhands_core::swarm::volunteer::{Event, Volunteer};
use serde::Deserialize;
use wasm_bindgen::prelude::*;

pub use self::outside::Outside;

use crate::browser;
use crate::hand::{Hand, PartId};
use crate::link::Link;
use crate::transport::Traffic;

/// Own results whose place in the ledger is not known yet.
const CREDITS_MAX: usize = 1024;
/// Over how long tokens a second are measured.
const RATE_MS: f64 = 10_000.0;

/// How the worker's script describes the tab.
#[derive(Deserialize)]
struct Setup {
    /// What `/api/manifest` says.
    manifest: Manifest,
    /// `host:port` of the page, and whether it came by https.
    host: String,
    port: u16,
    secure: bool,
    /// The engine's description for the coordination peer.
    engine: String,
    /// Of all engines together, multiply-adds a second.
    speed: f64,
    engines: usize,
}

#[derive(Deserialize)]
struct Manifest {
    run: Hash,
    name: String,
    protocol: u32,
    peers: Vec<PeerAddress>,
}

struct Inner {
    outside: Rc<Outside>,
    machine: Volunteer,
    secret: Secret,
    link: Link,
    traffic: Traffic,
    /// Bytes of weights that the host gave.
    weights_in: Rc<Cell<u64>>,
    setup: Setup,
    peer: Option<PeerKey>,
    connected: bool,
    model: Option<ModelConfig>,
    model_json: String,
    /// What each engine computes.
    engines: Vec<Option<PartId>>,
    /// Engines that have yet to load the weights, and whether the others could.
    loading: Option<(Hash, usize, bool)>,
    /// Counts losses of engines: what was asked of earlier ones no longer matters.
    generation: u32,
    hand: Option<Hand>,
    next_part: PartId,
    duty: f64,
    rest: Option<String>,
    /// Why it is over, and whether that is a failure.
    ended: Option<(String, bool)>,
    /// Kind and work of results that were announced.
    credits: BTreeMap<Hash, (&'static str, u64)>,
    /// When tokens were processed, and how many.
    rate: Vec<(f64, u64)>,
}

/// See the module.
#[wasm_bindgen(js_name = Volunteer)]
#[derive(Clone)]
pub struct TabVolunteer(Rc<RefCell<Inner>>);

#[wasm_bindgen(js_class = Volunteer)]
impl TabVolunteer {
    /// A volunteer with the identity of a seed of 32 bytes, who joins the run of `setup`.
    #[wasm_bindgen(constructor)]
    pub fn new(outside: Outside, seed: &[u8], setup: &str) -> Result<Self, JsError> {
        Self::build(outside, seed, setup).map_err(|e| JsError::new(&format!("{e:#}")))
    }

    /// Time passes.
    pub fn tick(&self) {
        self.handle(Event::Tick);
    }

    /// An engine has made weights, or could not.
    pub fn loaded(&self, weights: &str, made: bool) {
        let event = {
            let mut inner = self.0.borrow_mut();
            let Some((hash, left, good)) = &mut inner.loading else { return };
            if hash.to_string() != weights {
                return;
            }
            *left -= 1;
            *good &= made;
            if *left > 0 {
                return;
            }
            let event = Event::Weights { hash: *hash, loaded: *good };
            inner.loading = None;
            event
        };
        self.handle(event);
    }

    /// An engine has processed so many tokens of a part.
    pub fn progress(&self, part: PartId, tokens: f64) {
        let mut inner = self.0.borrow_mut();
        let Some(hand) = &mut inner.hand else { return };
        let before = hand.tokens().0;
        if hand.progress(part, tokens as u64) {
            let more = hand.tokens().0.saturating_sub(before);
            let now = browser::now_ms();
            inner.rate.retain(|(at, _)| now - at < RATE_MS);
            inner.rate.push((now, more));
        }
    }

    /// An engine has computed a part.
    pub fn computed(&self, engine: usize, part: PartId, bytes: Vec<u8>) {
        let done = {
            let mut inner = self.0.borrow_mut();
            let inner = &mut *inner;
            if let Some(busy) = inner.engines.get_mut(engine)
                && *busy == Some(part)
            {
                *busy = None;
            }
            let done = match (&mut inner.hand, &inner.model) {
                (Some(hand), Some(model)) => hand.computed(part, bytes, model),
                _ => Ok(None),
            };
            inner.dispatch();
            match done {
                Ok(Some(done)) => {
                    inner.hand = None;
                    if inner.credits.len() >= CREDITS_MAX {
                        inner.credits.pop_first();
                    }
                    inner.credits.insert(done.hash, (done.kind, done.multiply_adds));
                    done
                }
                Ok(None) => return,
                Err(why) => return inner.outside.broken(engine, &why),
            }
        };
        self.handle(Event::Computed { unit: done.hash, bytes: done.bytes });
    }

    /// So many new engines have taken the place of those before: all begin anew.
    pub fn engines_replaced(&self, engines: usize) {
        {
            let mut inner = self.0.borrow_mut();
            inner.generation += 1;
            (inner.hand, inner.loading) = (None, None);
            inner.engines = vec![None; engines.max(1)];
            if inner.model.is_some() {
                inner.outside.model(&inner.model_json);
            }
        }
        self.handle(Event::EngineLost);
    }

    /// The owner's wishes: why to rest, if at all, and how much of the time to compute.
    pub fn wishes(&self, rest: Option<String>, duty: f64) {
        let paused = rest.is_some();
        let changed = {
            let mut inner = self.0.borrow_mut();
            inner.duty = duty.clamp(0.01, 1.0);
            let changed = inner.rest.is_some() != paused;
            inner.rest = rest;
            changed
        };
        if changed {
            self.handle(Event::Pause(paused));
        }
    }

    /// What the page shows, as JSON.
    pub fn view(&self) -> String {
        let view = self.0.borrow().view();
        serde_json::to_string(&view).unwrap_or_default()
    }
}

impl TabVolunteer {
    fn build(outside: Outside, seed: &[u8], setup: &str) -> Result<Self> {
        let seed: [u8; 32] = seed.try_into().context("the seed has 32 bytes")?;
        let setup: Setup = serde_json::from_str(setup).context("the host's manifest")?;
        let theirs = setup.manifest.protocol;
        anyhow::ensure!(
            theirs == PROTOCOL,
            "the host speaks protocol {theirs}, this page {PROTOCOL}; reload the page"
        );
        let secret = Secret::from_seed(&seed);
        let traffic = Traffic::default();
        let cell: Rc<RefCell<Option<Self>>> = Rc::default();
        let lost = cell.clone();
        let link = Link::start(seed, traffic.clone(), move || {
            let this = lost.borrow().clone();
            this.into_iter().for_each(|this| this.lost());
        })?;
        let agent = format!("tab {}", env!("CARGO_PKG_VERSION"));
        let peers = setup.manifest.peers.clone();
        let machine =
            Volunteer::new(secret.clone(), agent, setup.engine.clone(), setup.speed, peers);
        let inner = Inner {
            outside: Rc::new(outside),
            machine,
            secret,
            link,
            traffic,
            weights_in: Rc::default(),
            peer: None,
            connected: false,
            model: None,
            model_json: String::new(),
            engines: vec![None; setup.engines.max(1)],
            setup,
            loading: None,
            generation: 0,
            hand: None,
            next_part: 0,
            duty: 1.0,
            rest: None,
            ended: None,
            credits: BTreeMap::new(),
            rate: Vec::new(),
        };
        let this = Self(Rc::new(RefCell::new(inner)));
        *cell.borrow_mut() = Some(this.clone());
        Ok(this)
    }

    fn lost(&self) {
        {
            let mut inner = self.0.borrow_mut();
            if std::mem::take(&mut inner.connected) {
                inner.outside.say("the connection to the host is lost; trying again");
            }
        }
        self.handle(Event::Lost);
    }

    fn handle(&self, event: Event) {
        let effects = {
            let mut inner = self.0.borrow_mut();
            inner.machine.handle(browser::now_ms() as u64, event)
        };
        for effect in effects {
            self.carry_out(effect);
        }
    }
}

impl Inner {
    /// Gives parts to engines that have nothing to do.
    fn dispatch(&mut self) {
        let Some(hand) = &mut self.hand else { return };
        for (engine, busy) in self.engines.iter_mut().enumerate() {
            if busy.is_some() {
                continue;
            }
            let Some(part) = hand.take() else { return };
            *busy = Some(part.id);
            self.outside.compute(engine, part.id, Uint8Array::from(&part.unit[..]));
        }
    }
}
