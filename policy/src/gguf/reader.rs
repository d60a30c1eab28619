//! The GGUF container: metadata and a table of tensors, as views into the bytes of an untrusted file.
//!
//! Written by hand because candle's reader copies every tensor and allocates up to 1 GiB for a string that a file announces
//! but does not hold. Knows no model. Invariant: allocations stay within a small multiple of the file's size, every view
//! lies within the file, every tensor has exactly the bytes of its shape and type, and no two tensors overlap.

use std::collections::BTreeMap;

use super::blocks::BlockType;
use super::error::GgufError;

/// Most keys accepted: the longest published headers have about a hundred.
const KEYS_MAX: u64 = 1 << 16;

/// Most tensors accepted: mixtures of experts have about ten thousand.
const TENSORS_MAX: u64 = 1 << 16;

/// Longest key or name that the format allows.
const NAME_BYTES_MAX: usize = u16::MAX as usize;

/// Most elements of a tensor: far above any model, and small enough that sizes fit 64 bits.
const ELEMENTS_MAX: u64 = 1 << 40;

/// Alignment of tensors in a file that does not set `general.alignment`.
const ALIGNMENT: u64 = 32;

/// A value of the metadata.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Entry<'a> {
    Unsigned(u64),
    Signed(i64),
    Float(f64),
    Flag(bool),
    Text(&'a str),
    List(List<'a>),
}

/// An array of the metadata, decoded on request.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct List<'a> {
    kind: u32,
    count: usize,
    bytes: &'a [u8],
}

/// A tensor of the file.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Tensor<'a> {
    pub(super) block: BlockType,
    /// Rows first, as in Hugging Face's files: `[out, in]` or `[width]`.
    pub(super) shape: Vec<usize>,
    pub(super) bytes: &'a [u8],
}

/// A file's metadata and tensors.
#[derive(Debug)]
pub(super) struct Container<'a> {
    entries: BTreeMap<&'a str, Entry<'a>>,
    pub(super) tensors: BTreeMap<&'a str, Tensor<'a>>,
}

impl<'a> Container<'a> {
    pub(super) fn parse(bytes: &'a [u8]) -> Result<Self, GgufError> {
        let mut cursor = Cursor { bytes, at: 0 };
        if cursor.take(4).is_err() || &bytes[..4] != b"GGUF" {
            return Err(malformed("it does not begin with `GGUF`".to_owned()));
        }
        let version = cursor.u32()?;
        if !(2..=3).contains(&version) {
            return Err(malformed(format!(
                "it has version {version}, but only little-endian versions 2 and 3 can be read"
            )));
        }
        let tensors = at_most(TENSORS_MAX, cursor.u64()?, "tensors")?;
        let keys = at_most(KEYS_MAX, cursor.u64()?, "keys")?;
        let mut entries = BTreeMap::new();
        for _ in 0..keys {
            let key = cursor.name()?;
            let kind = cursor.u32()?;
            let entry = cursor.entry(kind)?;
            if entries.insert(key, entry).is_some() {
                return Err(malformed(format!("key `{key}` occurs twice")));
            }
        }
        let infos = (0..tensors)
            .map(|_| cursor.tensor_info())
            .collect::<Result<Vec<_>, _>>()?;
        let mut container = Self {
            entries,
            tensors: BTreeMap::new(),
        };
        container.locate(infos, bytes, cursor.at)?;
        Ok(container)
    }

    /// Finds the bytes of each tensor behind the header.
    fn locate(
        &mut self,
        mut infos: Vec<TensorInfo<'a>>,
        bytes: &'a [u8],
        header_end: usize,
    ) -> Result<(), GgufError> {
        let alignment = self.unsigned("general.alignment")?.unwrap_or(ALIGNMENT);
        if !alignment.is_power_of_two() || !(8..=1 << 16).contains(&alignment) {
            return Err(malformed(format!(
                "general.alignment is {alignment}, but it must be a power of two from 8 to 65536"
            )));
        }
        let start = (header_end as u64).next_multiple_of(alignment);
        infos.sort_by_key(|info| info.offset);
        let mut end = 0;
        for info in infos {
            let name = info.name;
            if info.offset % alignment != 0 || info.offset < end {
                return Err(malformed(format!(
                    "tensor `{name}` begins at {}, which is not a multiple of {alignment} or lies within another tensor",
                    info.offset
                )));
            }
            end = info.offset + info.block.bytes_of(&info.shape, name)?;
            let within = |at: u64| usize::try_from(start + at).ok();
            let data = within(info.offset)
                .zip(within(end))
                .and_then(|(from, to)| bytes.get(from..to))
                .ok_or_else(|| {
                    malformed(format!(
                        "tensor `{name}` ends at byte {}, but the file has {} bytes; fetch it again",
                        start + end,
                        bytes.len()
                    ))
                })?;
            let tensor = Tensor {
                block: info.block,
                shape: info.shape.iter().rev().map(|&axis| axis as usize).collect(),
                bytes: data,
            };
            if self.tensors.insert(name, tensor).is_some() {
                return Err(malformed(format!("tensor `{name}` occurs twice")));
            }
        }
        Ok(())
    }

    pub(super) fn entry(&self, key: &str) -> Option<Entry<'a>> {
        self.entries.get(key).copied()
    }

    pub(super) fn keys(&self) -> impl Iterator<Item = &'a str> + '_ {
        self.entries.keys().copied()
    }

    pub(super) fn text(&self, key: &str) -> Result<Option<&'a str>, GgufError> {
        match self.entry(key) {
            None => Ok(None),
            Some(Entry::Text(text)) => Ok(Some(text)),
            Some(_) => Err(GgufError::metadata(key, "a text")),
        }
    }

    pub(super) fn unsigned(&self, key: &str) -> Result<Option<u64>, GgufError> {
        match self.entry(key) {
            None => Ok(None),
            Some(Entry::Unsigned(number)) => Ok(Some(number)),
            Some(Entry::Signed(number)) if number >= 0 => Ok(Some(number.unsigned_abs())),
            Some(_) => Err(GgufError::metadata(key, "a whole number of at least 0")),
        }
    }

    pub(super) fn float(&self, key: &str) -> Result<Option<f64>, GgufError> {
        match self.entry(key) {
            None => Ok(None),
            Some(Entry::Float(number)) => Ok(Some(number)),
            Some(Entry::Unsigned(number)) => Ok(Some(number as f64)),
            Some(_) => Err(GgufError::metadata(key, "a number")),
        }
    }

    pub(super) fn flag(&self, key: &str) -> Result<Option<bool>, GgufError> {
        match self.entry(key) {
            None => Ok(None),
            Some(Entry::Flag(flag)) => Ok(Some(flag)),
            Some(_) => Err(GgufError::metadata(key, "true or false")),
        }
    }

    pub(super) fn list(&self, key: &str) -> Result<Option<List<'a>>, GgufError> {
        match self.entry(key) {
            None => Ok(None),
            Some(Entry::List(list)) => Ok(Some(list)),
            Some(_) => Err(GgufError::metadata(key, "a list")),
        }
    }
}

impl<'a> List<'a> {
    pub(super) fn len(&self) -> usize {
        self.count
    }

    pub(super) fn texts(&self, key: &str) -> Result<Vec<&'a str>, GgufError> {
        let mut cursor = Cursor {
            bytes: self.bytes,
            at: 0,
        };
        let mut texts = Vec::with_capacity(self.count);
        for _ in 0..self.count {
            match cursor.entry(self.kind)? {
                Entry::Text(text) => texts.push(text),
                _ => return Err(GgufError::metadata(key, "a list of texts")),
            }
        }
        Ok(texts)
    }

    pub(super) fn numbers(&self, key: &str) -> Result<Vec<f64>, GgufError> {
        let mut cursor = Cursor {
            bytes: self.bytes,
            at: 0,
        };
        let mut numbers = Vec::with_capacity(self.count);
        for _ in 0..self.count {
            numbers.push(match cursor.entry(self.kind)? {
                Entry::Unsigned(number) => number as f64,
                Entry::Signed(number) => number as f64,
                Entry::Float(number) => number,
                Entry::Flag(flag) => f64::from(u8::from(flag)),
                _ => return Err(GgufError::metadata(key, "a list of numbers")),
            });
        }
        Ok(numbers)
    }
}

/// A tensor of the header's table.
struct TensorInfo<'a> {
    name: &'a str,
    /// Fastest axis first, as in the format.
    shape: Vec<u64>,
    block: BlockType,
    offset: u64,
}

/// A position in untrusted bytes.
struct Cursor<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Cursor<'a> {
    fn take(&mut self, count: usize) -> Result<&'a [u8], GgufError> {
        let end = self.at.checked_add(count);
        let taken = end.and_then(|end| self.bytes.get(self.at..end));
        let taken = taken.ok_or_else(|| malformed("it ends within its header".to_owned()))?;
        self.at += count;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], GgufError> {
        let mut array = [0; N];
        array.copy_from_slice(self.take(N)?);
        Ok(array)
    }

    fn u32(&mut self) -> Result<u32, GgufError> {
        self.array().map(u32::from_le_bytes)
    }

    fn u64(&mut self) -> Result<u64, GgufError> {
        self.array().map(u64::from_le_bytes)
    }

    fn text(&mut self) -> Result<&'a str, GgufError> {
        let count = self.u64()?;
        let count = usize::try_from(count).unwrap_or(usize::MAX);
        let bytes = self.take(count)?;
        std::str::from_utf8(bytes).map_err(|_| malformed("a text in it is not UTF-8".to_owned()))
    }

    fn name(&mut self) -> Result<&'a str, GgufError> {
        let name = self.text()?;
        if name.len() > NAME_BYTES_MAX {
            return Err(malformed(format!("a name in it has {} bytes", name.len())));
        }
        Ok(name)
    }

    /// A value; `kind` is the format's number of its type.
    fn entry(&mut self, kind: u32) -> Result<Entry<'a>, GgufError> {
        Ok(match kind {
            0 => Entry::Unsigned(u64::from(u8::from_le_bytes(self.array()?))),
            1 => Entry::Signed(i64::from(i8::from_le_bytes(self.array()?))),
            2 => Entry::Unsigned(u64::from(u16::from_le_bytes(self.array()?))),
            3 => Entry::Signed(i64::from(i16::from_le_bytes(self.array()?))),
            4 => Entry::Unsigned(u64::from(self.u32()?)),
            5 => Entry::Signed(i64::from(i32::from_le_bytes(self.array()?))),
            6 => Entry::Float(shortest_decimal(f32::from_le_bytes(self.array()?))),
            7 => Entry::Flag(self.array::<1>()? != [0]),
            8 => Entry::Text(self.text()?),
            9 => Entry::List(self.list()?),
            10 => Entry::Unsigned(self.u64()?),
            11 => Entry::Signed(i64::from_le_bytes(self.array()?)),
            12 => Entry::Float(f64::from_le_bytes(self.array()?)),
            other => {
                return Err(malformed(format!(
                    "it holds a value of the unknown type {other}"
                )));
            }
        })
    }

    fn list(&mut self) -> Result<List<'a>, GgufError> {
        let kind = self.u32()?;
        // No published file has nested lists, and their depth would be unbounded.
        if kind == 9 {
            return Err(malformed("it holds a list of lists".to_owned()));
        }
        // Every element takes at least a byte.
        let left = (self.bytes.len() - self.at) as u64;
        let count = at_most(left, self.u64()?, "elements in a list")?;
        let from = self.at;
        for _ in 0..count {
            self.entry(kind)?;
        }
        Ok(List {
            kind,
            count: count as usize,
            bytes: &self.bytes[from..self.at],
        })
    }

    fn tensor_info(&mut self) -> Result<TensorInfo<'a>, GgufError> {
        let name = self.name()?;
        let axes = self.u32()?;
        if !(1..=4).contains(&axes) {
            return Err(malformed(format!(
                "tensor `{name}` has {axes} axes, but only 1 to 4 can be read"
            )));
        }
        let shape: Vec<u64> = (0..axes).map(|_| self.u64()).collect::<Result<_, _>>()?;
        let elements = shape
            .iter()
            .try_fold(1u64, |product, &axis| product.checked_mul(axis));
        if elements.is_none_or(|elements| elements == 0 || elements > ELEMENTS_MAX) {
            return Err(malformed(format!(
                "tensor `{name}` has shape {shape:?}, but must have 1 to {ELEMENTS_MAX} elements"
            )));
        }
        let block = BlockType::from_number(self.u32()?, name)?;
        let offset = at_most(ELEMENTS_MAX << 3, self.u64()?, "bytes before a tensor")?;
        Ok(TensorInfo {
            name,
            shape,
            block,
            offset,
        })
    }
}

/// The shortest decimal that rounds to `number`, as f64: 1e-6 stored in f32 becomes 1e-6, not 9.999999974752427e-7.
fn shortest_decimal(number: f32) -> f64 {
    number
        .to_string()
        .parse()
        .unwrap_or_else(|_| f64::from(number))
}

fn at_most(max: u64, number: u64, unit: &str) -> Result<u64, GgufError> {
    if number > max {
        return Err(malformed(format!(
            "it announces {number} {unit}, above the limit of {max}"
        )));
    }
    Ok(number)
}

fn malformed(problem: String) -> GgufError {
    GgufError::Malformed(problem)
}
