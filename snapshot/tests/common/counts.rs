//! How many crashes came in the middle of what: the figures that a soak prints at its end.

use std::collections::BTreeMap;

#[derive(Default)]
pub(crate) struct Counts {
    total: usize,
    of: BTreeMap<String, usize>,
}

impl Counts {
    /// One crash, with all that was under way.
    pub(crate) fn add(&mut self, under_way: impl IntoIterator<Item = String>) {
        self.total += 1;
        for what in under_way {
            *self.of.entry(what).or_default() += 1;
        }
    }

    pub(crate) fn total(&self) -> usize {
        self.total
    }

    /// One line that `tests/soak` finds.
    pub(crate) fn print(&self, kind: &str, unit: &str) {
        let of: Vec<String> = self
            .of
            .iter()
            .map(|(what, count)| format!("{what} {count}"))
            .collect();
        println!(
            "soak {kind}: {} {unit}; under way then: {}",
            self.total,
            of.join(", ")
        );
    }
}
