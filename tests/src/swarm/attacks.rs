//! Dishonest volunteers. Those that falsify results are honest until they are trusted, which is
//! the worst case: a newcomer's results wait for an audit.

use manyhands_core::engine::RowStats;
use manyhands_core::model::tokenizer::END;
use manyhands_core::run::work::{Output, Values, Work};
use manyhands_core::swarm::ids::{Hash, Signature};
use manyhands_core::swarm::protocol::Request;
use manyhands_core::swarm::unit::{Unit, encode_output};

use super::machine::Machine;
use super::world::{Happening, World};

/// What a dishonest volunteer does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Attack {
    /// Announces random bytes as a result.
    RandomBytes,
    /// Computes nothing: zeros of the right shape.
    Zeros,
    /// Computes under weights of another time.
    OtherWeights,
    /// Computes under the version before, to save a download.
    OldWeights,
    /// Cuts completions off.
    Truncated,
    /// Ends completions early.
    EarlyEnd,
    /// Samples at another temperature.
    OtherTemperature,
    /// Announces somebody's result of another unit.
    Copied,
    /// Claims to have sampled the right answer.
    ForgedReward,
    /// Differentiates in the wrong direction.
    SignFlipped,
    /// Exaggerates a gradient.
    Scaled,
    /// Changes one bit of one sum.
    OneBit,
    /// Makes sums and counts of clamped values as large as the format takes.
    Saturated,
    /// Falsifies one result in twenty.
    Rarely,
    /// With others: all tell the same lies, and confirm those of each other.
    Colluding,
    /// Uploads other bytes than it announced.
    OtherBytes,
    /// Sends its receipts again and again.
    Replayed,
    /// Sends receipts that others signed.
    Stolen,
    /// Takes units and computes nothing.
    Hoarding,
    /// Uploads so slowly that no upload ends.
    SlowLoris,
    /// Announces more bytes than there can be.
    Oversized,
    /// Sends bytes that are no message.
    Malformed,
}

impl Attack {
    /// All of them.
    pub const ALL: [Self; 22] = [
        Self::RandomBytes,
        Self::Zeros,
        Self::OtherWeights,
        Self::OldWeights,
        Self::Truncated,
        Self::EarlyEnd,
        Self::OtherTemperature,
        Self::Copied,
        Self::ForgedReward,
        Self::SignFlipped,
        Self::Scaled,
        Self::OneBit,
        Self::Saturated,
        Self::Rarely,
        Self::Colluding,
        Self::OtherBytes,
        Self::Replayed,
        Self::Stolen,
        Self::Hoarding,
        Self::SlowLoris,
        Self::Oversized,
        Self::Malformed,
    ];
}

/// What becomes of an upload.
pub enum Upload {
    /// These bytes arrive.
    Bytes(Vec<u8>),
    /// It takes for ever.
    Drips,
}

/// The name of a kind of work.
fn kind(work: &Work) -> &'static str {
    match work {
        Work::Sample { .. } | Work::Check { .. } => "samples",
        Work::Score { .. } => "scores",
        Work::Gradient { .. } => "gradient",
    }
}

impl World<'_> {
    /// The attack of a machine, once it has gained trust.
    fn attack(&self, i: usize) -> Option<Attack> {
        self.machines[i].profile.attack.filter(|_| self.is_trusted(i))
    }

    /// The bytes that a machine takes for its result; `None` if it never has any.
    pub(super) fn result(
        &mut self,
        i: usize,
        hash: Hash,
        unit: &Unit,
        honest: Output,
    ) -> Option<Vec<u8>> {
        let bytes = encode_output(&honest);
        let Some(attack) = self.attack(i) else {
            if self.machines[i].profile.attack.is_none() {
                self.newest.insert(kind(&unit.work), bytes.clone());
            }
            return Some(bytes);
        };
        if attack == Attack::Hoarding {
            return None;
        }
        // A unit that is stored was delivered by somebody: this is an audit.
        let audits =
            self.store.blobs.contains_key(&hash) || matches!(unit.work, Work::Check { .. });
        let lie = match attack {
            Attack::RandomBytes => Some((0..64).map(|_| self.random.bits() as u8).collect()),
            Attack::Copied => self.newest.get(kind(&unit.work)).cloned(),
            Attack::OtherWeights => {
                let at = self.random.below(self.history.len() as u64) as usize;
                self.under(unit, self.history[at])
            }
            Attack::OldWeights => {
                let at = self.history.iter().rposition(|w| *w == unit.weights).unwrap_or(0);
                self.under(unit, self.history[at.saturating_sub(1)])
            }
            Attack::OtherTemperature => self.hotter(unit),
            Attack::Colluding if audits && !self.shared_lies.contains(&hash) => None,
            Attack::Rarely if !self.random.chance(0.05) => None,
            _ => falsify(attack, &unit.work, honest).map(|o| encode_output(&o)),
        };
        let lie = lie.filter(|l| *l != bytes);
        if lie.is_some() && !audits {
            self.machines[i].lies += 1;
            if attack == Attack::Colluding {
                self.shared_lies.insert(hash);
            }
        }
        Some(lie.unwrap_or(bytes))
    }

    fn under(&mut self, unit: &Unit, weights: Hash) -> Option<Vec<u8>> {
        let unit = Unit { weights, work: unit.work.clone() };
        Some(encode_output(&self.lab.compute(&unit)))
    }

    fn hotter(&mut self, unit: &Unit) -> Option<Vec<u8>> {
        let mut unit = unit.clone();
        let Work::Sample { temperature_scale: Some(scale), .. } = &mut unit.work else {
            return None;
        };
        *scale = *scale / 4 * 3;
        Some(encode_output(&self.lab.compute(&unit)))
    }

    /// What a machine uploads.
    pub(super) fn tampered(&mut self, i: usize, mut bytes: Vec<u8>) -> Upload {
        match self.attack(i) {
            Some(Attack::OtherBytes) => {
                if let Some(last) = bytes.last_mut() {
                    *last ^= 1;
                }
                self.machines[i].lies += 1;
                Upload::Bytes(bytes)
            }
            Some(Attack::SlowLoris) => Upload::Drips,
            _ => Upload::Bytes(bytes),
        }
    }

    /// The bytes that a machine sends for a request; `None` if it says nothing.
    pub(super) fn forged(&mut self, i: usize, request: &Request) -> Option<Vec<u8>> {
        match (self.attack(i), request) {
            (Some(Attack::Malformed), _) => {
                return Some((0..40).map(|_| self.random.bits() as u8 | 0x80).collect());
            }
            (Some(Attack::Oversized), Request::Receipt { unit, receipt, .. }) => {
                let bytes = u64::MAX;
                let signature = self.sign(i, unit, receipt, bytes);
                let (unit, receipt) = (*unit, *receipt);
                return Some(Request::Receipt { unit, receipt, bytes, signature }.encode());
            }
            (Some(Attack::Replayed), Request::Receipt { .. }) => {
                self.machines[i].sent.push(request.clone());
                for (n, again) in self.machines[i].sent.clone().into_iter().enumerate() {
                    self.after(20 + n as u64, Happening::Inject(i, again));
                }
            }
            (None, Request::Receipt { .. }) => {
                let thief = |m: &Machine| m.profile.attack == Some(Attack::Stolen);
                let thief = self.machines.iter().position(thief);
                if let Some(thief) = thief.filter(|t| *t != i && self.is_trusted(*t)) {
                    self.after(1, Happening::Inject(thief, request.clone()));
                }
            }
            _ => {}
        }
        Some(request.encode())
    }

    fn sign(&self, i: usize, unit: &Hash, receipt: &Hash, bytes: u64) -> Signature {
        let run = self.machines[i].volunteer.as_ref().map(|v| v.run()).unwrap_or(Hash([0; 32]));
        self.machines[i].sign(&run, unit, receipt, bytes)
    }
}

/// A false output of the right shape; `None` where the attack does not apply.
fn falsify(attack: Attack, work: &Work, honest: Output) -> Option<Output> {
    let Output { mut saturations, mut values } = honest;
    let nothing = RowStats { t: 0, total: 1 << 23, moment: 0, greedy: 0 };
    match (attack, &mut values, work) {
        (Attack::Zeros, Values::Samples(samples), _) => {
            for c in samples {
                (c.tokens, c.stats) = (vec![END], vec![nothing]);
            }
        }
        (Attack::Zeros, Values::Scores(stats), _) => {
            stats.iter_mut().flatten().for_each(|s| *s = nothing)
        }
        (Attack::Zeros, Values::Gradient(_, sum), _) => {
            sum.0.iter_mut().flatten().for_each(|g| *g = 0);
        }
        (Attack::Truncated, Values::Samples(samples), _) => {
            for c in samples {
                let n = (c.tokens.len() - 1).max(1);
                c.tokens.truncate(n);
                c.stats.truncate(n);
            }
        }
        (Attack::EarlyEnd | Attack::Rarely, Values::Samples(samples), Work::Sample { .. }) => {
            for c in samples {
                let n = (c.tokens.len() / 2).max(1);
                c.tokens.truncate(n);
                c.stats.truncate(n);
                c.tokens[n - 1] = END;
            }
        }
        (Attack::ForgedReward, Values::Samples(samples), Work::Sample { requests, .. }) => {
            for (c, r) in samples.iter_mut().zip(requests) {
                let digit = r.prompt.iter().rfind(|t| (48..58).contains(*t)).copied().unwrap_or(48);
                c.tokens = vec![u32::from(b'#'), 48 + digit % 2, END];
                c.stats.resize(3, nothing);
            }
        }
        (Attack::Rarely, Values::Scores(stats), _) => {
            stats.iter_mut().flatten().for_each(|s| *s = nothing);
        }
        (Attack::SignFlipped | Attack::Rarely | Attack::Colluding, Values::Gradient(_, sum), _) => {
            sum.0.iter_mut().flatten().for_each(|g| *g = -*g);
        }
        (Attack::Scaled, Values::Gradient(_, sum), _) => {
            sum.0.iter_mut().flatten().for_each(|g| *g *= 64);
        }
        (Attack::OneBit, Values::Gradient(_, sum), _) => *sum.0.first_mut()?.first_mut()? ^= 1,
        (Attack::Saturated, Values::Gradient(_, sum), _) => {
            sum.0.iter_mut().flatten().for_each(|g| *g = i64::MAX);
            saturations.0[0] = (1 << 40) - 1;
        }
        _ => return None,
    }
    Some(Output { saturations, values })
}
