//! The messages, one file per noun. Every message is a [`Statement`](crate::envelope::Statement): numbered, bounded, validated
//! and signed. Golden bytes fix the form of each (`tests/golden`).

pub mod ask;
pub mod batch;
pub mod control;
pub mod critique;
pub mod descriptor;
pub mod fate;
pub mod group;
pub mod lease;
pub mod peer;
pub mod ticket;
pub mod verdict;
pub mod version;

use crate::envelope::Invalid;
use crate::limits::TEXT_BYTES_MAX;

/// Checks a list's length.
fn at_most(field: &'static str, found: usize, limit: usize) -> Result<(), Invalid> {
    if found > limit {
        return Err(Invalid::new(
            field,
            format!("has {found} entries, at most {limit} are allowed"),
        ));
    }
    Ok(())
}

/// Checks a length in bytes.
fn bytes_at_most(field: &'static str, found: usize, limit: usize) -> Result<(), Invalid> {
    if found > limit {
        let problem = format!("has {found} bytes, at most {limit} are allowed");
        return Err(Invalid::new(field, problem));
    }
    Ok(())
}

/// Checks a number's upper bound.
fn number_at_most(field: &'static str, found: u32, limit: u32) -> Result<(), Invalid> {
    if found > limit {
        let problem = format!("is {found}, at most {limit} is allowed");
        return Err(Invalid::new(field, problem));
    }
    Ok(())
}

/// Checks the length of a list that may not be empty.
fn some_of(field: &'static str, found: usize, limit: usize) -> Result<(), Invalid> {
    if found == 0 {
        return Err(Invalid::new(field, "is empty"));
    }
    at_most(field, found, limit)
}

/// Checks the length of a free text.
fn short_text(field: &'static str, text: &str) -> Result<(), Invalid> {
    bytes_at_most(field, text.len(), TEXT_BYTES_MAX)
}

/// Checks that a number is neither infinite nor NaN.
fn finite(field: &'static str, value: f32) -> Result<(), Invalid> {
    if !value.is_finite() {
        return Err(Invalid::new(
            field,
            format!("is {value}, not a finite number"),
        ));
    }
    Ok(())
}
