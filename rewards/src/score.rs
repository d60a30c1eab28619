//! Scores answers from a file with lines `{"completion" or "text", "gold"}`, and `prompt`, `finished` and `tokens` if a
//! reward uses them. The first bad line ends the scoring with its number: users would take a mean over the good lines for
//! the mean of the file.

use std::io::BufRead;

use serde::Serialize;

use crate::function::Answer;
use crate::json_lines::{JsonLine, JsonlError, JsonlReader};
use crate::reward::{ComponentScore, GoldError, Reward, Score};

/// Why a file cannot be scored. Lines count from 1.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum ScoreError {
    #[error(transparent)]
    Line(#[from] JsonlError),
    #[error("{file}:{line}: {reason}")]
    Gold {
        file: String,
        line: u64,
        reason: GoldError,
    },
    #[error(
        "{file}:{line} has no column `tokens`, which a reward counts: add it, or set `unit = \"chars\"` in the reward"
    )]
    NoTokens { file: String, line: u64 },
    #[error("{file}:{line} has both `completion` and `text`: keep one of them")]
    TwoTexts { file: String, line: u64 },
}

/// The score of one line.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ScoredLine {
    /// Line number, from 1.
    pub line: u64,
    #[serde(flatten)]
    pub score: Score,
}

/// Iterates over the scored lines of one file; the first error ends the iteration.
#[derive(Debug)]
pub struct ScoreLines<'r, R> {
    reward: &'r Reward,
    lines: JsonlReader<R>,
    ended: bool,
}

impl<'r, R: BufRead> ScoreLines<'r, R> {
    /// `file` is the name of `reader` in errors.
    pub fn new(reward: &'r Reward, reader: R, file: &str) -> Self {
        Self {
            reward,
            lines: JsonlReader::new(reader, file),
            ended: false,
        }
    }
}

impl<R: BufRead> Iterator for ScoreLines<'_, R> {
    type Item = Result<ScoredLine, ScoreError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.ended {
            return None;
        }
        let scored = self
            .lines
            .next()?
            .map_err(ScoreError::from)
            .and_then(|line| score_line(self.reward, line));
        self.ended = scored.is_err();
        Some(scored)
    }
}

fn score_line(reward: &Reward, line: JsonLine) -> Result<ScoredLine, ScoreError> {
    let column = match (line.has("completion"), line.has("text")) {
        (true, true) => {
            return Err(ScoreError::TwoTexts {
                file: line.file,
                line: line.line,
            });
        }
        (false, true) => "text",
        _ => "completion",
    };
    let text = line.text(column, "put the answer there, or into `text`")?;
    let gold = line.text_or_number("gold", "put the gold answer there")?;
    let prompt = if line.has("prompt") {
        line.text("prompt", "")?
    } else {
        ""
    };
    let tokens = match line.count("tokens")? {
        Some(tokens) => tokens,
        None if reward.counts_tokens() => {
            return Err(ScoreError::NoTokens {
                file: line.file,
                line: line.line,
            });
        }
        None => text.chars().count(),
    };
    let answer = Answer {
        prompt,
        text,
        finished: line.truth("finished")?.unwrap_or(true),
        tokens,
    };
    match reward.score(&answer, &gold) {
        Ok(score) => Ok(ScoredLine {
            line: line.line,
            score,
        }),
        Err(reason) => Err(ScoreError::Gold {
            file: line.file,
            line: line.line,
            reason,
        }),
    }
}

/// Means over scored lines.
#[derive(Debug, Clone, PartialEq, Default, Serialize)]
pub struct ScoreSummary {
    pub lines: u64,
    /// Mean; 0 without lines.
    pub total: f64,
    /// With the mean of each component.
    pub components: Vec<ComponentScore>,
}

impl ScoreSummary {
    /// Adds one line; all lines come from the same reward.
    pub fn add(&mut self, score: &Score) {
        self.lines += 1;
        if self.components.is_empty() {
            self.components = score
                .components
                .iter()
                .map(|component| ComponentScore {
                    name: component.name.clone(),
                    value: 0.0,
                })
                .collect();
        }
        debug_assert_eq!(
            self.components.len(),
            score.components.len(),
            "all lines come from the same reward"
        );
        // Running means: the sum of a long file would lose the last digits of late lines.
        let share = 1.0 / self.lines as f64;
        self.total += (score.total - self.total) * share;
        for (mean, new) in self.components.iter_mut().zip(&score.components) {
            mean.value += (new.value - mean.value) * share;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::reward::Component;

    fn reward(entries: &[&str]) -> Reward {
        let parts = entries.iter().map(|entry| entry.parse().unwrap());
        let parts = parts.map(|table| Component::from_table(table).unwrap());
        Reward::of(parts.collect()).unwrap()
    }

    fn refusal(reward: &Reward, file: &str) -> String {
        ScoreLines::new(reward, file.as_bytes(), "answers.jsonl")
            .find_map(Result::err)
            .expect("a refusal")
            .to_string()
    }

    #[test]
    fn each_line_is_scored_by_component() {
        let reward = reward(&[
            "type = 'numeric_match'",
            "type = 'length'\nunit = 'chars'\nmax = 2\nramp = 4\nweight = 0.5",
        ]);
        let file = "{\"prompt\": \"1+1=\", \"completion\": \"2\", \"gold\": 2}\n\n{\"text\": \"2222\", \"gold\": \"2\"}\n";
        let lines: Vec<ScoredLine> = ScoreLines::new(&reward, file.as_bytes(), "answers.jsonl")
            .collect::<Result<_, _>>()
            .unwrap();
        let json: Vec<String> = lines
            .iter()
            .map(|line| serde_json::to_string(line).unwrap())
            .collect();
        insta::assert_snapshot!(json.join("\n"), @r#"
        {"line":1,"total":1.0,"components":[{"name":"numeric_match","value":1.0},{"name":"length","value":0.0}]}
        {"line":3,"total":-0.25,"components":[{"name":"numeric_match","value":0.0},{"name":"length","value":-0.5}]}
        "#);
        let mut summary = ScoreSummary::default();
        for line in &lines {
            summary.add(&line.score);
        }
        assert_eq!((summary.lines, summary.total), (2, 0.375));
        assert_eq!(summary.components[1].value, -0.25);
    }

    #[test]
    fn the_error_for_a_line_that_cannot_be_scored_names_it() {
        let numeric = reward(&["type = 'numeric_match'"]);
        insta::assert_snapshot!(
            refusal(&numeric, "{\"completion\": \"2\", \"gold\": \"two\"}"),
            @"answers.jsonl:1: the gold answer `two` is not a number, so reward numeric_match cannot compare with it: write gold answers as plain numbers (26, -0.5, 1e3), or use exact_match"
        );
        insta::assert_snapshot!(
            refusal(&numeric, "{\"answer\": \"2\", \"gold\": 2}"),
            @"answers.jsonl:1 has no column `completion`, it has `answer`, `gold`: put the answer there, or into `text`"
        );
        insta::assert_snapshot!(
            refusal(&numeric, "{\"completion\": \"2\"}"),
            @"answers.jsonl:1 has no column `gold`, it has `completion`: put the gold answer there"
        );
        insta::assert_snapshot!(
            refusal(&numeric, "{\"completion\": \"2\", \"text\": \"3\", \"gold\": 2}"),
            @"answers.jsonl:1 has both `completion` and `text`: keep one of them"
        );
        let length = reward(&["type = 'length'\nmax = 2"]);
        insta::assert_snapshot!(
            refusal(&length, "{\"completion\": \"2\", \"gold\": 2}"),
            @r#"answers.jsonl:1 has no column `tokens`, which a reward counts: add it, or set `unit = "chars"` in the reward"#
        );
    }

    #[test]
    fn an_answer_that_ran_out_of_tokens_gets_the_lowest_value_if_finishing_is_required() {
        let reward = reward(&["type = 'numeric_match'\nfinished = 'required'"]);
        let file =
            "{\"text\": \"2\", \"gold\": 2, \"finished\": false}\n{\"text\": \"2\", \"gold\": 2}\n";
        let totals: Vec<f64> = ScoreLines::new(&reward, file.as_bytes(), "f")
            .map(|line| line.unwrap().score.total)
            .collect();
        assert_eq!(totals, [0.0, 1.0]);
    }
}
