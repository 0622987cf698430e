//! Answers for people: tables, details, sizes with units, local times. Scripts use `--json`.

use std::fmt::Write as _;

use comfy_table::{CellAlignment, ContentArrangement, Table, presets};
use serde_json::{Map, Value};
use stillpoint_config::{Size, format_duration};

/// How a value is shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Text,
    Bytes,
    Time,
    /// Seconds since.
    Ago,
    Number,
    Flag,
    List,
}

/// A column of a table: its title, the key of the value (with `.` for inner ones), and how it is shown.
pub(crate) struct Column(pub(crate) &'static str, pub(crate) &'static str, pub(crate) Kind);

/// The rows as a table without lines: easy to read, and to cut with awk.
pub(crate) fn table(rows: &[Value], columns: &[Column]) -> String {
    let mut table = Table::new();
    table
        .load_style(presets::NOTHING)
        .set_content_arrangement(ContentArrangement::Disabled);
    table.set_header(columns.iter().map(|column| column.0));
    for row in rows {
        table.add_row(
            columns
                .iter()
                .map(|Column(_, key, kind)| cell(find(row, key), *kind)),
        );
    }
    for (i, Column(_, _, kind)) in columns.iter().enumerate() {
        if let Some(column) = table.column_mut(i) {
            column.set_padding((0, 2));
            if matches!(kind, Kind::Bytes | Kind::Number) {
                column.set_cell_alignment(CellAlignment::Right);
            }
        }
    }
    let mut text = String::new();
    for line in table.lines() {
        text.push_str(line.trim_end());
        text.push('\n');
    }
    text
}

fn find<'a>(row: &'a Value, key: &str) -> &'a Value {
    key.split('.')
        .fold(row, |value, part| match part.parse::<usize>() {
            Ok(index) => value.get(index).unwrap_or(&Value::Null),
            Err(_) => value.get(part).unwrap_or(&Value::Null),
        })
}

fn cell(value: &Value, kind: Kind) -> String {
    let none = "-".to_owned();
    match (kind, value) {
        (_, Value::Null) => none,
        (Kind::Bytes, value) => value
            .as_u64()
            .map_or_else(|| plain(value), |bytes| Size(bytes).to_string()),
        (Kind::Time, Value::String(text)) => local_time(text),
        (Kind::Ago, value) => {
            let span = value
                .as_u64()
                .map(|seconds| format_duration(std::time::Duration::from_secs(seconds)));
            span.map_or(none, |span| format!("{span} ago"))
        }
        (Kind::Flag, Value::Bool(flag)) => if *flag { "yes" } else { "no" }.to_owned(),
        (Kind::List, Value::Array(list)) if list.is_empty() => none,
        (Kind::List, Value::Array(list)) => list.iter().map(plain).collect::<Vec<_>>().join(", "),
        (_, Value::String(text)) if text.is_empty() => none,
        (_, value) => plain(value),
    }
}

fn plain(value: &Value) -> String {
    match value {
        Value::String(text) => visible(text),
        Value::Null => "-".to_owned(),
        Value::Bool(flag) => if *flag { "yes" } else { "no" }.to_owned(),
        Value::Array(list) => list.iter().map(plain).collect::<Vec<_>>().join(", "),
        Value::Object(map) => map
            .iter()
            .map(|(k, v)| format!("{k} {}", plain(v)))
            .collect::<Vec<_>>()
            .join(", "),
        Value::Number(number) => number.to_string(),
    }
}

/// Texts that came from other hosts (names, notes, agents' reports) must not steer the operator's terminal.
fn visible(text: &str) -> String {
    text.chars()
        .map(|c| {
            if c.is_control() {
                char::REPLACEMENT_CHARACTER
            } else {
                c
            }
        })
        .collect()
}

/// RFC 3339 in the local time zone, to the second.
pub(crate) fn local_time(text: &str) -> String {
    match text.parse::<jiff::Timestamp>() {
        Ok(time) => time
            .to_zoned(jiff::tz::TimeZone::system())
            .strftime("%Y-%m-%d %H:%M:%S")
            .to_string(),
        Err(_) => visible(text),
    }
}

/// One object as lines of `key: value`; inner objects and lists are indented.
pub(crate) fn details(value: &Value) -> String {
    let mut text = String::new();
    if let Value::Object(map) = value {
        put_object(&mut text, map, 0);
    } else {
        let _infallible = writeln!(text, "{}", plain(value));
    }
    text
}

fn put_object(text: &mut String, map: &Map<String, Value>, indent: usize) {
    let label = |key: &str| {
        let key = key
            .strip_suffix("_bytes")
            .or_else(|| key.strip_suffix("_seconds"))
            .unwrap_or(key);
        key.replace('_', " ")
    };
    let width = map
        .keys()
        .map(|key| label(key).chars().count())
        .max()
        .unwrap_or(0)
        + 1;
    for (key, value) in map {
        let head = format!("{:indent$}{:width$}", "", format!("{}:", label(key)));
        match value {
            Value::Array(list) if list.iter().any(Value::is_object) => {
                let _infallible = writeln!(text, "{}", head.trim_end());
                for item in list {
                    put_item(text, item, indent + 2);
                }
            }
            Value::Object(inner) => {
                let _infallible = writeln!(text, "{}", head.trim_end());
                put_object(text, inner, indent + 2);
            }
            value => {
                let _infallible = writeln!(text, "{head} {}", detail(key, value));
            }
        }
    }
}

/// An object of a list: its first line is marked, so that one sees where each begins.
fn put_item(text: &mut String, item: &Value, indent: usize) {
    let mut inner = String::new();
    match item {
        Value::Object(map) => put_object(&mut inner, map, indent + 2),
        other => {
            let _infallible = writeln!(inner, "{:indent$}  {}", "", plain(other));
        }
    }
    let mark = format!("{:indent$}- ", "");
    text.push_str(&mark);
    text.push_str(inner.get(mark.len()..).unwrap_or(&inner));
}

fn detail(key: &str, value: &Value) -> String {
    match value {
        Value::Number(number) if key.ends_with("_bytes") => {
            let bytes = number.as_u64().unwrap_or(0);
            let size = Size(bytes).to_string();
            if bytes < 1024 {
                size
            } else {
                format!("{size} ({bytes} bytes)")
            }
        }
        Value::Number(number) if key.ends_with("_seconds") => {
            format_duration(std::time::Duration::from_secs(number.as_u64().unwrap_or(0)))
        }
        Value::String(text)
            if key.ends_with("_at") || key.ends_with("_until") || matches!(key, "since" | "time") =>
        {
            local_time(text)
        }
        Value::Array(list) if list.is_empty() => "-".to_owned(),
        value => plain(value),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn tables_have_aligned_columns_and_no_trailing_blanks() {
        let rows = [
            json!({"name": "a", "size_bytes": 1_073_741_824u64, "x": {"y": [1]}}),
            json!({"name": "longer", "size_bytes": 512, "x": null}),
        ];
        let columns = [
            Column("NAME", "name", Kind::Text),
            Column("SIZE", "size_bytes", Kind::Bytes),
            Column("Y", "x.y.0", Kind::Number),
        ];
        let text = table(&rows, &columns);
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines.len(), 3);
        assert!(lines.iter().all(|line| line.trim_end() == *line), "{text}");
        assert_eq!(
            lines[1].split_whitespace().collect::<Vec<_>>(),
            ["a", "1GiB", "1"]
        );
        assert_eq!(
            lines[2].split_whitespace().collect::<Vec<_>>(),
            ["longer", "512B", "-"]
        );
        assert!(
            lines[1].starts_with("a  ") && lines[2].starts_with("longer  "),
            "{text}"
        );
    }

    #[test]
    fn details_show_inner_things_indented() {
        let text = details(&json!({
            "name": "a", "size_bytes": 2048, "uptime_seconds": 90, "list": [{"p": 1, "q": "x"}, {"p": 2, "q": "y"}], "none": [], "o": {"k": true},
        }));
        assert!(text.contains("size:   2KiB (2048 bytes)\n"), "{text}");
        assert!(text.contains("uptime: 1m30s\n"), "{text}");
        assert!(
            text.contains("list:\n  - p: 1\n    q: x\n  - p: 2\n    q: y\n"),
            "{text}"
        );
        assert!(text.contains("o:\n  k: yes\n"), "{text}");
    }

    #[test]
    fn control_characters_do_not_reach_the_terminal() {
        let rows = [json!({"name": "a\u{1b}[2Jb"})];
        let text = table(&rows, &[Column("NAME", "name", Kind::Text)]);
        assert!(!text.contains('\u{1b}'), "{text:?}");
        assert!(!details(&json!({"note": "x\u{7}"})).contains('\u{7}'));
    }
}
