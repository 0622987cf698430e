//! Taking turns, and what the turns say.

use std::time::{Duration, Instant};

use anyhow::Context as _;

/// A small seeded generator (SplitMix64): all contenders of a round see the same numbers.
pub(crate) struct Rng(u64);

impl Rng {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ 0x5851_f42d_4c95_7f2d)
    }

    /// A number in `0..bound`; `bound` is not 0.
    pub(crate) fn below(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % bound
    }
}

/// One of those that take turns: does its part of a round, gives how long that took.
pub(crate) type Contender<'a> = Box<dyn FnMut(u64) -> anyhow::Result<Duration> + 'a>;

/// Lets the contenders take turns. Gives the seconds of each in each round; the first round is a rehearsal.
pub(crate) fn take_turns(rounds: u64, contenders: &mut [Contender<'_>]) -> anyhow::Result<Vec<Vec<f64>>> {
    let mut seconds = vec![Vec::new(); contenders.len()];
    for round in 0..=rounds {
        let mut order: Vec<usize> = (0..contenders.len()).collect();
        if round % 2 == 1 {
            order.reverse();
        }
        for index in order {
            let (Some(contender), Some(seconds)) = (contenders.get_mut(index), seconds.get_mut(index)) else {
                continue;
            };
            let took = contender(round)?;
            if round > 0 {
                seconds.push(took.as_secs_f64());
            }
        }
    }
    Ok(seconds)
}

/// How long `work` takes.
pub(crate) fn time(work: impl FnOnce() -> anyhow::Result<()>) -> anyhow::Result<Duration> {
    let begun = Instant::now();
    work()?;
    Ok(begun.elapsed())
}

/// How long this thread computes for `work`: for what never waits, a figure that other processes spoil less.
pub(crate) fn compute_time(work: impl FnOnce() -> anyhow::Result<()>) -> anyhow::Result<Duration> {
    let now = || {
        let now = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
        Duration::try_from(now).context("the clock of this thread")
    };
    let begun = now()?;
    work()?;
    Ok(now()?.saturating_sub(begun))
}

/// The value below which `share` (0 to 1) of the samples are. 0 when there is none.
pub(crate) fn quantile(samples: &[f64], share: f64) -> f64 {
    let mut sorted = samples.to_vec();
    sorted.sort_by(f64::total_cmp);
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        clippy::cast_precision_loss,
        reason = "an index into a short list"
    )]
    let at = (sorted.len().saturating_sub(1) as f64 * share).round() as usize;
    sorted.get(at).copied().unwrap_or(0.0)
}

/// How fast `subject` was in units of `base`, round by round.
pub(crate) fn ratios(base: &[f64], subject: &[f64]) -> Vec<f64> {
    base.iter()
        .zip(subject)
        .map(|(base, subject)| base / subject)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_and_ratios() {
        let samples = [5.0, 1.0, 4.0, 2.0, 3.0];
        let of = |share| quantile(&samples, share).to_bits();
        assert_eq!([of(0.0), of(0.5), of(1.0)], [1.0, 3.0, 5.0].map(f64::to_bits));
        assert_eq!(quantile(&[], 0.5).to_bits(), 0.0f64.to_bits());
        assert_eq!(ratios(&[2.0], &[4.0]), [0.5], "half as fast");
    }

    #[test]
    fn turns_are_taken_in_both_orders_and_the_first_is_not_counted() {
        let log = std::cell::RefCell::new(Vec::new());
        let one = |name: char| -> Contender<'_> {
            let log = &log;
            Box::new(move |round| {
                log.borrow_mut().push((name, round));
                Ok(Duration::from_secs(1))
            })
        };
        let seconds = take_turns(2, &mut [one('a'), one('b')]).expect("no error");
        assert_eq!(seconds, [[1.0, 1.0], [1.0, 1.0]]);
        let expected = [('a', 0), ('b', 0), ('b', 1), ('a', 1), ('a', 2), ('b', 2)];
        assert_eq!(log.into_inner(), expected);
    }
}
