//! Replays the fuzz corpus on stable Rust: the seeds, every kept input of `tests/fuzz/corpus`, and mutations of both. No input
//! may panic a parser. `tests/fuzz/run` searches further, with coverage.

#![expect(
    clippy::indexing_slicing,
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    reason = "seeds are written by hand, and a wrong one must fail loudly"
)]

#[path = "../fuzz/targets.rs"]
mod targets;

use std::fs;
use std::path::Path;

/// Mutations of each input; a second or two for all targets together.
const MUTATIONS: u64 = 4000;

/// SplitMix64: reproducible, and good enough to choose bytes.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, n: usize) -> usize {
        usize::try_from(self.next() % n.max(1) as u64).unwrap()
    }
}

fn mutate(input: &[u8], random: &mut Random) -> Vec<u8> {
    let mut bytes = input.to_vec();
    for _ in 0..=random.below(4) {
        let at = random.below(bytes.len());
        match random.below(6) {
            0 => bytes.truncate(at),
            1 => bytes.insert(at.min(bytes.len()), random.next() as u8),
            2 if !bytes.is_empty() => bytes[at] ^= 1 << random.below(8),
            3 if !bytes.is_empty() => bytes[at] = [0, 1, 0x7f, 0x80, 0xff][random.below(5)],
            4 => bytes.extend_from_slice(&input[..at.min(input.len())]),
            _ if bytes.len() >= 4 => {
                let at = random.below(bytes.len() - 3);
                bytes[at..at + 4].copy_from_slice(&[0xff; 4]);
            }
            _ => {}
        }
    }
    bytes
}

fn kept(name: &str) -> Vec<Vec<u8>> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("fuzz/corpus")
        .join(name);
    let Ok(entries) = fs::read_dir(folder) else {
        return Vec::new();
    };
    entries
        .map(|entry| fs::read(entry.unwrap().path()).unwrap())
        .collect()
}

#[test]
fn no_input_of_the_corpus_panics_a_parser() {
    for target in targets::ALL {
        let seeds = (target.seeds)();
        assert!(!seeds.is_empty(), "{} has seeds", target.name);
        let inputs: Vec<_> = seeds
            .into_iter()
            .chain(kept(target.name))
            .chain([Vec::new()])
            .collect();
        for (number, input) in inputs.iter().enumerate() {
            (target.run)(input);
            let mut random = Random(number as u64);
            for round in 0..MUTATIONS {
                let mutated = mutate(input, &mut random);
                let run = std::panic::catch_unwind(|| (target.run)(&mutated));
                assert!(
                    run.is_ok(),
                    "{} input {number} mutation {round}: {mutated:02x?}",
                    target.name
                );
            }
        }
        println!(
            "story fuzz corpus: {}: {} inputs, {} mutations",
            target.name,
            inputs.len(),
            inputs.len() as u64 * MUTATIONS
        );
    }
}
