//! Asymmetric numeral systems in their range variant (rANS, arXiv:1311.2540), one state of 64 bits, words of 32.
//!
//! The encoder takes symbols last to first, and the decoder returns them first to last. Raw bits use the same state, so there is
//! one stream. Invariant: the decoder ends in the encoder's first state, with no word left. An altered stream almost never does;
//! the root of the result detects the rest.

use super::SliceError;
use super::bits::{BitReader, BitWriter};
use super::token::TOKENS;

/// The frequencies of a table add up to 2^`SCALE_BITS`.
const SCALE_BITS: u32 = 12;
const SCALE: u32 = 1 << SCALE_BITS;
/// The state stays at or above this, and below 2^32 times this.
const LOWEST: u64 = 1 << 31;
/// Bits of a written frequency after its leading one. The rounding error of at most 6 % costs 0.1 % of the stream.
const MANTISSA_BITS: u32 = 3;
/// Bits of the field that holds a frequency's length in bits: 0 for none, at most 13.
const LENGTH_BITS: u32 = 4;
/// Bits of the field that holds the number of tokens listed.
const COUNT_BITS: u32 = 6;
const _: () = assert!(TOKENS < 1 << COUNT_BITS);

/// The frequency of each token. The frequencies are all zero, or they add up to [`SCALE`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Table {
    frequency: [u16; TOKENS],
    start: [u16; TOKENS],
}

impl Table {
    /// The table for counted tokens, rounded as [`Table::write`] rounds it.
    pub(super) fn of_counts(counts: &[u32; TOKENS]) -> Self {
        let total: u64 = counts.iter().map(|count| u64::from(*count)).sum();
        let rounded = counts.map(|count| {
            if count == 0 {
                return 0;
            }
            let share = (u64::from(count) * u64::from(SCALE) / total).max(1) as u32;
            round(share)
        });
        Self::of_weights(&rounded)
    }

    /// Scales weights so that they add up to [`SCALE`]; the largest one takes the rounding error.
    fn of_weights(weights: &[u32; TOKENS]) -> Self {
        let weights_sum: u32 = weights.iter().sum();
        let mut frequency = [0u16; TOKENS];
        let mut largest = 0;
        let mut assigned = 0;
        for (token, weight) in weights
            .iter()
            .enumerate()
            .filter(|(_, weight)| **weight > 0)
        {
            let scaled = (weight * SCALE / weights_sum).max(1);
            frequency[token] = scaled as u16;
            assigned += scaled;
            if scaled > u32::from(frequency[largest]) || frequency[largest] == 0 {
                largest = token;
            }
        }
        if assigned > 0 {
            // The largest of at most 48 tokens has at least 1/48 of the scale: more than the others were rounded up by.
            let rest = SCALE as i32 - assigned as i32;
            frequency[largest] = (i32::from(frequency[largest]) + rest) as u16;
        }
        let total: u32 = frequency.iter().copied().map(u32::from).sum();
        debug_assert!(total == SCALE || total == 0, "frequencies add up to SCALE");
        let mut start = [0u16; TOKENS];
        let mut next = 0;
        for token in 0..TOKENS {
            start[token] = next;
            next += frequency[token];
        }
        Self { frequency, start }
    }

    /// Whether every frequency is zero.
    pub(super) fn is_empty(&self) -> bool {
        self.frequency.iter().all(|frequency| *frequency == 0)
    }

    /// Writes the table for `counts`, so that [`Table::read`] returns the same table as [`Table::of_counts`].
    pub(super) fn write(counts: &[u32; TOKENS], bits: &mut BitWriter) {
        let total: u64 = counts.iter().map(|count| u64::from(*count)).sum();
        let listed = counts.iter().rposition(|count| *count > 0);
        let listed = listed.map_or(0, |last| last + 1);
        bits.put(listed as u32, COUNT_BITS);
        for count in &counts[..listed] {
            if *count == 0 {
                bits.put(0, LENGTH_BITS);
                continue;
            }
            let share = (u64::from(*count) * u64::from(SCALE) / total).max(1) as u32;
            let share = round(share);
            let length = share.ilog2();
            bits.put(length + 1, LENGTH_BITS);
            let kept = length.min(MANTISSA_BITS);
            bits.put((share >> (length - kept)) & ((1 << kept) - 1), kept);
        }
    }

    pub(super) fn read(bits: &mut BitReader) -> Result<Self, SliceError> {
        let listed = bits.get(COUNT_BITS)? as usize;
        let mut weights = [0u32; TOKENS];
        let weights_listed = weights.get_mut(..listed).ok_or(SliceError::Table)?;
        for weight in weights_listed.iter_mut() {
            let length = bits.get(LENGTH_BITS)?;
            if length == 0 {
                continue;
            }
            if length > SCALE_BITS + 1 {
                return Err(SliceError::Table);
            }
            let length = length - 1;
            let kept = length.min(MANTISSA_BITS);
            *weight = ((1 << kept) | bits.get(kept)?) << (length - kept);
        }
        if weights_listed.last() == Some(&0) {
            return Err(SliceError::Table);
        }
        Ok(Self::of_weights(&weights))
    }
}

/// Rounds a share down to the bits that are written.
fn round(share: u32) -> u32 {
    let dropped = share.ilog2().saturating_sub(MANTISSA_BITS);
    (share >> dropped) << dropped
}

/// A table, and the token of each slot of the scale.
#[derive(Debug)]
pub(super) struct Lookup {
    table: Table,
    token: Vec<u8>,
}

impl Lookup {
    pub(super) fn new(table: Table) -> Self {
        let mut token = vec![0u8; if table.is_empty() { 0 } else { SCALE as usize }];
        for (index, (start, frequency)) in table.start.iter().zip(&table.frequency).enumerate() {
            let start = usize::from(*start);
            token[start..start + usize::from(*frequency)].fill(index as u8);
        }
        Self { table, token }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.token.is_empty()
    }
}

/// Codes symbols, last to first.
#[derive(Debug)]
pub(super) struct Encoder {
    state: u64,
    words: Vec<u32>,
}

impl Encoder {
    pub(super) fn new() -> Self {
        Self {
            state: LOWEST,
            words: Vec::new(),
        }
    }

    /// Codes a token whose frequency is not zero.
    #[inline]
    pub(super) fn put(&mut self, table: &Table, token: usize) {
        debug_assert!(table.frequency[token] > 0, "a token that the table has");
        let frequency = u64::from(table.frequency[token]).max(1);
        self.make_room(((LOWEST >> SCALE_BITS) << 32) * frequency);
        self.state = ((self.state / frequency) << SCALE_BITS)
            + self.state % frequency
            + u64::from(table.start[token]);
    }

    /// Codes the lowest `count` bits of `value`; `count` is at most 30.
    #[inline]
    pub(super) fn put_raw(&mut self, value: u32, count: u32) {
        self.make_room((LOWEST >> count) << 32);
        self.state = (self.state << count) | u64::from(value);
    }

    #[inline]
    fn make_room(&mut self, limit: u64) {
        if self.state >= limit {
            self.words.push(self.state as u32);
            self.state >>= 32;
        }
    }

    /// Appends the state and the words in the order of reading.
    pub(super) fn finish(self, bytes: &mut Vec<u8>) {
        bytes.extend(self.state.to_le_bytes());
        bytes.reserve(self.words.len() * 4);
        for word in self.words.iter().rev() {
            bytes.extend(word.to_le_bytes());
        }
    }
}

/// Decodes symbols, first to last.
#[derive(Debug)]
pub(super) struct Decoder<'a> {
    state: u64,
    words: &'a [[u8; 4]],
    is_overrun: bool,
}

impl<'a> Decoder<'a> {
    pub(super) fn new(bytes: &'a [u8]) -> Result<Self, SliceError> {
        let (state, rest) = bytes.split_first_chunk().ok_or(SliceError::Truncated)?;
        let (words, over) = rest.as_chunks();
        let state = u64::from_le_bytes(*state);
        if !over.is_empty() || !(LOWEST..LOWEST << 32).contains(&state) {
            return Err(SliceError::Trailing);
        }
        Ok(Self {
            state,
            words,
            is_overrun: false,
        })
    }

    /// The next token. The table must not be empty; an empty one yields token 0, and [`Self::finish`] fails.
    #[inline]
    pub(super) fn get(&mut self, lookup: &Lookup) -> usize {
        let slot = (self.state & u64::from(SCALE - 1)) as usize;
        // In an empty table, token 0 has frequency 0: the state becomes 0, which is not a valid end.
        let token = lookup
            .token
            .get(slot)
            .map_or(0, |token| usize::from(*token));
        let frequency = u64::from(lookup.table.frequency[token]);
        let start = u64::from(lookup.table.start[token]);
        self.state = frequency * (self.state >> SCALE_BITS) + slot as u64 - start;
        self.refill();
        token
    }

    /// The next `count` raw bits.
    #[inline]
    pub(super) fn get_raw(&mut self, count: u32) -> u32 {
        let value = self.state as u32 & ((1 << count) - 1);
        self.state >>= count;
        self.refill();
        value
    }

    #[inline]
    fn refill(&mut self) {
        if self.state >= LOWEST {
            return;
        }
        match self.words.split_first() {
            Some((word, rest)) => {
                self.state = (self.state << 32) | u64::from(u32::from_le_bytes(*word));
                self.words = rest;
            }
            None => {
                // A valid state lets the caller's loop end normally; `finish` reports the error.
                self.state |= LOWEST;
                self.is_overrun = true;
            }
        }
    }

    /// Checks that the stream ends where its symbols end.
    pub(super) fn finish(self) -> Result<(), SliceError> {
        if self.is_overrun {
            return Err(SliceError::Truncated);
        }
        if self.state != LOWEST || !self.words.is_empty() {
            return Err(SliceError::Trailing);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn counts_of(tokens: &[usize]) -> [u32; TOKENS] {
        let mut counts = [0; TOKENS];
        tokens.iter().for_each(|token| counts[*token] += 1);
        counts
    }

    proptest! {
        #[test]
        fn symbols_and_raw_bits_come_back(
            symbols in proptest::collection::vec((0..TOKENS, any::<u32>(), 0u32..22), 1..600),
        ) {
            let tokens: Vec<usize> = symbols.iter().map(|symbol| symbol.0).collect();
            let counts = counts_of(&tokens);
            let table = Table::of_counts(&counts);
            let mut bits = BitWriter::default();
            Table::write(&counts, &mut bits);
            let written = bits.finish();
            let read = Table::read(&mut BitReader::new(&written)).unwrap();
            prop_assert_eq!(&read, &table);

            let mut encoder = Encoder::new();
            for (token, raw, count) in symbols.iter().rev() {
                encoder.put_raw(raw & ((1 << count) - 1), *count);
                encoder.put(&table, *token);
            }
            let mut bytes = Vec::new();
            encoder.finish(&mut bytes);
            let lookup = Lookup::new(read);
            let mut decoder = Decoder::new(&bytes).unwrap();
            for (token, raw, count) in &symbols {
                prop_assert_eq!(decoder.get(&lookup), *token);
                prop_assert_eq!(decoder.get_raw(*count), raw & ((1 << count) - 1));
            }
            prop_assert_eq!(decoder.finish(), Ok(()));
        }

        #[test]
        fn every_readable_table_adds_up(bytes in proptest::collection::vec(any::<u8>(), 0..64)) {
            if let Ok(table) = Table::read(&mut BitReader::new(&bytes)) {
                let total: u32 = table.frequency.iter().map(|f| u32::from(*f)).sum();
                prop_assert!(total == SCALE || table.is_empty());
                Lookup::new(table);
            }
        }
    }

    #[test]
    fn a_stream_cut_short_or_too_long_is_refused() {
        let counts = counts_of(&[1, 2, 2, 3, 3, 3]);
        let table = Table::of_counts(&counts);
        let mut encoder = Encoder::new();
        (0..200).for_each(|i| encoder.put(&table, 1 + i % 3));
        let mut bytes = Vec::new();
        encoder.finish(&mut bytes);
        let lookup = Lookup::new(table);
        let end = |bytes: &[u8]| {
            let mut decoder = Decoder::new(bytes)?;
            (0..200).for_each(|_| {
                decoder.get(&lookup);
            });
            decoder.finish()
        };
        assert_eq!(end(&bytes), Ok(()));
        assert_eq!(end(&bytes[..bytes.len() - 4]), Err(SliceError::Truncated));
        assert_eq!(end(&bytes[..7]), Err(SliceError::Truncated));
        let longer = [&bytes[..], &[0; 4]].concat();
        assert_eq!(end(&longer), Err(SliceError::Trailing));
    }
}
