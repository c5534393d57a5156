//! Bounds of what a coordination peer can make a volunteer hold, keep or try.

use super::super::*;
use crate::conformance::suite::DIGEST;
use crate::model::generate::Request as Prompt;
use crate::run::work::Work;
use crate::swarm::protocol::{Idle, Welcome};

fn volunteer() -> Volunteer {
    let secret = Secret::from_seed(&[1; 32]);
    let host = PeerAddress { peer: Secret::from_seed(&[2; 32]).key(), addresses: Vec::new() };
    Volunteer::new(secret, "agent".into(), "engine".into(), 1e9, vec![host])
}

fn config() -> String {
    let text = r#"{"name": "x", "model": {"preset": "nano"}, "task": [{"family": "gcd"}]}"#;
    let config: RunConfig = serde_json::from_str(text).unwrap();
    serde_json::to_string(&config).unwrap()
}

fn unit(i: u8) -> Response {
    let work = Work::Sample {
        seed: u64::from(i),
        temperature_scale: None,
        max_new_tokens: 4,
        end: 2,
        requests: vec![Prompt { prompt: vec![1], stream: [0; 3] }],
    };
    let unit = Unit { weights: Hash([i; 32]), work }.encode();
    Response::Unit { unit, accepted: Vec::new() }
}

/// Answers the request at hand; what is asked next.
fn answer(volunteer: &mut Volunteer, now_ms: u64, response: Response) -> Option<Request> {
    let effects = volunteer.handle(now_ms, Event::Answer(Some(response)));
    asked(effects)
}

fn asked(effects: Vec<Effect>) -> Option<Request> {
    effects.into_iter().find_map(|e| match e {
        Effect::Ask(request) => Some(request),
        _ => None,
    })
}

/// One with an open session that asks for work.
fn in_session() -> Volunteer {
    let mut volunteer = volunteer();
    volunteer.handle(0, Event::Tick);
    let hello = asked(volunteer.handle(0, Event::Connected));
    assert!(matches!(hello, Some(Request::Hello { digest, .. }) if digest == DIGEST));
    let welcome = Welcome {
        run: Hash([7; 32]),
        config: config(),
        ordinal: 0,
        beat_ms: 1_000_000,
        peers: Vec::new(),
    };
    assert_eq!(answer(&mut volunteer, 0, Response::Welcome(welcome)), Some(Request::Take));
    volunteer
}

#[test]
fn volunteer_asks_for_no_more_units_than_it_may_hold() {
    let mut volunteer = in_session();
    let weights = Response::Weights { base: None, blobs: Vec::new() };
    let mut next = answer(&mut volunteer, 1, unit(1));
    let mut taken = 1;
    while let Some(request) = next {
        let response = match request {
            Request::Take => {
                taken += 1;
                unit(taken)
            }
            _ => weights.clone(),
        };
        next = answer(&mut volunteer, 2, response);
    }
    assert_eq!(volunteer.held_count(), LEASES_A_VOLUNTEER_MAX);
    assert_eq!(usize::from(taken), LEASES_A_VOLUNTEER_MAX);
}

/// A coordination peer that names ever new weights fills no memory: the oldest go.
#[test]
fn weights_over_their_count_are_forgotten() {
    let mut volunteer = in_session();
    let mut forgotten = Vec::new();
    for i in 0..10 {
        let effects = volunteer.handle(1, Event::Weights { hash: Hash([i; 32]), loaded: true });
        forgotten.extend(effects.into_iter().filter_map(|e| match e {
            Effect::Forget(hash) => Some(hash.0[0]),
            _ => None,
        }));
    }
    let kept = 10 - WEIGHTS_MAX as u8;
    assert_eq!(forgotten, (0..kept).collect::<Vec<_>>());
}

/// Pauses between attempts to connect grow, and stop growing.
#[test]
fn retries_slow_down_to_their_bound() {
    let mut volunteer = volunteer();
    let (mut now_ms, mut pauses) = (0, Vec::new());
    for _ in 0..20 {
        let effects = volunteer.handle(now_ms, Event::Tick);
        assert!(matches!(effects[..], [Effect::Connect(_)]), "{effects:?}");
        volunteer.handle(now_ms, Event::Lost);
        let pause = volunteer.wake_ms() - now_ms;
        assert!(volunteer.handle(now_ms + pause - 1, Event::Tick).is_empty());
        pauses.push(pause);
        now_ms += pause;
    }
    assert_eq!(pauses[..3], [RETRY_MS_MIN, 2 * RETRY_MS_MIN, 4 * RETRY_MS_MIN]);
    assert_eq!(pauses.last(), Some(&RETRY_MS_MAX));
    assert!(pauses.is_sorted());
}

/// Being told to ask again at once, again and again, is no busy loop: an answer of 0 ms counts 1.
#[test]
fn idle_answer_without_a_pause_still_pauses() {
    let mut volunteer = in_session();
    let idle = Response::Idle { retry_ms: 0, why: Idle::Waiting, accepted: Vec::new() };
    assert_eq!(answer(&mut volunteer, 5, idle), None);
    assert_eq!(asked(volunteer.handle(6, Event::Tick)), Some(Request::Take));
}
