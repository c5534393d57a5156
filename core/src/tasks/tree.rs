//! Random arithmetic expressions whose every subexpression is a whole number, with the steps that
//! solve them. Shared by basic arithmetic (solve it) and countdown (find it).

use super::draws::Draws;

/// Absolute values above this are not multiplied further.
const PRODUCT_MAX: i64 = 9999;

/// What a random expression may be made of.
pub(super) struct Shape {
    /// Leaves are drawn from `1..=leaf_max`.
    pub(super) leaf_max: u32,
    /// Operators to pick from: some of `+-*/`, repeated to weigh them.
    pub(super) operators: &'static [u8],
    /// Whether a difference may be negative.
    pub(super) signed: bool,
}

/// An expression of whole numbers: its text, its value and its working.
pub(super) struct Tree {
    /// Infix text with no more parentheses than needed.
    pub(super) text: String,
    /// Its value.
    pub(super) value: i64,
    /// Leaves, from left to right.
    pub(super) leaves: Vec<i64>,
    /// One `3*4=12` for each operation, in an order in which they can be carried out.
    pub(super) steps: Vec<String>,
    /// Binding strength of the outermost operator: 1 `+-`, 2 `*/`, 3 a leaf.
    precedence: u8,
}

impl Tree {
    /// A random expression of `leaf_count` numbers.
    pub(super) fn random(draws: &mut Draws, shape: &Shape, leaf_count: u32) -> Self {
        if leaf_count == 1 {
            return Self::leaf(draws.between((1, shape.leaf_max)).into());
        }
        let operator = draws.pick(shape.operators);
        if operator == b'/' && leaf_count == 2 {
            // Quotient first, so that the division has no remainder.
            let divisor = draws.between((2, 9));
            let quotient = draws.between((2, (shape.leaf_max / divisor).max(2)));
            let dividend = Self::leaf((divisor * quotient).into());
            return Self::join(dividend, operator, Self::leaf(divisor.into()));
        }
        let left_count = draws.between((1, leaf_count - 1));
        let left = Self::random(draws, shape, left_count);
        let right = Self::random(draws, shape, leaf_count - left_count);
        match operator {
            b'*' | b'/' if (left.value * right.value).abs() <= PRODUCT_MAX => {
                Self::join(left, b'*', right)
            }
            b'-' if shape.signed || left.value >= right.value => Self::join(left, b'-', right),
            b'-' => Self::join(right, b'-', left),
            _ => Self::join(left, b'+', right),
        }
    }

    fn leaf(value: i64) -> Self {
        Self { text: value.to_string(), value, leaves: vec![value], steps: vec![], precedence: 3 }
    }

    fn join(left: Self, operator: u8, right: Self) -> Self {
        let value = match operator {
            b'+' => left.value + right.value,
            b'-' => left.value - right.value,
            b'*' => left.value * right.value,
            _ => left.value / right.value,
        };
        let precedence = if matches!(operator, b'+' | b'-') { 1 } else { 2 };
        // `a-(b-c)` and `a/(b*c)` need their parentheses; `a+(b-c)` and `a*(b*c)` do not.
        let right_floor = precedence + u8::from(matches!(operator, b'-' | b'/'));
        let sign = char::from(operator);
        let text = format!(
            "{}{sign}{}",
            left.enclosed_below(precedence),
            right.enclosed_below(right_floor)
        );
        let step = format!("{}{sign}{}={value}", left.value, operand(right.value));
        let mut joined = Self { text, value, leaves: left.leaves, steps: left.steps, precedence };
        joined.leaves.extend(right.leaves);
        joined.steps.extend(right.steps);
        joined.steps.push(step);
        joined
    }

    fn enclosed_below(&self, precedence: u8) -> String {
        if self.precedence < precedence { format!("({})", self.text) } else { self.text.clone() }
    }
}

/// A number as a right operand: `(-3)` if negative.
fn operand(value: i64) -> String {
    if value < 0 { format!("({value})") } else { value.to_string() }
}
