//! What an operator reads: the place, the thing, the trouble, the way out.

use std::fmt;
use std::path::PathBuf;

use serde::Serialize;

/// What is wrong with one value, and what to write instead. The caller knows where it stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Trouble {
    /// What is wrong.
    pub trouble: String,
    /// What to do about it.
    pub way_out: String,
}

impl Trouble {
    pub(crate) fn new(trouble: impl Into<String>, way_out: impl Into<String>) -> Self {
        Self {
            trouble: trouble.into(),
            way_out: way_out.into(),
        }
    }
}

impl fmt::Display for Trouble {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.trouble, self.way_out)
    }
}

impl std::error::Error for Trouble {}

/// One problem of a configuration file, with its place.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Problem {
    /// The file as the operator named it.
    pub file: PathBuf,
    /// Line, counted from 1; 0 when the whole file is meant.
    pub line: usize,
    /// The thing: a section, a key, a LUN, a target.
    pub thing: String,
    /// What is wrong with it.
    pub trouble: String,
    /// What to do about it.
    pub way_out: String,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:", self.file.display())?;
        if self.line > 0 {
            write!(f, "{}:", self.line)?;
        }
        write!(f, " {}: {}", self.thing, self.trouble)?;
        if self.way_out.is_empty() {
            Ok(())
        } else {
            write!(f, ": {}", self.way_out)
        }
    }
}

/// Everything that is wrong with a configuration file, in the order of its lines. Never empty.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Problems(pub Vec<Problem>);

impl fmt::Display for Problems {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, problem) in self.0.iter().enumerate() {
            if i > 0 {
                writeln!(f)?;
            }
            write!(f, "{problem}")?;
        }
        Ok(())
    }
}

impl std::error::Error for Problems {}
