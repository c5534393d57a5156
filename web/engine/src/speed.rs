//! How fast an engine is: what the coordination peer is told, and what chooses between engines.

use manyhands_core::engine::{Engine, EngineError};
use manyhands_core::model::config::ModelConfig;
use manyhands_core::model::decoder::Decoder;
use manyhands_core::model::init::master_weights;
use manyhands_core::model::weights::Weights;
use manyhands_core::run::execute::score;
use manyhands_shaders::twin::logits::temperature_scale;

use crate::now_ms;

/// Sequences of the first try.
const SEQUENCES_MIN: usize = 1;
/// Sequences of the last.
const SEQUENCES_MAX: usize = 64;
/// Tokens of a sequence.
const TOKENS: u32 = 64;
/// A try that takes so long says enough.
const LONG_MS: f64 = 150.0;

/// The model that is timed.
pub fn probe() -> ModelConfig {
    ModelConfig::preset("micro", 128, 96).expect("a preset of this program")
}

/// Multiply-adds a second of forward passes. A graphics processor needs much work at once to be
/// fast, and a slow engine must not be kept for long: the work grows until it takes some time.
pub async fn measure<E: Engine>(engine: &E, model: &ModelConfig) -> Result<f64, EngineError> {
    let weights = Weights::quantize(model, &master_weights(model, 0));
    let decoder = Decoder::new(engine, &weights);
    let tokens: Vec<u32> = (0..TOKENS).map(|i| i % 100 + 3).collect();
    let mut count = SEQUENCES_MIN;
    // The first pass compiles.
    let items = |count| vec![(tokens.as_slice(), 1); count];
    score(engine, &decoder, &items(1), temperature_scale(1.0), |_| ()).await?;
    loop {
        let started = now_ms();
        score(engine, &decoder, &items(count), temperature_scale(1.0), |_| ()).await?;
        let ms = now_ms() - started;
        if ms > LONG_MS || count >= SEQUENCES_MAX {
            let rows = count as f64 * f64::from(TOKENS - 1);
            let multiply_adds = rows * model.multiply_adds(TOKENS as usize / 2) as f64;
            return Ok(multiply_adds * 1e3 / ms.max(0.1));
        }
        count *= 4;
    }
}
