//! Random messages for tests: every record can be rolled, so that no message is forgotten in the round-trip tests.

use super::Capabilities;
use crate::error::{ErrorCode, Refusal};
use crate::ident::{AgentId, LunId, SessionId, SetId, ShadowId};

/// A small deterministic generator (splitmix64): a test names its seed.
pub(crate) struct Dice(pub(crate) u64);

impl Dice {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// 0 .. `limit` - 1.
    pub(crate) fn below(&mut self, limit: usize) -> usize {
        usize::try_from(self.next() % u64::try_from(limit).unwrap()).unwrap()
    }
}

/// Anything that can be rolled.
pub(crate) trait Sample: Sized {
    fn sample(dice: &mut Dice) -> Self;
}

macro_rules! sample_integers {
    ($($ty:ty),*) => {$(
        impl Sample for $ty {
            fn sample(dice: &mut Dice) -> Self {
                #[expect(clippy::cast_possible_truncation, reason = "any bits do")]
                let value = dice.next() as $ty;
                value
            }
        }
    )*};
}
sample_integers!(u8, u16, u32);

impl Sample for u64 {
    fn sample(dice: &mut Dice) -> Self {
        dice.next()
    }
}

impl Sample for bool {
    fn sample(dice: &mut Dice) -> Self {
        dice.below(2) == 1
    }
}

impl Sample for String {
    fn sample(dice: &mut Dice) -> Self {
        let alphabet = ['a', 'Z', '0', '/', ' ', 'ü', '漢', '\n'];
        let len = dice.below(12);
        (0..len).map(|_| alphabet[dice.below(alphabet.len())]).collect()
    }
}

impl<T: Sample> Sample for Option<T> {
    fn sample(dice: &mut Dice) -> Self {
        bool::sample(dice).then(|| T::sample(dice))
    }
}

impl<T: Sample> Sample for Vec<T> {
    fn sample(dice: &mut Dice) -> Self {
        let len = dice.below(4);
        (0..len).map(|_| T::sample(dice)).collect()
    }
}

impl<const N: usize> Sample for [u8; N] {
    fn sample(dice: &mut Dice) -> Self {
        std::array::from_fn(|_| u8::sample(dice))
    }
}

macro_rules! sample_newtypes {
    ($($name:ident),*) => {$(
        impl Sample for $name {
            fn sample(dice: &mut Dice) -> Self {
                Self(Sample::sample(dice))
            }
        }
    )*};
}
sample_newtypes!(
    AgentId,
    SessionId,
    SetId,
    ShadowId,
    LunId,
    Capabilities,
    ErrorCode
);

impl Sample for Refusal {
    fn sample(dice: &mut Dice) -> Self {
        Self {
            code: Sample::sample(dice),
            text: Sample::sample(dice),
            subject: Sample::sample(dice),
            retry_after_ms: Sample::sample(dice),
            session: Sample::sample(dice),
        }
    }
}
