//! The tokenizer of a GGUF file as Hugging Face would have published it: `tokenizer.json` and `tokenizer_config.json` from
//! the pieces, their types and scores, the merges, and the name of the pre-tokenizer.
//!
//! Knows no weights. The file has no merges for a SentencePiece vocabulary; they follow from the scores, as in
//! transformers' conversion. Invariant: an unknown pre-tokenizer is refused, never guessed.

use std::collections::HashMap;

use serde_json::{Map, Value, json};

use super::error::GgufError;
use super::reader::Container;
use crate::config::{Architecture, Config};

/// Longest piece accepted: the longest published one is a run of 256 spaces.
const PIECE_BYTES_MAX: usize = 1024;

/// The words of Llama 3 and Qwen2, within which byte pairs are merged. The two differ in how many digits form a word.
const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const QWEN2: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// Special pieces that end an answer in the supported families.
const ENDS: [&str; 5] = [
    "<end_of_turn>",
    "<|im_end|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|endoftext|>",
];

/// The `token_type` of a piece.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum PieceKind {
    Normal,
    Unknown,
    Control,
    UserDefined,
    Unused,
    Byte,
}

impl PieceKind {
    fn from_number(number: f64) -> Self {
        match number as i64 {
            2 => Self::Unknown,
            3 => Self::Control,
            4 => Self::UserDefined,
            5 => Self::Unused,
            6 => Self::Byte,
            _ => Self::Normal,
        }
    }
}

/// How text is split before merging.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum PreTokenizer {
    /// Spaces become `▁`, unknown characters become bytes.
    SentencePiece {
        space_before: bool,
    },
    Llama3,
    Qwen2,
    /// GPT-2's words, and every digit alone.
    SmolLm,
    Gpt2,
}

pub(super) struct Vocabulary<'a> {
    architecture: Architecture,
    pre: PreTokenizer,
    pieces: Vec<&'a str>,
    kinds: Vec<PieceKind>,
    scores: Vec<f64>,
    merges: Vec<&'a str>,
    /// Whether a document begins with the token `bos`.
    add_bos: bool,
    pub(super) bos: Option<u32>,
    pub(super) pad: Option<u32>,
    unknown: Option<u32>,
    end: Option<u32>,
    /// Whether the piece of byte 9 is named as a tab, as in Gemma's published files.
    names_tab: bool,
    /// All pieces that end an answer; those that the metadata names come first.
    pub(super) ends: Vec<u32>,
}

impl<'a> Vocabulary<'a> {
    pub(super) fn new(
        container: &Container<'a>,
        architecture: Architecture,
    ) -> Result<Self, GgufError> {
        let key = "tokenizer.ggml.tokens";
        let list = container
            .list(key)?
            .ok_or_else(|| GgufError::metadata(key, "a list of texts"))?;
        let pieces = list.texts(key)?;
        if let Some(long) = pieces.iter().find(|piece| piece.len() > PIECE_BYTES_MAX) {
            let start: String = long.chars().take(40).collect();
            return Err(GgufError::Malformed(format!(
                "the piece `{start}…` of its vocabulary has {} bytes, but at most {PIECE_BYTES_MAX} are read",
                long.len()
            )));
        }
        let kinds = numbers(container, "tokenizer.ggml.token_type", pieces.len())?;
        let kinds: Vec<PieceKind> = match kinds {
            Some(numbers) => numbers.into_iter().map(PieceKind::from_number).collect(),
            None => vec![PieceKind::Normal; pieces.len()],
        };
        let pre = pre_tokenizer(container)?;
        let scores = numbers(container, "tokenizer.ggml.scores", pieces.len())?;
        let merges = match container.list("tokenizer.ggml.merges")? {
            Some(list) => list.texts("tokenizer.ggml.merges")?,
            None => Vec::new(),
        };
        let id = |key: &str| -> Result<Option<u32>, GgufError> {
            let id = container
                .unsigned(key)?
                .and_then(|id| u32::try_from(id).ok());
            Ok(id.filter(|&id| (id as usize) < pieces.len()))
        };
        let end = id("tokenizer.ggml.eos_token_id")?;
        let turn = [
            id("tokenizer.ggml.eot_token_id")?,
            id("tokenizer.ggml.eom_token_id")?,
        ];
        let named = (0u32..).zip(pieces.iter().zip(&kinds));
        let named = named
            .filter(|(_, (piece, kind))| **kind == PieceKind::Control && ENDS.contains(piece))
            .map(|(id, _)| id);
        let mut ends: Vec<u32> = end.into_iter().chain(turn.into_iter().flatten()).collect();
        for id in named {
            if !ends.contains(&id) {
                ends.push(id);
            }
        }
        ends.dedup();
        let add_bos = container.flag("tokenizer.ggml.add_bos_token")?;
        Ok(Self {
            architecture,
            pre,
            scores: scores.unwrap_or_default(),
            merges,
            add_bos: add_bos.unwrap_or(matches!(
                pre,
                PreTokenizer::SentencePiece { .. } | PreTokenizer::Llama3
            )),
            bos: id("tokenizer.ggml.bos_token_id")?,
            pad: id("tokenizer.ggml.padding_token_id")?,
            unknown: id("tokenizer.ggml.unknown_token_id")?,
            end,
            names_tab: architecture == Architecture::Gemma3 && !pieces.contains(&"\t"),
            ends,
            pieces,
            kinds,
        })
    }

    /// The name of a piece in `tokenizer.json`.
    fn name(&self, id: usize) -> &'a str {
        match self.pieces[id] {
            "<0x09>" if self.names_tab => "	",
            piece => piece,
        }
    }

    fn piece(&self, id: Option<u32>) -> Option<&'a str> {
        id.map(|id| self.name(id as usize))
    }

    /// The text of `tokenizer.json`.
    pub(super) fn tokenizer_json(&self) -> Result<String, GgufError> {
        let is_pieces = matches!(self.pre, PreTokenizer::SentencePiece { .. });
        let mut vocabulary = Map::with_capacity(self.pieces.len());
        for id in 0..self.pieces.len() {
            // Padding up to a round number of rows.
            if self.kinds[id] == PieceKind::Unused {
                continue;
            }
            if vocabulary
                .insert(self.name(id).to_owned(), json!(id))
                .is_some()
            {
                let piece = self.name(id);
                return Err(GgufError::Malformed(format!(
                    "piece `{piece}` occurs twice in its vocabulary"
                )));
            }
        }
        let merges = if is_pieces {
            self.merges_of_scores()
        } else {
            self.merges_as_listed()?
        };
        let model = json!({
            "type": "BPE",
            "dropout": null,
            "unk_token": if is_pieces { self.piece(self.unknown) } else { None },
            "continuing_subword_prefix": null,
            "end_of_word_suffix": null,
            "fuse_unk": is_pieces,
            "byte_fallback": is_pieces,
            "ignore_merges": self.pre == PreTokenizer::Llama3,
            "vocab": vocabulary,
            "merges": merges,
        });
        let file = json!({
            "version": "1.0",
            "truncation": null,
            "padding": null,
            "added_tokens": self.added_tokens().into_iter().map(|(_, token)| token).collect::<Vec<_>>(),
            "normalizer": self.normalizer(),
            "pre_tokenizer": self.pre_tokenizer(),
            "post_processor": self.post_processor(),
            "decoder": self.decoder(),
            "model": model,
        });
        Ok(format!("{file}\n"))
    }

    /// Control and user-defined pieces, which are found in text before all others. Control pieces decode to nothing.
    fn added_tokens(&self) -> Vec<(usize, Value)> {
        let added = |id: usize| match self.kinds[id] {
            PieceKind::Control | PieceKind::Unknown => Some(true),
            PieceKind::UserDefined => Some(false),
            PieceKind::Normal | PieceKind::Unused | PieceKind::Byte => None,
        };
        let token = |id: usize| {
            let special = added(id)?;
            let token = json!({
                "id": id, "content": self.name(id), "special": special,
                "single_word": false, "lstrip": false, "rstrip": false, "normalized": false,
            });
            Some((id, token))
        };
        (0..self.pieces.len()).filter_map(token).collect()
    }

    fn merges_as_listed(&self) -> Result<Vec<(&'a str, &'a str)>, GgufError> {
        let pair = |merge: &&'a str| {
            merge.split_once(' ').ok_or_else(|| {
                GgufError::Malformed(format!(
                    "the merge `{merge}` of its vocabulary is not a pair"
                ))
            })
        };
        self.merges.iter().map(pair).collect()
    }

    /// The pairs of pieces that form each piece, in the order of transformers' conversion: highest score first.
    /// User-defined pieces come before all others, because SentencePiece takes them out of a text beforehand.
    fn merges_of_scores(&self) -> Vec<(&'a str, &'a str)> {
        let joins =
            |id: usize| matches!(self.kinds[id], PieceKind::Normal | PieceKind::UserDefined);
        let ids: HashMap<&str, usize> = (0..self.pieces.len())
            .map(|id| (self.name(id), id))
            .collect();
        let mut merges = Vec::new();
        for id in (0..self.pieces.len()).filter(|&id| joins(id)) {
            let piece = self.name(id);
            let score = match self.kinds[id] {
                PieceKind::UserDefined => f64::INFINITY,
                _ => self.scores.get(id).copied().unwrap_or(-(id as f64)),
            };
            let mut pairs: Vec<(usize, usize, usize)> = piece
                .char_indices()
                .skip(1)
                .filter_map(|(at, _)| Some((*ids.get(&piece[..at])?, *ids.get(&piece[at..])?, at)))
                .collect();
            pairs.sort_unstable();
            let lengths = |at: usize| (piece[..at].chars().count(), piece[at..].chars().count());
            merges.extend(
                pairs
                    .into_iter()
                    .map(|(_, _, at)| (score, lengths(at), piece.split_at(at))),
            );
        }
        // The sort is stable: equal scores keep the order of their ids.
        merges.sort_by(|a, b| b.0.total_cmp(&a.0).then(b.1.cmp(&a.1)));
        merges.into_iter().map(|(_, _, pair)| pair).collect()
    }

    fn normalizer(&self) -> Value {
        let underscores =
            json!({ "type": "Replace", "pattern": { "String": " " }, "content": "▁" });
        match self.pre {
            PreTokenizer::SentencePiece { space_before: true } => json!({
                "type": "Sequence",
                "normalizers": [{ "type": "Prepend", "prepend": "▁" }, underscores],
            }),
            PreTokenizer::SentencePiece {
                space_before: false,
            } => underscores,
            PreTokenizer::Qwen2 => json!({ "type": "NFC" }),
            PreTokenizer::Llama3 | PreTokenizer::SmolLm | PreTokenizer::Gpt2 => Value::Null,
        }
    }

    fn pre_tokenizer(&self) -> Value {
        let bytes = |use_regex: bool| {
            json!({
                "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": use_regex,
            })
        };
        let sequence = |first: Value, second: Value| json!({ "type": "Sequence", "pretokenizers": [first, second] });
        let split = |pattern: &str| json!({ "type": "Split", "pattern": { "Regex": pattern }, "behavior": "Isolated", "invert": false });
        match self.pre {
            // The normalizer left no spaces; Gemma's published file has this step all the same.
            PreTokenizer::SentencePiece {
                space_before: false,
            } => json!({
                "type": "Split", "pattern": { "String": " " }, "behavior": "MergedWithPrevious", "invert": false,
            }),
            PreTokenizer::SentencePiece { space_before: true } => Value::Null,
            PreTokenizer::Llama3 => sequence(split(LLAMA3), bytes(false)),
            PreTokenizer::Qwen2 => sequence(split(QWEN2), bytes(false)),
            PreTokenizer::SmolLm => sequence(
                json!({ "type": "Digits", "individual_digits": true }),
                bytes(true),
            ),
            PreTokenizer::Gpt2 => bytes(true),
        }
    }

    /// Puts `bos` at the start of a document, where the file asks for it.
    fn post_processor(&self) -> Value {
        let (true, Some(id), Some(bos)) = (self.add_bos, self.bos, self.piece(self.bos)) else {
            return Value::Null;
        };
        let special = json!({ "SpecialToken": { "id": bos, "type_id": 0 } });
        let text = |name: &str, kind: u8| json!({ "Sequence": { "id": name, "type_id": kind } });
        json!({
            "type": "TemplateProcessing",
            "single": [special, text("A", 0)],
            "pair": [special, text("A", 0), { "SpecialToken": { "id": bos, "type_id": 1 } }, text("B", 1)],
            "special_tokens": { bos: { "id": bos, "ids": [id], "tokens": [bos] } },
        })
    }

    fn decoder(&self) -> Value {
        let PreTokenizer::SentencePiece { space_before } = self.pre else {
            return json!({ "type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true });
        };
        let mut steps = vec![
            json!({ "type": "Replace", "pattern": { "String": "▁" }, "content": " " }),
            json!({ "type": "ByteFallback" }),
            json!({ "type": "Fuse" }),
        ];
        if space_before {
            steps.push(json!({ "type": "Strip", "content": " ", "start": 1, "stop": 0 }));
        }
        json!({ "type": "Sequence", "decoders": steps })
    }

    /// The text of `tokenizer_config.json`.
    pub(super) fn settings(&self, config: &Config) -> String {
        let class = match (self.pre, self.architecture) {
            (_, Architecture::Gemma3) => "GemmaTokenizer",
            (PreTokenizer::Qwen2, _) => "Qwen2Tokenizer",
            (PreTokenizer::SmolLm | PreTokenizer::Gpt2, _) => "GPT2Tokenizer",
            (PreTokenizer::SentencePiece { .. }, _) => "LlamaTokenizer",
            (PreTokenizer::Llama3, _) => "PreTrainedTokenizerFast",
        };
        let mut settings = json!({
            "tokenizer_class": class,
            "add_bos_token": self.add_bos,
            "add_eos_token": false,
            "clean_up_tokenization_spaces": false,
            "model_max_length": config.max_position_embeddings,
        });
        // Without this list, transformers treats every added token as special.
        let added = self.added_tokens().into_iter().map(|(id, mut token)| {
            if let Value::Object(token) = &mut token {
                token.remove("id");
            }
            (id.to_string(), token)
        });
        if let Value::Object(settings) = &mut settings {
            settings.insert(
                "added_tokens_decoder".to_owned(),
                Value::Object(added.collect()),
            );
            for (key, id) in [
                ("bos_token", self.bos),
                ("eos_token", self.end),
                ("pad_token", self.pad),
                ("unk_token", self.unknown),
            ] {
                if let Some(piece) = self.piece(id) {
                    settings.insert(key.to_owned(), piece.into());
                }
            }
        }
        format!("{settings:#}\n")
    }
}

/// The list under `key`, which must have one number for each of `count` pieces.
fn numbers(
    container: &Container<'_>,
    key: &str,
    count: usize,
) -> Result<Option<Vec<f64>>, GgufError> {
    let Some(list) = container.list(key)? else {
        return Ok(None);
    };
    if list.len() != count {
        return Err(GgufError::Malformed(format!(
            "{key} has {} elements, but the vocabulary has {count} pieces",
            list.len()
        )));
    }
    Ok(Some(list.numbers(key)?))
}

fn pre_tokenizer(container: &Container<'_>) -> Result<PreTokenizer, GgufError> {
    let shortened = |text: &str| text.chars().take(80).collect();
    let space_before = container
        .flag("tokenizer.ggml.add_space_prefix")?
        .unwrap_or(true);
    match container.text("tokenizer.ggml.model")?.unwrap_or("(none)") {
        "llama" => return Ok(PreTokenizer::SentencePiece { space_before }),
        "gpt2" => {}
        other => {
            return Err(GgufError::TokenizerKind {
                key: "tokenizer.ggml.model",
                found: shortened(other),
                supported: "llama, gpt2",
            });
        }
    }
    match container.text("tokenizer.ggml.pre")?.unwrap_or("(none)") {
        "llama-bpe" | "llama3" | "llama-v3" => Ok(PreTokenizer::Llama3),
        "qwen2" => Ok(PreTokenizer::Qwen2),
        "smollm" => Ok(PreTokenizer::SmolLm),
        "gpt-2" => Ok(PreTokenizer::Gpt2),
        other => Err(GgufError::TokenizerKind {
            key: "tokenizer.ggml.pre",
            found: shortened(other),
            supported: "llama-bpe, qwen2, smollm, gpt-2",
        }),
    }
}
