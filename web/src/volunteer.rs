//! The volunteer of a tab: carries out what the machine of `core` wants, over the network and on
//! engines in other workers. It lives in the network worker and never computes.

use std::cell::{RefCell, RefMut};
use std::collections::BTreeMap;
use std::rc::Rc;

use anyhow::{Context, Result};
use js_sys::{Array, Uint8Array};
use libp2p::Multiaddr;
use libp2p::multiaddr::Protocol;
use manyhands_core::model::config::ModelConfig;
use manyhands_core::swarm::ids::{Hash, PeerKey, Secret};
use manyhands_core::swarm::ledger::receipt_message;
use manyhands_core::swarm::protocol::{PROTOCOL, PeerAddress, Response};
use manyhands_core::swarm::volunteer::{Effect, Event, Volunteer};
use serde::{Deserialize, Serialize};
use wasm_bindgen::prelude::*;

use crate::blobs;
use crate::browser;
use crate::hand::{Hand, PartId, kind};
use crate::link::Link;
use crate::transport::Traffic;

/// Own results whose place in the ledger is not known yet.
const CREDITS_MAX: usize = 1024;
/// Over how long tokens a second are measured.
const RATE_MS: f64 = 10_000.0;

#[wasm_bindgen]
extern "C" {
    /// What the worker's script does for the volunteer. Nothing of it calls back at once.
    pub type Outside;
    /// All engines: forget everything, this is the model.
    #[wasm_bindgen(method)]
    fn model(this: &Outside, config: &str);
    /// All engines: make weights.
    #[wasm_bindgen(method)]
    fn load(this: &Outside, want: &str, base: Option<String>, blobs: Array);
    /// All engines: these weights are not needed any more.
    #[wasm_bindgen(method)]
    fn forget(this: &Outside, weights: &str);
    /// One engine: compute.
    #[wasm_bindgen(method)]
    fn compute(this: &Outside, engine: usize, part: PartId, unit: Uint8Array);
    /// An engine answers nonsense.
    #[wasm_bindgen(method)]
    fn broken(this: &Outside, engine: usize, why: &str);
    /// Keep a signed receipt, as JSON.
    #[wasm_bindgen(method)]
    fn keep(this: &Outside, receipt: &str);
    /// The ledger has the unit.
    #[wasm_bindgen(method)]
    fn accepted(this: &Outside, unit: &str, sequence: f64);
    /// A blob that was kept, or `undefined`.
    #[wasm_bindgen(method)]
    pub async fn read_blob(this: &Outside, hash: &str) -> JsValue;
    /// Keep a piece of a blob of that length.
    #[wasm_bindgen(method)]
    pub async fn write_blob(
        this: &Outside,
        hash: &str,
        offset: f64,
        bytes: Uint8Array,
        length: f64,
    ) -> JsValue;
    /// Something that people may want to know.
    #[wasm_bindgen(method)]
    pub fn say(this: &Outside, text: &str);
}

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
struct View {
    stage: &'static str,
    reason: Option<String>,
    run: Hash,
    name: String,
    peer: PeerKey,
    unit: Option<UnitView>,
    tokens_per_second: Option<f64>,
    bytes_in: u64,
    bytes_out: u64,
}

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

struct Inner {
    outside: Rc<Outside>,
    machine: Volunteer,
    secret: Secret,
    link: Link,
    traffic: Traffic,
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

    /// Gives back what is held, before the worker ends.
    pub async fn farewell(&self) {
        let asked = {
            let mut inner = self.0.borrow_mut();
            let (request, peer) = (inner.machine.farewell(), inner.peer);
            request.zip(peer).map(|(request, peer)| (inner.link.clone(), peer, request))
        };
        if let Some((link, peer, request)) = asked {
            // The leases would lapse anyway.
            let _ = link.request(peer, request.encode()).await;
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

    fn carry_out(&self, effect: Effect) {
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
        let generation = inner.generation;
        wasm_bindgen_futures::spawn_local(async move {
            let found = Array::new();
            for hash in &blobs {
                match blobs::get(&link, peer, &outside, hash).await {
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

    fn view(&self) -> View {
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
        }
    }
}
