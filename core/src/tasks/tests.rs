//! What every family must hold to, checked over families, levels and splits.

mod oracle;

use std::collections::BTreeSet;

use proptest::prelude::*;

use oracle::{answer_of, check_steps};

use super::{Family, HELD_OUT_ONE_IN, LEVEL_MAX, Problem, Split, final_answer};

/// Problems looked at for each family, level and split.
const SAMPLES: u64 = 300;

fn each_problem(mut check: impl FnMut(Family, u32, Split, Problem)) {
    for family in Family::ALL {
        for level in 1..=LEVEL_MAX {
            for split in [Split::Train, Split::HeldOut] {
                for index in 0..SAMPLES {
                    check(family, level, split, family.generate(17, index, level, split));
                }
            }
        }
    }
}

/// The trace must teach what the scorer rewards, and the stored answer must be true.
#[test]
fn generate_answers_are_right_and_traces_score_one() {
    each_problem(|family, level, _, problem| {
        assert_eq!(family.score(&problem, &problem.trace), 1.0, "{problem:?}");
        assert_eq!(final_answer(&problem.trace), Some(problem.answer.as_str()), "{problem:?}");
        if let Some(answer) = answer_of(family, &problem.prompt) {
            assert_eq!(problem.answer, answer, "{family} {level} {problem:?}");
        }
        check_steps(&problem);
    });
}

/// A policy finds every hole that exists: answers that are nearly right score nothing.
#[test]
fn score_edited_answers_is_zero() {
    each_problem(|family, _, _, problem| {
        let answer = &problem.answer;
        let mut wrong = vec![
            String::new(),
            "#".to_owned(),
            "# ".to_owned(),
            answer.clone(),
            format!("##{answer}"),
            format!("#{answer}#"),
            format!("#{answer}#{answer}"),
            format!("#{answer}{answer}"),
            format!("#{answer} {answer}"),
            format!("#{answer},{answer}"),
            format!("#the answer is {answer}"),
            format!("#{answer}."),
            format!("#={answer}"),
            format!("#+{answer}"),
            format!("#{answer}\n"),
            format!("#\t{answer}"),
            format!("#{answer}\0"),
            format!("#0{answer}"),
        ];
        if let Ok(number) = answer.parse::<i64>() {
            let texts = [number + 1, number - 1, -number].map(|near| near.to_string());
            wrong.extend(texts.into_iter().filter(|near| near != answer).map(|n| format!("#{n}")));
            wrong.push(format!("#{number}.0"));
        }
        for completion in wrong {
            assert_eq!(family.score(&problem, &completion), 0.0, "{completion:?} {problem:?}");
        }
        assert_eq!(family.score(&problem, &format!("so # {answer}  ")), 1.0, "{problem:?}");
    });
}

/// The rules of countdown: any exact solution, each number once.
#[test]
fn countdown_accepts_every_solution_and_nothing_else() {
    let problem = Problem::new("24 from 3 3 8 8:".into(), "", "8/(3-8/3)".into());
    for (answer, score) in [
        ("8/(3-8/3)", 1.0),
        ("8 / ( 3 - 8/3 )", 1.0),
        ("(8)/((3)-(8/3))", 1.0),
        ("24", 0.0),
        ("3*8", 0.0),
        ("3*8+8-8", 0.0),
        ("3*8*(3-2)", 0.0),
        ("3*8+3-3", 0.0),
        ("8/(3-8/3)=24", 0.0),
        ("8/(3-8/3)+0", 0.0),
        ("88/33", 0.0),
        ("8**3/8/3", 0.0),
        ("8/(3-3)*8", 0.0),
        ("8/(3-8/3", 0.0),
        ("-(8/(8/3-3))", 0.0),
        ("3\u{d7}8+3-8", 0.0),
    ] {
        assert_eq!(Family::Countdown.score(&problem, &format!("#{answer}")), score, "{answer}");
    }
    for prompt in ["", "24 from :", "24 from 3 3", "x from 3:", "24 of 3:"] {
        let problem = Problem { prompt: prompt.to_owned(), ..problem.clone() };
        assert_eq!(Family::Countdown.score(&problem, "#8/(3-8/3)"), 0.0, "{prompt}");
    }
}

/// If a training prompt could equal a held-out one, every held-out figure would be worthless.
#[test]
fn generate_splits_share_no_problem_whatever_the_seeds() {
    for family in Family::ALL {
        for level in 1..=LEVEL_MAX {
            let prompts = |split, seeds: [u64; 3]| -> BTreeSet<String> {
                let all = seeds.into_iter().flat_map(|seed| (0..500).map(move |i| (seed, i)));
                all.map(|(seed, i)| {
                    let problem = family.generate(seed, i, level, split);
                    assert_eq!(family.split_of(&problem), split);
                    problem.prompt
                })
                .collect()
            };
            let train = prompts(Split::Train, [1, 2, u64::MAX]);
            let held_out = prompts(Split::HeldOut, [1, 3, 1 << 32]);
            assert!(train.is_disjoint(&held_out), "{family} level {level}");
            assert!(held_out.len() >= 10, "{family} {level}: {} held out", held_out.len());
        }
    }
}

/// The retry bound of `generate` rests on neither split being rare in any space.
#[test]
fn generate_unfiltered_draws_have_a_fair_held_out_share() {
    for family in Family::ALL {
        for level in 0..LEVEL_MAX {
            let draw = |index| {
                let mut draws = super::Draws::new(5, index, [family as u8, level as u8, 0], 0);
                family.split_of(&(family.spec().draw)(&mut draws, level as usize))
            };
            let held_out = (0..4000).filter(|&index| draw(index) == Split::HeldOut).count();
            let fair = 4000 / usize::from(HELD_OUT_ONE_IN);
            assert!((fair / 4..fair * 2).contains(&held_out), "{family} {level}: {held_out}");
        }
    }
}

/// The same words in another order are the same problem where order does not matter.
#[test]
fn split_of_unordered_families_ignores_the_order() {
    let split = |a: u32, b: u32| {
        let prompt = format!("gcd({a},{b})=");
        Family::Gcd.split_of(&Problem::new(prompt, "", String::new()))
    };
    for (a, b) in (1..40).flat_map(|a| (1..a).map(move |b| (a, b))) {
        assert_eq!(split(a, b), split(b, a), "{a} {b}");
    }
}

/// Contexts are planned from these bounds; a longer problem would be cut off in training.
#[test]
fn generate_text_is_ascii_and_within_the_declared_lengths() {
    let mut longest = [[(0, 0); LEVEL_MAX as usize]; Family::ALL.len()];
    each_problem(|family, level, _, Problem { prompt, answer, trace }| {
        let printable = |text: &str| text.bytes().all(|byte| matches!(byte, b' '..=b'~'));
        assert!(printable(&prompt) && printable(&trace), "{prompt} {trace}");
        assert!(trace.ends_with(&format!("#{answer}")) && trace.matches('#').count() == 1);
        let longest = &mut longest[family as usize][level as usize - 1];
        *longest = (longest.0.max(prompt.len()), longest.1.max(trace.len()));
    });
    for family in Family::ALL {
        for level in 1..=LEVEL_MAX {
            let (prompt, trace) = longest[family as usize][level as usize - 1];
            let bounds = (family.prompt_bytes_max(level), family.trace_bytes_max(level));
            assert!(prompt <= bounds.0 && trace <= bounds.1, "{family} {level}: {prompt}/{trace}");
            assert!(bounds.0 + bounds.1 <= if level == 1 { 96 } else { 240 }, "{family} {level}");
        }
    }
}

/// Peers regenerate problems instead of sending them: a change here breaks every stored run.
#[test]
fn generate_matches_the_goldens() {
    let goldens: [(Family, &str, &str); 13] = [
        (Family::ChainSum, "555-166+146+374=", "555-166=389;389+146=535;535+374=909#909"),
        (Family::BasicArithmetic, "5*(14-18)+9=", "14-18=-4;5*(-4)=-20;-20+9=-11#-11"),
        (Family::SimpleEquations, "8x-2=7x+8;x=", "x=8+2=10#10"),
        (Family::Countdown, "28 from 7 2 18 5:", "18-2=16;5+16=21;21+7=28#5+18-2+7"),
        (Family::LetterCounting, "b in eaeabegba:", "e0a0e0a0b1e1g1b2a2#2"),
        (
            Family::NumberSorting,
            "sort 23 37 95 85 83:",
            "23;23 37;23 37 95;23 37 85 95#23 37 83 85 95",
        ),
        (Family::SpellBackward, "reverse cotdalz:", "c o t d a l z;z l a d t o c#zladtoc"),
        (
            Family::BaseConversion,
            "base10 443 to base6=",
            "443/6=73r5;73/6=12r1;12/6=2r0;2/6=0r2#2015",
        ),
        (Family::Gcd, "gcd(266,238)=", "266%238=28;238%28=14;28%14=0#14"),
        (
            Family::CountBits,
            "bits 1082=",
            "1082:0;541:1;270:1;135:2;67:3;33:4;16:4;8:4;4:4;2:4;1:5#5",
        ),
        (Family::Lcm, "lcm(6,54)=", "6%54=6;54%6=0;6/6*54=54#54"),
        (Family::ModularAddition, "(82+78)%7=", "82+78=160;160%7=6#6"),
        (Family::PrimeFactorization, "factor 163=", "163/163=1#163"),
    ];
    let mut changed = String::new();
    for (family, prompt, trace) in goldens {
        let problem = family.generate(0x0123_4567_89ab_cdef, 41, 3, Split::Train);
        assert_eq!(problem, family.generate(0x0123_4567_89ab_cdef, 41, 3, Split::Train));
        if (problem.prompt.as_str(), problem.trace.as_str()) != (prompt, trace) {
            changed +=
                &format!("(Family::{family:?}, {:?}, {:?}),\n", problem.prompt, problem.trace);
        }
    }
    assert!(changed.is_empty(), "changed, now:\n{changed}");
}

/// Streams of different arguments differ; levels outside the range are clamped.
#[test]
fn generate_every_argument_matters() {
    for family in Family::ALL {
        let stream = |seed, first: u64, level, split| -> Vec<Problem> {
            (first..first + 8).map(|index| family.generate(seed, index, level, split)).collect()
        };
        let base = stream(1, 0, 3, Split::Train);
        assert_ne!(base, stream(1 << 32, 0, 3, Split::Train));
        assert_ne!(base, stream(1, 1 << 32, 3, Split::Train));
        assert_ne!(base, stream(1, 0, 4, Split::Train));
        assert_ne!(base, stream(1, 0, 3, Split::HeldOut));
        assert_eq!(stream(1, 0, 0, Split::Train), stream(1, 0, 1, Split::Train));
        assert_eq!(stream(1, 0, u32::MAX, Split::Train), stream(1, 0, 5, Split::Train));
    }
}

/// Names in files, on the command line and in reports are the same.
#[test]
fn family_names_agree_with_serde() {
    for (number, family) in Family::ALL.into_iter().enumerate() {
        assert_eq!(family as usize, number);
        assert_eq!(serde_json::to_string(&family).unwrap(), format!("\"{family}\""));
        assert_eq!(family.to_string().parse::<Family>().unwrap(), family);
    }
    let message = "gdc".parse::<Family>().unwrap_err().to_string();
    assert!(message.contains("`gdc`") && message.contains("gcd, count_bits"), "{message}");
}

/// One `#`, and something after it.
#[test]
fn final_answer_needs_exactly_one_mark() {
    for (completion, answer) in [
        ("a#b", Some("b")),
        ("#b", Some("b")),
        ("a#  b c ", Some("b c")),
        ("", None),
        ("b", None),
        ("a#", None),
        ("a#  ", None),
        ("a#b#", None),
        ("#a#b", None),
    ] {
        assert_eq!(final_answer(completion), answer, "{completion:?}");
    }
}

proptest! {
    /// Completions are a model's: whatever they hold, the score is 0 or 1 and nothing panics.
    #[test]
    fn score_arbitrary_completions_never_panic(
        bytes in proptest::collection::vec(any::<u8>(), 0..120),
        expression in "[-+*/(). 0-9]{0,60}",
        seed in any::<u64>(),
        index in any::<u64>(),
        level in any::<u32>(),
    ) {
        let text = String::from_utf8_lossy(&bytes).into_owned();
        for family in Family::ALL {
            let problem = family.generate(seed, index, level % 7, Split::HeldOut);
            prop_assert_eq!(family.score(&problem, &problem.trace), 1.0);
            for completion in [&text, &format!("#{text}"), &format!("{text}#{expression}")] {
                let score = family.score(&problem, completion);
                prop_assert!(score == 0.0 || score == 1.0);
            }
        }
    }
}
