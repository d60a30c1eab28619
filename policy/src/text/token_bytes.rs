//! The bytes of each token of a vocabulary, so that a text can be searched across token boundaries.
//!
//! Read from `tokenizer.json`: byte-level vocabularies spell bytes as visible characters, those with a byte fallback write
//! `▁` for a space and `<0xNN>` for a byte. Special tokens have no bytes, as in decoded text. Invariant: a vocabulary of
//! hostile or unknown form yields bytes, never an error, because worker and critic only have to agree.

use serde_json::Value;

use super::byte_level::byte_of;
use super::tokenizer::Tokenizer;

/// The text of an id without a token, as in decoded text.
const UNKNOWN: &str = "\u{FFFD}";

/// The bytes of every token.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TokenBytes {
    /// By id; ids without a token, and ids beyond the end, are unknown.
    pieces: Vec<Option<Box<[u8]>>>,
}

/// How a vocabulary spells bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Spelling {
    ByteLevel,
    Fallback,
    Plain,
}

impl TokenBytes {
    /// Reads the vocabulary of a tokenizer.
    pub fn new(tokenizer: &Tokenizer) -> Self {
        // The tokenizer was parsed from this text, so this cannot fail; an empty table would be harmless.
        let file: Value = serde_json::from_str(tokenizer.json()).unwrap_or_default();
        let spelling = spelling(&file["decoder"]);
        let mut bytes = Self {
            pieces: vec![None; tokenizer.vocab_size()],
        };
        match &file["model"]["vocab"] {
            Value::Object(vocabulary) => {
                for (token, id) in vocabulary {
                    bytes.set(id.as_u64(), spelled(token, spelling));
                }
            }
            Value::Array(pieces) => {
                for (id, piece) in (0..).zip(pieces) {
                    let token = piece.get(0).and_then(Value::as_str).unwrap_or_default();
                    bytes.set(Some(id), spelled(token, spelling));
                }
            }
            _ => {}
        }
        for added in file["added_tokens"].as_array().into_iter().flatten() {
            let special = added["special"].as_bool().unwrap_or(false);
            let content = added["content"].as_str().unwrap_or_default();
            let piece = if special { "" } else { content };
            bytes.set(added["id"].as_u64(), piece.as_bytes().to_vec());
        }
        bytes
    }

    fn set(&mut self, id: Option<u64>, piece: Vec<u8>) {
        let place = id.and_then(|id| self.pieces.get_mut(usize::try_from(id).ok()?));
        if let Some(place) = place {
            *place = Some(piece.into());
        }
    }

    /// The bytes of one token.
    pub fn of(&self, token: u32) -> &[u8] {
        match self.pieces.get(token as usize) {
            Some(Some(piece)) => piece,
            _ => UNKNOWN.as_bytes(),
        }
    }
}

/// The spelling that the decoder reverts; of several steps, the first that reverts one.
fn spelling(decoder: &Value) -> Spelling {
    match decoder["type"].as_str() {
        Some("ByteLevel") => Spelling::ByteLevel,
        Some("ByteFallback" | "Metaspace") => Spelling::Fallback,
        Some("Replace") if decoder["pattern"]["String"] == "▁" => Spelling::Fallback,
        Some("Sequence") => {
            let steps = decoder["decoders"].as_array().into_iter().flatten();
            let mut found = steps.map(spelling).filter(|step| *step != Spelling::Plain);
            found.next().unwrap_or(Spelling::Plain)
        }
        _ => Spelling::Plain,
    }
}

fn spelled(token: &str, spelling: Spelling) -> Vec<u8> {
    match spelling {
        Spelling::Plain => token.as_bytes().to_vec(),
        Spelling::Fallback => match fallback_byte(token) {
            Some(byte) => vec![byte],
            None => token.replace('▁', " ").into_bytes(),
        },
        Spelling::ByteLevel => {
            let bytes: Option<Vec<u8>> = token.chars().map(byte_of).collect();
            // As in the decoder, a token with other characters stands for itself.
            bytes.unwrap_or_else(|| token.as_bytes().to_vec())
        }
    }
}

/// The byte of `<0xNN>`.
fn fallback_byte(token: &str) -> Option<u8> {
    let digits = token.strip_prefix("<0x")?.strip_suffix('>')?;
    if digits.len() != 2 {
        return None;
    }
    u8::from_str_radix(digits, 16).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_bytes_of_tokens_join_to_the_decoded_text() {
        let tokenizer = Tokenizer::characters("ab .é\n").unwrap();
        let bytes = TokenBytes::new(&tokenizer);
        let tokens = tokenizer.encode("b é.a\n").unwrap();
        let joined: Vec<u8> = tokens
            .iter()
            .flat_map(|token| bytes.of(*token).to_vec())
            .collect();
        assert_eq!(String::from_utf8(joined).unwrap(), "b é.a\n");
        assert_eq!(bytes.of(1), b"", "special tokens have no text");
        assert_eq!(bytes.of(999), UNKNOWN.as_bytes());
    }

    #[test]
    fn each_spelling_is_read() {
        assert_eq!(spelled("Ġa", Spelling::ByteLevel), b" a");
        assert_eq!(spelled("Ã©", Spelling::ByteLevel), "é".as_bytes());
        assert_eq!(spelled("▁a", Spelling::Fallback), b" a");
        assert_eq!(spelled("<0xE9>", Spelling::Fallback), [0xE9]);
        assert_eq!(spelled("<0xE9Z>", Spelling::Fallback), b"<0xE9Z>");
    }

    #[test]
    fn the_spelling_is_found_among_several_decoder_steps() {
        let steps = serde_json::json!({ "type": "Sequence", "decoders": [
            { "type": "Replace", "pattern": { "String": "▁" }, "content": " " },
            { "type": "ByteFallback" }, { "type": "Fuse" },
        ]});
        assert_eq!(spelling(&steps), Spelling::Fallback);
        assert_eq!(spelling(&Value::Null), Spelling::Plain);
    }
}
