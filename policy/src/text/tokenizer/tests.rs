use proptest::prelude::*;

use super::super::characters::spelled;
use super::*;
use crate::testing::tiny;

const ALPHABET: &str = "0123456789+-=., \nabc";

proptest! {
    #[test]
    fn text_survives_encoding_and_decoding(text in "[0-9+=., \nabc-]{0,60}") {
        let tokenizer = Tokenizer::characters(ALPHABET).unwrap();
        let tokens = tokenizer.encode(&text).unwrap();
        prop_assert_eq!(tokens.len(), text.chars().count());
        prop_assert_eq!(tokenizer.decode(&tokens).unwrap(), text);
    }
}

#[test]
fn special_tokens_have_fixed_ids_and_no_text() {
    let tokenizer = Tokenizer::characters(ALPHABET).unwrap();
    assert_eq!((tokenizer.pad(), tokenizer.eos()), (Some(0), Some(1)));
    assert_eq!(tokenizer.vocab_size(), 2 + ALPHABET.chars().count());
    assert_eq!(
        tokenizer.encode("1<eos>").unwrap(),
        [tokenizer.id("1").unwrap(), 1]
    );
    assert_eq!(
        tokenizer
            .decode(&[tokenizer.id("1").unwrap(), 1, 0])
            .unwrap(),
        "1"
    );
    assert_eq!(
        tokenizer.encode_prompt("1=").unwrap(),
        tokenizer.encode("1=").unwrap()
    );
}

#[test]
fn characters_are_spelled_as_in_byte_level_vocabularies() {
    let names: Vec<String> = " \nA~é中".chars().map(spelled).collect();
    assert_eq!(names, ["Ġ", "Ċ", "A", "~", "Ã©", "ä¸Ń"]);
    let tokenizer = Tokenizer::characters(" \né中").unwrap();
    assert_eq!(tokenizer.encode("中 \né").unwrap(), [5, 2, 3, 4]);
    assert_eq!(tokenizer.decode(&[5, 2, 3, 4]).unwrap(), "中 \né");
    assert_eq!((tokenizer.id(" "), tokenizer.id("Ġ")), (Some(2), Some(2)));
    assert_eq!(tokenizer.id("é中"), None);
}

#[test]
fn an_id_without_a_token_is_shown() {
    let tokenizer = Tokenizer::characters("12").unwrap();
    assert_eq!(tokenizer.decode(&[2, 9, 3]).unwrap(), "1\u{FFFD}2");
}

#[test]
fn a_character_outside_the_alphabet_is_an_error() {
    let error = Tokenizer::characters("12")
        .unwrap()
        .encode("1z")
        .unwrap_err()
        .to_string();
    assert!(error.contains("1z"), "{error}");
}

#[test]
fn an_alphabet_must_list_each_character_once() {
    assert_eq!(character_tokenizer(""), Err(AlphabetError::Empty));
    let duplicate = AlphabetError::Duplicate { character: '1' };
    assert_eq!(character_tokenizer("121"), Err(duplicate));
}

#[test]
fn a_vocabulary_beyond_the_embedding_is_refused() {
    let config = tiny();
    Tokenizer::characters(ALPHABET)
        .unwrap()
        .check(&config)
        .unwrap();
    let wide: String = ('\u{4E00}'..).take(36).collect();
    let error = Tokenizer::characters(&wide)
        .unwrap()
        .check(&config)
        .unwrap_err()
        .to_string();
    assert!(error.contains("37"), "{error}");
}

#[test]
fn a_written_tokenizer_reads_back_with_its_special_tokens() {
    let tokenizer = Tokenizer::characters(ALPHABET).unwrap();
    let again = Tokenizer::parse(tokenizer.json(), Some(tokenizer.settings())).unwrap();
    assert_eq!((again.eos(), again.pad()), (Some(1), Some(0)));
    let object = r#"{"eos_token": {"content": "a"}}"#;
    let other = Tokenizer::parse(tokenizer.json(), Some(object)).unwrap();
    assert_eq!(other.eos(), tokenizer.id("a"));
    let bare = Tokenizer::parse(tokenizer.json(), None).unwrap();
    assert_eq!(bare.eos(), Some(1));
}

#[test]
fn an_unreadable_file_is_refused_by_name() {
    let error = Tokenizer::parse("{}", None).unwrap_err().to_string();
    assert!(error.contains("tokenizer.json"), "{error}");
    let json = character_tokenizer("1").unwrap();
    let error = Tokenizer::parse(&json, Some("[")).unwrap_err().to_string();
    assert!(error.contains("tokenizer_config.json"), "{error}");
    let empty = tempfile::tempdir().unwrap();
    let error = Tokenizer::load(empty.path()).unwrap_err().to_string();
    assert!(error.contains("tokenizer.json is missing"), "{error}");
}

/// One of the committed tokenizers, and the tokens that transformers gives to awkward texts with it.
fn reference(name: &str) -> (Tokenizer, Value) {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("testdata/tokenizers");
    let read = |file: String| std::fs::read_to_string(folder.join(file)).unwrap();
    let expected: Value = serde_json::from_str(&read(format!("{name}-expected.json"))).unwrap();
    let settings = expected["settings"].to_string();
    let tokenizer = Tokenizer::parse(&read(format!("{name}.json")), Some(&settings)).unwrap();
    (tokenizer, expected)
}

#[test]
fn awkward_texts_have_the_tokens_that_transformers_gives_them() {
    for name in ["llama", "qwen2", "smollm2", "gemma"] {
        let (tokenizer, expected) = reference(name);
        let ids = |value: &Value| -> Vec<u32> { serde_json::from_value(value.clone()).unwrap() };
        for case in expected["cases"].as_array().unwrap() {
            let text = case["text"].as_str().unwrap();
            let plain = tokenizer.encode(text).unwrap();
            assert_eq!(plain, ids(&case["plain"]), "{name}: {text:?}");
            assert_eq!(
                tokenizer.encode_prompt(text).unwrap(),
                ids(&case["prompt"]),
                "{name}: {text:?}"
            );
            let decoded = case["decoded"].as_str().unwrap();
            assert_eq!(
                tokenizer.decode(&plain).unwrap(),
                decoded,
                "{name}: {text:?}"
            );
        }
    }
}

#[test]
fn a_conversation_is_encoded_in_the_form_of_its_template() {
    let (json, settings) = (
        character_tokenizer("<>|ab\n").unwrap(),
        r#"{"eos_token": "<eos>"}"#,
    );
    let folder = tempfile::tempdir().unwrap();
    let write = |name: &str, text: &str| std::fs::write(folder.path().join(name), text).unwrap();
    write("tokenizer.json", &json);
    write("tokenizer_config.json", settings);
    let asked =
        |tokenizer: &Tokenizer| tokenizer.encode_chat(&[Message::user("a")], Rendering::PROMPT);
    let bare = Tokenizer::load(folder.path()).unwrap();
    let error = asked(&bare).unwrap_err().to_string();
    assert!(error.contains("no chat template"), "{error}");

    write(
        "tokenizer_config.json",
        r#"{"eos_token": "<eos>", "chat_template": "b{{ messages[0].content }}"}"#,
    );
    let named = Tokenizer::load(folder.path()).unwrap();
    assert_eq!(asked(&named).unwrap(), named.encode("ba").unwrap());

    write(
        "chat_template.jinja",
        "{{ messages[0].content }}{{ eos_token }}b",
    );
    let filed = Tokenizer::load(folder.path()).unwrap();
    assert_eq!(asked(&filed).unwrap(), filed.encode("a<eos>b").unwrap());
    assert_eq!(
        filed.chat(),
        Some("{{ messages[0].content }}{{ eos_token }}b")
    );

    write("chat_template.jinja", "{% if %}");
    let broken = Tokenizer::load(folder.path()).unwrap();
    let error = asked(&broken).unwrap_err().to_string();
    assert!(error.contains("chat template cannot be read"), "{error}");
}
