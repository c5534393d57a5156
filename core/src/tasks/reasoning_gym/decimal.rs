//! Decimal numbers as Python's `Decimal` reads them, for equality only.

/// `0.digits * 10^exponent`, normalised so that equal numbers are equal values.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Decimal {
    negative: bool,
    /// Significant digits, without zeros at either end; empty for zero.
    digits: String,
    exponent: i64,
}

impl Decimal {
    /// Reads `[+-] digits [. digits] [e [+-] digits]` between white space, underscores ignored.
    pub(super) fn parse(text: &str) -> Option<Self> {
        let text = text.trim().replace('_', "");
        let (negative, text) = match text.strip_prefix('-') {
            Some(rest) => (true, rest),
            None => (false, text.strip_prefix('+').unwrap_or(&text)),
        };
        let (mantissa, exponent) = match text.split_once(['e', 'E']) {
            // An integer of Rust's has the same grammar as a Python exponent.
            Some((mantissa, exponent)) => (mantissa, exponent.parse::<i32>().ok()?),
            None => (text, 0),
        };
        let (whole, fraction) = mantissa.split_once('.').unwrap_or((mantissa, ""));
        let digits = format!("{whole}{fraction}");
        if digits.is_empty() || !digits.bytes().all(|byte| byte.is_ascii_digit()) {
            return None;
        }
        let significant = digits.trim_start_matches('0');
        let leading_zeros = digits.len() - significant.len();
        let digits = significant.trim_end_matches('0').to_owned();
        if digits.is_empty() {
            return Some(Self { negative: false, digits, exponent: 0 });
        }
        let point = i64::try_from(whole.len()).ok()? - i64::try_from(leading_zeros).ok()?;
        Some(Self { negative, digits, exponent: point + i64::from(exponent) })
    }
}

#[cfg(test)]
mod tests {
    use super::Decimal;

    /// Writings of the same number are equal; neighbours and signs are not.
    #[test]
    fn decimal_equality_ignores_the_writing() {
        for text in
            ["1200", "+1200", "01200.00", "1.2e3", "12E+2", ".12e4", " 1_200. ", "120000e-2"]
        {
            assert_eq!(Decimal::parse(text), Decimal::parse("1200"), "{text}");
        }
        for text in ["-1200", "1201", "120", "12000", "1200.5", "1.2e4"] {
            assert_ne!(Decimal::parse(text), Decimal::parse("1200"), "{text}");
        }
        assert_eq!(Decimal::parse("-0.0e9"), Decimal::parse("0"));
        for text in
            ["", "-", ".", "e3", "1e", "1.2.3", "--1", "+-1", "0x1", "1 2", "one", "1e99999999999"]
        {
            assert_eq!(Decimal::parse(text), None, "{text}");
        }
    }
}
