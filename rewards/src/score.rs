//! Scoring answers from a file: lines `{"completion" or "text", "gold"}`, with `prompt`, `finished` and `tokens` where a
//! reward looks at them. One bad line ends the scoring with its number: a mean over the lines that happened to parse
//! would be read as the mean of the file.

use std::io::BufRead;

use serde::Serialize;

use crate::jsonl::{JsonLines, JsonlError, Row};
use crate::reward::{Answer, ComponentScore, GoldError, Reward, Score};

/// Why a file cannot be scored.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum ScoreError {
    /// The line itself.
    #[error(transparent)]
    Line(#[from] JsonlError),
    /// The gold answer does not fit the reward.
    #[error("{file}:{line}: {reason}")]
    Gold {
        /// The file's name.
        file: String,
        /// Line, from 1.
        line: u64,
        /// Why.
        reason: GoldError,
    },
    /// A reward counts tokens and the line does not say how many there are.
    #[error(
        "{file}:{line} has no column `tokens`, which a reward counts: add it, or set `unit = \"chars\"` in the reward"
    )]
    NoTokens {
        /// The file's name.
        file: String,
        /// Line, from 1.
        line: u64,
    },
    /// Two columns for one thing.
    #[error("{file}:{line} has both `completion` and `text`: keep one of them")]
    TwoTexts {
        /// The file's name.
        file: String,
        /// Line, from 1.
        line: u64,
    },
}

/// What one line is worth.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ScoredLine {
    /// Line, from 1.
    pub line: u64,
    /// Total and components.
    #[serde(flatten)]
    pub score: Score,
}

/// The scored lines of one file, in order; the first error ends them.
#[derive(Debug)]
pub struct ScoreLines<'r, R> {
    reward: &'r Reward,
    rows: JsonLines<R>,
    ended: bool,
}

impl<'r, R: BufRead> ScoreLines<'r, R> {
    /// Scores `reader`, calling it `file` in errors.
    pub fn new(reward: &'r Reward, reader: R, file: &str) -> Self {
        Self {
            reward,
            rows: JsonLines::new(reader, file),
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
            .rows
            .next()?
            .map_err(ScoreError::from)
            .and_then(|row| score_row(self.reward, row));
        self.ended = scored.is_err();
        Some(scored)
    }
}

fn score_row(reward: &Reward, row: Row) -> Result<ScoredLine, ScoreError> {
    let column = match (row.has("completion"), row.has("text")) {
        (true, true) => {
            return Err(ScoreError::TwoTexts {
                file: row.file,
                line: row.line,
            });
        }
        (false, true) => "text",
        _ => "completion",
    };
    let text = row.text(column, "put the answer there, or into `text`")?;
    let gold = row.text_or_number("gold", "put the gold answer there")?;
    let prompt = if row.has("prompt") {
        row.text("prompt", "")?
    } else {
        ""
    };
    let tokens = match row.count("tokens")? {
        Some(tokens) => tokens,
        None if reward.counts_tokens() => {
            return Err(ScoreError::NoTokens {
                file: row.file,
                line: row.line,
            });
        }
        None => text.chars().count(),
    };
    let answer = Answer {
        prompt,
        text,
        finished: row.truth("finished")?.unwrap_or(true),
        tokens,
    };
    match reward.score(&answer, &gold) {
        Ok(score) => Ok(ScoredLine {
            line: row.line,
            score,
        }),
        Err(reason) => Err(ScoreError::Gold {
            file: row.file,
            line: row.line,
            reason,
        }),
    }
}

/// Means over scored lines.
#[derive(Debug, Clone, PartialEq, Default, Serialize)]
pub struct ScoreSummary {
    /// Lines added.
    pub lines: u64,
    /// Mean total; 0 without lines.
    pub total: f64,
    /// Mean of each component.
    pub components: Vec<ComponentScore>,
}

impl ScoreSummary {
    /// Adds one line; all must come from the same reward.
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
        // Running means: sums of a long file would lose the last digits of what is added late.
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
    use crate::reward::RewardEntry;

    fn reward(entries: &[&str]) -> Reward {
        let entries: Vec<RewardEntry> = entries
            .iter()
            .map(|entry| RewardEntry::from_table(entry.parse().unwrap()).unwrap())
            .collect();
        Reward::compile(&entries).unwrap()
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
    fn a_line_that_cannot_be_scored_is_named() {
        let numeric = reward(&["type = 'numeric_match'"]);
        insta::assert_snapshot!(
            refusal(&numeric, "{\"completion\": \"2\", \"gold\": \"two\"}"),
            @"answers.jsonl:1: the gold answer `two` is no number, so reward numeric_match cannot compare with it: write gold answers as plain numbers (26, -0.5, 1e3), or use exact_match"
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
    fn an_answer_that_ran_out_of_tokens_gets_the_least_where_finishing_is_required() {
        let reward = reward(&["type = 'numeric_match'\nfinished = 'required'"]);
        let file =
            "{\"text\": \"2\", \"gold\": 2, \"finished\": false}\n{\"text\": \"2\", \"gold\": 2}\n";
        let totals: Vec<f64> = ScoreLines::new(&reward, file.as_bytes(), "f")
            .map(|line| line.unwrap().score.total)
            .collect();
        assert_eq!(totals, [0.0, 1.0]);
    }
}
