//! Figures of large simulated swarms: `swarm_scale [VOLUNTEERS] [STEPS] [POLICY_LAG]`.

#![expect(clippy::print_stdout, reason = "an example prints its results")]

use std::time::Instant;

use manyhands_tests::scale::Scale;

fn main() {
    let mut numbers = std::env::args().skip(1).map(|a| a.parse().unwrap_or(0));
    let volunteers = numbers.next().unwrap_or(1000);
    let steps = numbers.next().unwrap_or(60);
    let lags = numbers.next().map_or(vec![1, 2], |lag| vec![lag]);
    for lag in lags {
        let begun = Instant::now();
        let figures = Scale::new(volunteers as usize, steps, lag).simulate();
        println!("{volunteers} volunteers, policy_lag {lag}");
        println!("{figures}");
        println!("simulated in     {:.1} s\n", begun.elapsed().as_secs_f64());
    }
}
