//! The table for people and the JSON for scripts.

use serde_json::{Value, json};

use crate::measure::{quantile, ratios};

/// What was measured, in the order in which it was.
#[derive(Default)]
pub(crate) struct Report {
    rows: Vec<Value>,
    missed: usize,
}

impl Report {
    /// A heading for the rows that follow.
    pub(crate) fn section(&mut self, name: &str) {
        println!("\n{name}");
        self.rows.push(json!({ "section": name }));
    }

    /// `subject` against `base`, both in seconds per round; `operations` is how many each did per round.
    pub(crate) fn ratio(
        &mut self,
        name: &str,
        of: &str,
        base: &[f64],
        subject: &[f64],
        operations: f64,
        target: Option<f64>,
    ) {
        let ratios = ratios(base, subject);
        let [low, median, high] = [0.25, 0.5, 0.75].map(|share| quantile(&ratios, share));
        let rate = operations / quantile(subject, 0.5);
        let verdict = target.map(|target| {
            if median >= target {
                format!("target {target:.2}: met")
            } else {
                self.missed += 1;
                format!("target {target:.2}: MISSED")
            }
        });
        println!(
            "  {name:<44} {median:5.2} of {of:<18} ({low:.2} .. {high:.2})  {rate:>9.0}/s  {}",
            verdict.unwrap_or_default()
        );
        self.rows.push(json!({
            "name": name, "of": of, "median": median, "quartiles": [low, high], "rounds": ratios.len(),
            "per_second": rate, "target": target,
        }));
    }

    /// Times of single calls, in seconds.
    pub(crate) fn latency(&mut self, name: &str, seconds: &[f64], p99_target_ms: Option<f64>) {
        let ms = |share| quantile(seconds, share) * 1000.0;
        let [p50, p99, worst] = [0.5, 0.99, 1.0].map(ms);
        let verdict = p99_target_ms.map(|target| {
            if p99 <= target {
                format!("target p99 {target} ms: met")
            } else {
                self.missed += 1;
                format!("target p99 {target} ms: MISSED")
            }
        });
        println!(
            "  {name:<44} p50 {p50:8.2} ms  p99 {p99:8.2} ms  worst {worst:8.2} ms  of {}  {}",
            seconds.len(),
            verdict.unwrap_or_default()
        );
        self.rows.push(json!({
            "name": name, "p50_ms": p50, "p99_ms": p99, "worst_ms": worst, "samples": seconds.len(),
            "p99_target_ms": p99_target_ms,
        }));
    }

    /// One plain figure.
    pub(crate) fn figure(&mut self, name: &str, value: u64, unit: &str) {
        println!("  {name:<44} {value} {unit}");
        self.rows
            .push(json!({ "name": name, "value": value, "unit": unit }));
    }

    /// How many targets were missed.
    pub(crate) fn missed(&self) -> usize {
        self.missed
    }

    /// Everything as one document.
    pub(crate) fn json(self, settings: &Value) -> Value {
        json!({ "settings": settings, "missed": self.missed, "rows": self.rows })
    }
}
