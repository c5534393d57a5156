//! A bounded reader of arithmetic expressions, for scorers: hostile text can neither blow the stack
//! nor overflow nor take long.
//!
//! [`parse`] is the shunting-yard algorithm with explicit stacks; it knows grammar only. What a
//! number and an operator mean is the caller's: [`exact`] computes in fractions of `i64`, and the
//! comparison with Reasoning Gym in floats.

/// Longest expression that is read at all.
pub(super) const EXPRESSION_BYTES_MAX: usize = 256;

/// An operator; `Negate` is the only one with a single operand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Operator {
    Add,
    Subtract,
    Multiply,
    Divide,
    Power,
    Negate,
}

impl Operator {
    /// Binding strength, as in Python: `-2**2` is `-(2**2)` and `2*-3` is allowed.
    const fn precedence(self) -> u8 {
        match self {
            Self::Add | Self::Subtract => 1,
            Self::Multiply | Self::Divide => 2,
            Self::Negate => 3,
            Self::Power => 4,
        }
    }
}

/// An expression in postfix order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Item<'a> {
    /// Digits with at most one dot.
    Number(&'a str),
    Operator(Operator),
}

/// Reads `+ - * / **`, parentheses, unary minus, decimals and spaces into postfix order.
pub(super) fn parse(text: &str) -> Option<Vec<Item<'_>>> {
    if text.len() > EXPRESSION_BYTES_MAX {
        return None;
    }
    let bytes = text.as_bytes();
    let mut postfix = Vec::new();
    // `None` marks an open parenthesis.
    let mut pending: Vec<Option<Operator>> = Vec::new();
    let mut operand_next = true;
    let mut at = 0;
    while at < bytes.len() {
        let start = at;
        at += 1;
        let operator = match bytes[start] {
            b' ' => continue,
            b'0'..=b'9' | b'.' if operand_next => {
                while at < bytes.len() && matches!(bytes[at], b'0'..=b'9' | b'.') {
                    at += 1;
                }
                postfix.push(Item::Number(number(&text[start..at])?));
                operand_next = false;
                continue;
            }
            b'(' if operand_next => {
                pending.push(None);
                continue;
            }
            b')' if !operand_next => {
                while let Some(operator) = pending.pop()? {
                    postfix.push(Item::Operator(operator));
                }
                continue;
            }
            // A prefix operator has no left operand, so nothing pending may be applied before it.
            b'-' if operand_next => {
                pending.push(Some(Operator::Negate));
                continue;
            }
            _ if operand_next => return None,
            b'+' => Operator::Add,
            b'-' => Operator::Subtract,
            b'/' => Operator::Divide,
            b'*' if bytes.get(at) == Some(&b'*') => {
                at += 1;
                Operator::Power
            }
            b'*' => Operator::Multiply,
            _ => return None,
        };
        // Left-associative operators yield to equals; the power binds to the right.
        let yields = operator.precedence() + u8::from(operator == Operator::Power);
        while let Some(&Some(top)) = pending.last()
            && top.precedence() >= yields
        {
            postfix.push(Item::Operator(top));
            pending.pop();
        }
        pending.push(Some(operator));
        operand_next = true;
    }
    if operand_next {
        return None;
    }
    while let Some(operator) = pending.pop() {
        postfix.push(Item::Operator(operator?));
    }
    Some(postfix)
}

/// A literal: at most one dot, at least one digit, and no leading zeros before another digit.
fn number(literal: &str) -> Option<&str> {
    let (whole, fraction) = literal.split_once('.').unwrap_or((literal, ""));
    let padded = whole.len() > 1 && whole.starts_with('0');
    (!padded && literal.len() > literal.matches('.').count() && !fraction.contains('.'))
        .then_some(literal)
}

/// Runs a postfix expression. `None` as soon as a number or an operation has no value.
pub(super) fn evaluate<'a, T: Copy>(
    postfix: &[Item<'a>],
    mut number: impl FnMut(&'a str) -> Option<T>,
    mut negate: impl FnMut(T) -> Option<T>,
    mut apply: impl FnMut(Operator, T, T) -> Option<T>,
) -> Option<T> {
    let mut stack: Vec<T> = Vec::new();
    for item in postfix {
        let value = match *item {
            Item::Number(literal) => number(literal)?,
            Item::Operator(Operator::Negate) => negate(stack.pop()?)?,
            Item::Operator(operator) => {
                let right = stack.pop()?;
                apply(operator, stack.pop()?, right)?
            }
        };
        stack.push(value);
    }
    let value = stack.pop()?;
    stack.is_empty().then_some(value)
}

/// A fraction in lowest terms with a positive denominator.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Fraction {
    numerator: i64,
    denominator: i64,
}

impl Fraction {
    /// In lowest terms; `None` for a zero denominator or anything outside `i64`.
    ///
    /// Sums of products of `i64` stay inside `i128`, so one check here covers every operation.
    fn new(numerator: i128, denominator: i128) -> Option<Self> {
        if denominator == 0 {
            return None;
        }
        let (mut a, mut b) = (numerator.unsigned_abs(), denominator.unsigned_abs());
        while b != 0 {
            (a, b) = (b, a % b);
        }
        let scale = i128::try_from(a).ok()? * denominator.signum();
        Some(Self {
            numerator: (numerator / scale).try_into().ok()?,
            denominator: (denominator / scale).try_into().ok()?,
        })
    }

    /// A whole number.
    pub(super) const fn whole(numerator: i64) -> Self {
        Self { numerator, denominator: 1 }
    }

    /// The value, if it is whole.
    #[cfg(test)]
    pub(super) fn to_whole(self) -> Option<i64> {
        (self.denominator == 1).then_some(self.numerator)
    }

    fn apply(operator: Operator, left: Self, right: Self) -> Option<Self> {
        let [a, b, c, d] =
            [left.numerator, left.denominator, right.numerator, right.denominator].map(i128::from);
        match operator {
            Operator::Add => Self::new(a * d + c * b, b * d),
            Operator::Subtract => Self::new(a * d - c * b, b * d),
            Operator::Multiply => Self::new(a * c, b * d),
            Operator::Divide => Self::new(a * d, b * c),
            Operator::Power | Operator::Negate => None,
        }
    }
}

/// The exact value of an expression of integers, `+ - * /` and parentheses, and the integers in
/// the order of their appearance. Unary minus, powers and decimals are refused.
pub(super) fn exact(text: &str) -> Option<(Fraction, Vec<i64>)> {
    let mut numbers = Vec::new();
    let value = evaluate(
        &parse(text)?,
        |literal| {
            let number = literal.parse().ok()?;
            numbers.push(number);
            Some(Fraction::whole(number))
        },
        |_| None,
        Fraction::apply,
    )?;
    Some((value, numbers))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn value(text: &str) -> Option<Fraction> {
        exact(text).map(|(value, _)| value)
    }

    /// A wrong precedence or association would accept wrong countdown answers.
    #[test]
    fn exact_follows_precedence_and_association() {
        for (text, numerator, denominator) in [
            ("7-3-2", 2, 1),
            ("8/4/2", 1, 1),
            ("2+3*4", 14, 1),
            ("(2+3)*4", 20, 1),
            ("7-(3-2)", 6, 1),
            ("1/3+1/6", 1, 2),
            ("(1-3)/4", -1, 2),
            ("((5))", 5, 1),
            (" 1 + 2 ", 3, 1),
        ] {
            assert_eq!(value(text), Fraction::new(numerator, denominator), "{text}");
        }
    }

    /// Anything but a plain expression is refused, without a panic and without deep recursion.
    #[test]
    fn exact_refuses_malformed_and_hostile_text() {
        let deep = "(".repeat(100_000);
        let nines = format!("{0}*{0}", "9".repeat(18));
        for text in [
            "", "+", "1+", "+1", "-1", "1 2", "(1", "1)", "()", "1**2", "1//2", "1.5", "1.", "01",
            "1/0", "1/(2-2)", "2(3)", "(1)(2)", "a", "1=1", "\u{0661}", "1e3", "1_0", &deep,
            &nines,
        ] {
            assert_eq!(value(text), None, "{text}");
        }
    }
}
