//! Shows a run: the records of its directory, its summary, the terminal display and `report.html`.
//!
//! This crate reads files and draws; it talks to no process. The commands of `src/` decide what is shown when.
#![cfg_attr(test, allow(clippy::unwrap_used, clippy::expect_used, clippy::panic))]

pub mod machine;
pub mod output;
pub mod record;
pub mod report;
pub mod screen;
pub mod summary;
pub mod text;
