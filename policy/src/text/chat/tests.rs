use std::path::Path;

use proptest::prelude::*;
use serde_json::json;

use super::*;

fn testdata(name: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("testdata/chat")
        .join(name);
    std::fs::read_to_string(path).unwrap()
}

fn template(source: &str) -> ChatTemplate {
    ChatTemplate::new(source, &json!({"eos_token": "</s>"})).unwrap()
}

fn rendered(source: &str, content: &str) -> Result<String, ChatError> {
    template(source).render(&[Message::user(content)], Rendering::PROMPT)
}

fn role(name: &str) -> ChatRole {
    match name {
        "system" => ChatRole::System,
        "user" => ChatRole::User,
        _ => ChatRole::Assistant,
    }
}

#[test]
fn published_templates_give_the_text_of_transformers() {
    let expected: Json = serde_json::from_str(&testdata("expected.json")).unwrap();
    let mut compared = 0;
    for (name, entry) in expected.as_object().unwrap() {
        let source = testdata(&format!("{name}.jinja"));
        let template = ChatTemplate::new(&source, &entry["special"]).unwrap();
        for case in entry["cases"].as_array().unwrap() {
            let turns = case["messages"].as_array().unwrap().iter();
            let messages: Vec<Message<'_>> = turns
                .map(|turn| Message {
                    role: role(turn["role"].as_str().unwrap()),
                    content: turn["content"].as_str().unwrap(),
                })
                .collect();
            let rendering = Rendering {
                add_generation_prompt: case["answer_next"].as_bool().unwrap(),
                unix_seconds: case["unix_seconds"].as_i64(),
            };
            let text = template.render(&messages, rendering);
            assert_eq!(
                text.ok().as_deref(),
                case["text"].as_str(),
                "{name}: {messages:?}"
            );
            compared += 1;
        }
    }
    assert!(compared > 200, "{compared} cases were compared");
}

#[test]
fn python_s_behaviour_is_kept_where_minijinja_differs() {
    for (source, expected) in [
        ("{% if true %}\n  x\n  {% endif %}\ny", "  x\ny"),
        ("{{ messages[0].content | trim }}|", "a|"),
        ("{{ messages[0]['content'].strip() }}|", "a|"),
        ("{{ messages[0].content.lstrip('\\x1f ') }}|", "a \u{1c}|"),
        (
            "{{ messages | length }}{{ none }}{{ true }}{{ tools is none }}",
            "1NoneTrueTrue",
        ),
        (
            "{% set n = namespace(x=1) %}{% for i in range(3) %}{% set n.x = n.x + i %}{% endfor %}{{ n.x }}",
            "4",
        ),
        (
            "{% for i in [1, 2, 3][::-1] %}{% if i == 1 %}{% break %}{% endif %}{{ i }}{% endfor %}",
            "32",
        ),
        (
            "{{ 'a,b'.split(',')[-1] ~ 'Ab'.startswith('A') }}{{ eos_token }}",
            "bTrue</s>",
        ),
        ("{{ strftime_now is defined }}", "False"),
    ] {
        let text = rendered(source, "\u{1f} a \u{1c}").unwrap();
        assert_eq!(text, expected, "{source}");
    }
}

#[test]
fn json_is_written_as_python_writes_it() {
    for (source, expected) in [
        (
            r#"{{ {'b': [1, 2.0, 1e16, 1e-7], 'a': none, 'c': {}} | tojson }}"#,
            r#"{"b": [1, 2.0, 1e+16, 1e-07], "a": null, "c": {}}"#,
        ),
        (
            r#"{{ {'b': [1, true], 'a': []} | tojson(indent=2, sort_keys=true) }}"#,
            "{\n  \"a\": [],\n  \"b\": [\n    1,\n    true\n  ]\n}",
        ),
        (
            "{{ messages[0].content | tojson }}",
            r#""<é>&'\"\\\n\u0001😀""#,
        ),
        (
            "{{ messages[0].content | tojson(ensure_ascii=true) }}",
            r#""<\u00e9>&'\"\\\n\u0001\ud83d\ude00""#,
        ),
    ] {
        assert_eq!(
            rendered(source, "<é>&'\"\\\n\u{1}😀").unwrap(),
            expected,
            "{source}"
        );
    }
}

#[test]
fn an_exception_of_the_template_is_reported_in_its_words() {
    let source = "{{ raise_exception('roles must alternate') }}";
    let error = rendered(source, "x").unwrap_err().to_string();
    assert!(error.contains("roles must alternate"), "{error}");
    assert!(!error.contains('\n'));
}

#[test]
fn an_unreadable_or_endless_template_is_refused() {
    let unread = ChatTemplate::new("{% if %}", &Json::Null);
    assert!(matches!(unread, Err(ChatError::Unreadable(_))));
    let large = ChatTemplate::new(&" ".repeat((1 << 20) + 1), &Json::Null);
    assert!(matches!(large, Err(ChatError::Unreadable(_))));
    for source in [
        "{% for a in range(9999) %}{% for b in range(9999) %}{% endfor %}{% endfor %}",
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
        "{% set n = namespace(x=[]) %}{% for i in range(200) %}{% set n.x = [n.x] %}{% endfor %}{{ n.x | tojson }}",
        "{{ messages | tojson(separators=(',', ':')) }}",
        "{{ 'x' * 99999999999 }}",
        "{{ messages.nothing.more }}",
    ] {
        assert!(
            matches!(rendered(source, "x"), Err(ChatError::Refused(_))),
            "{source}"
        );
    }
}

#[test]
fn the_default_is_chosen_among_several_templates() {
    let several = json!({"chat_template": [
        {"name": "tool_use", "template": "a"}, {"name": "default", "template": "b"}
    ]});
    assert_eq!(ChatTemplate::in_settings(&several).as_deref(), Some("b"));
    assert_eq!(
        ChatTemplate::in_settings(&json!({"chat_template": "c"})).as_deref(),
        Some("c")
    );
    assert_eq!(
        ChatTemplate::in_settings(&json!({"chat_template": [1, {"name": "default"}]})),
        None
    );
}

proptest! {
    #[test]
    fn templates_of_any_text_never_panic(source in "[{}% a-z()'|\\[\\].0-9+*-]{0,60}", content in "\\PC{0,20}") {
        if let Ok(template) = ChatTemplate::new(&source, &Json::Null) {
            drop(template.render(&[Message::user(&content)], Rendering::PROMPT));
        }
    }
}
