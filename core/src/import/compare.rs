//! What rounding cost: divergence, agreement and perplexity against the original, on a text.

use std::collections::BTreeMap;

use manyhands_shaders::twin::Saturations;
use serde::{Deserialize, Serialize};

use super::reference::Reference;
use crate::engine::{Batch, Engine, EngineError};
use crate::model::decoder::Decoder;
use crate::parallel;

/// Rows whose logits are held at a time.
const ROWS: usize = 64;

/// The exact model against its f32 original, over every position of a text.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Comparison {
    /// Positions compared.
    pub positions: usize,
    /// Tokens of a window: no position sees more than so many.
    pub window: usize,
    /// Mean Kullback-Leibler divergence of the exact distribution from the original's, nats.
    pub kl: f64,
    /// Largest divergence at any position, nats.
    pub kl_max: f64,
    /// Share of positions with the same likeliest token.
    pub top1: f64,
    /// Perplexity of the text under the original.
    pub ppl_source: f64,
    /// Perplexity of the text under the exact model.
    pub ppl_exact: f64,
    /// By site, where there are any: values that the exact model clamped, and at `matmul` block
    /// terms so large that a sum of them might overflow. A first token's massive channel makes a
    /// few of the latter; that its sum fits is what the scale of the residual stream is for.
    pub saturation: BTreeMap<String, u64>,
}

impl Comparison {
    /// Values that were clamped: what no import should have.
    pub fn clamped(&self) -> u64 {
        self.saturation.iter().filter(|(site, _)| *site != "matmul").map(|(_, count)| count).sum()
    }
}

/// Both distributions at one position.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Position {
    /// Divergence in nats.
    pub kl: f64,
    /// Whether the likeliest token is the same.
    pub agrees: bool,
    /// Negative log-probability of the next token: the original's and the exact one's.
    pub nll: Option<[f64; 2]>,
}

/// Log of the sum of exponentials, and the first index of the largest value.
fn log_sum(logits: &[f64]) -> (f64, usize) {
    let mut top = 0;
    for i in 1..logits.len() {
        if logits[i] > logits[top] {
            top = i;
        }
    }
    let max = logits[top];
    (max + libm::log(logits.iter().map(|x| libm::exp(x - max)).sum()), top)
}

/// Compares one row of logits (V), the exact ones in `FX(16)`.
pub fn position(source: &[f32], exact: &[i32], next: Option<u32>) -> Position {
    let p: Vec<f64> = source.iter().map(|x| f64::from(*x)).collect();
    let q: Vec<f64> = exact.iter().map(|x| f64::from(*x) / 65_536.0).collect();
    let ((p_sum, p_top), (q_sum, q_top)) = (log_sum(&p), log_sum(&q));
    let terms = p.iter().zip(&q).map(|(p, q)| {
        let log_p = p - p_sum;
        libm::exp(log_p) * (log_p - (q - q_sum))
    });
    Position {
        kl: terms.sum(),
        agrees: p_top == q_top,
        nll: next.map(|t| [p_sum - p[t as usize], q_sum - q[t as usize]]),
    }
}

/// Runs both models over `tokens`, cut into windows. `progress` is told the positions done.
pub async fn compare<E: Engine>(
    reference: &Reference,
    engine: &E,
    decoder: &Decoder<E>,
    tokens: &[u32],
    window: usize,
    mut progress: impl FnMut(usize),
) -> Result<Comparison, EngineError> {
    engine.take_saturations().await?;
    let width = reference.config.width;
    let mut positions = Vec::new();
    for tokens in tokens.chunks(window) {
        let states = reference.states(tokens);
        let mut caches = decoder.caches(engine, 1, tokens.len());
        for (i, part) in tokens.chunks(ROWS).enumerate() {
            let mut batch = Batch::default();
            batch.push(0, i * ROWS, part);
            let exact = decoder.logits(engine, &decoder.states(engine, &batch, &mut caches));
            let exact = engine.read(&exact).await?;
            let source = reference.logits(&states.rows[i * ROWS * width..][..part.len() * width]);
            let next = tokens[i * ROWS + 1..].iter().map(|t| Some(*t)).chain([None]);
            let v = reference.config.vocabulary;
            let rows = source.chunks_exact(v).zip(exact.chunks_exact(v)).zip(next).collect();
            positions.extend(parallel::map(rows, |((s, e), next)| position(s, e, next)));
            progress(positions.len());
        }
    }
    Ok(summary(&positions, window, engine.take_saturations().await?))
}

fn summary(positions: &[Position], window: usize, saturations: Saturations) -> Comparison {
    let n = positions.len() as f64;
    let nll: Vec<[f64; 2]> = positions.iter().filter_map(|p| p.nll).collect();
    let perplexity = |i: usize| libm::exp(nll.iter().map(|n| n[i]).sum::<f64>() / nll.len() as f64);
    Comparison {
        positions: positions.len(),
        window,
        kl: positions.iter().map(|p| p.kl).sum::<f64>() / n,
        kl_max: positions.iter().map(|p| p.kl).fold(0.0, f64::max),
        top1: positions.iter().filter(|p| p.agrees).count() as f64 / n,
        ppl_source: perplexity(0),
        ppl_exact: perplexity(1),
        saturation: Saturations::NAMES
            .iter()
            .zip(saturations.0)
            .filter(|(_, count)| *count > 0)
            .map(|(name, count)| ((*name).to_string(), count))
            .collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Two tokens at ln 3 against ln 1: p = (3/4, 1/4) and q = (1/2, 1/2).
    #[test]
    fn position_has_the_divergence_of_its_definition() {
        let p = position(&[3_f32.ln(), 0.0], &[7, 7], Some(1));
        let expected = 0.75 * 1.5_f64.ln() + 0.25 * 0.5_f64.ln();
        assert!((p.kl - expected).abs() < 1e-7, "{p:?}");
        let [source, exact] = p.nll.unwrap();
        assert!((source - 4_f64.ln()).abs() < 1e-6 && (exact - 2_f64.ln()).abs() < 1e-12);
        assert!(p.agrees);
        assert!(!position(&[0.0, 1.0], &[65_536, 0], None).agrees);
    }
}
