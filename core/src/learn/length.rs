//! Length: what is added to, or taken from, a reward because of how long the answer is.
//!
//! Applied in this order: `stop_properly` scales the task's reward, then both penalties are added.
//!
//! - cosine (ProRL v2): `eta_min + (eta_max - eta_min)/2 (1 + cos(pi l / L_max))`, on for some steps,
//!   then off for more. The blog's formula images are lost; this is the usual reconstruction.
//! - soft overlong (DAPO 2503.14476; factor and form as in verl): `min(-exceed / buffer * factor, 0)` with
//!   `exceed = l - (L_max - buffer)`, and never below `-factor`.
//! - `stop_properly` (`NeMo-RL`): the reward of a truncated answer is multiplied by this.

use std::f64::consts::PI;

use serde::{Deserialize, Serialize};

use super::config::{ConfigError, require};

/// Length shaping of rewards. Everything is off by default.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LengthConfig {
    /// Scheduled cosine penalty.
    pub cosine: Option<CosineLength>,
    /// Soft penalty close to the limit.
    pub overlong: Option<SoftOverlong>,
    /// Factor of the reward of an answer that hit the limit: 0 takes it away, 1 changes nothing.
    pub stop_properly: Option<f64>,
}

/// Cosine between `eta_max` at length 0 and `eta_min` at `length_max` and beyond.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CosineLength {
    /// Value at `length_max`: negative punishes length.
    pub eta_min: f64,
    /// Value at length 0.
    pub eta_max: f64,
    /// `L_max`, tokens.
    pub length_max: u32,
    /// Steps with the penalty, at the start of each period; default 100.
    #[serde(default = "default_on_steps")]
    pub on_steps: u64,
    /// Steps without it, after those; 0 is always on. Default 500.
    #[serde(default = "default_off_steps")]
    pub off_steps: u64,
}

/// Linear from 0 at `length_max - buffer` to `-factor` at `length_max`.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SoftOverlong {
    /// `L_max`, tokens.
    pub length_max: u32,
    /// Width of the slope, tokens.
    pub buffer: u32,
    /// Largest penalty; default 1.
    #[serde(default = "default_factor")]
    pub factor: f64,
}

const fn default_on_steps() -> u64 {
    100
}
const fn default_off_steps() -> u64 {
    500
}
const fn default_factor() -> f64 {
    1.0
}

impl LengthConfig {
    /// Checks ranges.
    pub fn validate(&self) -> Result<(), ConfigError> {
        if let Some(cosine) = self.cosine {
            let fix = "use the longest completion, in tokens";
            require(cosine.length_max > 0, "length.cosine.length_max", cosine.length_max, fix)?;
            let fits = cosine.eta_min.is_finite()
                && cosine.eta_max.is_finite()
                && cosine.eta_min <= cosine.eta_max;
            let got = format!("[{}, {}]", cosine.eta_min, cosine.eta_max);
            require(fits, "length.cosine.eta_min", got, "use eta_min <= eta_max")?;
            require(cosine.on_steps > 0, "length.cosine.on_steps", 0, "use 1 or more")?;
        }
        if let Some(overlong) = self.overlong {
            let fits = overlong.buffer > 0 && overlong.buffer <= overlong.length_max;
            let fix = "use 1 to length_max tokens";
            require(fits, "length.overlong.buffer", overlong.buffer, fix)?;
            let fits = overlong.factor.is_finite() && overlong.factor >= 0.0;
            require(fits, "length.overlong.factor", overlong.factor, "use 1")?;
        }
        let scale = self.stop_properly.unwrap_or(1.0);
        let fits = (0.0..=1.0).contains(&scale);
        require(fits, "length.stop_properly", scale, "use a factor from 0 to 1")
    }

    /// The reward after shaping, for an answer of `length` tokens at a step counted from 0.
    pub fn shape(&self, reward: f64, length: u32, is_truncated: bool, step: u64) -> f64 {
        let scale = self.stop_properly.filter(|_| is_truncated).unwrap_or(1.0);
        let cosine = self.cosine.filter(|c| c.is_on(step)).map_or(0.0, |c| c.value(length));
        let overlong = self.overlong.map_or(0.0, |o| o.value(length));
        reward * scale + cosine + overlong
    }
}

impl CosineLength {
    /// Whether the schedule has the penalty on at a step counted from 0.
    pub fn is_on(&self, step: u64) -> bool {
        self.off_steps == 0 || step % self.on_steps.saturating_add(self.off_steps) < self.on_steps
    }

    /// What is added to the reward while on.
    pub fn value(&self, length: u32) -> f64 {
        let share = f64::from(length.min(self.length_max)) / f64::from(self.length_max);
        self.eta_min + 0.5 * (self.eta_max - self.eta_min) * (1.0 + libm::cos(PI * share))
    }
}

impl SoftOverlong {
    /// What is added to the reward.
    pub fn value(&self, length: u32) -> f64 {
        let exceed = f64::from(length) - (f64::from(self.length_max) - f64::from(self.buffer));
        -(exceed / f64::from(self.buffer)).clamp(0.0, 1.0) * self.factor + 0.0
    }
}

#[cfg(test)]
mod tests {
    use super::super::golden::{assert_golden, golden};
    use super::*;

    const COSINE: CosineLength = CosineLength {
        eta_min: -0.5,
        eta_max: 0.0,
        length_max: 8192,
        on_steps: 100,
        off_steps: 500,
    };
    const OVERLONG: SoftOverlong = SoftOverlong { length_max: 20480, buffer: 4096, factor: 1.0 };

    #[test]
    fn length_penalties_equal_golden() {
        let golden = &golden()["length"];
        for (length, expected) in
            golden["cos(l,L=8192,eta_min=-0.5,eta_max=0)"].as_object().unwrap()
        {
            assert_golden(length, &[COSINE.value(length.parse().unwrap())], expected);
        }
        for (length, expected) in golden["dapo L=20480 cache=4096"].as_object().unwrap() {
            assert_golden(length, &[OVERLONG.value(length.parse().unwrap())], expected);
        }
        assert_eq!(COSINE.value(9000), COSINE.value(8192));
    }

    #[test]
    fn cosine_length_follows_its_schedule() {
        let on: Vec<u64> = (0..1300).filter(|&s| COSINE.is_on(s)).collect();
        assert_eq!(on.len(), 300);
        assert_eq!((on[99], on[100], on[200]), (99, 600, 1200));
        assert!((0..9).all(|s| CosineLength { off_steps: 0, ..COSINE }.is_on(s)));
    }

    #[test]
    fn length_shape_scales_then_adds() {
        let config = LengthConfig {
            cosine: Some(COSINE),
            overlong: Some(OVERLONG),
            stop_properly: Some(0.0),
        };
        config.validate().unwrap();
        assert_eq!(config.shape(1.0, 20480, true, 0), -1.5);
        assert_eq!(config.shape(1.0, 20480, true, 100), -1.0);
        assert_eq!(config.shape(1.0, 20480, false, 100), 0.0);
        assert_eq!(LengthConfig::default().shape(0.3, 99_999, true, 5), 0.3);
    }

    #[test]
    fn length_config_names_key_and_fix() {
        let overlong = Some(SoftOverlong { buffer: 0, ..OVERLONG });
        let error = LengthConfig { overlong, ..LengthConfig::default() }.validate().unwrap_err();
        assert!(error.to_string().contains("length.overlong.buffer"), "{error}");
        let text = r#"{"cosine":{"eta_min":-1,"eta_max":0,"length_max":9,"period":1}}"#;
        assert!(serde_json::from_str::<LengthConfig>(text).is_err());
    }
}
