//! Bits in bytes, lowest first. They hold the small tables before a slice's coded symbols, so the code is written for clarity, not
//! for speed.

use super::SliceError;

#[derive(Debug, Default)]
pub(super) struct BitWriter {
    bytes: Vec<u8>,
    used: u32,
}

impl BitWriter {
    /// Appends the lowest `count` bits of `value`.
    pub(super) fn put(&mut self, value: u32, count: u32) {
        for bit in 0..count {
            if self.used == 0 {
                self.bytes.push(0);
            }
            if let Some(last) = self.bytes.last_mut() {
                *last |= (((value >> bit) & 1) as u8) << self.used;
            }
            self.used = (self.used + 1) % 8;
        }
    }

    /// The bytes; the last byte's unused bits are zero.
    pub(super) fn finish(self) -> Vec<u8> {
        self.bytes
    }
}

/// Reads what [`BitWriter`] wrote.
#[derive(Debug)]
pub(super) struct BitReader<'a> {
    bytes: &'a [u8],
    position: usize,
}

impl<'a> BitReader<'a> {
    pub(super) fn new(bytes: &'a [u8]) -> Self {
        Self { bytes, position: 0 }
    }

    /// The next `count` bits, at most 32.
    pub(super) fn get(&mut self, count: u32) -> Result<u32, SliceError> {
        let mut value = 0;
        for bit in 0..count {
            let byte = self.bytes.get(self.position / 8);
            let byte = byte.ok_or(SliceError::Truncated)?;
            value |= u32::from((byte >> (self.position % 8)) & 1) << bit;
            self.position += 1;
        }
        Ok(value)
    }

    /// The bytes after the last one begun. Its unused bits must be zero, so that a content has only one encoding.
    pub(super) fn rest(mut self) -> Result<&'a [u8], SliceError> {
        let padding = (8 - self.position % 8) % 8;
        if self.get(padding as u32)? != 0 {
            return Err(SliceError::Trailing);
        }
        Ok(&self.bytes[self.position / 8..])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bits_come_back_in_order_and_padding_must_be_zero() {
        let mut writer = BitWriter::default();
        writer.put(0b101, 3);
        writer.put(0xabc, 12);
        writer.put(0, 0);
        let mut bytes = writer.finish();
        bytes.push(7);
        let mut reader = BitReader::new(&bytes);
        assert_eq!(reader.get(3), Ok(0b101));
        assert_eq!(reader.get(12), Ok(0xabc));
        assert_eq!(reader.rest(), Ok(&[7u8][..]));

        bytes[1] |= 0x80;
        let mut reader = BitReader::new(&bytes);
        assert!(reader.get(15).is_ok());
        assert_eq!(reader.rest(), Err(SliceError::Trailing));
        assert_eq!(BitReader::new(&[]).get(1), Err(SliceError::Truncated));
    }
}
