use super::*;
use crate::model::init::master_weights;
use proptest::prelude::*;

/// Neither tile sides nor segments divide these shapes.
fn config() -> ModelConfig {
    let nano = ModelConfig::preset("nano", 34, 8).unwrap();
    ModelConfig { width: 48, head_dim: 16, ffn: 40, layers: 1, ..nano }
}

/// Weights whose masters differ from those of `seed` by up to `step`.
fn stepped(config: &ModelConfig, seed: u64, step: f32) -> Weights {
    let mut master = master_weights(config, seed);
    for (i, x) in master.iter_mut().flatten().enumerate() {
        *x += step * ((i * 7919 % 201) as f32 / 100.0 - 1.0);
    }
    Weights::quantize(config, &master)
}

fn exponents(w: &Weights) -> Vec<i8> {
    let matrices = w.parameters.iter().filter(|p| matches!(p, Parameter::Matrix(_)));
    matrices.flat_map(|p| tiles(p).exponents.clone()).collect()
}

#[test]
fn delta_of_any_step_makes_the_next_version() {
    let base = stepped(&config(), 1, 0.0);
    let mut sizes = vec![];
    for step in [0.0, 1e-6, 1e-4, 1e-2, 10.0] {
        let next = stepped(&config(), 1, step);
        let bytes = encode(Some(&base), &next);
        assert_eq!(apply(Some(&base), &config(), &bytes).unwrap(), next, "step {step}");
        assert_eq!(hashes(&bytes).unwrap(), (Some(base.hash().into()), next.hash().into()));
        sizes.push(bytes.len());
    }
    assert!(sizes.is_sorted() && sizes[0] < 300 && sizes[1] < sizes[4] / 10, "{sizes:?}");
    assert_ne!(exponents(&stepped(&config(), 1, 10.0)), exponents(&base), "no tile moved");
    // Back again: exponents fall.
    let bytes = encode(Some(&stepped(&config(), 1, 10.0)), &base);
    let back = apply(Some(&stepped(&config(), 1, 10.0)), &config(), &bytes).unwrap();
    assert_eq!(back, base);
}

/// One outlier moves a tile's exponent and rounds a thousand mantissas to a coarser grid: all but ties are predicted.
#[test]
fn delta_of_a_moved_exponent_is_predicted() {
    let mut master = master_weights(&config(), 1);
    let base = Weights::quantize(&config(), &master);
    master[0][5] = 4.0;
    let next = Weights::quantize(&config(), &master);
    assert_ne!(exponents(&next), exponents(&base));
    let none = encode(Some(&base), &base).len();
    let forward = encode(Some(&base), &next);
    assert!(forward.len() < none + 100, "{} bytes, {none} for no change", forward.len());
    assert_eq!(apply(Some(&base), &config(), &forward).unwrap(), next);
}

#[test]
fn delta_from_nothing_makes_the_version() {
    let untied = ModelConfig { tied: false, ..config() };
    // The largest shapes are cut into segments of whole rows.
    let wide = ModelConfig { vocabulary: 700, width: 416, head_dim: 4, ..config() };
    assert!(wide.vocabulary > segment_rows(wide.width));
    for config in [config(), untied, wide] {
        let next = stepped(&config, 2, 1e-3);
        let bytes = encode(None, &next);
        assert_eq!(apply(None, &config, &bytes).unwrap(), next);
        let values: usize = shapes(&config).iter().map(|s| s.rows * s.cols).sum();
        assert!(bytes.len() * 8 < values * 11, "{} bytes of {values} values", bytes.len());
    }
}

#[test]
fn delta_against_another_base_names_both() {
    let (base, next) = (stepped(&config(), 1, 0.0), stepped(&config(), 1, 1e-3));
    let bytes = encode(Some(&base), &next);
    for wrong in [Some(&next), None] {
        let error = apply(wrong, &config(), &bytes).unwrap_err();
        let got = wrong.map(|w| w.hash().into());
        assert_eq!(error, DeltaError::Base { expected: Some(base.hash().into()), got });
        assert!(error.to_string().contains(&Hash::from(base.hash()).to_string()), "{error}");
    }
    let error = apply(Some(&base), &config(), &encode(None, &next)).unwrap_err();
    assert!(matches!(error, DeltaError::Base { expected: None, got: Some(_) }), "{error}");
}

#[test]
fn delta_with_another_result_is_refused() {
    let (base, next) = (stepped(&config(), 1, 0.0), stepped(&config(), 1, 1e-3));
    let mut bytes = encode(Some(&base), &next);
    bytes[40] ^= 1;
    let error = apply(Some(&base), &config(), &bytes).unwrap_err();
    assert!(matches!(error, DeltaError::Result { got, .. } if got == next.hash().into()));
}

/// A liar names the hash of weights that no kernel is exact for.
#[test]
fn delta_out_of_range_is_refused_though_its_hash_is_right() {
    type Damage = fn(&mut Weights);
    let damages: [Damage; 5] = [
        |w| matrix_of(w).mantissas[3] = 512,
        |w| matrix_of(w).mantissas[3] = i16::MIN,
        |w| matrix_of(w).exponents[1] = 12,
        |w| matrix_of(w).exponents[1] = -41,
        |w| w.parameters[1] = Parameter::Gain(vec![-(1 << 18); 48]),
    ];
    let base = stepped(&config(), 1, 0.0);
    for (i, damage) in damages.iter().enumerate() {
        let mut next = stepped(&config(), 1, 1e-4);
        damage(&mut next);
        for base in [None, Some(&base)] {
            let error = apply(base, &config(), &encode(base, &next)).unwrap_err();
            let range = DeltaError::Tensor {
                tensor: if i < 4 { "embedding" } else { "layers.0.attention_norm" }.into(),
                error: TensorError::Range,
            };
            assert_eq!(error, range, "damage {i}");
        }
    }
}

fn matrix_of(w: &mut Weights) -> &mut Tiles {
    let Parameter::Matrix(tiles) = &mut w.parameters[0] else { panic!("an embedding") };
    tiles
}

fn sequence(values: &[u64]) -> Vec<u8> {
    let mut out = vec![];
    encode_sequence(values.to_vec(), &mut out);
    out
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Sparse within sparse, dense, huge values, zeros: each has one encoding.
    #[test]
    fn sequence_any_values_return_and_flips_are_another_sequence(
        values in proptest::collection::vec(
            (0_u32..20, 0_u32..64, any::<u64>()).prop_map(|(zero, s, x)| if zero > 0 { 0 } else { x >> s }),
            0..600,
        ),
        dense in any::<bool>(), at in any::<proptest::sample::Index>(),
    ) {
        let values: Vec<u64> = values.iter().map(|v| v + u64::from(dense && *v < 9)).collect();
        let mut bytes = sequence(&values);
        let (back, rest) = decode_sequence(&bytes, values.len()).unwrap();
        prop_assert!(back == values && rest.is_empty());
        let bit = at.index(bytes.len() * 8);
        bytes[bit / 8] ^= 1 << (bit % 8);
        if let Ok((other, [])) = decode_sequence(&bytes, values.len()) {
            prop_assert_ne!(&other, &values);
            prop_assert_eq!(sequence(&other), bytes);
        }
    }

    /// The result's hash notices what ranges and canonical forms do not.
    #[test]
    fn delta_flipped_or_cut_is_refused(
        cut in any::<bool>(), from_nothing in any::<bool>(), at in any::<proptest::sample::Index>(),
    ) {
        let (base, next) = (stepped(&config(), 1, 0.0), stepped(&config(), 1, 1e-4));
        let base = (!from_nothing).then_some(&base);
        let mut bytes = encode(base, &next);
        let at = at.index(bytes.len());
        bytes[at] ^= 0x10;
        bytes.truncate(if cut { at } else { bytes.len() });
        prop_assert!(apply(base, &config(), &bytes).is_err());
    }

    #[test]
    fn delta_any_bytes_never_panics(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
        let _ = decode_sequence(&bytes, 300);
        let tensors = shapes(&config()).len();
        let lengths = vec![bytes.len() as u64 / tensors as u64; tensors];
        let lengths: Vec<u8> = lengths.iter().flat_map(|n| n.to_le_bytes()).collect();
        let body = bytes.len() / tensors * tensors;
        let framed = [&[0; HEADER_BYTES][..], &lengths, &bytes[..body]].concat();
        prop_assert!(apply(None, &config(), &framed).is_err());
        prop_assert!(apply(None, &config(), &bytes).is_err());
    }
}
