//! Figures of large simulated swarms:
//! `swarm_scale [VOLUNTEERS [STEPS [POLICY_LAG [VETERANS [UNIT_SECONDS [SILENCE_SECONDS]]]]]]`.
//!
//! `VETERANS` is the share that has been trusted for long: 0 shows a swarm that comes from nowhere,
//! 0.9 one that has grown.

#![expect(clippy::print_stdout, reason = "an example prints its results")]

use std::time::Instant;

use manyhands_tests::scale::Scale;

fn main() {
    let numbers: Vec<f64> =
        std::env::args().skip(1).map(|a| a.parse().expect("arguments are numbers")).collect();
    let number = |i: usize| numbers.get(i).copied();
    let volunteers = number(0).unwrap_or(1000.0) as usize;
    let steps = number(1).unwrap_or(60.0) as u64;
    let lags = number(2).map_or(vec![1, 2], |lag| vec![lag as u64]);
    for lag in lags {
        let mut scale = Scale::new(volunteers, steps, lag);
        scale.veterans = number(3).unwrap_or(scale.veterans);
        scale.policy.unit_seconds = number(4).unwrap_or(scale.policy.unit_seconds);
        scale.policy.silence_seconds = number(5).unwrap_or(scale.policy.silence_seconds);
        let begun = Instant::now();
        let figures = scale.simulate();
        let seconds = begun.elapsed().as_secs_f64();
        println!(
            "{volunteers} volunteers, {} of them trusted for long, policy_lag {lag}, units of {} s",
            scale.veterans, scale.policy.unit_seconds
        );
        println!("{figures}");
        let per = |x: u64| 1e6 * seconds / x.max(1) as f64;
        println!(
            "simulated in     {seconds:.1} s, {:.1} us a unit, {:.2} us an event\n",
            per(figures.units),
            per(figures.events)
        );
    }
}
