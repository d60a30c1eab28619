//! A log of JSON lines that survives being killed at any byte: a record is a line ended by a newline, and whatever
//! follows the last newline was torn and is not a record. Appending never leaves a torn line in the middle, a reader
//! that follows a growing file takes up whole lines only, and a run that resumes cuts off the lines of the steps that it
//! takes again.

use std::fs::{self, File, OpenOptions};
use std::io::{self, BufRead, BufReader, Read as _, Seek, SeekFrom, Write};
use std::marker::PhantomData;
use std::path::{Path, PathBuf};

use super::Line;

/// Why a log was not read or written.
#[derive(Debug, thiserror::Error)]
pub enum JsonLinesError {
    /// Nothing was written; the log still ends with a whole line.
    #[error(
        "the disk is full: {} could not grow; free some space and start the same command again",
        path.display()
    )]
    DiskFull { path: PathBuf },
    /// The operating system refused.
    #[error("{} could not be {action}: {source}", path.display())]
    Io {
        path: PathBuf,
        /// `opened`, `read` or `written`.
        action: &'static str,
        /// What the system said.
        source: io::Error,
    },
    /// A NaN or an infinity, which JSON cannot hold.
    #[error("`{key}` of a line for {} is not a finite number", path.display())]
    NotFinite {
        path: PathBuf,
        /// The key, or the line itself where no key is to blame.
        key: String,
    },
    /// A whole line that is not what the log holds.
    #[error("{}:{line} is not a line of this log ({reason}); move the file away to go on", path.display())]
    Corrupt {
        path: PathBuf,
        /// Line number, from 1.
        line: u64,
        /// What the parser said.
        reason: String,
    },
}

impl JsonLinesError {
    fn io(path: &Path, action: &'static str, source: io::Error) -> Self {
        let path = path.to_owned();
        match source.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Self::DiskFull { path },
            _ => Self::Io {
                path,
                action,
                source,
            },
        }
    }
}

/// The writing end of a log. One per file: the process that owns it.
#[derive(Debug)]
pub struct JsonLines<L> {
    path: PathBuf,
    file: File,
    /// Bytes up to the last whole line.
    bytes: u64,
    line: PhantomData<fn(&L)>,
}

impl<L: Line> JsonLines<L> {
    /// Opens a log for appending, made with its folder if there is none.
    ///
    /// The longest run of leading records that `keep` accepts stays; everything after it, a torn end included, is cut
    /// off. A run that resumes at step s passes `|line| line.step <= s`; a log that is only continued, `|_| true`.
    ///
    /// # Errors
    /// When the file cannot be opened, read or cut, or holds lines of another kind.
    pub fn open(path: &Path, mut keep: impl FnMut(&L) -> bool) -> Result<Self, JsonLinesError> {
        let opened = |source| JsonLinesError::io(path, "opened", source);
        if let Some(folder) = path.parent() {
            fs::create_dir_all(folder).map_err(opened)?;
        }
        let file = OpenOptions::new()
            .create(true)
            .append(true)
            .read(true)
            .open(path)
            .map_err(opened)?;
        let mut reader = JsonLinesReader::<L>::new(path);
        let bytes = reader.take_while(&file, &mut keep)?;
        file.set_len(bytes)
            .map_err(|source| JsonLinesError::io(path, "written", source))?;
        Ok(Self {
            path: path.to_owned(),
            file,
            bytes,
            line: PhantomData,
        })
    }

    /// Appends one line, in a single write that has reached the operating system when this returns.
    ///
    /// # Errors
    /// When a number is not finite or the disk refuses; the log then ends as it did before, and may be appended to
    /// again.
    pub fn append(&mut self, line: &L) -> Result<(), JsonLinesError> {
        self.append_by(line, |file, text| file.write_all(text))
    }

    /// `write` is a parameter so that a test can run out of space half-way through a line.
    fn append_by(
        &mut self,
        line: &L,
        write: impl FnOnce(&mut File, &[u8]) -> io::Result<()>,
    ) -> Result<(), JsonLinesError> {
        let mut text = serde_json::to_string(line).map_err(|error| self.unwritable(&error))?;
        if text.contains("null") {
            self.refuse_not_finite(&text)?;
        }
        text.push('\n');
        match write(&mut self.file, text.as_bytes()) {
            Ok(()) => {
                self.bytes += text.len() as u64;
                Ok(())
            }
            Err(source) => {
                // A full disk takes part of the line. Should the cut fail too, the first failure is the one to tell.
                self.file.set_len(self.bytes).ok();
                Err(JsonLinesError::io(&self.path, "written", source))
            }
        }
    }

    /// Makes what was appended survive a loss of power.
    ///
    /// # Errors
    /// When the disk refuses.
    pub fn sync(&self) -> Result<(), JsonLinesError> {
        self.file
            .sync_data()
            .map_err(|source| JsonLinesError::io(&self.path, "written", source))
    }

    /// serde writes a float that is not finite as null, which may also stand for a value that is absent.
    fn refuse_not_finite(&self, text: &str) -> Result<(), JsonLinesError> {
        let value: serde_json::Value =
            serde_json::from_str(text).map_err(|error| self.unwritable(&error))?;
        let Some(object) = value.as_object() else {
            return Ok(());
        };
        let culprit = object
            .iter()
            .find(|(key, value)| !L::NULLABLE.contains(&key.as_str()) && holds_null(value));
        match culprit {
            Some((key, _)) => Err(JsonLinesError::NotFinite {
                path: self.path.clone(),
                key: key.clone(),
            }),
            None => Ok(()),
        }
    }

    fn unwritable(&self, error: &serde_json::Error) -> JsonLinesError {
        let source = io::Error::new(io::ErrorKind::InvalidData, error.to_string());
        JsonLinesError::io(&self.path, "written", source)
    }
}

fn holds_null(value: &serde_json::Value) -> bool {
    match value {
        serde_json::Value::Null => true,
        serde_json::Value::Array(items) => items.iter().any(holds_null),
        serde_json::Value::Object(fields) => fields.values().any(holds_null),
        serde_json::Value::Bool(_)
        | serde_json::Value::Number(_)
        | serde_json::Value::String(_) => false,
    }
}

/// What a reader found since it was last asked.
#[derive(Debug, Clone, PartialEq)]
pub struct Read<L> {
    /// The whole lines that were added.
    pub lines: Vec<L>,
    /// Whether the file was cut and written anew, so that `lines` are all that it holds and what was read before is void.
    pub restarted: bool,
}

/// The reading end of a log that may still grow, or be cut and written anew by a run that resumes.
#[derive(Debug)]
pub struct JsonLinesReader<L> {
    path: PathBuf,
    /// Bytes taken up: the end of a whole line.
    bytes: u64,
    lines: u64,
    /// The last line taken up, newline included: while it stands where it stood, so does all before it.
    last: Vec<u8>,
    line: PhantomData<fn() -> L>,
}

impl<L: Line> JsonLinesReader<L> {
    /// A reader at the beginning of a log, which need not exist yet.
    pub fn new(path: &Path) -> Self {
        Self {
            path: path.to_owned(),
            bytes: 0,
            lines: 0,
            last: Vec::new(),
            line: PhantomData,
        }
    }

    /// The whole lines that were added since the last call; none when there is no file.
    ///
    /// # Errors
    /// When the file cannot be read or a whole line is not one of this log.
    pub fn read_new(&mut self) -> Result<Read<L>, JsonLinesError> {
        let file = match File::open(&self.path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                let restarted = self.bytes > 0;
                *self = Self::new(&self.path);
                return Ok(Read {
                    lines: Vec::new(),
                    restarted,
                });
            }
            Err(source) => return Err(self.unreadable(source)),
        };
        let restarted = !self.stands_where_it_stood(&file)?;
        if restarted {
            *self = Self::new(&self.path);
        }
        let mut lines = Vec::new();
        self.each(&file, |line| {
            lines.push(line);
            true
        })?;
        Ok(Read { lines, restarted })
    }

    /// Where the leading records that `keep` accepts end, in bytes.
    fn take_while(
        &mut self,
        file: &File,
        keep: &mut impl FnMut(&L) -> bool,
    ) -> Result<u64, JsonLinesError> {
        self.each(file, |line| keep(&line))?;
        Ok(self.bytes)
    }

    /// Whether the last line taken up is still there. The length alone would not tell: a run that resumed may have cut
    /// the log and grown it again between two calls.
    fn stands_where_it_stood(&self, mut file: &File) -> Result<bool, JsonLinesError> {
        let start = self.bytes - self.last.len() as u64;
        file.seek(SeekFrom::Start(start))
            .map_err(|source| self.unreadable(source))?;
        let mut found = vec![0; self.last.len()];
        match file.read_exact(&mut found) {
            Ok(()) => Ok(found == self.last),
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(false),
            Err(source) => Err(self.unreadable(source)),
        }
    }

    /// Hands over whole lines from where the reader stands until `take` refuses one, and stands behind the last taken.
    fn each(&mut self, file: &File, mut take: impl FnMut(L) -> bool) -> Result<(), JsonLinesError> {
        let mut input = BufReader::new(file);
        input
            .seek(SeekFrom::Start(self.bytes))
            .map_err(|source| self.unreadable(source))?;
        loop {
            let mut text = Vec::new();
            input
                .read_until(b'\n', &mut text)
                .map_err(|source| self.unreadable(source))?;
            if text.last() != Some(&b'\n') {
                return Ok(());
            }
            let line = serde_json::from_slice(&text).map_err(|error| JsonLinesError::Corrupt {
                path: self.path.clone(),
                line: self.lines + 1,
                reason: error.to_string(),
            })?;
            if !take(line) {
                return Ok(());
            }
            self.bytes += text.len() as u64;
            self.lines += 1;
            self.last = text;
        }
    }

    fn unreadable(&self, source: io::Error) -> JsonLinesError {
        JsonLinesError::io(&self.path, "read", source)
    }
}

/// All whole lines of a log; none when there is no file.
///
/// # Errors
/// When the file cannot be read or a whole line is not one of this log.
pub fn read_all<L: Line>(path: &Path) -> Result<Vec<L>, JsonLinesError> {
    JsonLinesReader::new(path).read_new().map(|read| read.lines)
}

#[cfg(test)]
mod tests;
