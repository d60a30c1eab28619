//! The size of a task, its disjoint splits, its fixed order, and the refusal of bad files.

use std::collections::BTreeSet;
use std::io::Write;

use proptest::prelude::*;

use super::*;
use crate::tagged::quoted;

fn opened(config: &str) -> Result<Task, TaskError> {
    let config = TaskConfig::from_table(config.parse().unwrap())?;
    Task::open(&config, Path::new("."))
}

fn running_sums() -> Task {
    Task::open(&TaskConfig::default(), Path::new(".")).unwrap()
}

fn prompts(task: &Task, split: Split) -> Vec<&str> {
    task.items(split)
        .iter()
        .map(|item| item.prompt.as_str())
        .collect()
}

/// A task from the lines of a file; errors carry the name task.jsonl.
fn from_file(content: &[u8], keys: &str) -> Result<Task, TaskError> {
    let folder = tempfile::tempdir().unwrap();
    std::fs::File::create(folder.path().join("task.jsonl"))
        .unwrap()
        .write_all(content)
        .unwrap();
    let table = format!("type = 'jsonl'\nfile = 'task.jsonl'\n{keys}");
    let config = TaskConfig::from_table(table.parse().unwrap())?;
    Task::open(&config, folder.path())
}

fn refusal(content: &str, keys: &str) -> String {
    from_file(content.as_bytes(), keys).unwrap_err().to_string()
}

/// An error whose list of types stands for itself, so that no test repeats it.
fn without_types(error: TaskError) -> String {
    let types = quoted(TaskConfig::TYPES.iter().map(|kind| kind.name));
    error.to_string().replace(&types, "{types}")
}

fn questions(count: usize) -> String {
    (0..count)
        .map(|n| {
            format!(
                "{{\"prompt\": \"what is {n} + 1?\", \"gold\": {}}}\n",
                n + 1
            )
        })
        .collect()
}

#[test]
fn the_default_task_has_ten_thousand_distinct_prompts_and_large_held_out_splits() {
    let task = running_sums();
    let all: BTreeSet<&str> = Split::ALL
        .iter()
        .flat_map(|split| prompts(&task, *split))
        .collect();
    let lengths = Split::ALL.map(|split| task.len(split));
    assert_eq!(
        lengths.iter().sum::<usize>(),
        all.len(),
        "a prompt is in two splits"
    );
    assert_eq!(all.len(), 11_000);
    assert!(task.len(Split::Development) >= 500, "{lengths:?}");
    assert!(task.len(Split::HeldOut) >= 1_000, "{lengths:?}");
}

#[test]
fn every_split_has_both_lengths_in_their_proportion() {
    let task = running_sums();
    for split in Split::ALL {
        let three = task
            .items(split)
            .iter()
            .filter(|item| item.prompt.matches('+').count() == 2)
            .count();
        let share = three as f64 / task.len(split) as f64;
        assert!(
            (0.06..0.13).contains(&share),
            "{split}: {share} of the prompts have three terms, expected 1/11"
        );
    }
}

#[test]
fn the_order_is_a_permutation_that_the_seed_fixes() {
    let config = |seed: u64| {
        TaskConfig::RunningSums(RunningSumsConfig {
            seed,
            ..Default::default()
        })
    };
    let open = |seed| Task::open(&config(seed), Path::new(".")).unwrap();
    let (first, again, other) = (open(1), open(1), open(2));
    assert_eq!(first, again);
    assert_ne!(prompts(&first, Split::Train), prompts(&other, Split::Train));
    for task in [&first, &other] {
        let distinct: BTreeSet<&str> = (0..task.len(Split::Train))
            .map(|n| task.item(Split::Train, n).unwrap().prompt.as_str())
            .collect();
        assert_eq!(distinct.len(), task.len(Split::Train));
        assert_eq!(task.item(Split::Train, task.len(Split::Train)), None);
    }
    let mut sorted = prompts(&first, Split::Train);
    sorted.sort_unstable();
    assert_ne!(
        sorted,
        prompts(&first, Split::Train),
        "the order is the enumeration's"
    );
}

#[test]
fn the_first_prompts_are_the_same_on_every_machine() {
    let task = running_sums();
    let first: Vec<&str> = Split::ALL
        .iter()
        .map(|split| prompts(&task, *split)[0])
        .collect();
    insta::assert_snapshot!(first.join(" "), @"9+0+0+0= 3+4+7+8= 3+4+8+3=");
    insta::assert_snapshot!(hex::encode(task.digest()), @"44d8955380d1676562971f8bc766baca927ae0692c6f279db63171de17ed20c6");
}

#[test]
fn the_digest_of_a_file_is_fixed_with_and_without_demonstrations() {
    let digest = |keys: &str| {
        let file = b"{\"prompt\": \"1+1=\", \"gold\": 2, \"shown\": \"2.\"}\n{\"prompt\": \"2+3=\", \"gold\": \"5\", \"shown\": \"5.\"}\n";
        let keys = format!("held_out_fraction = 0\ndev_fraction = 0\n{keys}");
        hex::encode(from_file(file, &keys).unwrap().digest())
    };
    insta::assert_snapshot!(digest(""), @"91e32bc8223616e54ae5595e269f52de8ed74ed3c6e62011068d13ed645a8485");
    insta::assert_snapshot!(digest("demonstration = 'shown'"), @"2e3e8a5e0f7a30277ee0fa7c51b824196077d2efe9a0f4b13a3e15a6979039c9");
}

#[test]
fn the_alphabet_is_known() {
    let task = running_sums();
    assert_eq!(task.alphabet().collect::<String>(), "+,.0123456789=");
}

#[test]
fn appending_to_a_file_moves_no_prompt_to_another_split() {
    let keys = "held_out_fraction = 0.3\ndev_fraction = 0.2";
    let before = from_file(questions(60).as_bytes(), keys).unwrap();
    let after = from_file(questions(90).as_bytes(), keys).unwrap();
    for split in Split::ALL {
        let now: BTreeSet<&str> = prompts(&after, split).into_iter().collect();
        assert!(
            prompts(&before, split)
                .iter()
                .all(|prompt| now.contains(prompt))
        );
    }
}

#[test]
fn prompts_that_differ_in_white_space_only_share_a_split() {
    let partition = Partition {
        held_out_fraction: 0.4,
        development_fraction: 0.2,
        seed: 3,
    };
    for n in 0..100 {
        let (plain, spaced) = (format!("what is {n}?"), format!(" what  is\n{n}? "));
        assert_eq!(partition.split(&plain), partition.split(&spaced));
    }
}

#[test]
fn the_order_of_the_lines_does_not_matter() {
    let mut lines: Vec<String> = questions(50)
        .lines()
        .map(|line| format!("{line}\n"))
        .collect();
    let forward = from_file(
        lines.concat().as_bytes(),
        "held_out_fraction = 0.3\ndev_fraction = 0.2",
    )
    .unwrap();
    lines.reverse();
    let backward = from_file(
        lines.concat().as_bytes(),
        "held_out_fraction = 0.3\ndev_fraction = 0.2",
    )
    .unwrap();
    assert_eq!(forward, backward);
}

#[test]
fn columns_can_be_named_and_others_are_ignored() {
    let file = b"{\"q\": \"1+1\", \"a\": 2, \"steps\": \"two.\", \"source\": [1, {}]}\n";
    let keys = "prompt = 'q'\ngold = 'a'\ndemonstration = 'steps'\nheld_out_fraction = 0\ndev_fraction = 0";
    let task = from_file(file, keys).unwrap();
    let item = task.item(Split::Train, 0).unwrap();
    assert_eq!(
        (item.gold.as_str(), item.demonstration.as_deref()),
        ("2", Some("two."))
    );
    assert!(task.is_empty(Split::HeldOut));
}

#[test]
fn a_repeated_prompt_is_merged_or_refused() {
    let twice = format!("{}{}", questions(40), questions(3));
    let task = from_file(
        twice.as_bytes(),
        "held_out_fraction = 0.3\ndev_fraction = 0.2",
    )
    .unwrap();
    assert_eq!(task.duplicates(), 3);
    assert_eq!(
        Split::ALL
            .map(|split| task.len(split))
            .iter()
            .sum::<usize>(),
        40
    );
    insta::assert_snapshot!(
        refusal("{\"prompt\": \"1+1\", \"gold\": 2}\n\n{\"prompt\": \"1+1\", \"gold\": 3}\n", ""),
        @"task.jsonl:3 repeats the prompt of line 1 with another gold answer: keep one of them"
    );
}

#[test]
fn bad_files_are_refused_with_line_and_way_out() {
    insta::assert_snapshot!(
        refusal("", ""),
        @"the task file task.jsonl has no prompt: write one JSON object on each line"
    );
    insta::assert_snapshot!(
        refusal("{\"question\": \"1+1\"}", ""),
        @"task.jsonl:1 has no column `prompt`, it has `question`: set `prompt` in [task] to the column that holds the prompt"
    );
    insta::assert_snapshot!(
        refusal("{\"prompt\": \"1+1\", \"answer\": 2}", ""),
        @"task.jsonl:1 has no column `gold`, it has `answer`, `prompt`: set `gold` in [task] to the column that holds the gold answer"
    );
    insta::assert_snapshot!(
        refusal("{\"prompt\": \" \", \"gold\": 2}", ""),
        @"task.jsonl:1: column `prompt` is empty: write a prompt or drop the line"
    );
    insta::assert_snapshot!(
        refusal("{\"prompt\": \"1+1\", \"gold\": \"\"}", ""),
        @"task.jsonl:1: column `gold` is empty: write the answer or drop the line"
    );
    insta::assert_snapshot!(
        refusal("{\"prompt\": \"1+1\", \"gold\": [2]}", ""),
        @"task.jsonl:1: column `gold` is a list: write it as a string or a number"
    );
    insta::assert_snapshot!(
        refusal("{\"prompt\": \"1+1\", \"gold\": 2}", ""),
        @"none of the task's 1 prompts falls into the development split: add prompts, or change `dev_fraction` (0 leaves the split out) or `seed`"
    );
    let folder = TaskConfig::Jsonl(toml::from_str("file = '.'").unwrap());
    insta::assert_snapshot!(
        Task::open(&folder, Path::new("/")).unwrap_err(),
        @".:1 cannot be read (Is a directory (os error 21)): give a readable file"
    );
    let missing = TaskConfig::Jsonl(toml::from_str("file = 'missing.jsonl'").unwrap());
    insta::assert_snapshot!(
        Task::open(&missing, Path::new("/nowhere")).unwrap_err(),
        @"the task file missing.jsonl cannot be opened (No such file or directory (os error 2)): set `file` in [task] to a JSONL file"
    );
}

#[test]
fn a_text_that_fits_no_message_is_refused_when_the_file_is_read() {
    let long = "9".repeat(65_537);
    insta::assert_snapshot!(
        refusal(&format!("{{\"prompt\": \"1+1\", \"gold\": 2}}\n{{\"prompt\": \"2+2\", \"gold\": \"{long}\"}}\n"), ""),
        @"task.jsonl:2: column `gold` is 65537 bytes long, the limit is 65536: shorten it or drop the line"
    );
    insta::assert_snapshot!(
        refusal(&format!("{{\"prompt\": \"{long}\", \"gold\": 2}}\n"), ""),
        @"task.jsonl:1: column `prompt` is 65537 bytes long, the limit is 65536: shorten it or drop the line"
    );
    let longest = &long[1..];
    let line = format!("{{\"prompt\": \"{longest}\", \"gold\": \"{longest}\"}}\n");
    let keys = "held_out_fraction = 0\ndev_fraction = 0";
    assert_eq!(
        from_file(line.as_bytes(), keys).unwrap().len(Split::Train),
        1
    );
}

#[test]
fn bad_configurations_are_refused() {
    insta::assert_snapshot!(
        without_types(opened("terms_min = 3").unwrap_err()),
        @"task has no `type`: add one of {types}"
    );
    insta::assert_snapshot!(
        without_types(opened("type = 'runing_sums'").unwrap_err()),
        @"task has the unknown type `runing_sums`, did you mean `running_sums`: the types are {types}"
    );
    insta::assert_snapshot!(
        opened("type = 'jsonl'").unwrap_err(),
        @"task jsonl: missing field `file`, which has no default: add it"
    );
    insta::assert_snapshot!(
        opened("type = 'running_sums'\nheld_out_fraction = 1.5").unwrap_err(),
        @"task running_sums: `held_out_fraction` is 1.5, but a share must be at least 0 and below 1"
    );
    insta::assert_snapshot!(
        opened("type = 'running_sums'\nterms_min = -1").unwrap_err(),
        @"task running_sums: `terms_min` has an invalid value: integer `-1`, expected u32"
    );
    insta::assert_snapshot!(
        opened("type = 'jsonl'\nfile = 'x'\ngold = 'prompt'").unwrap_err(),
        @"task jsonl: `gold` is `prompt`, which is also the prompt's column: name another column"
    );
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn arbitrary_bytes_in_a_file_never_panic(content in proptest::collection::vec(any::<u8>(), 0..300)) {
        drop(from_file(&content, ""));
    }

    #[test]
    fn arbitrary_prompts_are_in_exactly_one_split(
        texts in proptest::collection::btree_set("\\PC{1,12}", 1..60), seed in any::<u64>(), held_out in 0.0..0.5f64,
    ) {
        let items: Vec<Item> = texts
            .iter()
            .map(|prompt| Item { prompt: prompt.clone(), gold: "1".to_owned(), demonstration: None })
            .collect();
        let partition = Partition { held_out_fraction: held_out, development_fraction: 0.2, seed };
        if let Ok(task) = Task::from_items(SourceItems { items, duplicates: 0, alphabet: "" }, partition) {
            let mut seen: Vec<&str> = Split::ALL.iter().flat_map(|split| prompts(&task, *split)).collect();
            seen.sort_unstable();
            prop_assert_eq!(seen, texts.iter().map(String::as_str).collect::<Vec<_>>());
        }
    }
}
