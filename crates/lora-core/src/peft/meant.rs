//! What an adapter's config means in a checkpoint, of whose layers only names and shapes are known.

use std::collections::{BTreeMap, BTreeSet};

use super::keys::{Part, Slot};
use crate::config::{LoraConfig, Patterns, TrainedBias};
use crate::error::{Error, Result};
use crate::inject::{self, second_entry};
use crate::problem::ConfigProblem;
use crate::target::{Saved, Selection, TargetModules, ends_as, trains_whole};

/// What the config means to change in a checkpoint.
pub(super) struct Meant<'a> {
    config: &'a LoraConfig,
    patterns: Patterns<'a>,
    saved: Saved<'a>,
    /// The targets; `None` for all linear layers: which those are, a checkpoint does not say.
    targets: Option<BTreeSet<&'a str>>,
}

impl<'a> Meant<'a> {
    pub(super) fn new(config: &'a LoraConfig, paths: &'a BTreeSet<String>) -> Result<Self> {
        let mut unusable = Vec::new();
        let patterns = Patterns::new(config, &mut unusable);
        let saved = Saved::new(&config.modules_to_save, &mut unusable);
        if !unusable.is_empty() {
            return Err(Error::config(unusable));
        }
        let paths: Vec<&str> = paths.iter().map(String::as_str).collect();
        let Selection { selected, problems } = config.select(&paths, None);
        // An expression of Python's own, with looks ahead for instance, leaves it to the file.
        let is_known = !problems.iter().any(ConfigProblem::is_no_regex)
            && config.target_modules != TargetModules::AllLinear;
        let targets: Option<BTreeSet<&str>> = is_known.then(|| {
            let selected = paths.iter().zip(selected).filter(|(_, selected)| *selected);
            selected.map(|(path, _)| *path).collect()
        });
        let mut problems = saved.clashes(targets.iter().flatten().copied());
        problems.extend(paths.iter().filter_map(|path| second_entry(config, path)));
        match problems.is_empty() {
            true => Ok(Self { config, patterns, saved, targets }),
            false => Err(Error::config(problems)),
        }
    }

    /// What the layer gets of the `parts` that the file has for it, and which of these that takes.
    pub(super) fn part(
        &self,
        path: &str,
        parts: &BTreeSet<Part>,
        slot: &Slot,
    ) -> Option<(inject::Part, Vec<Part>)> {
        let has_factors = parts.contains(&Part::A) || parts.contains(&Part::B);
        let is_target = self.targets.as_ref().is_none_or(|targets| targets.contains(path));
        let tokens = tokens_of(self.config, path);
        let bias = slot.has_bias().then_some(Part::Bias);
        if has_factors && is_target {
            let low_rank = self.patterns.resolve(path);
            let own = [
                (true, Part::A),
                (true, Part::B),
                (true, Part::BaseWeight),
                (low_rank.lora_bias, Part::LoraBias),
                (low_rank.dora, Part::Magnitude),
                (low_rank.train_bias && slot.has_bias(), Part::BaseBias),
            ];
            let own = own.into_iter().filter(|(is_read, _)| *is_read).map(|(_, part)| part);
            Some((inject::Part::LowRank(low_rank), own.collect()))
        } else if parts.contains(&Part::Tokens) && !tokens.is_empty() {
            Some((inject::Part::Tokens(tokens), vec![Part::Tokens, Part::BaseWeight]))
        } else if parts.contains(&Part::Weight) && self.saved.trains(path).is_some() {
            Some((inject::Part::Whole, [Part::Weight].into_iter().chain(bias).collect()))
        } else if parts.contains(&Part::Bias) && self.config.bias == TrainedBias::All {
            Some((inject::Part::Bias, bias.into_iter().collect()))
        } else {
            None
        }
    }

    /// The targets for which the file has nothing, and what trains in full where it has nothing for any that is
    /// meant so: a checkpoint may hold layers beside those of the model. So of biases only those count whose
    /// path begins as that of a layer of the file does (`model`, and not `v_head`).
    pub(super) fn absent<'p, T>(
        &self,
        paths: &'p BTreeSet<String>,
        layers: &'p BTreeMap<String, T>,
        is_bias: impl Fn(&T) -> bool,
        has_bias: impl Fn(&str) -> bool,
    ) -> Vec<String> {
        let targets = self.targets.iter().flatten().filter(|path| !layers.contains_key(**path));
        let targets = targets.map(|path| format!("{path} is a target"));
        let is_absent = |is_meant: &dyn Fn(&str) -> bool| {
            paths.iter().any(|path| is_meant(path)) && !layers.keys().any(|path| is_meant(path))
        };
        let names = self.config.modules_to_save.iter();
        let wholes = names.filter(|name| is_absent(&|path| trains_whole(path, name)));
        let wholes = wholes.map(|name| format!("{name} trained as a whole"));
        let entries = self.config.trainable_tokens.iter().map(|(name, _)| name);
        let tokens = entries.filter(|name| is_absent(&|path| ends_as(path, name)));
        let tokens = tokens.map(|name| format!("{name} has trained tokens"));
        let start = |path: &'p String| path.split_once('.').map(|(start, _)| start);
        let starts: BTreeSet<Option<&str>> = layers.keys().map(start).collect();
        let mut biased = paths.iter().filter(|path| {
            let is_other = !layers.contains_key(*path) && self.saved.trains(path).is_none();
            is_other && starts.contains(&start(path)) && has_bias(path)
        });
        let has_biases = layers.values().any(is_bias);
        let biases = (self.config.bias == TrainedBias::All && !has_biases).then(|| biased.next());
        let biases = biases.flatten().map(|path| format!("{path} has a trained bias"));
        let nothing = |what| format!("{what}, and the file has nothing for it");
        targets.chain(wholes).chain(tokens).chain(biases).map(nothing).collect()
    }
}

/// The token ids whose rows of the embedding at `path` were trained.
fn tokens_of(config: &LoraConfig, path: &str) -> Vec<usize> {
    let own = config.trainable_tokens.iter().find(|(name, _)| ends_as(path, name));
    own.map(|(_, ids)| ids.clone()).unwrap_or_default()
}
