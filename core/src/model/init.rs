//! Deterministic initialisation of master weights from a seed.

use manyhands_shaders::x1::philox;

use super::config::ModelConfig;
use super::weights::shapes;

/// Stream of the generator that initialisation draws from.
const STREAM: u32 = 0x1417;

/// f32 master weights in the order of [`shapes`]: gains 1; matrices normal with deviation
/// `1 / sqrt(inputs)`, those that write to the residual stream divided by `sqrt(2 L)` as in GPT-2
/// (Radford et al. 2019), the embedding halved. Of an adapter, `b` is 0, so that it changes nothing at first.
pub fn master_weights(config: &ModelConfig, seed: u64) -> Vec<Vec<f32>> {
    let mut out = Vec::new();
    for (tensor, shape) in shapes(config).iter().enumerate() {
        let count = shape.rows * shape.cols;
        if config.adapter.is_some() && shape.name.ends_with(".b") {
            out.push(vec![0.0; count]);
            continue;
        }
        if shape.rows == 1 {
            out.push(vec![1.0; count]);
            continue;
        }
        let mut deviation = 1.0 / (shape.cols as f64).sqrt();
        if shape.name.ends_with("output") || shape.name.ends_with("down") {
            deviation /= (2.0 * config.layers as f64).sqrt();
        } else if shape.name == "embedding" || shape.name == "head" {
            deviation /= 2.0;
        }
        out.push(normals(seed, tensor as u32, count).map(|x| (x * deviation) as f32).collect());
    }
    out
}

/// `count` standard normal numbers by the Box-Muller transform, with soft-float functions.
fn normals(seed: u64, tensor: u32, count: usize) -> impl Iterator<Item = f64> {
    let key = [seed as u32, (seed >> 32) as u32];
    let pairs = (0..count.div_ceil(2)).flat_map(move |i| {
        let i = i as u64;
        let r = philox([i as u32, (i >> 32) as u32, tensor, STREAM], key);
        // (0, 1], so that the logarithm is finite.
        let unit = |hi: u32, lo: u32| {
            let bits = (u64::from(hi) << 32 | u64::from(lo)) >> 11;
            (bits + 1) as f64 * (1.0 / 9_007_199_254_740_992.0)
        };
        let radius = (-2.0 * libm::log(unit(r[0], r[1]))).sqrt();
        let angle = std::f64::consts::TAU * unit(r[2], r[3]);
        [radius * libm::cos(angle), radius * libm::sin(angle)]
    });
    pairs.take(count)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A change of the generator would silently change every run.
    #[test]
    fn normals_have_unit_moments_and_stay_as_they_are() {
        let x: Vec<f64> = normals(7, 0, 20_000).collect();
        let mean = x.iter().sum::<f64>() / x.len() as f64;
        let variance = x.iter().map(|x| x * x).sum::<f64>() / x.len() as f64;
        let fourth = x.iter().map(|x| x * x * x * x).sum::<f64>() / x.len() as f64;
        assert!(mean.abs() < 0.03, "{mean}");
        assert!((variance - 1.0).abs() < 0.05, "{variance}");
        assert!((fourth - 3.0).abs() < 0.3, "{fourth}");
        let mut hash = blake3::Hasher::new();
        for x in &x {
            hash.update(&x.to_bits().to_le_bytes());
        }
        assert_eq!(&hash.finalize().to_hex()[..16], "7e6345e4d6f7ec28");
    }
}
