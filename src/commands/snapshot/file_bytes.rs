//! `--file-bytes-max`: the size of one file of weights.

use muster_broadcaster::snapshot::FILE_BYTES_MAX;

/// A smaller limit is probably a mistake in the unit.
const FILE_BYTES_MIN: u64 = 16 << 10;

pub(super) fn parse(text: &str) -> Result<u64, String> {
    let number = text.parse().ok();
    let number = number.filter(|bytes| *bytes >= FILE_BYTES_MIN);
    number.ok_or_else(|| {
        format!(
            "give a number of bytes without a unit, at least {FILE_BYTES_MIN}; {FILE_BYTES_MAX} is usual"
        )
    })
}
