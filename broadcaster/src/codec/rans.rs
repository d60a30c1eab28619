//! Asymmetric numeral systems in their range variant (rANS, arXiv:1311.2540), one state of 64 bits, words of 32.
//!
//! Symbols are coded last to first and come back first to last. Raw bits go through the same state, so that there is one
//! stream. Invariant: the decoder ends in the state that the encoder began with, and with no word left; whatever was
//! altered on the way almost never does, and the root decides in the end.

use super::SliceError;
use super::bits::{BitReader, BitWriter};
use super::token::TOKENS;

/// Frequencies of a table add up to 2 to this.
const SCALE_BITS: u32 = 12;
const SCALE: u32 = 1 << SCALE_BITS;
/// The state is kept at or above this, and below it times 2 to 32.
const LOWEST: u64 = 1 << 31;
/// Significant bits to which a frequency is written, after its length: at most 6 % from the best, which costs 0.1 %.
const MANTISSA_BITS: u32 = 3;
/// Bits of how long a frequency is: 0 for none, at most 13.
const LENGTH_BITS: u32 = 4;
/// Bits of how many tokens a table lists.
const COUNT_BITS: u32 = 6;
const _: () = assert!(TOKENS < 1 << COUNT_BITS);

/// How often each token is to be expected. Either every frequency is zero, or they add up to [`SCALE`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Table {
    frequency: [u16; TOKENS],
    start: [u16; TOKENS],
}

impl Table {
    /// The table for tokens that were counted, rounded as it will be written.
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

    /// Scales weights so that they add up; what rounding leaves over goes to the largest.
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
            // Of at most 48 tokens the largest has at least 1/48 of the scale, more than the others were rounded up by.
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

    /// Whether no token is expected at all.
    pub(super) fn is_empty(&self) -> bool {
        self.frequency.iter().all(|frequency| *frequency == 0)
    }

    /// Writes the table for `counts`, which [`Table::read`] makes the same table of.
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

    /// Reads a table.
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

/// The share rounded down to the significant bits that are written.
fn round(share: u32) -> u32 {
    let dropped = share.ilog2().saturating_sub(MANTISSA_BITS);
    (share >> dropped) << dropped
}

/// A table, and which token each part of the scale belongs to.
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

/// Takes symbols last to first.
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

    /// Codes a token that the table expects.
    #[inline]
    pub(super) fn put(&mut self, table: &Table, token: usize) {
        let frequency = u64::from(table.frequency[token]).max(1);
        self.make_room(((LOWEST >> SCALE_BITS) << 32) * frequency);
        self.state = ((self.state / frequency) << SCALE_BITS)
            + self.state % frequency
            + u64::from(table.start[token]);
    }

    /// Codes the lowest `count` bits of `value`; at most 30.
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

    /// Appends the state and the words, in the order in which they are read.
    pub(super) fn finish(self, bytes: &mut Vec<u8>) {
        bytes.extend(self.state.to_le_bytes());
        bytes.reserve(self.words.len() * 4);
        for word in self.words.iter().rev() {
            bytes.extend(word.to_le_bytes());
        }
    }
}

/// Gives symbols first to last.
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

    /// The next token by a table that is not empty.
    #[inline]
    pub(super) fn get(&mut self, lookup: &Lookup) -> usize {
        let slot = (self.state & u64::from(SCALE - 1)) as usize;
        // An empty table gives token 0, of frequency 0: the state becomes 0 and the end will not be as it must.
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
                // Goes on with a valid state, so that the caller's loop ends on its own; the end then tells.
                self.state |= LOWEST;
                self.is_overrun = true;
            }
        }
    }

    /// Whether the stream ended where its content did.
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
        fn every_table_that_can_be_read_adds_up(bytes in proptest::collection::vec(any::<u8>(), 0..64)) {
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
