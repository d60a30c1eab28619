//! Live progress of a run: a display that is redrawn on a terminal, or plain lines elsewhere. It reads the files of the run
//! directory alone. [`frame`] and [`Plain`] decide what is shown and are pure; this file draws. Invariant: all output goes to
//! stderr, and a closed stderr does not end the run.

mod frame;
mod plain;
mod status;

use std::io::{self, IsTerminal as _, Write};
use std::path::Path;
use std::time::Instant;

use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};
use muster_protocol::record::JsonLinesError;

use crate::record::{RecordReader, RunRecord};
use plain::Plain;

pub use status::{Process, ProcessState, Status};

/// How progress is shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ScreenMode {
    /// A display that is redrawn in place.
    Live,
    /// Lines now and then.
    Plain,
    Quiet,
}

impl ScreenMode {
    /// [`Self::Live`] if stderr is a terminal, else [`Self::Plain`].
    pub fn of_stderr() -> Self {
        if io::stderr().is_terminal() {
            Self::Live
        } else {
            Self::Plain
        }
    }
}

/// The display. Owned by one task, which calls [`Screen::tick`] a few times a second.
#[derive(Debug)]
pub struct Screen {
    mode: ScreenMode,
    reader: RecordReader,
    plain: Plain,
    lines: MultiProgress,
    bars: Vec<ProgressBar>,
    started: Instant,
}

/// A writer for logs that does not tear the display.
#[derive(Debug, Clone)]
pub struct LogWriter {
    lines: MultiProgress,
}

impl Screen {
    /// A display of the run in `dir`. The present lines of its logs are not announced.
    ///
    /// # Errors
    /// A log of the run cannot be read.
    pub fn new(dir: &Path, mode: ScreenMode) -> Result<Self, JsonLinesError> {
        let mut reader = RecordReader::new(dir);
        reader.read_new()?;
        let lines = MultiProgress::with_draw_target(match mode {
            // Five times a second: more often is not read, and costs time that the run could use.
            ScreenMode::Live => ProgressDrawTarget::stderr_with_hz(5),
            ScreenMode::Plain | ScreenMode::Quiet => ProgressDrawTarget::hidden(),
        });
        let started = Instant::now();
        Ok(Self {
            mode,
            reader,
            plain: Plain::default(),
            lines,
            bars: Vec::new(),
            started,
        })
    }

    /// Reads new lines of the logs and shows them.
    ///
    /// # Errors
    /// A log of the run cannot be read. The display stays as it was, and the next call tries again.
    pub fn tick(&mut self, now: Instant, status: &Status) -> Result<(), JsonLinesError> {
        let added = self.reader.read_new()?;
        let record = self.reader.record();
        match self.mode {
            ScreenMode::Quiet => {}
            ScreenMode::Plain => {
                for line in self.plain.lines(now, added, record, status) {
                    to_stderr(&line);
                }
            }
            ScreenMode::Live => {
                let elapsed = now.saturating_duration_since(self.started);
                self.draw(frame::live(
                    self.reader.record(),
                    status,
                    elapsed.as_secs_f64(),
                ));
            }
        }
        Ok(())
    }

    pub fn newest_step(&self) -> u64 {
        let steps = &self.reader.record().steps;
        steps.last().map_or(0, |line| line.step)
    }

    /// Prints a line above the display.
    pub fn note(&self, line: &str) {
        match self.mode {
            ScreenMode::Quiet => {}
            ScreenMode::Plain => to_stderr(line),
            ScreenMode::Live => self.lines.suspend(|| to_stderr(line)),
        }
    }

    /// The writer for logs during the display.
    pub fn log_writer(&self) -> LogWriter {
        LogWriter {
            lines: self.lines.clone(),
        }
    }

    /// Ends the display; its last state stays on the terminal. Returns the record.
    pub fn finish(self) -> RunRecord {
        self.bars.iter().for_each(ProgressBar::abandon);
        self.reader.into_record()
    }

    fn draw(&mut self, shown: Vec<String>) {
        while self.bars.len() < shown.len() {
            let bar = self.lines.add(ProgressBar::no_length());
            // `wide_msg` cuts a line to the terminal's width. The template is a constant that parses.
            if let Ok(style) = ProgressStyle::with_template("{wide_msg}") {
                bar.set_style(style);
            }
            self.bars.push(bar);
        }
        for (bar, line) in self.bars.iter().zip(shown) {
            bar.set_message(line);
        }
    }
}

impl Write for LogWriter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.lines.suspend(|| io::stderr().write(bytes))
    }

    fn flush(&mut self) -> io::Result<()> {
        io::stderr().flush()
    }
}

/// A snapshot of the display, for commands such as `muster status`.
///
/// * `elapsed` — seconds that the run has taken
pub fn still(record: &RunRecord, status: &Status, elapsed: f64) -> Vec<String> {
    frame::live(record, status, elapsed)
}

/// Prints a line on stderr. A closed stderr is ignored, so that it does not end a run.
fn to_stderr(line: &str) {
    writeln!(io::stderr(), "{line}").ok();
}

#[cfg(test)]
mod tests {
    use super::*;
    use muster_protocol::record::{JsonLines, Line as _, StepMetrics};

    #[test]
    fn a_screen_follows_the_files_of_a_run_whoever_writes_them() {
        let folder = tempfile::tempdir().unwrap();
        let mut screen = Screen::new(folder.path(), ScreenMode::Quiet).unwrap();
        let mut log = JsonLines::open(&folder.path().join(StepMetrics::FILE), |_| true).unwrap();
        log.append(&StepMetrics {
            step: 1,
            ..Default::default()
        })
        .unwrap();
        screen.tick(Instant::now(), &Status::default()).unwrap();
        assert_eq!(screen.reader.record().steps_taken(), 1);
        log.append(&StepMetrics {
            step: 2,
            ..Default::default()
        })
        .unwrap();
        screen.tick(Instant::now(), &Status::default()).unwrap();
        assert_eq!(screen.finish().steps_taken(), 2);
    }

    #[test]
    fn a_live_screen_draws_as_many_lines_as_the_frame_has() {
        let folder = tempfile::tempdir().unwrap();
        let mut screen = Screen::new(folder.path(), ScreenMode::Live).unwrap();
        screen.lines.set_draw_target(ProgressDrawTarget::hidden());
        for _ in 0..2 {
            screen.tick(Instant::now(), &Status::default()).unwrap();
        }
        assert_eq!(
            screen.bars.len(),
            frame::live(screen.reader.record(), &Status::default(), 0.0).len()
        );
        assert!(screen.bars[0].message().contains("step"));
    }
}
