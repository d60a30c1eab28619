//! The published alternative, to compare with: PULSE (arXiv:2602.03839) sends the positions of the weights that changed and
//! their new values. As its code does: a tensor is a matrix, coordinates are sorted, rows and columns are differences (the
//! column starts anew in each row), values are as they are, and everything goes through zstd level 1.
//!
//! Nothing in a run uses it.

/// Where a matrix of 16-bit weights changed, and to what.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Coordinates {
    /// Rows since the change before.
    pub row_delta: Vec<u32>,
    /// Columns since the change before in the same row; the column itself where the row is another.
    pub col_delta: Vec<u32>,
    /// New values.
    pub values: Vec<u16>,
}

/// The coordinates of what differs between two matrices of `columns` columns, in little-endian bytes.
pub fn coordinates(parent: &[u8], child: &[u8], columns: usize) -> Coordinates {
    let mut found = Coordinates::default();
    let (mut last_row, mut last_column) = (0, 0);
    let pairs = parent.as_chunks().0.iter().zip(child.as_chunks().0);
    for (i, (parent, child)) in pairs.enumerate() {
        if parent == child {
            continue;
        }
        let (row, column) = (i / columns.max(1), i % columns.max(1));
        if row != last_row {
            last_column = 0;
        }
        found.row_delta.push((row - last_row) as u32);
        found.col_delta.push((column - last_column) as u32);
        found.values.push(u16::from_le_bytes(*child));
        (last_row, last_column) = (row, column);
    }
    found
}

/// Bytes of the patch as PULSE packs it: rows in one byte or four, columns in two or four, values in two, zstd level 1.
/// `None` when the compressor refuses.
pub fn packed(coordinates: &Coordinates) -> Option<Vec<u8>> {
    let mut bytes = Vec::with_capacity(coordinates.values.len() * 5);
    let largest = |deltas: &[u32]| deltas.iter().copied().max().unwrap_or(0);
    let rows_width = if largest(&coordinates.row_delta) <= 0xff {
        1
    } else {
        4
    };
    let columns_width = if largest(&coordinates.col_delta) <= 0xffff {
        2
    } else {
        4
    };
    for row in &coordinates.row_delta {
        bytes.extend_from_slice(&row.to_le_bytes()[..rows_width]);
    }
    for column in &coordinates.col_delta {
        bytes.extend_from_slice(&column.to_le_bytes()[..columns_width]);
    }
    for value in &coordinates.values {
        bytes.extend_from_slice(&value.to_le_bytes());
    }
    zstd::bulk::compress(&bytes, 1).ok()
}

/// Bytes of a patch with flat gaps of seven bits a byte instead of rows and columns: smaller on most steps, so the one to beat.
/// `None` when the compressor refuses.
pub fn packed_flat(parent: &[u8], child: &[u8]) -> Option<Vec<u8>> {
    let (mut gaps, mut values) = (Vec::new(), Vec::new());
    let mut last = 0;
    let pairs = parent.as_chunks::<2>().0.iter().zip(child.as_chunks().0);
    for (i, (_, child)) in pairs
        .enumerate()
        .filter(|(_, (parent, child))| parent != child)
    {
        let mut gap = i - last;
        while gap >= 0x80 {
            gaps.push(gap as u8 | 0x80);
            gap >>= 7;
        }
        gaps.push(gap as u8);
        values.extend_from_slice(child);
        last = i;
    }
    let mut bytes = u32::try_from(gaps.len()).ok()?.to_le_bytes().to_vec();
    bytes.extend(gaps);
    bytes.extend(values);
    zstd::bulk::compress(&bytes, 1).ok()
}

/// Writes to `child` the one that a flat patch was packed from. `None` when it was not packed for a parent of this length.
pub fn apply_flat(packed: &[u8], parent: &[u8], child: &mut [u8]) -> Option<()> {
    // Of every weight a gap of at most five bytes and a value.
    let unpacked = zstd::bulk::decompress(packed, 4 + parent.len() / 2 * 7).ok()?;
    let (length, rest) = unpacked.split_first_chunk()?;
    let (gaps, values) = rest.split_at_checked(u32::from_le_bytes(*length) as usize)?;
    let (mut values, _) = values.as_chunks::<2>();
    if child.len() != parent.len() {
        return None;
    }
    child.copy_from_slice(parent);
    let (weights, _) = child.as_chunks_mut::<2>();
    let (mut at, mut gap, mut shift) = (0usize, 0usize, 0);
    for byte in gaps {
        gap |= usize::from(byte & 0x7f) << shift;
        shift = (shift + 7).min(56);
        if byte & 0x80 == 0 {
            at = at.checked_add(gap)?;
            let (value, after) = values.split_first()?;
            *weights.get_mut(at)? = *value;
            (values, gap, shift) = (after, 0, 0);
        }
    }
    Some(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use muster_broadcaster::codec::patch::{Float, apply, encode};

    #[derive(serde::Deserialize)]
    struct Vector {
        pulsesync: Sync,
    }

    #[derive(serde::Deserialize)]
    struct Sync {
        cols: usize,
        base: Vec<u16>,
        new: Vec<u16>,
        row_delta: Vec<u32>,
        col_delta: Vec<u32>,
        values: Vec<u16>,
    }

    #[test]
    fn the_golden_vector_is_reproduced_and_our_patch_returns_it() {
        let text = include_str!("../../../broadcaster/testdata/lowcomm_pulse.json");
        let vector: Sync = serde_json::from_str::<Vector>(text).unwrap().pulsesync;
        let bytes = |weights: &[u16]| -> Vec<u8> {
            weights
                .iter()
                .flat_map(|weight| weight.to_le_bytes())
                .collect()
        };
        let (parent, child) = (bytes(&vector.base), bytes(&vector.new));
        let found = coordinates(&parent, &child, vector.cols);
        assert_eq!(found.row_delta, vector.row_delta);
        assert_eq!(found.col_delta, vector.col_delta);
        assert_eq!(found.values, vector.values);
        assert!(packed(&found).unwrap().len() > 2 * vector.values.len());
        let flat = packed_flat(&parent, &child).unwrap();
        let mut applied = vec![0; parent.len()];
        assert_eq!(apply_flat(&flat, &parent, &mut applied), Some(()));
        assert_eq!(applied, child);
        assert_eq!(apply_flat(&flat, &parent[..8], &mut applied[..8]), None);

        let patch = encode(&parent, &child, Float::Bf16).unwrap();
        assert_eq!(patch.changed, vector.values.len() as u64);
        applied.fill(0);
        apply(&patch.bytes, &parent, &mut applied, Float::Bf16).unwrap();
        assert_eq!(applied, child);
    }
}
