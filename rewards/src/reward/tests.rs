//! A composed reward is finite and within its range, names each component, and refuses bad entries.

use proptest::prelude::*;

use super::*;
use crate::functions::tests::known_types;

fn entry(text: &str) -> Result<Component, ConfigError> {
    Component::from_table(text.parse().unwrap())
}

fn refusal(text: &str) -> String {
    let refused = entry(text).unwrap_err().to_string();
    refused.replace(&known_types(), "{types}")
}

fn composed(entries: &[&str]) -> Result<Reward, ConfigError> {
    let components = entries.iter().map(|text| entry(text).unwrap());
    Reward::of(components.collect())
}

fn everything() -> Reward {
    composed(&[
        "type = 'exact_match'\nextract = { inside_tag = 'answer' }\nweight = 0.1",
        "type = 'numeric_match'\nabsolute_tolerance = 0.1\nrelative_tolerance = 0.3\nweight = 0.7",
        "type = 'numeric_match'\nname = 'strict'\nnumber = 'whole'\nextract = { after_last = ',' }\nterminator = '.'",
        "type = 'regex'\npattern = '(\\d+)'\ncapture = 1\nweight = 1e6",
        "type = 'format'\ntags = ['think', 'answer']\nweight = 0.3",
        "type = 'length'\nunit = 'chars'\nmin = 3\nmax = 9\nramp = 7\nweight = 0.9",
        "type = 'length'\nname = 'tokens'\ntarget = 9\nramp = 7\nfinished = 'required'",
    ])
    .unwrap()
}

#[test]
fn components_are_reported_separately_and_the_total_is_their_weighted_sum() {
    let reward = composed(&[
        "type = 'numeric_match'\nname = 'correct'\nextract = { inside_tag = 'answer' }",
        "type = 'format'\ntags = ['think', 'answer']\nweight = 0.25",
        "type = 'length'\nunit = 'chars'\nmax = 10\nramp = 100\nweight = 0.5",
    ])
    .unwrap();
    let text = "<think>9+8+7=24</think><answer>26</answer>";
    let answer = Answer {
        prompt: "9+8+7+2=",
        text,
        finished: true,
        tokens: 12,
    };
    let score = reward.score(&answer, "26").unwrap();
    let values: Vec<(&str, f64)> = score
        .components
        .iter()
        .map(|c| (c.name.as_str(), c.value))
        .collect();
    assert_eq!(
        values,
        [("correct", 1.0), ("format", 1.0), ("length", -0.32)]
    );
    assert_eq!(score.total, 1.0 + 0.25 - 0.16);
    assert_eq!(
        reward.range(),
        Range {
            min: -0.5,
            max: 1.25
        }
    );
}

#[test]
fn a_configuration_is_explained_in_sentences() {
    insta::assert_snapshot!(everything().explain().join("\n"), @r#"
    exact_match (weight 0.1, range 0 to 1): pays 1 if the text inside the only <answer>…</answer> equals the gold answer, character by character
    numeric_match (weight 0.7, range 0 to 1): pays 1 if the last number of the whole text is within 0.1 or 30 % of the gold number
    strict (weight 1, range 0 to 1): pays 1 if the text after the last `,` (the text must end with `.`) equals the gold number exactly
    regex (weight 1000000, range 0 to 1): pays 1 if group 1 of the first match of `(\d+)` equals the gold answer
    format (weight 0.3, range 0 to 1): pays 1 if the text has <think>…</think> <answer>…</answer> in this order, each once and not empty, with nothing outside them
    length (weight 0.9, range -1 to 0): takes up to 1 from a text outside 3 to 9 characters, in full at a distance of 7 characters
    tokens (weight 1, range -1 to 0): takes up to 1 from a text other than 9 tokens, in full at a distance of 7 tokens; an answer that ran out of tokens gets the lowest value
    the total is the weighted sum and lies in -1.9 to 1000002.1
    "#);
}

#[test]
fn wrong_entries_are_refused_with_the_way_out() {
    insta::assert_snapshot!(refusal("weight = 1"), @"a reward has no `type`: add one of {types}");
    insta::assert_snapshot!(refusal("type = 'llm_judge'\nname = 'quality'"), @"reward quality has the unknown type `llm_judge`: the types are {types}");
    insta::assert_snapshot!(refusal("type = 'exact'"), @"a reward has the unknown type `exact`, did you mean `exact_match`: the types are {types}");
    insta::assert_snapshot!(refusal("type = 3"), @"a reward has the unknown type `3`: the types are {types}");
    insta::assert_snapshot!(refusal("type = 'numeric_match'\ntolerance = 0.1"), @"reward numeric_match has the unknown key `tolerance`, did you mean `absolute_tolerance`: its keys are `type`, `name`, `weight`, `finished`, `extract`, `terminator`, `number`, `absolute_tolerance`, `relative_tolerance`");
    insta::assert_snapshot!(refusal("type = 'numeric_match'\nwieght = 0.1"), @"reward numeric_match has the unknown key `wieght`, did you mean `weight`: its keys are `type`, `name`, `weight`, `finished`, `extract`, `terminator`, `number`, `absolute_tolerance`, `relative_tolerance`");
    insta::assert_snapshot!(refusal("type = 'numeric_match'\nabsolute_tolerance = -0.1"), @"reward numeric_match: `absolute_tolerance` is -0.1, but a tolerance must be a number of at least 0");
    insta::assert_snapshot!(refusal("type = 'numeric_match'\nrelative_tolerance = 1"), @"reward numeric_match: `relative_tolerance` is 1, but it must be at least 0 and below 1, since at 1 the answer 0 would always be right");
    insta::assert_snapshot!(refusal("type = 'numeric_match'\nabsolute_tolerance = inf"), @"reward numeric_match: `absolute_tolerance` is inf, but a tolerance must be a number of at least 0");
    insta::assert_snapshot!(refusal("type = 'numeric_match'\nextract = { after_first = ',' }"), @"reward numeric_match: `extract` has an unknown variant `after_first`, expected one of `whole`, `after_last`, `inside_tag`");
    insta::assert_snapshot!(refusal("type = 'numeric_match'\nnumber = 'middle'"), @"reward numeric_match: `number` has an unknown variant `middle`, expected one of `last`, `first`, `whole`");
    insta::assert_snapshot!(refusal("type = 'exact_match'\nweight = -1"), @"reward exact_match: `weight` is -1, but a weight must not be negative: to punish, use a function whose range is below 0, such as `length`");
    insta::assert_snapshot!(refusal("type = 'exact_match'\nweight = nan"), @"reward exact_match: `weight` is NaN, but a weight must be a number from 0 to 1000000");
    insta::assert_snapshot!(refusal("type = 'exact_match'\nweight = 'high'"), @r#"reward exact_match: `weight` has an invalid type: string "high", expected f64"#);
    insta::assert_snapshot!(refusal("type = 'exact_match'\nname = 'Right answer'"), @"reward Right answer: `name` is `Right answer`, but it must be 1 to 64 of a-z, 0-9 and _, since it labels a metric");
    insta::assert_snapshot!(refusal("type = 'exact_match'\nfinished = true"), @"reward exact_match: `finished` has an invalid type: unit variant, expected string only");
    insta::assert_snapshot!(refusal("type = 'regex'"), @"reward regex: missing field `pattern`, which has no default: add it");
    insta::assert_snapshot!(refusal("type = 'length'\nmax = 5\nramp = 0"), @"reward length: `ramp` has an invalid value: integer `0`, expected a nonzero u32");
}

#[test]
fn wrong_lists_are_refused_with_the_way_out() {
    let refused = |entries: &[&str]| composed(entries).unwrap_err().to_string();
    insta::assert_snapshot!(refused(&[]), @r#"the configuration has no [[reward]]: add it, for example with `type = "exact_match"`"#);
    insta::assert_snapshot!(refused(&["type = 'exact_match'", "type = 'exact_match'"]), @"two rewards are named `exact_match`: give one of them another `name`");
    insta::assert_snapshot!(refused(&["type = 'exact_match'\nweight = 0"]), @"every reward has weight 0, so nothing is paid: give at least one a weight above 0");
    insta::assert_snapshot!(refused(&["type = 'exact_match'"; 33]), @"the configuration: `reward` is a list of 33, but at most 32 can be composed: merge some");
}

#[test]
fn an_unfinished_answer_gets_the_lowest_value_if_finishing_is_required() {
    let reward = composed(&[
        "type = 'exact_match'\nfinished = 'required'",
        "type = 'length'\nmax = 100\nfinished = 'required'",
    ])
    .unwrap();
    let value = |finished| {
        let answer = Answer {
            prompt: "",
            text: "yes",
            finished,
            tokens: 1,
        };
        reward.score(&answer, "yes").unwrap().total
    };
    assert_eq!((value(true), value(false)), (1.0, -1.0));
}

#[test]
fn a_written_entry_is_read_back_the_same() {
    for text in [
        "type = 'exact_match'\ncase = 'insensitive'",
        "type = 'numeric_match'\nname = 'correct'\nextract = { after_last = ',' }\nterminator = '.'\nnumber = 'whole'",
        "type = 'regex'\npattern = 'a(b)'\ncapture = 1\nweight = 0.5",
        "type = 'format'\ntags = ['think', 'answer']\noutside = 'anything'\nfinished = 'required'",
        "type = 'length'\nmax = 7",
    ] {
        let read = entry(text).unwrap();
        let written = toml::to_string(&read).unwrap();
        let read_back: Component = toml::from_str(&written).unwrap();
        assert_eq!(read_back.config, read.config, "{written}");
        assert_eq!(toml::to_string(&read_back).unwrap(), written);
    }
}

#[test]
fn hostile_texts_earn_nothing_and_break_nothing() {
    let reward = everything();
    let texts = [
        "nan".to_owned(),
        "1e999".to_owned(),
        "9".repeat(100_000),
        ",".repeat(100_000),
        "<answer>".repeat(20_000),
        "\u{202e}26\u{202c}".to_owned(),
        "\0\0\0".to_owned(),
        "🙂".repeat(10_000),
    ];
    for text in &texts {
        let answer = Answer {
            prompt: "",
            text,
            finished: false,
            tokens: usize::MAX,
        };
        let score = reward.score(&answer, "7").unwrap();
        assert!(reward.range().contains(score.total));
        assert!(
            score.total < 0.5,
            "{} earns {}",
            &text[..text.len().min(12)],
            score.total
        );
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn the_total_is_finite_and_within_the_declared_range(
        text in "(\\PC|[0-9.,<>/e+-]|<answer>|</answer>|<think>|</think>){0,80}",
        gold in "-?[1-9][0-9]{0,20}(\\.[0-9]{1,5})?(e[0-9])?", finished in any::<bool>(), tokens in any::<usize>(),
    ) {
        let reward = everything();
        let answer = Answer { prompt: "", text: &text, finished, tokens };
        let score = reward.score(&answer, &gold).unwrap();
        prop_assert!(score.total.is_finite());
        prop_assert!(reward.range().contains(score.total), "{} outside {}", score.total, reward.range());
        prop_assert_eq!(score, reward.score(&answer, &gold).unwrap());
    }
}
