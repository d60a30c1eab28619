//! Codes a slice as XOR with the parent, in byte planes compressed with zstd. It suits weights of any width if most change a
//! little: their high bytes are mostly equal, so the high planes are runs of zeros.

use super::SliceError;

/// zstd's level: higher levels save less than 2 % of a plane, and take several times as long.
const LEVEL: i32 = 1;

/// Codes the change from `parent` to `child`, both of weights of `width` bytes. `None` if their lengths differ or are no multiple
/// of the width, or if compression fails.
pub fn encode(parent: &[u8], child: &[u8], width: usize) -> Option<Vec<u8>> {
    if width == 0 || parent.len() != child.len() || !parent.len().is_multiple_of(width) {
        return None;
    }
    let mut bytes = Vec::new();
    let mut plane = vec![0; parent.len() / width];
    for offset in 0..width {
        let pairs = parent[offset.min(parent.len())..]
            .iter()
            .step_by(width)
            .zip(child[offset.min(child.len())..].iter().step_by(width));
        for (xor, (parent, child)) in plane.iter_mut().zip(pairs) {
            *xor = parent ^ child;
        }
        let packed = zstd::bulk::compress(&plane, LEVEL).ok()?;
        bytes.extend(u32::try_from(packed.len()).ok()?.to_le_bytes());
        bytes.extend(packed);
    }
    Some(bytes)
}

/// Writes the child that was encoded to `child`. Allocates one plane of the parent.
///
/// # Errors
/// When the bytes are not planes of this parent's length.
pub fn apply(
    planes: &[u8],
    parent: &[u8],
    child: &mut [u8],
    width: usize,
) -> Result<(), SliceError> {
    if width == 0 || parent.len() != child.len() || !parent.len().is_multiple_of(width) {
        return Err(SliceError::Beyond);
    }
    child.copy_from_slice(parent);
    let mut rest = planes;
    let mut plane = vec![0; parent.len() / width];
    for offset in 0..width {
        let (length, after) = rest.split_first_chunk().ok_or(SliceError::Truncated)?;
        let length = u32::from_le_bytes(*length) as usize;
        let (packed, after) = after
            .split_at_checked(length)
            .ok_or(SliceError::Truncated)?;
        rest = after;
        // Into a buffer of the right size: a stream that claims to be larger fails, and allocates nothing.
        let unpacked = zstd::bulk::decompress_to_buffer(packed, &mut plane[..]);
        if unpacked.ok() != Some(plane.len()) {
            return Err(SliceError::Plane);
        }
        for (weight, xor) in child.chunks_exact_mut(width).zip(&plane) {
            weight[offset] ^= xor;
        }
    }
    if rest.is_empty() {
        Ok(())
    } else {
        Err(SliceError::Trailing)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn any_child_comes_back_and_truncated_planes_are_refused(
            pairs in proptest::collection::vec((any::<u32>(), any::<u32>(), any::<bool>()), 0..300),
            width in prop::sample::select(vec![2usize, 4]),
        ) {
            let parent: Vec<u8> = pairs.iter().flat_map(|pair| pair.0.to_le_bytes()).collect();
            let child: Vec<u8> = pairs
                .iter()
                .flat_map(|(parent, child, same)| if *same { *parent } else { *child }.to_le_bytes())
                .collect();
            let planes = encode(&parent, &child, width).unwrap();
            let mut applied = vec![0; parent.len()];
            prop_assert_eq!(apply(&planes, &parent, &mut applied, width), Ok(()));
            prop_assert_eq!(&applied, &child);
            let short = apply(&planes[..planes.len() - 1], &parent, &mut applied, width);
            prop_assert!(short.is_err());
            let longer = [&parent[..], &[0; 4]].concat();
            let mut applied = vec![0; longer.len()];
            prop_assert!(apply(&planes, &longer, &mut applied, width).is_err());
        }

        #[test]
        fn arbitrary_bytes_do_not_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let parent = [7; 64];
            let mut child = [0; 64];
            let _never_panics = apply(&bytes, &parent, &mut child, 4);
        }
    }
}
