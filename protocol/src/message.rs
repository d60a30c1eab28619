//! What can be said, one file per noun. Every message is a [`Statement`](crate::envelope::Statement): numbered, bounded,
//! validated, signed; golden bytes hold each one.

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

/// Checks a list's length, which may not be zero.
fn some_of(field: &'static str, found: usize, limit: usize) -> Result<(), Invalid> {
    if found == 0 {
        return Err(Invalid::new(field, "is empty"));
    }
    at_most(field, found, limit)
}

/// Checks a free text's length.
fn short_text(field: &'static str, text: &str) -> Result<(), Invalid> {
    if text.len() > TEXT_BYTES_MAX {
        let problem = format!(
            "has {} bytes, at most {TEXT_BYTES_MAX} are allowed",
            text.len()
        );
        return Err(Invalid::new(field, problem));
    }
    Ok(())
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
