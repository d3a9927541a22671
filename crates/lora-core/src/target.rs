//! Rules that say which layers are adapted. Strings only: no tensors, no model.
//!
//! They are PEFT's rules. Two differences: what matches nothing is a problem here, and patterns are
//! those of the [`regex`] crate, in which look-around and back-references are errors; of what both
//! accept, only `a*+` differs (possessive in Python, a repeated repetition here).

use std::collections::BTreeSet;

use regex::Regex;

use crate::error::{Error, Result};
use crate::problem::ConfigProblem;

/// Which linear layers get an adapter, by their dotted path (`model.layers.0.self_attn.q_proj`).
///
/// Two entries that match one layer, or that are the same, are as good as one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TargetModules {
    /// Every linear layer but the model's output layer.
    AllLinear,
    /// Names: each matches the paths that equal it, or end with a dot and it.
    Names(Vec<String>),
    /// A regular expression that the whole path must match.
    Pattern(String),
}

impl TargetModules {
    /// Targets by name.
    pub fn names<S: Into<String>>(names: impl IntoIterator<Item = S>) -> Self {
        Self::Names(names.into_iter().map(Into::into).collect())
    }
}

/// Which linear layers get no adapter although they are targets.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ExcludeModules {
    /// Names: each matches the paths that equal it, or end with a dot and it.
    Names(Vec<String>),
    /// A regular expression that the whole path must match.
    Pattern(String),
}

impl ExcludeModules {
    /// Exclusions by name.
    pub fn names<S: Into<String>>(names: impl IntoIterator<Item = S>) -> Self {
        Self::Names(names.into_iter().map(Into::into).collect())
    }
}

/// What [`LoraConfig::select`](crate::LoraConfig::select) finds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Selection {
    /// Whether each path is a target, in the paths' order.
    pub selected: Vec<bool>,
    /// Everything that is wrong with the configuration or matches nothing. Never empty when nothing is
    /// selected.
    pub problems: Vec<ConfigProblem>,
}

impl Selection {
    /// The selection, if there are no problems.
    ///
    /// # Errors
    /// With all problems at once.
    pub fn into_result(self) -> Result<Vec<bool>> {
        if self.problems.is_empty() { Ok(self.selected) } else { Err(Error::config(self.problems)) }
    }

    /// The selection for an adapter's file. Its lists may have been made for several kinds of model:
    /// an entry that matches nothing is no problem while others match.
    pub(crate) fn into_result_for_loading(mut self) -> Result<Vec<bool>> {
        if self.selected.contains(&true) {
            self.problems.retain(ConfigProblem::bars_loading);
        }
        self.into_result()
    }
}

/// The fields of a [`LoraConfig`](crate::LoraConfig) that say which layers are targets.
pub(crate) struct Rules<'a> {
    pub target_modules: &'a TargetModules,
    pub exclude_modules: Option<&'a ExcludeModules>,
    pub layers_to_transform: &'a [usize],
    pub layers_pattern: &'a [String],
    pub modules_to_save: &'a [String],
}

impl Rules<'_> {
    /// Applies the rules to the paths of a model's linear layers; `output_layer` is the one that
    /// [`TargetModules::AllLinear`] leaves out.
    pub(crate) fn select(&self, paths: &[&str], output_layer: Option<&str>) -> Selection {
        let mut problems = Vec::new();
        let entries = self.entries(paths, output_layer, &mut problems);
        let excluded = self.excluded(paths, &mut problems);
        let saved = self.under_saved(paths, &mut problems);
        let layers = self.layers(paths, &mut problems);

        // A path that stands in the list as a whole is asked for by itself, in whatever layer it is.
        let in_full = |path: &str| match self.target_modules {
            TargetModules::Names(names) => names.iter().any(|name| name == path),
            _ => false,
        };
        let elsewhere: Vec<bool> = match &layers {
            Some(layers) => {
                let outside = |(path, index): (&&str, &Option<usize>)| {
                    !in_full(path) && index.is_none_or(|index| !layers.wanted.contains(&index))
                };
                paths.iter().zip(&layers.indices).map(outside).collect()
            }
            None => vec![false; paths.len()],
        };
        let selected: Vec<bool> = (0..paths.len())
            .map(|i| {
                entries.iter().any(|(_, matches)| matches[i])
                    && !(excluded[i] || saved[i] || elsewhere[i])
            })
            .collect();

        // Where no wanted index exists, the indices are the problem, and are told below.
        let some_layer = layers.as_ref().is_some_and(|layers| !layers.existing_wanted().is_empty());
        for (entry, matches) in &entries {
            let of_entry = |those: &[bool]| matches.iter().zip(those).any(|(a, b)| *a && *b);
            if of_entry(&selected) || !matches.contains(&true) {
                continue;
            }
            let causes = [
                ("exclude_modules", of_entry(&excluded)),
                ("modules_to_save", of_entry(&saved)),
                ("layers_to_transform", some_layer && of_entry(&elsewhere)),
            ];
            let by: Vec<&str> =
                causes.iter().filter(|(_, acts)| *acts).map(|(setting, _)| *setting).collect();
            if !by.is_empty() {
                problems.push(ConfigProblem::AllLeftOut { entry: entry.clone(), by });
            }
        }
        if let Some(layers) = layers {
            layers.check(paths, &selected, self.layers_pattern, &mut problems);
        }
        Selection { selected, problems }
    }

    /// The entries of the targets as written, and which paths each matches.
    fn entries(
        &self,
        paths: &[&str],
        output_layer: Option<&str>,
        problems: &mut Vec<ConfigProblem>,
    ) -> Vec<(String, Vec<bool>)> {
        const SETTING: &str = "target_modules";
        match self.target_modules {
            TargetModules::AllLinear => {
                let entry = "all-linear".to_owned();
                let matches: Vec<bool> =
                    paths.iter().map(|path| Some(*path) != output_layer).collect();
                if !matches.contains(&true) {
                    problems.push(name_matches_nothing(SETTING, &entry, paths));
                }
                vec![(entry, matches)]
            }
            TargetModules::Names(names) => {
                if names.is_empty() {
                    problems.push(ConfigProblem::setting(SETTING, "at least one name", "none"));
                }
                named(SETTING, names, paths, problems)
            }
            TargetModules::Pattern(pattern) => {
                vec![(pattern.clone(), matching(SETTING, pattern, paths, problems))]
            }
        }
    }

    fn excluded(&self, paths: &[&str], problems: &mut Vec<ConfigProblem>) -> Vec<bool> {
        const SETTING: &str = "exclude_modules";
        match self.exclude_modules {
            None => vec![false; paths.len()],
            Some(ExcludeModules::Names(names)) => {
                let entries = named(SETTING, names, paths, problems);
                (0..paths.len()).map(|i| entries.iter().any(|(_, matches)| matches[i])).collect()
            }
            Some(ExcludeModules::Pattern(pattern)) => matching(SETTING, pattern, paths, problems),
        }
    }

    /// Which paths are modules that train as a whole, or lie in one. PEFT reads the names as regular
    /// expressions without a bracket around them: `a|b` is two halves of a larger expression.
    fn under_saved(&self, paths: &[&str], problems: &mut Vec<ConfigProblem>) -> Vec<bool> {
        let compiled = self.modules_to_save.iter().filter_map(|name| {
            let around = |name: &str| format!(r"^(?:(?:^|.*\.){name}(?:$|\..*))");
            compile("modules_to_save", name, around, problems)
        });
        let compiled: Vec<Regex> = compiled.collect();
        paths.iter().map(|path| compiled.iter().any(|regex| regex.is_match(path))).collect()
    }

    /// The index of each path, if the rules ask for indices.
    fn layers(&self, paths: &[&str], problems: &mut Vec<ConfigProblem>) -> Option<Layers> {
        if self.layers_to_transform.is_empty() {
            if !self.layers_pattern.is_empty() {
                let expected = "layers_to_transform beside it";
                problems.push(ConfigProblem::setting("layers_pattern", expected, "none"));
            }
            return None;
        }
        let other = match self.target_modules {
            TargetModules::Names(_) => None,
            TargetModules::AllLinear => Some("all-linear".to_owned()),
            TargetModules::Pattern(pattern) => {
                Some(format!("the pattern '{pattern}', which can choose layers itself"))
            }
        };
        if let Some(found) = other {
            let expected = "names in target_modules beside it";
            problems.push(ConfigProblem::setting("layers_to_transform", expected, found));
            return None;
        }
        let indices = match self.layers_pattern {
            [] => {
                let default = Regex::new(r"^.*?\.[^.]*\.(?P<index>\d+)\.");
                let default = default.expect("a constant");
                paths.iter().map(|path| index_in(&default, path)).collect()
            }
            patterns => indices_by(patterns, paths, problems),
        };
        Some(Layers { wanted: self.layers_to_transform.iter().copied().collect(), indices })
    }
}

/// `layers_to_transform` against a model.
struct Layers {
    wanted: BTreeSet<usize>,
    /// For each path: which layer of the model it is in.
    indices: Vec<Option<usize>>,
}

impl Layers {
    fn existing(&self) -> BTreeSet<usize> {
        self.indices.iter().flatten().copied().collect()
    }

    fn existing_wanted(&self) -> BTreeSet<usize> {
        self.existing().intersection(&self.wanted).copied().collect()
    }

    fn check(
        &self,
        paths: &[&str],
        selected: &[bool],
        patterns: &[String],
        problems: &mut Vec<ConfigProblem>,
    ) {
        let existing = self.existing();
        let indices: Vec<usize> = self.wanted.difference(&existing).copied().collect();
        // With layers_pattern and no index at all, the pattern is the problem and was told.
        if !indices.is_empty() && (!existing.is_empty() || patterns.is_empty()) {
            let lists = if existing.is_empty() { list_names(paths) } else { Vec::new() };
            let existing = existing.into_iter().collect();
            problems.push(ConfigProblem::NoSuchIndex { indices, existing, lists });
        }
        if !selected.contains(&true) {
            return; // no target anywhere: told already, once for each entry
        }
        let has_target = |wanted: &usize| {
            let with_target = self.indices.iter().zip(selected).filter(|(_, selected)| **selected);
            with_target.into_iter().any(|(index, _)| *index == Some(*wanted))
        };
        let indices: Vec<usize> =
            self.existing_wanted().into_iter().filter(|index| !has_target(index)).collect();
        if !indices.is_empty() {
            problems.push(ConfigProblem::NoTargetAtIndex { indices });
        }
    }
}

/// The number after the first of `patterns` that matches. As PEFT does, an entry goes into a larger
/// expression without a bracket around it.
fn indices_by(
    patterns: &[String],
    paths: &[&str],
    problems: &mut Vec<ConfigProblem>,
) -> Vec<Option<usize>> {
    const SETTING: &str = "layers_pattern";
    let mut compiled = Vec::new();
    for pattern in patterns {
        let around = |pattern: &str| format!(r"^(?:(?:^|.*?\.){pattern}\.(?P<index>\d+)\.)");
        let Some(regex) = compile(SETTING, pattern, around, problems) else { continue };
        if paths.iter().all(|path| index_in(&regex, path).is_none()) {
            let nearest = most_similar(pattern, list_names(paths));
            add(problems, ConfigProblem::NoSuchList { entry: pattern.clone(), nearest });
        }
        compiled.push(regex);
    }
    let first = |path: &&str| compiled.iter().find(|regex| regex.is_match(path));
    paths.iter().map(|path| index_in(first(path)?, path)).collect()
}

fn index_in(regex: &Regex, path: &str) -> Option<usize> {
    regex.captures(path)?.name("index")?.as_str().parse().ok()
}

/// The names that stand before an index in `paths`.
fn list_names(paths: &[&str]) -> Vec<String> {
    let mut names = BTreeSet::new();
    for path in paths {
        let parts: Vec<&str> = path.split('.').collect();
        let is_index = |part: &str| !part.is_empty() && part.bytes().all(|b| b.is_ascii_digit());
        for three in parts.windows(3).filter(|three| is_index(three[1]) && !is_index(three[0])) {
            names.insert(three[0].to_owned());
        }
    }
    names.into_iter().collect()
}

/// `rank_pattern` or `alpha_pattern`: of the keys, the first that matches a path counts. A key is a
/// regular expression that matches the path from its start, or from after one of its dots, to its
/// end.
pub(crate) struct Keys<'a> {
    setting: &'static str,
    keys: Vec<(&'a str, Option<Regex>)>,
}

impl<'a> Keys<'a> {
    pub(crate) fn new(
        setting: &'static str,
        keys: impl Iterator<Item = &'a str>,
        problems: &mut Vec<ConfigProblem>,
    ) -> Self {
        let around = |key: &str| format!(r"^(?:.*\.)?(?:{key})$");
        let keys = keys.map(|key| (key, compile(setting, key, around, problems))).collect();
        Self { setting, keys }
    }

    /// The position of the key that counts for `path`.
    pub(crate) fn first(&self, path: &str) -> Option<usize> {
        let matches = |regex: &Option<Regex>| regex.as_ref().is_some_and(|r| r.is_match(path));
        self.keys.iter().position(|(_, regex)| matches(regex))
    }

    /// Every key must count for a target.
    pub(crate) fn check(
        &self,
        paths: &[&str],
        selected: &[bool],
        problems: &mut Vec<ConfigProblem>,
    ) {
        let setting = self.setting;
        let targets = paths.iter().zip(selected).filter(|(_, selected)| **selected);
        let targets: Vec<&str> = targets.map(|(path, _)| *path).collect();
        let counting: BTreeSet<usize> =
            targets.iter().filter_map(|path| self.first(path)).collect();
        for (position, (key, regex)) in self.keys.iter().enumerate() {
            let Some(regex) = regex else { continue };
            if counting.contains(&position) {
                continue;
            }
            let entry = (*key).to_owned();
            let target = targets.iter().find(|path| regex.is_match(path));
            let layer = paths.iter().find(|path| regex.is_match(path));
            if let Some(first) = target.and_then(|path| self.first(path)) {
                let before = self.keys[first].0.to_owned();
                problems.push(ConfigProblem::NeverFirst { setting, entry, before });
            } else if layer.is_none() {
                add(problems, name_matches_nothing(setting, key, paths));
            } else if let (Some(example), false) = (layer, targets.is_empty()) {
                // Without any target the targets are the problem, and were told.
                let example = (*example).to_owned();
                problems.push(ConfigProblem::NoTarget { setting, entry, example });
            }
        }
    }
}

/// Which paths each name matches; a name that matches none is a problem.
fn named(
    setting: &'static str,
    names: &[String],
    paths: &[&str],
    problems: &mut Vec<ConfigProblem>,
) -> Vec<(String, Vec<bool>)> {
    let mut entries: Vec<(String, Vec<bool>)> = Vec::with_capacity(names.len());
    for name in names {
        if entries.iter().any(|(other, _)| other == name) {
            continue;
        }
        let matches: Vec<bool> = paths.iter().map(|path| is_named(path, name)).collect();
        if !matches.contains(&true) {
            problems.push(name_matches_nothing(setting, name, paths));
        }
        entries.push((name.clone(), matches));
    }
    entries
}

/// Whether `path` equals `name`, or ends with a dot and `name`.
fn is_named(path: &str, name: &str) -> bool {
    path.strip_suffix(name).is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))
}

/// Which paths the pattern matches as a whole; none is a problem.
fn matching(
    setting: &'static str,
    pattern: &str,
    paths: &[&str],
    problems: &mut Vec<ConfigProblem>,
) -> Vec<bool> {
    let around = |pattern: &str| format!("^(?:{pattern})$");
    let Some(whole) = compile(setting, pattern, around, problems) else {
        return vec![false; paths.len()];
    };
    let matches: Vec<bool> = paths.iter().map(|path| whole.is_match(path)).collect();
    if !matches.contains(&true) {
        let part = Regex::new(pattern).ok();
        let in_part = paths.iter().find(|path| part.as_ref().is_some_and(|p| p.is_match(path)));
        let entry = pattern.to_owned();
        problems.push(match in_part.or(paths.first()) {
            Some(example) => {
                ConfigProblem::PatternNoMatch { setting, entry, example: (*example).to_owned() }
            }
            None => ConfigProblem::NoMatch { setting, entry, nearest: Vec::new() },
        });
    }
    matches
}

/// The entry inside a larger expression. It must be an expression by itself too, or else its brackets
/// could pair with those around it.
fn compile(
    setting: &'static str,
    entry: &str,
    around: impl Fn(&str) -> String,
    problems: &mut Vec<ConfigProblem>,
) -> Option<Regex> {
    match Regex::new(entry).and_then(|_| Regex::new(&around(entry))) {
        Ok(regex) => Some(regex),
        Err(error) => {
            // The parser draws a picture; the reason is its last line.
            let text = error.to_string();
            let last = text.lines().next_back().unwrap_or_default();
            let reason = last.trim_start_matches("error: ").to_owned();
            add(problems, ConfigProblem::NoRegex { setting, entry: entry.to_owned(), reason });
            None
        }
    }
}

/// The same entry twice in a list is one problem.
fn add(problems: &mut Vec<ConfigProblem>, problem: ConfigProblem) {
    if !problems.contains(&problem) {
        problems.push(problem);
    }
}

fn name_matches_nothing(setting: &'static str, entry: &str, paths: &[&str]) -> ConfigProblem {
    let last = |path: &&str| path.rsplit('.').next().unwrap_or(path).to_owned();
    let part = format!(".{entry}.");
    let mut layers: Vec<String> = Vec::new();
    for path in paths.iter().filter(|path| format!(".{path}.").contains(&part)) {
        if !layers.contains(&last(path)) {
            layers.push(last(path));
        }
    }
    let entry = entry.to_owned();
    if layers.is_empty() {
        let nearest = nearest(&entry, paths);
        return ConfigProblem::NoMatch { setting, entry, nearest };
    }
    ConfigProblem::HoldsLayers { setting, entry, layers }
}

/// The module names of `paths` that are spelt most like `entry`: as many last parts of each path as
/// the entry has, so that a name of many layers counts once.
fn nearest(entry: &str, paths: &[&str]) -> Vec<String> {
    // A key of rank_pattern may write its dots and ends as a regular expression does.
    let plain = entry.replace('\\', "");
    let plain = plain.trim_start_matches('^').trim_end_matches('$');
    let parts = plain.split('.').count();
    let ends = paths.iter().map(|path| {
        let start = path.rmatch_indices('.').nth(parts - 1).map_or(0, |(dot, _)| dot + 1);
        path[start..].to_owned()
    });
    most_similar(plain, ends.collect())
}

/// At most eight of `names`, the most similar first.
fn most_similar(entry: &str, mut names: Vec<String>) -> Vec<String> {
    names.sort_unstable();
    names.dedup();
    names.sort_by_cached_key(|name| edit_distance(entry, name));
    names.truncate(8);
    names
}

/// Levenshtein distance in characters.
fn edit_distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, from) in a.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, to) in b.iter().enumerate() {
            let replace = diagonal + usize::from(from != *to);
            diagonal = row[j + 1];
            row[j + 1] = replace.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[b.len()]
}
