//! The pages hold against the tree: links and paths exist, shown commands parse, and the book lists each page.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Pages outside of `docs/`.
const PAGES: [&str; 4] = [
    "README.md",
    "ARCHITECTURE.md",
    "CONTRIBUTING.md",
    "tests/reference/README.md",
];
const README_LINES_MAX: usize = 150;
/// An `sh` block after a line that begins so is not limited to `muster` commands; the comment gives the reason.
const NOT_RUN: &str = "<!-- not run: ";

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

struct Page {
    /// Relative to the root.
    path: PathBuf,
    text: String,
}

struct ShellBlock<'a> {
    lines: Vec<&'a str>,
    has_reason: bool,
}

impl Page {
    /// The text outside of fenced blocks.
    fn prose(&self) -> String {
        let mut in_block = false;
        let outside = self.text.lines().filter(|line| {
            let is_fence = line.trim_start().starts_with("```");
            in_block ^= is_fence;
            !in_block && !is_fence
        });
        outside.collect::<Vec<_>>().join("\n")
    }

    fn code_spans(&self) -> Vec<String> {
        let prose = self.prose();
        let spans = prose.split('`').skip(1).step_by(2);
        spans.map(|span| span.replace('\n', " ")).collect()
    }

    /// The targets of links, without those to other sites.
    fn links(&self) -> Vec<String> {
        let prose = self.prose();
        let targets = prose.split("](").skip(1);
        targets
            .filter_map(|rest| rest.split(')').next())
            .filter(|target| !target.contains("://"))
            .map(str::to_owned)
            .collect()
    }

    fn shell_blocks(&self) -> Vec<ShellBlock<'_>> {
        let mut blocks = Vec::new();
        let mut before = "";
        let mut lines = self.text.lines().map(str::trim_start);
        while let Some(line) = lines.next() {
            if line == "```sh" {
                blocks.push(ShellBlock {
                    lines: lines.by_ref().take_while(|line| *line != "```").collect(),
                    has_reason: before.starts_with(NOT_RUN),
                });
            }
            before = line;
        }
        blocks
    }

    /// The anchors of headings, as forges write them.
    fn anchors(&self) -> BTreeSet<String> {
        let prose = self.prose();
        let headings = prose.lines().filter(|line| line.starts_with('#'));
        let anchor = |heading: &str| {
            let title = heading.trim_start_matches('#').trim().to_lowercase();
            let kept = title
                .chars()
                .filter(|c| c.is_alphanumeric() || " -_".contains(*c));
            kept.collect::<String>().replace(' ', "-")
        };
        headings.map(anchor).collect()
    }
}

fn page(path: &Path) -> Page {
    let text = fs::read_to_string(root().join(path))
        .unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    Page {
        path: path.to_owned(),
        text,
    }
}

fn pages() -> Vec<Page> {
    let mut paths: Vec<PathBuf> = PAGES.iter().map(PathBuf::from).collect();
    for entry in fs::read_dir(root().join("docs")).unwrap() {
        let name = entry.unwrap().file_name();
        if Path::new(&name).extension().is_some_and(|it| it == "md") {
            paths.push(Path::new("docs").join(name));
        }
    }
    paths.iter().map(|path| page(path)).collect()
}

/// What `muster WORDS --help` prints.
#[derive(Default)]
struct Help(BTreeMap<Vec<String>, String>);

impl Help {
    fn of(&mut self, words: &[String]) -> &str {
        self.0.entry(words.to_vec()).or_insert_with(|| {
            let output = Command::new(env!("CARGO_BIN_EXE_muster"))
                .args(words)
                .arg("--help")
                .output()
                .expect("the built program runs");
            String::from_utf8(output.stdout).unwrap()
        })
    }

    fn has_subcommand(&mut self, words: &[String], name: &str) -> bool {
        let help = self.of(words);
        let (_, commands) = help.split_once("Commands:\n").unwrap_or_default();
        let listed = commands.lines().take_while(|line| !line.is_empty());
        listed
            .filter_map(|line| line.split_whitespace().next())
            .any(|listed| listed == name)
    }

    /// Why `command`, a line that begins with `muster`, does not parse.
    fn problem(&mut self, command: &str) -> Option<String> {
        let mut words = command.split_whitespace().skip(1).peekable();
        let mut subcommands = Vec::new();
        while let Some(word) = words.next_if(|word| self.has_subcommand(&subcommands, word)) {
            subcommands.push(word.to_owned());
        }
        if subcommands.is_empty() {
            return Some("no such command".to_owned());
        }
        let help = self.of(&subcommands);
        if help.contains("<COMMAND>") && words.peek().is_some() {
            return Some("no such subcommand".to_owned());
        }
        let known: BTreeSet<&str> = help
            .split(|c: char| !c.is_alphanumeric() && c != '-')
            .collect();
        let unknown = words.find(|word| word.starts_with("--") && !known.contains(word));
        unknown.map(|flag| format!("no option {flag}"))
    }
}

/// The `muster` commands of a shell line.
fn commands(line: &str) -> impl Iterator<Item = &str> {
    let code = line.split(" #").next().unwrap_or_default();
    code.split("&&")
        .flat_map(|part| part.split('|'))
        .map(str::trim)
        .filter(|part| part.starts_with("muster "))
}

#[test]
fn links_lead_to_pages_and_headings_that_exist() {
    for from in pages() {
        for link in from.links() {
            let (path, anchor) = link.split_once('#').unwrap_or((&link, ""));
            let target = match path {
                "" => from.path.clone(),
                path => from.path.parent().unwrap().join(path),
            };
            let place = format!("{}: link to {link}", from.path.display());
            assert!(root().join(&target).exists(), "{place}");
            assert!(
                anchor.is_empty() || page(&target).anchors().contains(anchor),
                "{place}: no such heading"
            );
        }
    }
}

#[test]
fn paths_that_pages_name_exist() {
    let top: BTreeSet<String> = fs::read_dir(root())
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter(|name| name != "target" && name != "runs")
        .collect();
    for page in pages() {
        for span in page.code_spans() {
            let is_pattern = span.contains(['*', ' ', '{']) || span.contains("NAME");
            let named = span
                .split_once('/')
                .is_some_and(|(first, _)| top.contains(first));
            assert!(
                !named || is_pattern || root().join(&span).exists(),
                "{}: {span} does not exist",
                page.path.display()
            );
        }
    }
}

#[test]
fn shown_commands_parse() {
    let mut help = Help::default();
    for page in pages() {
        let blocks = page.shell_blocks();
        let shown = blocks.iter().flat_map(|block| &block.lines);
        let spans = page.code_spans();
        let all = shown.copied().chain(spans.iter().map(String::as_str));
        for command in all.flat_map(commands) {
            let problem = help.problem(command);
            assert_eq!(problem, None, "{}: {command}", page.path.display());
        }
    }
}

#[test]
fn a_block_of_other_commands_says_why_no_test_runs_them() {
    for page in pages() {
        for block in page.shell_blocks() {
            let is_ours = |line: &&str| line.is_empty() || line.starts_with("muster ");
            assert!(
                block.has_reason || block.lines.iter().all(is_ours),
                "{}: put `{NOT_RUN}REASON -->` before the block {:?}",
                page.path.display(),
                block.lines
            );
        }
    }
}

#[test]
fn an_unknown_command_or_option_does_not_parse() {
    let mut help = Help::default();
    assert_eq!(help.problem("muster status --json"), None);
    assert!(help.problem("muster bench policy").is_some());
    assert!(help.problem("muster status --no-such-option").is_some());
    assert!(help.problem("muster ctl halt").is_some());
}

#[test]
fn the_book_lists_every_page() {
    let summary = page(Path::new("docs/SUMMARY.md"));
    let listed: BTreeSet<PathBuf> = summary
        .links()
        .iter()
        .map(|link| Path::new("docs").join(link))
        .collect();
    let expected: BTreeSet<PathBuf> = pages()
        .into_iter()
        .map(|page| page.path)
        .filter(|path| path.starts_with("docs") && *path != summary.path)
        .collect();
    assert_eq!(listed, expected);
}

#[test]
fn the_readme_is_short() {
    let lines = page(Path::new("README.md")).text.lines().count();
    assert!(lines <= README_LINES_MAX, "README.md has {lines} lines");
}
