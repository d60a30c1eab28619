//! The contents of a REWARD.toml, the errors for mistakes, and one canonical JSON for one meaning.

use super::*;
use crate::functions::tests::known_types;

const QUICKSTART: &str = "
[task]
type = 'running_sums'

[[reward]]
type = 'numeric_match'
name = 'correct'
extract = { after_last = ',' }
terminator = '.'
number = 'whole'
";

fn refusal(text: &str) -> String {
    RewardConfig::from_toml(text).unwrap_err().to_string()
}

#[test]
fn a_configuration_can_be_embedded_in_a_larger_one_and_written_out() {
    #[derive(Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Run {
        steps: u32,
        task: TaskConfig,
        reward: Reward,
    }
    let run: Run = toml::from_str(&format!("steps = 5\n{QUICKSTART}")).unwrap();
    let config = RewardConfig::from_toml(QUICKSTART).unwrap();
    let written = toml::to_string(&config).unwrap();
    let embedded = RewardConfig {
        task: run.task,
        reward: run.reward,
    };
    assert_eq!(run.steps, 5);
    assert_eq!(toml::to_string(&embedded).unwrap(), written);
    insta::assert_snapshot!(written, @r#"
    [task]
    type = "running_sums"
    terms_min = 3
    terms_max = 4
    addend_min = 0
    addend_max = 9
    prompts_per_length_max = 20000
    held_out_fraction = 0.12
    dev_fraction = 0.06
    seed = 0

    [[reward]]
    name = "correct"
    weight = 1.0
    finished = "any"
    type = "numeric_match"
    terminator = "."
    number = "whole"
    absolute_tolerance = 0.0
    relative_tolerance = 0.0

    [reward.extract]
    after_last = ","
    "#);
    let read_back = RewardConfig::from_toml(&written).unwrap();
    assert_eq!(toml::to_string(&read_back).unwrap(), written);
}

#[test]
fn a_mistake_inside_a_larger_configuration_keeps_its_sentence() {
    let error = toml::from_str::<RewardConfig>(
        "[task]\ntype = 'running_sums'\n[[reward]]\ntype = 'lenght'",
    )
    .unwrap_err();
    insta::assert_snapshot!(error.message().replace(&known_types(), "{types}"), @"a reward has the unknown type `lenght`, did you mean `length`: the types are {types}");
}

#[test]
fn mistakes_are_refused_with_the_way_out() {
    insta::assert_snapshot!(refusal(""), @r#"the configuration has no [task]: add it, for example with `type = "running_sums"`"#);
    insta::assert_snapshot!(refusal("[task]\ntype = 'running_sums'"), @r#"the configuration has no [[reward]]: add it, for example with `type = "exact_match"`"#);
    insta::assert_snapshot!(refusal("[task]\ntype = 'running_sums'\n[reward]\ntype = 'exact_match'"), @"the reward configuration: `reward` has the wrong form: it is a list: write [[reward]] with two brackets");
    insta::assert_snapshot!(refusal("task = 'running_sums'"), @"the reward configuration: `task` has the wrong form: write it as a table, [task]");
    insta::assert_snapshot!(refusal("[task]\ntype = running_sums"), @"the configuration is not TOML at line 2: string values must be quoted, expected literal string");
    insta::assert_snapshot!(refusal(&format!("{QUICKSTART}\n[learner]\nlr = 1")), @"the reward configuration has the unknown key `learner`: its keys are `task`, `reward`");
}

#[test]
fn one_meaning_has_one_canonical_json() {
    let canonical = |text: &str| {
        let config = RewardConfig::from_toml(text).unwrap();
        config.canonical_json().unwrap()
    };
    let plain = canonical("[task]\ntype = 'running_sums'\n[[reward]]\ntype = 'exact_match'");
    let spelled_out = canonical(
        "[[reward]]\nweight = 1\ncase = 'sensitive'\ntype = 'exact_match'\nname = 'exact_match'\n[task]\nterms_max = 4\ntype = 'running_sums'",
    );
    let other =
        canonical("[task]\ntype = 'running_sums'\n[[reward]]\ntype = 'exact_match'\nweight = 2");
    assert_eq!(plain, spelled_out);
    assert_ne!(plain, other);
    insta::assert_snapshot!(canonical(QUICKSTART), @r#"{"reward":[{"absolute_tolerance":0.0,"extract":{"after_last":","},"finished":"any","name":"correct","number":"whole","relative_tolerance":0.0,"terminator":".","type":"numeric_match","weight":1.0}],"task":{"addend_max":9,"addend_min":0,"dev_fraction":0.06,"held_out_fraction":0.12,"prompts_per_length_max":20000,"seed":0,"terms_max":4,"terms_min":3,"type":"running_sums"}}"#);
}

#[test]
fn gold_answers_that_do_not_fit_the_reward_are_refused_when_the_task_is_opened() {
    let folder = tempfile::tempdir().unwrap();
    let lines: String = (0..50)
        .map(|n| format!("{{\"prompt\": \"capital {n}?\", \"gold\": \"Paris\"}}\n"))
        .collect();
    std::fs::write(folder.path().join("capitals.jsonl"), lines).unwrap();
    let path = folder.path().join("reward.toml");
    std::fs::write(&path, "[task]\ntype = 'jsonl'\nfile = 'capitals.jsonl'\nheld_out_fraction = 0.3\ndev_fraction = 0\n[[reward]]\ntype = 'numeric_match'").unwrap();
    let config = RewardConfig::load(&path).unwrap();
    let refused = config.prepare(folder.path()).unwrap_err().to_string();
    assert!(refused.starts_with("prompt `capital "), "{refused}");
    insta::assert_snapshot!(refused.split_once(": ").unwrap().1, @"the gold answer `Paris` is not a number, so reward numeric_match cannot compare with it: write gold answers as plain numbers (26, -0.5, 1e3), or use exact_match");
}

#[test]
fn the_error_for_a_missing_file_names_it() {
    insta::assert_snapshot!(RewardConfig::load(Path::new("/nowhere/reward.toml")).unwrap_err(), @"/nowhere/reward.toml cannot be read (No such file or directory (os error 2)): give the path of a TOML file with [task] and [[reward]]");
}
