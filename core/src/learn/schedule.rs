//! Learning-rate schedules: a factor of the base rate as a function of the update's number.
//!
//! Updates count from 1. Warm-up is linear, `update / warmup_steps`, reaching 1 at its last
//! update; the shape then runs from there to `decay_steps` and stays at its floor.

use std::f64::consts::PI;

use serde::{Deserialize, Serialize};

use super::config::{ConfigError, require};

/// What follows warm-up.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Shape {
    /// The base rate, for ever. The default (ProRL).
    #[default]
    Constant,
    /// A straight line from 1 to `floor`.
    Linear {
        /// Updates from the start of the run to the floor, warm-up included.
        decay_steps: u64,
        /// Final factor, 0 to 1.
        floor: f64,
    },
    /// Half a cosine from 1 to `floor`.
    Cosine {
        /// Updates from the start of the run to the floor, warm-up included.
        decay_steps: u64,
        /// Final factor, 0 to 1.
        floor: f64,
    },
}

/// Warm-up, then a shape.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Schedule {
    /// Updates of linear warm-up; default 0.
    pub warmup_steps: u64,
    /// Default `constant`.
    pub shape: Shape,
}

impl Schedule {
    /// Checks ranges.
    pub fn validate(&self) -> Result<(), ConfigError> {
        let (Shape::Linear { decay_steps, floor } | Shape::Cosine { decay_steps, floor }) =
            self.shape
        else {
            return Ok(());
        };
        let fits = decay_steps > self.warmup_steps;
        let fix = "use more than warmup_steps: it counts from the start of the run";
        require(fits, "optimizer.schedule.shape.decay_steps", decay_steps, fix)?;
        let fits = (0.0..=1.0).contains(&floor);
        require(fits, "optimizer.schedule.shape.floor", floor, "use a factor from 0 to 1")
    }

    /// Factor of the base rate for the update of this number, counted from 1.
    pub fn factor(&self, update: u64) -> f64 {
        if update < self.warmup_steps {
            return update as f64 / self.warmup_steps as f64;
        }
        let progress = |decay_steps: u64| {
            let span = decay_steps.saturating_sub(self.warmup_steps).max(1) as f64;
            ((update - self.warmup_steps) as f64 / span).min(1.0)
        };
        match self.shape {
            Shape::Constant => 1.0,
            Shape::Linear { decay_steps, floor } => 1.0 - (1.0 - floor) * progress(decay_steps),
            Shape::Cosine { decay_steps, floor } => {
                floor + (1.0 - floor) * 0.5 * (1.0 + libm::cos(PI * progress(decay_steps)))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::golden::assert_close;
    use super::*;

    fn factors(shape: Shape, updates: [u64; 6]) -> [f64; 6] {
        let schedule = Schedule { warmup_steps: 4, shape };
        schedule.validate().unwrap();
        updates.map(|update| schedule.factor(update))
    }

    #[test]
    fn schedule_values() {
        let at = [1, 4, 9, 14, 24, 99];
        let linear = Shape::Linear { decay_steps: 24, floor: 0.2 };
        let cosine = Shape::Cosine { decay_steps: 24, floor: 0.2 };
        let root = libm::sqrt(0.5);
        for (shape, expected) in [
            (Shape::Constant, [0.25, 1.0, 1.0, 1.0, 1.0, 1.0]),
            (linear, [0.25, 1.0, 0.8, 0.6, 0.2, 0.2]),
            (cosine, [0.25, 1.0, 0.6 + 0.4 * root, 0.6, 0.2, 0.2]),
        ] {
            assert_close("factor", &factors(shape, at), &expected, 1e-15);
        }
        assert_eq!(Schedule::default().factor(1), 1.0);
    }

    #[test]
    fn schedule_config_names_key_and_fix() {
        let shape = Shape::Linear { decay_steps: 4, floor: 0.0 };
        let error = Schedule { warmup_steps: 4, shape }.validate().unwrap_err();
        assert!(error.to_string().contains("warmup_steps"), "{error}");
        assert!(serde_json::from_str::<Schedule>(r#"{"warmup":4}"#).is_err());
    }
}
