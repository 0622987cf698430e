//! An answer of the vCenter as a small tree, with limits on everything: what lies beyond them is refused, never half read.

use quick_xml::events::{BytesStart, Event};
use quick_xml::reader::Reader;

/// Elements in one answer. A host with 1,000 VMs answers with about a tenth of this.
const ELEMENTS_MAX: usize = 2_000_000;
/// Elements within each other. A tree of snapshots is the deepest thing that is asked for (32 levels are VMware's own limit).
const DEPTH_MAX: usize = 256;

/// What is wrong with an answer.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum XmlError {
    /// No XML.
    #[error("the answer is no well-formed XML: {0}")]
    Malformed(String),
    /// More than [`ELEMENTS_MAX`] or [`DEPTH_MAX`].
    #[error("the answer is larger than the agent accepts")]
    TooLarge,
}

/// One element; namespaces are left out, because vim25 has one only.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Element {
    /// Its local name.
    pub(crate) name: String,
    /// The local part of `xsi:type`, which tells the type of an abstract value.
    pub(crate) kind: Option<String>,
    /// The attribute `type`: what a reference refers to.
    pub(crate) of: Option<String>,
    /// Text between its children, in one.
    pub(crate) text: String,
    /// What is in it.
    pub(crate) children: Vec<Self>,
}

impl Element {
    /// Reads a whole document.
    pub(crate) fn parse(text: &str) -> Result<Self, XmlError> {
        let malformed = |error: &dyn std::fmt::Display| XmlError::Malformed(error.to_string());
        let mut reader = Reader::from_str(text);
        let mut open: Vec<Self> = vec![Self::default()];
        let mut elements = 0;
        loop {
            let event = reader.read_event().map_err(|error| malformed(&error))?;
            if matches!(event, Event::Start(_) | Event::Empty(_)) {
                elements += 1;
                if elements > ELEMENTS_MAX || open.len() > DEPTH_MAX {
                    return Err(XmlError::TooLarge);
                }
            }
            match event {
                Event::Start(start) => open.push(Self::begin(&start)?),
                Event::Empty(start) => {
                    let element = Self::begin(&start)?;
                    parent(&mut open)?.children.push(element);
                }
                Event::End(_) => {
                    let element = open.pop().unwrap_or_default();
                    parent(&mut open)?.children.push(element);
                }
                Event::Text(text) => parent(&mut open)?.text.push_str(&text.xml10_content()),
                Event::CData(text) => parent(&mut open)?.text.push_str(&text.xml10_content()),
                Event::GeneralRef(entity) => {
                    let known = entity.resolve_char_ref().map_err(|error| malformed(&error))?;
                    let c = match (known, &*entity.xml10_content()) {
                        (Some(c), _) => c,
                        (None, "amp") => '&',
                        (None, "lt") => '<',
                        (None, "gt") => '>',
                        (None, "quot") => '"',
                        (None, "apos") => '\'',
                        (None, other) => return Err(malformed(&format!("unknown entity {other:?}"))),
                    };
                    parent(&mut open)?.text.push(c);
                }
                // Entities of one's own could make a small answer a huge one; no vCenter sends them.
                Event::DocType(_) => return Err(malformed(&"it has a DOCTYPE")),
                Event::Comment(_) | Event::Decl(_) | Event::PI(_) => {}
                Event::Eof => break,
            }
        }
        match (open.pop(), open.is_empty()) {
            (Some(document), true) => document
                .children
                .into_iter()
                .next()
                .ok_or_else(|| malformed(&"it is empty")),
            _ => Err(malformed(&"it ends in the middle of an element")),
        }
    }

    fn begin(start: &BytesStart<'_>) -> Result<Self, XmlError> {
        let mut element = Self {
            name: start.local_name().as_ref().to_owned(),
            ..Self::default()
        };
        for attribute in start.attributes() {
            let attribute = attribute.map_err(|error| XmlError::Malformed(error.to_string()))?;
            let value = attribute.value.to_string();
            let local = |value: &str| value.rsplit(':').next().unwrap_or_default().to_owned();
            match attribute.key.as_ref() {
                "type" => element.of = Some(value),
                key if key.ends_with(":type") => element.kind = Some(local(&value)),
                _ => {}
            }
        }
        Ok(element)
    }

    /// The first child of this name.
    pub(crate) fn child(&self, name: &str) -> Option<&Self> {
        self.children.iter().find(|child| child.name == name)
    }

    /// Every child of this name.
    pub(crate) fn all<'a>(&'a self, name: &'a str) -> impl Iterator<Item = &'a Self> {
        self.children.iter().filter(move |child| child.name == name)
    }

    /// Follows names, first children each.
    pub(crate) fn at(&self, path: &[&str]) -> Option<&Self> {
        path.iter().try_fold(self, |element, name| element.child(name))
    }

    /// The text of a child.
    pub(crate) fn text_of(&self, name: &str) -> Option<&str> {
        self.child(name).map(|child| child.text.trim())
    }

    /// Whether a child says `true`.
    pub(crate) fn is_true(&self, name: &str) -> bool {
        matches!(self.text_of(name), Some("true" | "1"))
    }

    /// This element and all below it.
    pub(crate) fn walk(&self) -> Vec<&Self> {
        let mut found = vec![self];
        let mut at = 0;
        while let Some(element) = found.get(at).copied() {
            found.extend(&element.children);
            at += 1;
        }
        found
    }
}

fn parent(open: &mut [Element]) -> Result<&mut Element, XmlError> {
    open.last_mut()
        .ok_or_else(|| XmlError::Malformed("an element ends that did not begin".to_owned()))
}

/// Text as it may stand in a request.
pub(crate) fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            // XML 1.0 has no other control characters, not even escaped.
            c if c.is_control() && !matches!(c, '\t' | '\n' | '\r') => {}
            c => out.push(c),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tree_is_read_with_types_and_entities() {
        let text = r#"<?xml version="1.0"?><a:E xmlns:a="x"><val xsi:type="vim:Dog">R&amp;D &#65;</val><ref type="HostSystem">host-1</ref><e/></a:E>"#;
        let root = Element::parse(text).expect("well-formed");
        assert_eq!(root.name, "E");
        let val = root.child("val").expect("a child");
        assert_eq!((val.kind.as_deref(), val.text.as_str()), (Some("Dog"), "R&D A"));
        assert_eq!(
            root.child("ref").expect("a child").of.as_deref(),
            Some("HostSystem")
        );
        assert_eq!(root.walk().len(), 4);
    }

    #[test]
    fn what_is_no_answer_is_refused() {
        for bad in [
            "",
            "text",
            "<a>",
            "</a>",
            "<a></b>",
            "<a>&nope;</a>",
            "<!DOCTYPE a><a/>",
        ] {
            assert!(Element::parse(bad).is_err(), "{bad:?}");
        }
        let deep = "<a>".repeat(DEPTH_MAX + 1);
        assert_eq!(Element::parse(&deep), Err(XmlError::TooLarge));
    }

    #[test]
    fn escaped_text_comes_back() {
        let odd = "R&D <\"x\"> \u{1}'";
        let text = format!("<a>{}</a>", escape(odd));
        assert_eq!(
            Element::parse(&text).expect("well-formed").text,
            odd.replace('\u{1}', "")
        );
    }
}
