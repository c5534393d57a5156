//! Sorting numbers.

use super::{Problem, Spec, draws::Draws};

/// Levels: 3 numbers to 99, 4 to 99, 5 to 99, 6 to 999, 8 to 999.
pub(super) const NUMBER_SORTING: Spec = Spec {
    name: "number_sorting",
    draw: number_sorting,
    prompt_bytes_max: [14, 17, 20, 29, 37],
    trace_bytes_max: [17, 29, 44, 83, 143],
    unordered: true,
};

/// `[level - 1]` (numbers, largest number).
const RANGES: [(usize, u32); 5] = [(3, 99), (4, 99), (5, 99), (6, 999), (8, 999)];

/// The trace is an insertion sort: the sorted list after each number taken.
fn number_sorting(draws: &mut Draws, level: usize) -> Problem {
    let (count, number_max) = RANGES[level];
    let numbers: Vec<u32> = (0..count).map(|_| draws.between((0, number_max))).collect();
    let (mut sorted, mut steps) = (Vec::new(), Vec::new());
    for &number in &numbers {
        let place = sorted.partition_point(|&other| other <= number);
        sorted.insert(place, number);
        steps.push(joined(&sorted));
    }
    // The last list is the answer.
    let so_far = steps[..count - 1].join(";");
    Problem::new(format!("sort {}:", joined(&numbers)), &so_far, joined(&sorted))
}

fn joined(numbers: &[u32]) -> String {
    numbers.iter().map(u32::to_string).collect::<Vec<_>>().join(" ")
}
