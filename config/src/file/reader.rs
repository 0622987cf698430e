//! Walks a parsed TOML document and keeps going after a problem, so that an operator sees all of them in one go.
//!
//! serde stops at the first error, which is why the sections are read by hand: each key is asked for by name and type,
//! and at the end of a section every key that nobody asked for is unknown.

use std::ops::Range;
use std::path::{Path, PathBuf};

use toml::Spanned;
use toml::de::{DeTable, DeValue};

use crate::config::Unserved;
use crate::problem::{Problem, Trouble};
use crate::suggest;

/// Collects problems, and knows which line a byte of the text stands on.
pub(crate) struct Sink {
    file: PathBuf,
    line_starts: Vec<usize>,
    /// The text has syntax errors: what seems to be missing may only be unreadable, so it is not complained about.
    pub(crate) damaged: bool,
    pub(crate) problems: Vec<Problem>,
    pub(crate) warnings: Vec<Problem>,
    pub(crate) unserved: Vec<Unserved>,
}

impl Sink {
    pub(crate) fn new(text: &str, file: &Path) -> Self {
        let newlines = text
            .bytes()
            .enumerate()
            .filter(|(_, b)| *b == b'\n')
            .map(|(i, _)| i + 1);
        Self {
            file: file.to_owned(),
            line_starts: std::iter::once(0).chain(newlines).collect(),
            damaged: false,
            problems: Vec::new(),
            warnings: Vec::new(),
            unserved: Vec::new(),
        }
    }

    /// Line of a byte, counted from 1.
    pub(crate) fn line(&self, at: &Range<usize>) -> usize {
        self.line_starts.partition_point(|start| *start <= at.start)
    }

    /// A relative path is meant from the file's own directory, not from wherever the daemon was started.
    pub(crate) fn directory(&self) -> PathBuf {
        self.file.parent().map(Path::to_owned).unwrap_or_default()
    }

    pub(crate) fn problem(&mut self, at: &Range<usize>, thing: &str, trouble: Trouble) {
        let problem = self.make(at, thing, trouble);
        self.problems.push(problem);
    }

    pub(crate) fn warn(&mut self, at: &Range<usize>, thing: &str, trouble: Trouble) {
        let warning = self.make(at, thing, trouble);
        self.warnings.push(warning);
    }

    pub(crate) fn unserved(&mut self, at: &Range<usize>, section: &str) {
        let line = self.line(at);
        self.unserved.push(Unserved {
            section: section.to_owned(),
            line,
        });
    }

    fn make(&self, at: &Range<usize>, thing: &str, trouble: Trouble) -> Problem {
        Problem {
            file: self.file.clone(),
            line: self.line(at),
            thing: thing.to_owned(),
            trouble: trouble.trouble,
            way_out: trouble.way_out,
        }
    }
}

/// One table while it is read.
pub(crate) struct Section<'t, 'i> {
    table: &'t DeTable<'i>,
    /// Where its header stands.
    pub(crate) at: Range<usize>,
    /// How problems name it.
    pub(crate) thing: String,
    asked: Vec<&'static str>,
}

impl<'t, 'i> Section<'t, 'i> {
    pub(crate) fn new(table: &'t DeTable<'i>, at: Range<usize>, thing: impl Into<String>) -> Self {
        Self {
            table,
            at,
            thing: thing.into(),
            asked: Vec::new(),
        }
    }

    /// The raw text of a key, without asking for it: to name the section.
    pub(crate) fn peek(&self, key: &str) -> Option<&'t str> {
        self.table
            .iter()
            .find(|(k, _)| k.get_ref() == key)
            .and_then(|(_, v)| v.get_ref().as_str())
    }

    fn get(&mut self, key: &'static str) -> Option<&'t Spanned<DeValue<'i>>> {
        self.asked.push(key);
        self.table
            .iter()
            .find(|(k, _)| k.get_ref() == key)
            .map(|(_, v)| v)
    }

    fn wrong_type(&self, sink: &mut Sink, key: &str, value: &Spanned<DeValue<'_>>, wanted: &str) {
        let got = value.get_ref().type_str();
        let trouble = Trouble::new(format!("`{key}` is of type {got}"), format!("write {wanted}"));
        sink.problem(&value.span(), &self.thing, trouble);
    }

    /// Reports a problem of one key's value.
    pub(crate) fn bad<T>(&self, sink: &mut Sink, key: &str, value: &Spanned<T>, trouble: Trouble) {
        let trouble = Trouble {
            trouble: format!("`{key}`: {}", trouble.trouble),
            ..trouble
        };
        sink.problem(&value.span(), &self.thing, trouble);
    }

    /// Complains that a required key is missing.
    pub(crate) fn missing(&self, sink: &mut Sink, key: &str, example: &str) {
        if !sink.damaged {
            let trouble = Trouble::new(
                format!("`{key}` is missing"),
                format!("add for example `{key} = {example}`"),
            );
            sink.problem(&self.at, &self.thing, trouble);
        }
    }

    /// A text that `parse` understands.
    pub(crate) fn text<T>(
        &mut self,
        sink: &mut Sink,
        key: &'static str,
        parse: impl Fn(&str) -> Result<T, Trouble>,
    ) -> Option<Spanned<T>> {
        let value = self.get(key)?;
        let Some(text) = value.get_ref().as_str() else {
            self.wrong_type(sink, key, value, "a text in quotes");
            return None;
        };
        match parse(text) {
            Ok(parsed) => Some(Spanned::new(value.span(), parsed)),
            Err(trouble) => {
                self.bad(sink, key, value, trouble);
                None
            }
        }
    }

    /// A text that must be there.
    pub(crate) fn required<T>(
        &mut self,
        sink: &mut Sink,
        key: &'static str,
        example: &str,
        parse: impl Fn(&str) -> Result<T, Trouble>,
    ) -> Option<Spanned<T>> {
        if !self.has(key) {
            self.asked.push(key);
            self.missing(sink, key, example);
            return None;
        }
        self.text(sink, key, parse)
    }

    /// Whether the key was written, right or wrong.
    pub(crate) fn has(&self, key: &str) -> bool {
        self.table.iter().any(|(k, _)| k.get_ref() == key)
    }

    pub(crate) fn boolean(&mut self, sink: &mut Sink, key: &'static str) -> Option<Spanned<bool>> {
        let value = self.get(key)?;
        match value.get_ref().as_bool() {
            Some(boolean) => Some(Spanned::new(value.span(), boolean)),
            None => {
                self.wrong_type(sink, key, value, "true or false");
                None
            }
        }
    }

    pub(crate) fn integer(
        &mut self,
        sink: &mut Sink,
        key: &'static str,
        range: Range<u64>,
    ) -> Option<Spanned<u32>> {
        let value = self.get(key)?;
        let number = self.number(sink, key, value, &range)?;
        Some(Spanned::new(value.span(), number))
    }

    fn number(
        &self,
        sink: &mut Sink,
        key: &str,
        value: &Spanned<DeValue<'_>>,
        range: &Range<u64>,
    ) -> Option<u32> {
        let Some(integer) = value.get_ref().as_integer() else {
            self.wrong_type(sink, key, value, "a whole number without quotes");
            return None;
        };
        let number = i64::from_str_radix(integer.as_str(), integer.radix())
            .ok()
            .and_then(|n| u64::try_from(n).ok());
        match number
            .filter(|n| range.contains(n))
            .and_then(|n| u32::try_from(n).ok())
        {
            Some(number) => Some(number),
            None => {
                let way_out = format!("write a number from {} to {}", range.start, range.end - 1);
                self.bad(
                    sink,
                    key,
                    value,
                    Trouble::new(format!("{} is out of range", integer.as_str()), way_out),
                );
                None
            }
        }
    }

    fn array(&mut self, sink: &mut Sink, key: &'static str, most: usize) -> Option<&'t Spanned<DeValue<'i>>> {
        let value = self.get(key)?;
        let Some(array) = value.get_ref().as_array() else {
            self.wrong_type(sink, key, value, "a list in square brackets");
            return None;
        };
        if array.len() > most {
            let trouble = Trouble::new(
                format!("{} entries", array.len()),
                format!("at most {most} are allowed"),
            );
            self.bad(sink, key, value, trouble);
            return None;
        }
        Some(value)
    }

    /// A list of texts; None when `parse` refuses an entry, which is then reported.
    pub(crate) fn texts<T>(
        &mut self,
        sink: &mut Sink,
        key: &'static str,
        most: usize,
        parse: impl Fn(&str) -> Result<T, Trouble>,
    ) -> Option<Spanned<Vec<Spanned<T>>>> {
        let value = self.array(sink, key, most)?;
        let array = value.get_ref().as_array()?;
        let mut list = Vec::new();
        for entry in array.iter() {
            match entry.get_ref().as_str().map(&parse) {
                None => self.wrong_type(sink, key, entry, "every entry as a text in quotes"),
                Some(Ok(parsed)) => list.push(Spanned::new(entry.span(), parsed)),
                Some(Err(trouble)) => self.bad(sink, key, entry, trouble),
            }
        }
        (list.len() == array.len()).then(|| Spanned::new(value.span(), list))
    }

    /// A list of whole numbers.
    pub(crate) fn integers(
        &mut self,
        sink: &mut Sink,
        key: &'static str,
        most: usize,
        range: Range<u64>,
    ) -> Option<Spanned<Vec<Spanned<u32>>>> {
        let value = self.array(sink, key, most)?;
        let array = value.get_ref().as_array()?;
        let mut list = Vec::new();
        for entry in array.iter() {
            if let Some(number) = self.number(sink, key, entry, &range) {
                list.push(Spanned::new(entry.span(), number));
            }
        }
        (list.len() == array.len()).then(|| Spanned::new(value.span(), list))
    }

    /// A table below this one.
    pub(crate) fn table(
        &mut self,
        sink: &mut Sink,
        key: &'static str,
        thing: impl Into<String>,
    ) -> Option<Self> {
        let value = self.get(key)?;
        match value.get_ref().as_table() {
            Some(table) => Some(Self::new(table, value.span(), thing)),
            None => {
                self.wrong_type(sink, key, value, &format!("a table: `[{key}]`"));
                None
            }
        }
    }

    /// A list of tables; each is named by the value of `name_key`, or else counted.
    pub(crate) fn tables(
        &mut self,
        sink: &mut Sink,
        key: &'static str,
        most: usize,
        noun: &str,
        name_key: &str,
    ) -> Vec<Self> {
        let Some(value) = self.get(key) else {
            return Vec::new();
        };
        let Some(array) = value.get_ref().as_array() else {
            self.wrong_type(
                sink,
                key,
                value,
                &format!("a list of tables: `[[{key}]]` with two brackets"),
            );
            return Vec::new();
        };
        if array.len() > most {
            let trouble = Trouble::new(
                format!("{} of `[[{key}]]`", array.len()),
                format!("at most {most} are allowed"),
            );
            sink.problem(&value.span(), &self.thing, trouble);
            return Vec::new();
        }
        let mut sections = Vec::new();
        for (i, entry) in array.iter().enumerate() {
            let Some(table) = entry.get_ref().as_table() else {
                self.wrong_type(sink, key, entry, &format!("a table: `[[{key}]]`"));
                continue;
            };
            let mut section = Self::new(table, entry.span(), format!("[[{key}]] number {}", i + 1));
            if let Some(name) = section.peek(name_key) {
                section.thing = format!("{noun} {name:?}");
            }
            sections.push(section);
        }
        sections
    }

    /// Reports the keys that nobody asked for.
    pub(crate) fn finish(self, sink: &mut Sink) {
        for (key, _) in self
            .table
            .iter()
            .filter(|(key, _)| !self.asked.contains(&key.get_ref().as_ref()))
        {
            let way_out = match suggest::nearest(key.get_ref(), self.asked.iter().copied()) {
                Some(known) => format!("did you mean `{known}`?"),
                None => {
                    let mut known = self.asked.clone();
                    known.sort_unstable();
                    format!("remove it (known here: {})", known.join(", "))
                }
            };
            let trouble = Trouble::new(format!("unknown key `{}`", key.get_ref()), way_out);
            sink.problem(&key.span(), &self.thing, trouble);
        }
    }
}
