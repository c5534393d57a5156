use super::*;
use proptest::prelude::*;

fn packed(values: &[u64]) -> Vec<u8> {
    let mut out = vec![];
    pack(values.iter().copied(), &mut out);
    out
}

fn unpack_all(bytes: &[u8], count: usize) -> Result<Vec<u64>, PackingError> {
    let (values, rest) = unpack(bytes, count)?;
    if rest.is_empty() { Ok(values) } else { Err(PackingError::Trailing(rest.len() as u64)) }
}

/// Values of every size, runs of zeros, lengths round a block.
fn values() -> impl Strategy<Value = Vec<u64>> {
    let value = (0_u32..64, any::<u64>()).prop_map(|(shift, x)| x >> shift);
    let small = (0_u64..4).prop_map(|x| x / 3);
    let one_scale = (0_u32..64).prop_flat_map(|s| {
        proptest::collection::vec(any::<u64>().prop_map(move |x| x >> s), 0..300)
    });
    prop_oneof![
        proptest::collection::vec(value, 0..300),
        proptest::collection::vec(small, 0..300),
        one_scale,
    ]
}

#[test]
fn zigzag_extremes_return() {
    for x in [0, 1, -1, 2, -2, i64::MAX, i64::MIN] {
        assert_eq!(unzigzag(zigzag(x)), x);
    }
    assert_eq!([0, -1, 1, -2].map(zigzag), [0, 1, 2, 3]);
}

/// The format, bit by bit: a change here is a change of every receipt.
#[test]
fn pack_known_values_has_these_bytes() {
    assert_eq!(packed(&[]), [0_u8; 0]);
    assert_eq!(packed(&[0; 128]), [0]);
    assert_eq!(packed(&[0; 129]), [0, 0]);
    // Mean 5, so k = 2 and q = 1 for all. Lowest bit first: header `1100000`, then 5 as
    // `10` `10`, 6 as `10` `01`, 4 as `10` `00`.
    assert_eq!(packed(&[5, 6, 4]), [0b1000_0011, 0b1100_1010, 0]);
}

#[test]
fn unpack_extreme_blocks_stay_within_their_bound() {
    let mut lonely = vec![0; BLOCK];
    lonely[77] = u64::MAX;
    let mut few = vec![1; BLOCK];
    few[0] = 127;
    for block in [vec![u64::MAX; BLOCK], lonely, few, vec![u64::MAX], vec![1 << 63, 0]] {
        let bytes = packed(&block);
        assert!(bytes.len() <= BLOCK_BYTES_MAX, "{} bytes", bytes.len());
        assert_eq!(unpack_all(&bytes, block.len()).unwrap(), block);
    }
}

#[test]
fn unpack_foreign_bytes_names_the_fault() {
    let bytes = packed(&[5, 6, 4]);
    assert_eq!(unpack_all(&bytes[..2], 3), Err(PackingError::Truncated));
    assert_eq!(unpack_all(&[&bytes[..], &[0]].concat(), 3), Err(PackingError::Trailing(1)));
    assert_eq!(unpack_all(&[0x80], 128), Err(PackingError::NotCanonical), "padding");
    assert_eq!(unpack_all(&[0x7f; 99], 1), Err(PackingError::NotCanonical), "header");
    assert_eq!(unpack_all(&[1; 2], 1), Err(PackingError::NotCanonical), "zeros by a parameter");
    let ones = [&[0x81][..], &[0xff; 99]].concat();
    assert_eq!(unpack_all(&ones, 1), Err(PackingError::NotCanonical), "ones");
    assert_eq!(unpack_all(&[], usize::MAX), Err(PackingError::Truncated), "claimed count");
}

#[test]
fn split_wrong_lengths_are_refused() {
    let mut bytes = vec![];
    join(&[vec![1, 2], vec![], vec![3]], &mut bytes);
    assert_eq!(split(&bytes, 3).unwrap(), [&[1, 2][..], &[], &[3]]);
    assert_eq!(split(&bytes, 2), None);
    assert_eq!(split(&bytes, usize::MAX), None);
    assert_eq!(split(&bytes[..26], 3), None);
    for length in 0..3 {
        let mut wrong = bytes.clone();
        wrong[8 * length + 7] = 0xff;
        assert_eq!(split(&wrong, 3), None, "length {length}");
    }
}

proptest! {
    #[test]
    fn unpack_any_values_return(values in values()) {
        let bytes = packed(&values);
        prop_assert_eq!(unpack_all(&bytes, values.len()).unwrap(), values);
    }

    /// Two encodings of one sequence would let a receipt differ for equal results.
    #[test]
    fn unpack_flipped_bit_is_refused_or_is_another_sequence(
        values in values(), at in any::<proptest::sample::Index>(),
    ) {
        let mut bytes = packed(&values);
        prop_assume!(!bytes.is_empty());
        let bit = at.index(bytes.len() * 8);
        bytes[bit / 8] ^= 1 << (bit % 8);
        if let Ok(other) = unpack_all(&bytes, values.len()) {
            prop_assert_ne!(&other, &values);
            prop_assert_eq!(packed(&other), bytes);
        }
    }

    #[test]
    fn unpack_any_bytes_is_refused_or_canonical(
        bytes in proptest::collection::vec(any::<u8>(), 0..400), count in 0_usize..600,
    ) {
        if let Ok(values) = unpack_all(&bytes, count) {
            prop_assert_eq!(packed(&values), bytes);
        }
    }
}
