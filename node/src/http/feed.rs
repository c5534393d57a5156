//! Events: kept as history for late comers, and sent to everybody who watches.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use axum::http::StatusCode;
use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use futures::stream::{self, Stream};
use manyhands_core::run::report::StepReport;
use manyhands_core::run::samples::SampleGroup;
use manyhands_core::run::state::Evaluation;
use manyhands_core::swarm::status::StatusEvent;
use serde::Serialize;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, broadcast};

use super::error::ApiError;

/// Most clients of `/api/events` at once: each holds a connection for as long as it likes.
pub const SSE_CLIENTS_MAX: usize = 128;
/// Events that a slow client may be behind before it misses some and is told so.
pub const FEED_QUEUE_MAX: usize = 256;
/// Steps in the history; the oldest make room.
pub const STEPS_MAX: usize = 10_000;
/// Evaluations in the history; the oldest make room.
pub const EVALUATIONS_MAX: usize = 2_000;
/// Between signs of life on a quiet stream, so that proxies do not cut it.
pub const HEARTBEAT: Duration = Duration::from_secs(15);
/// After which a browser that lost the stream asks again.
const RETRY: Duration = Duration::from_secs(3);

/// A step in `/api/steps`.
#[derive(Clone, Debug, Serialize)]
pub struct StepLine {
    /// Steps of all phases that were done after it.
    pub ordinal: u64,
    /// Tokens sampled and trained on a second while it was made, if that was measured.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tokens_per_second: Option<f64>,
    /// Its numbers.
    #[serde(flatten)]
    pub report: StepReport,
}

/// A step as it is told to who watches: the event of the core, and its speed.
#[derive(Serialize)]
struct StepMessage<'a> {
    #[serde(flatten)]
    event: &'a StatusEvent,
    tokens_per_second: f64,
}

/// An evaluation in `/api/evaluations`.
#[derive(Clone, Debug, Serialize)]
pub(super) struct EvaluationLine {
    ordinal: u64,
    #[serde(flatten)]
    evaluation: Evaluation,
}

/// An event, encoded once for all clients.
#[derive(Debug)]
struct Message {
    name: &'static str,
    json: String,
}

#[derive(Debug, Default)]
struct History {
    steps: BTreeMap<u64, StepLine>,
    samples: Vec<SampleGroup>,
    evaluations: BTreeMap<u64, Evaluation>,
}

/// History and subscribers.
#[derive(Debug)]
pub struct Feed {
    sender: broadcast::Sender<Arc<Message>>,
    history: Mutex<History>,
    clients: Arc<Semaphore>,
}

impl Default for Feed {
    fn default() -> Self {
        Self {
            sender: broadcast::Sender::new(FEED_QUEUE_MAX),
            history: Mutex::default(),
            clients: Arc::new(Semaphore::new(SSE_CLIENTS_MAX)),
        }
    }
}

impl Feed {
    /// Remembers an event and tells everybody who watches. Never waits for them. After a restart,
    /// the caller publishes the steps that it knows again before it serves.
    pub fn publish(&self, event: &StatusEvent) {
        self.tell(event, event);
        self.history().record(event);
    }

    /// The same for a step whose speed is known.
    pub fn publish_step(&self, ordinal: u64, report: Box<StepReport>, tokens_per_second: f64) {
        let event = StatusEvent::Step { ordinal, report };
        self.tell(&event, &StepMessage { event: &event, tokens_per_second });
        let mut history = self.history();
        history.record(&event);
        if let Some(line) = history.steps.get_mut(&ordinal) {
            line.tokens_per_second = Some(tokens_per_second);
        }
    }

    /// Takes the newest sample rollouts in place of those before.
    pub fn show_samples<'a>(&self, groups: impl Iterator<Item = &'a SampleGroup>) {
        self.history().samples = groups.cloned().collect();
    }

    /// The newest sample rollouts, oldest first.
    pub(super) fn samples(&self) -> Vec<SampleGroup> {
        self.history().samples.clone()
    }

    fn tell(&self, event: &StatusEvent, message: &impl Serialize) {
        match serde_json::to_string(message) {
            // No subscribers is no error.
            Ok(json) => {
                let _ = self.sender.send(Arc::new(Message { name: event.name(), json }));
            }
            Err(error) => {
                tracing::error!(%error, event = event.name(), "an event cannot be encoded");
            }
        }
    }

    /// Steps with at least `from` steps done, in order, at most `limit`.
    pub fn steps(&self, from: u64, limit: usize) -> Vec<StepLine> {
        let history = self.history();
        history.steps.range(from..).take(limit).map(|(_, line)| line.clone()).collect()
    }

    /// Evaluations of weights with at least `from` steps behind them, in order, at most `limit`.
    pub(super) fn evaluations(&self, from: u64, limit: usize) -> Vec<EvaluationLine> {
        let history = self.history();
        let found = history.evaluations.range(from..).take(limit);
        found
            .map(|(&ordinal, evaluation)| EvaluationLine {
                ordinal,
                evaluation: evaluation.clone(),
            })
            .collect()
    }

    fn history(&self) -> MutexGuard<'_, History> {
        self.history.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The stream of one client.
    pub(super) fn subscribe(&self) -> Result<Response, ApiError> {
        let seat = self.clients.clone().try_acquire_owned().map_err(|_| {
            ApiError::new(
                StatusCode::SERVICE_UNAVAILABLE,
                format!(
                    "{SSE_CLIENTS_MAX} clients watch already; try again later, or read /api/status now and then"
                ),
            )
        })?;
        let watch = Watch { receiver: self.sender.subscribe(), greeted: false, _seat: seat };
        let keep_alive = KeepAlive::new().interval(HEARTBEAT);
        let stream = Sse::new(watch.stream()).keep_alive(keep_alive);
        // nginx would collect events until its buffer is full.
        Ok(([("x-accel-buffering", "no")], stream).into_response())
    }
}

/// One client's place in the stream. Its seat is free again when the client is gone.
struct Watch {
    receiver: broadcast::Receiver<Arc<Message>>,
    greeted: bool,
    _seat: OwnedSemaphorePermit,
}

impl Watch {
    fn stream(self) -> impl Stream<Item = Result<Event, Infallible>> {
        stream::unfold(self, |mut watch| async move {
            let event = watch.next().await?;
            Some((Ok(event), watch))
        })
    }

    async fn next(&mut self) -> Option<Event> {
        if !self.greeted {
            // At once, so that a browser knows that it is connected.
            self.greeted = true;
            return Some(Event::default().event("hello").data("{}").retry(RETRY));
        }
        match self.receiver.recv().await {
            Ok(message) => Some(Event::default().event(message.name).data(&message.json)),
            Err(broadcast::error::RecvError::Lagged(missed)) => {
                let data = format!("{{\"event\":\"lagged\",\"missed\":{missed}}}");
                Some(Event::default().event("lagged").data(data))
            }
            Err(broadcast::error::RecvError::Closed) => None,
        }
    }
}

impl History {
    fn record(&mut self, event: &StatusEvent) {
        match event {
            StatusEvent::Step { ordinal, report } => {
                let line = StepLine {
                    ordinal: *ordinal,
                    tokens_per_second: None,
                    report: (**report).clone(),
                };
                insert_bounded(&mut self.steps, *ordinal, line, STEPS_MAX);
            }
            StatusEvent::Evaluation { ordinal, evaluation } => {
                let evaluation = (**evaluation).clone();
                insert_bounded(&mut self.evaluations, *ordinal, evaluation, EVALUATIONS_MAX);
            }
            StatusEvent::RolledBack { ordinal } => {
                // What came after did not happen.
                self.steps.retain(|at, _| at <= ordinal);
                self.evaluations.retain(|at, _| at <= ordinal);
                self.samples.retain(|group| group.step <= *ordinal);
            }
            _ => {}
        }
    }
}

fn insert_bounded<T>(map: &mut BTreeMap<u64, T>, key: u64, value: T, count_max: usize) {
    map.insert(key, value);
    if map.len() > count_max {
        map.pop_first();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn history_over_its_bound_drops_the_oldest() {
        let mut map = BTreeMap::new();
        for key in [5, 3, 9, 7] {
            insert_bounded(&mut map, key, key, 3);
        }
        assert_eq!(map.into_keys().collect::<Vec<_>>(), [5, 7, 9]);
    }
}
