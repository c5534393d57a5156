//! Bounds of what a volunteer can hold, waste or make the scheduler remember.

use super::*;

const UNIT_MS: u64 = 10_000;
const SPEED: f64 = 1e9;

fn peer(i: u8) -> PeerKey {
    PeerKey([i; 32])
}

fn path() -> JobPath {
    JobPath { ordinal: 0, stage: Stage::Gradient { update: 0 } }
}

/// A job of many items of a tenth of a second each, and some volunteers.
fn scheduler(items: usize, volunteers: u8) -> Scheduler {
    let mut scheduler = Scheduler::new(SwarmSection::default(), 0);
    scheduler.open(path(), (SPEED / 10.0) as u64, 1..=1000, std::slice::from_ref(&(0..items)));
    (0..volunteers).for_each(|i| scheduler.arrive(peer(i), SPEED, 0));
    scheduler
}

fn task(assignment: Option<Assignment>) -> TaskId {
    match assignment {
        Some(Assignment::Unit { task, .. }) => task,
        other => panic!("no unit: {other:?}"),
    }
}

#[test]
fn leases_of_one_volunteer_are_bounded() {
    let mut scheduler = scheduler(100_000, 1);
    let given = (0..10).filter(|_| scheduler.take(peer(0), 0).is_some()).count();
    assert_eq!(given, LEASES_A_VOLUNTEER_MAX);
    assert_eq!(scheduler.volunteers()[&peer(0)].lease_count(), LEASES_A_VOLUNTEER_MAX);
}

#[test]
fn unit_has_no_more_items_than_fit_a_message() {
    let mut scheduler = Scheduler::new(SwarmSection::default(), 0);
    scheduler.open(path(), 1, 1..=7, std::slice::from_ref(&(0..1000)));
    scheduler.arrive(peer(0), SPEED, 0);
    let Some(Assignment::Unit { count, .. }) = scheduler.take(peer(0), 0) else { panic!("none") };
    assert_eq!(count, 7);
}

/// An engine that is slow with few items would be given ever fewer.
#[test]
fn unit_of_a_slow_volunteer_is_whole_batches() {
    let mut scheduler = Scheduler::new(SwarmSection::default(), 0);
    scheduler.open(path(), SPEED as u64, 8..=1000, std::slice::from_ref(&(0..44)));
    let counts: Vec<usize> = (0..4)
        .map_while(|i| {
            scheduler.arrive(peer(i), SPEED * [0.01, 5.0, 1.0, 0.01][i as usize], 0);
            match scheduler.take(peer(i), 0) {
                Some(Assignment::Unit { count, .. }) => Some(count),
                _ => None,
            }
        })
        .collect();
    assert!(counts[..3].iter().all(|c| c % 8 == 0 && *c > 0), "{counts:?}");
    assert_eq!(counts[0], 8);
}

/// A late unit goes to a second volunteer, and to a third if that one is late too, and to no more.
#[test]
fn holders_of_one_unit_are_bounded() {
    let mut scheduler = scheduler(1, 5);
    let first = task(scheduler.take(peer(0), 0));
    assert_eq!(scheduler.take(peer(1), 0), None, "not late yet");
    let others = (1..5)
        .filter_map(|i| scheduler.take(peer(i), u64::from(i) * UNIT_MS).map(|a| task(Some(a))))
        .collect::<Vec<_>>();
    assert_eq!(others, vec![first; HOLDERS_MAX - 1]);
    assert_eq!(scheduler.counts.backups, others.len() as u64);
}

/// What was cut for a fast volunteer goes to another fast one at once; to one that is not slower
/// than most after a while; and to a slow one not at all, while somebody faster is here.
#[test]
fn heavy_unit_that_nobody_holds_goes_to_the_fast() {
    let mut scheduler = Scheduler::new(SwarmSection::default(), 0);
    scheduler.open(path(), 100 * SPEED as u64, 1..=1, std::slice::from_ref(&(0..1)));
    let (slow, fast, other) = (peer(0), peer(1), peer(2));
    let courtesy_ms = (COURTESY * UNIT_MS as f64) as u64;
    for (peer, speed) in [(slow, SPEED), (fast, 100.0 * SPEED), (other, 100.0 * SPEED)] {
        scheduler.arrive(peer, speed, 0);
    }
    let unit = task(scheduler.take(fast, 0));
    scheduler.leave(fast);
    assert_eq!(scheduler.take(slow, 3 * UNIT_MS), None);
    assert_eq!(task(scheduler.take(other, 3 * UNIT_MS)), unit);
    scheduler.leave(other);
    assert_eq!(scheduler.take(slow, 3 * UNIT_MS + courtesy_ms - 1), None, "somebody may come");
    assert_eq!(task(scheduler.take(slow, 3 * UNIT_MS + courtesy_ms)), unit);
}

/// A unit waits for its audit: when the auditor is late, somebody else audits as well, and who is
/// second has nothing left to do.
#[test]
fn late_audit_of_a_unit_that_waits_goes_to_another() {
    let mut scheduler = scheduler(1, 4);
    (1..4).for_each(|i| scheduler.standing(peer(i)).valid_in_a_row = 100);
    let spot = scheduler.request_audit(peer(0), Kind::Gradient, 1, Urgency::Spot);
    let audit = scheduler.request_audit(peer(0), Kind::Gradient, 1, Urgency::Admission);
    assert_eq!(scheduler.take(peer(1), 0), Some(Assignment::Audit { audit }));
    assert_eq!(scheduler.take(peer(2), 0), Some(Assignment::Audit { audit: spot }));
    scheduler.touch(peer(1), UNIT_MS);
    scheduler.expire(UNIT_MS);
    assert_eq!(scheduler.audits_waiting(), 1, "what enters at once can wait for its audit");
    assert_eq!(scheduler.take(peer(3), UNIT_MS), Some(Assignment::Audit { audit }));
    assert_eq!((scheduler.holds(peer(1), audit), scheduler.counts.backups), (true, 1));
    scheduler.finish_audit(audit);
    assert!(!scheduler.holds(peer(1), audit) && !scheduler.holds(peer(3), audit));
    assert_eq!(scheduler.audits_waiting(), 0);
}

/// Breaks if an honest volunteer that has become slow is given the same again until it is expelled.
#[test]
fn volunteer_that_has_become_slow_is_given_less_and_longer() {
    let mut scheduler = scheduler(1000, 1);
    let slow = SPEED / 50.0;
    let (mut now_ms, mut lapses) = (0, 0);
    let count = loop {
        now_ms = scheduler.volunteers()[&peer(0)].resume_ms.max(now_ms);
        let given = scheduler.take(peer(0), now_ms).or_else(|| {
            // What it lost is offered to the average only after a while.
            now_ms += UNIT_MS;
            scheduler.take(peer(0), now_ms)
        });
        let Some(Assignment::Unit { task, count, .. }) = given else { panic!("{given:?}") };
        let cost = count as u64 * (SPEED / 10.0) as u64;
        now_ms += (cost as f64 / slow * 1e3) as u64;
        scheduler.touch(peer(0), now_ms);
        assert!(scheduler.expire(now_ms).is_empty(), "it was expelled");
        if scheduler.holds(peer(0), task) {
            scheduler.finished(peer(0), task, cost, now_ms);
            scheduler.forget(task);
            break count;
        }
        lapses = scheduler.volunteers()[&peer(0)].lapses;
    };
    assert!((1..=LAPSES_BEFORE_PAUSE).contains(&lapses), "{lapses} lapses");
    assert!(count <= 100);
    let cut = (0..20).find_map(|_| match scheduler.take(peer(0), now_ms) {
        Some(Assignment::Unit { task, count, .. }) => {
            scheduler.forget(task);
            (count < 20).then_some(count)
        }
        _ => None,
    });
    assert!(cut.is_some(), "no smaller unit was cut");
}

/// Breaks if what one engine did is expected of another.
#[test]
fn speed_of_another_engine_counts_from_the_start() {
    let mut scheduler = scheduler(1000, 2);
    let speed = |s: &Scheduler| s.volunteers()[&peer(0)].speed[2];
    let given = task(scheduler.take(peer(0), 0));
    scheduler.finished(peer(0), given, SPEED as u64, 100);
    let measured = speed(&scheduler);
    assert!(measured > 2.0 * SPEED);
    // The same engine, measured on a busier machine.
    scheduler.arrive(peer(0), SPEED / 2.0, 200);
    assert_eq!(speed(&scheduler), measured);
    for claim in [SPEED / 40.0, SPEED] {
        scheduler.arrive(peer(0), claim, 300);
        assert_eq!(speed(&scheduler), claim);
        assert_eq!(scheduler.total_speed[2], claim + SPEED);
    }
}

/// Who lets units lapse again and again is given one at a time, after ever longer pauses that have
/// an end, and is expelled at last.
#[test]
fn lapses_in_a_row_bring_pauses_and_then_expulsion() {
    let mut scheduler = scheduler(100_000, 1);
    let (mut now_ms, mut lapses, mut hoarders) = (0, 0, Vec::new());
    while hoarders.is_empty() {
        assert!(lapses < LAPSES_MAX, "nobody was expelled");
        let before_ms = now_ms;
        while scheduler.take(peer(0), now_ms).is_none() {
            now_ms += 1000;
            scheduler.touch(peer(0), now_ms);
            assert!(now_ms - before_ms <= PAUSE_MS_MAX, "a pause without end");
        }
        assert_eq!(now_ms > before_ms, lapses >= LAPSES_BEFORE_PAUSE, "lapse {lapses}");
        if lapses >= LAPSES_BEFORE_PAUSE {
            assert_eq!(scheduler.take(peer(0), now_ms), None, "a second unit");
        }
        now_ms += 10_000_000;
        scheduler.touch(peer(0), now_ms);
        hoarders = scheduler.expire(now_ms);
        lapses += 1;
        assert_eq!(scheduler.volunteers()[&peer(0)].lapses, lapses);
    }
    assert_eq!((lapses, hoarders), (LAPSES_MAX, vec![peer(0)]));
}

/// However many audits wait, one question looks at a bounded number of them.
#[test]
fn search_for_an_audit_ends_at_its_bound() {
    let mut scheduler = scheduler(1, 2);
    scheduler.standing(peer(0)).valid_in_a_row = 100;
    // Nobody audits own work: all that is looked at is of the one who asks.
    for _ in 0..SEARCH_MAX {
        scheduler.request_audit(peer(0), Kind::Gradient, 1, Urgency::Spot);
    }
    let other = scheduler.request_audit(peer(1), Kind::Gradient, 1, Urgency::Spot);
    assert!(matches!(scheduler.take(peer(0), 0), Some(Assignment::Unit { .. })));
    assert!(scheduler.take_own_audit().is_some());
    assert_eq!(scheduler.take(peer(0), 0), Some(Assignment::Audit { audit: other }));
}

/// Identities cost nothing: those that come, do nothing and go leave nothing behind.
#[test]
fn strangers_that_left_are_forgotten_and_others_are_not() {
    let mut scheduler = scheduler(100_000, 0);
    for i in 0..50_000_u32 {
        let mut key = [9; 32];
        key[..4].copy_from_slice(&i.to_le_bytes());
        scheduler.arrive(PeerKey(key), SPEED, u64::from(i));
        if i % 2 == 0 {
            scheduler.leave(PeerKey(key));
        }
    }
    scheduler.expire(1_000_000);
    assert_eq!(scheduler.volunteers().len(), 0);
    // One that let a unit lapse, one whose unit is to be audited, one that was expelled.
    (1..4).for_each(|i| scheduler.arrive(peer(i), SPEED, 1_000_000));
    task(scheduler.take(peer(1), 1_000_000));
    scheduler.request_audit(peer(2), Kind::Gradient, 1, Urgency::Admission);
    scheduler.expel(peer(3), crate::swarm::ledger::Offence::Flooding);
    scheduler.expire(2_000_000);
    assert_eq!(scheduler.volunteers().len(), 3);
    assert!(scheduler.volunteers().values().all(|v| !v.is_present));
    assert!(scheduler.is_expelled(&peer(3)));
}

/// A sign of life moves the end of patience, whoever else is silent.
#[test]
fn silence_ends_a_visit_and_a_sign_of_life_does_not() {
    let mut scheduler = scheduler(100_000, 2);
    task(scheduler.take(peer(0), 0));
    task(scheduler.take(peer(1), 0));
    scheduler.touch(peer(1), 20_000);
    assert!(scheduler.expire(29_999).is_empty());
    assert!(scheduler.volunteers()[&peer(0)].is_present);
    scheduler.expire(30_000);
    assert!(!scheduler.volunteers()[&peer(0)].is_present);
    assert!(scheduler.volunteers()[&peer(1)].is_present);
    assert_eq!(scheduler.counts.lapsed, 1);
    scheduler.expire(50_000);
    assert!(!scheduler.volunteers()[&peer(1)].is_present);
}
