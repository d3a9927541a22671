//! Rules that say which layers are adapted. Strings only: no tensors, no model.
//!
//! They are PEFT's rules, with two differences. What matches nothing is a problem here, and so is a setting
//! without effect. And patterns are those of the [`regex`] crate and not Python's: look-around, back-references,
//! `\Z` and `{,n}` are errors. Written alike and read otherwise are `a*+` (possessive in Python, a
//! repeated repetition here) and `&&`, `--`, `~~` or `[` inside of a character class (operations on
//! sets here).

use std::collections::BTreeSet;

use regex::{Regex, RegexBuilder};

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
        let fits = self.selected.contains(&true);
        let is_no_match =
            |problem: &ConfigProblem| !matches!(problem, ConfigProblem::Setting { .. });
        self.problems.retain(|problem| problem.bars_loading() || (!fits && is_no_match(problem)));
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
        let modules = Saved::new(self.modules_to_save, &mut problems);
        let saved: Vec<bool> = paths.iter().map(|path| modules.excludes(path)).collect();
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

/// The modules that train as a whole.
pub(crate) struct Saved<'a> {
    names: Vec<(&'a str, Option<Regex>)>,
}

impl<'a> Saved<'a> {
    /// PEFT reads the names as regular expressions without a bracket around them: `a|b` is two halves
    /// of a larger expression.
    pub(crate) fn new(names: &'a [String], problems: &mut Vec<ConfigProblem>) -> Self {
        let around = |name: &str| format!(r"^(?:(?:^|.*\.){name}(?:$|\..*))");
        let mut compiled =
            |name: &'a String| (name.as_str(), compile(SAVED, name, around, problems));
        Self { names: names.iter().map(&mut compiled).collect() }
    }

    /// Whether the layer at `path` can be no target, since it is one of them or lies in one.
    fn excludes(&self, path: &str) -> bool {
        self.names.iter().any(|(_, regex)| regex.as_ref().is_some_and(|r| r.is_match(path)))
    }

    /// The name for which the layer at `path` trains as a whole.
    pub(crate) fn trains(&self, path: &str) -> Option<&'a str> {
        self.names.iter().map(|(name, _)| *name).find(|name| trains_whole(path, name))
    }

    /// A problem for each name for which one of the targets would train as a whole.
    pub(crate) fn clashes<'p>(&self, targets: impl Iterator<Item = &'p str>) -> Vec<ConfigProblem> {
        let mut problems: Vec<(&str, ConfigProblem)> = Vec::new();
        for path in targets {
            let Some(name) = self.trains(path) else { continue };
            if problems.iter().all(|(other, _)| *other != name) {
                let expected = "names that mean no target";
                let found = format!("'{name}', which means '{path}' too");
                problems.push((name, ConfigProblem::setting(SAVED, expected, found)));
            }
        }
        problems.into_iter().map(|(_, problem)| problem).collect()
    }

    /// A problem for each name that no path has.
    pub(crate) fn unmatched(&self, paths: &[&str]) -> Vec<ConfigProblem> {
        let unmatched = self.names.iter().filter(|(name, regex)| {
            regex.is_some() && !paths.iter().any(|path| trains_whole(path, name)) // else told already
        });
        unmatched.map(|(name, _)| name_matches_nothing(SAVED, name, paths)).collect()
    }
}

const SAVED: &str = "modules_to_save";

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
pub(crate) fn is_named(path: &str, name: &str) -> bool {
    path.strip_suffix(name).is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))
}

/// Whether PEFT trains what lies at `path` for an entry `name` of `modules_to_save` or
/// `trainable_token_indices`: it compares letters and no dots, so that `head` means `xhead` too.
///
/// Source: PEFT 0.21.2, `utils/other.py`, `_set_trainable`.
pub(crate) fn ends_as(path: &str, name: &str) -> bool {
    !name.is_empty() && path.ends_with(name)
}

/// Whether the layer at `path` trains as a whole for an entry of `modules_to_save`: it [ends so](ends_as), or
/// a module that it lies in does.
pub(crate) fn trains_whole(path: &str, name: &str) -> bool {
    containers(path).chain([path]).any(|module| ends_as(module, name))
}

/// The modules that `path` lies in: `a` and `a.b` for `a.b.c`.
pub(crate) fn containers(path: &str) -> impl Iterator<Item = &str> {
    path.match_indices('.').map(|(dot, _)| &path[..dot])
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
        let part = regex(pattern).ok();
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
    match regex(entry).and_then(|_| regex(&around(entry))) {
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

fn regex(text: &str) -> Result<Regex, regex::Error> {
    /// Bytes at most: room for the paths of twenty thousand layers, which a saved adapter may list in one.
    const LARGEST: usize = 1 << 27;
    RegexBuilder::new(text).size_limit(LARGEST).build()
}

/// The same entry twice in a list is one problem.
fn add(problems: &mut Vec<ConfigProblem>, problem: ConfigProblem) {
    if !problems.contains(&problem) {
        problems.push(problem);
    }
}

pub(crate) fn name_matches_nothing(
    setting: &'static str,
    entry: &str,
    paths: &[&str],
) -> ConfigProblem {
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
pub(crate) fn most_similar(entry: &str, mut names: Vec<String>) -> Vec<String> {
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::LoraConfig;

    const PATHS: [&str; 9] = [
        "model.layers.0.self_attn.q_proj",
        "model.layers.0.self_attn.k_proj",
        "model.layers.0.mlp.up_proj",
        "model.layers.1.self_attn.q_proj",
        "model.layers.1.self_attn.k_proj",
        "model.layers.1.mlp.up_proj",
        "model.layers.2.self_attn.q_proj",
        "model.layers.2.self_attn.xq_proj",
        "lm_head",
    ];

    fn with(target_modules: TargetModules) -> LoraConfig {
        LoraConfig { target_modules, ..LoraConfig::new(8, 16.0) }
    }

    fn names(names: &[&str]) -> LoraConfig {
        with(TargetModules::names(names.iter().copied()))
    }

    fn pattern(pattern: &str) -> LoraConfig {
        with(TargetModules::Pattern(pattern.to_owned()))
    }

    fn strings(names: &[&str]) -> Vec<String> {
        names.iter().map(|name| (*name).to_owned()).collect()
    }

    fn keys<T: Copy>(keys: &[(&str, T)]) -> Vec<(String, T)> {
        keys.iter().map(|(key, value)| ((*key).to_owned(), *value)).collect()
    }

    fn chosen(config: &LoraConfig) -> Vec<usize> {
        let selected = config.select(&PATHS, Some("lm_head")).into_result().unwrap();
        (0..PATHS.len()).filter(|i| selected[*i]).collect()
    }

    /// What a reader sees of all that is wrong.
    #[track_caller]
    fn says(config: &LoraConfig, sentence: &str) {
        let error = config.select(&PATHS, Some("lm_head")).into_result().unwrap_err();
        assert_eq!(error.to_string(), sentence);
    }

    #[test]
    fn a_name_matches_a_whole_last_part_only() {
        assert_eq!(chosen(&names(&["q_proj"])), [0, 3, 6]);
        assert_eq!(chosen(&names(&["lm_head"])), [8]);
        assert_eq!(chosen(&names(&["1.self_attn.q_proj", "q_proj", "q_proj"])), [0, 3, 6]);
    }

    #[test]
    fn all_linear_leaves_out_the_output_layer() {
        assert_eq!(chosen(&LoraConfig::new(8, 16.0)), [0, 1, 2, 3, 4, 5, 6, 7]);
    }

    #[test]
    fn a_pattern_must_match_the_whole_path() {
        assert_eq!(chosen(&pattern(r".*\.0\..*_proj")), [0, 1, 2]);
        assert_eq!(chosen(&pattern("lm|lm_head")), [8]);
        says(
            &pattern("k_proj"),
            "target_modules: the pattern 'k_proj' matches no layer of this model; it must \
             match a whole path, such as model.layers.0.self_attn.k_proj",
        );
    }

    #[test]
    fn layers_are_taken_by_index_except_whole_paths() {
        let mut config = names(&["q_proj", "model.layers.0.mlp.up_proj"]);
        config.layers_to_transform = vec![2, 1];
        assert_eq!(chosen(&config), [2, 3, 6]);
        config.layers_pattern = strings(&["layers"]);
        assert_eq!(chosen(&config), [2, 3, 6]);
        config.layers_pattern = strings(&["h", "layers"]);
        says(
            &config,
            "layers_pattern: 'h' is no list of layers in this model; the nearest names are layers",
        );
    }

    #[test]
    fn exclusion_wins() {
        let mut config = names(&["q_proj", "k_proj"]);
        config.exclude_modules = Some(ExcludeModules::names(["0.self_attn.q_proj"]));
        assert_eq!(chosen(&config), [1, 3, 4, 6]);
        config.exclude_modules = Some(ExcludeModules::Pattern(r".*\.1\..*|lm_head".to_owned()));
        assert_eq!(chosen(&config), [0, 1, 6]);
        config.exclude_modules = None;
        config.modules_to_save = strings(&["layers.0"]);
        assert_eq!(chosen(&config), [3, 4, 6]);
    }

    #[test]
    fn an_entry_that_matches_nothing_is_told_even_if_others_match() {
        says(
            &names(&["q_proj", "k_porj", "k_porj"]),
            "target_modules: 'k_porj' matches no layer of this model; the nearest names are \
             k_proj, q_proj, up_proj, xq_proj, lm_head",
        );
        says(
            &names(&["q_proj", "mlp.up_porj"]),
            "target_modules: 'mlp.up_porj' matches no layer of this model; the nearest \
             names are mlp.up_proj, lm_head, self_attn.k_proj, self_attn.q_proj, self_attn.xq_proj",
        );
        says(
            &names(&["q_proj", "self_attn"]),
            "target_modules: 'self_attn' matches no layer of this model, but a part of it; \
             name the layers in it: q_proj, k_proj, xq_proj",
        );
        let mut config = names(&["q_proj"]);
        config.exclude_modules = Some(ExcludeModules::names(["lm_haed"]));
        says(
            &config,
            "exclude_modules: 'lm_haed' matches no layer of this model; the nearest names \
             are lm_head, k_proj, q_proj, up_proj, xq_proj",
        );
        config.exclude_modules = Some(ExcludeModules::Pattern("lm".to_owned()));
        says(
            &config,
            "exclude_modules: the pattern 'lm' matches no layer of this model; it must \
             match a whole path, such as lm_head",
        );
        let nothing = LoraConfig::new(8, 16.0).select::<&str>(&[], None);
        assert_eq!(
            nothing.into_result().unwrap_err().to_string(),
            "target_modules: 'all-linear' matches no layer of this model; the model has no \
             adaptable layer"
        );
    }

    #[test]
    fn what_is_asked_for_and_left_out_again_is_told() {
        let mut config = names(&["q_proj", "k_proj"]);
        config.exclude_modules = Some(ExcludeModules::names(["k_proj"]));
        says(
            &config,
            "target_modules: all layers that 'k_proj' matches are left out by exclude_modules",
        );
        config.target_modules = TargetModules::AllLinear;
        config.exclude_modules = Some(ExcludeModules::Pattern(".*".to_owned()));
        says(
            &config,
            "target_modules: all layers that 'all-linear' matches are left out by exclude_modules",
        );
        config = names(&["q_proj", "k_proj", "1.mlp.up_proj"]);
        config.exclude_modules = Some(ExcludeModules::names(["0.self_attn.k_proj"]));
        config.layers_to_transform = vec![0];
        says(
            &config,
            "2 problems in the settings: (1) target_modules: all layers that 'k_proj' matches are \
             left out by exclude_modules and layers_to_transform; (2) target_modules: all layers \
             that '1.mlp.up_proj' matches are left out by layers_to_transform",
        );
    }

    #[test]
    fn indices_must_exist_and_hold_a_target() {
        let mut config = names(&["k_proj"]);
        config.layers_to_transform = vec![1, 7, 3, 8];
        says(&config, "layers_to_transform: this model has no layer 3, 7-8; it has 0-2");
        config.layers_to_transform = vec![1, 2];
        says(&config, "layers_to_transform: no target is in layer 2");
        config.layers_to_transform = vec![3];
        says(&config, "layers_to_transform: this model has no layer 3; it has 0-2");
        let at_the_top = config.select(&["layers.0.k_proj", "layers.1.k_proj"], None);
        assert_eq!(
            at_the_top.into_result().unwrap_err().to_string(),
            "layers_to_transform: this model has no layer 3; name the list that holds its layers \
             in layers_pattern: layers"
        );
        assert_eq!(
            config.select(&["k_proj"], None).problems.last().unwrap().to_string(),
            "layers_to_transform: this model has no layer 3; its layers are in no list"
        );
    }

    #[test]
    fn settings_that_contradict_each_other_are_told() {
        let mut config = pattern(".*q_proj");
        config.layers_to_transform = vec![0];
        says(
            &config,
            "layers_to_transform: expected names in target_modules beside it, found the pattern \
             '.*q_proj', which can choose layers itself",
        );
        config.target_modules = TargetModules::AllLinear;
        says(
            &config,
            "layers_to_transform: expected names in target_modules beside it, found all-linear",
        );
        config = names(&["q_proj"]);
        config.layers_pattern = strings(&["layers"]);
        says(&config, "layers_pattern: expected layers_to_transform beside it, found none");
        says(&names(&[]), "target_modules: expected at least one name, found none");
    }

    #[test]
    fn every_key_must_count_for_a_target() {
        let mut config = names(&["q_proj", "xq_proj"]);
        config.rank_pattern = keys(&[("q.proj", 4), (".*xq_proj", 2)]);
        assert_eq!(chosen(&config), [0, 3, 6, 7]);
        config.rank_pattern = keys(&[("k_proj", 4)]);
        says(
            &config,
            "rank_pattern: 'k_proj' matches only layers that are no targets, such as \
             model.layers.0.self_attn.k_proj",
        );
        config.rank_pattern = keys(&[("q_proj", 4), ("0.self_attn.q_proj", 2)]);
        says(
            &config,
            "rank_pattern: '0.self_attn.q_proj' never counts, since the first key that matches \
             does; put it before 'q_proj', or remove it",
        );
        config.rank_pattern = keys(&[("q_proj", 4), ("q_proj", 2)]);
        says(
            &config,
            "rank_pattern: 'q_proj' never counts, since the first key that matches does; put it \
             before 'q_proj', or remove it",
        );
        config.rank_pattern = Vec::new();
        config.alpha_pattern = keys(&[(r"^mlp\.up_porj$", 4.0)]);
        says(
            &config,
            r"alpha_pattern: '^mlp\.up_porj$' matches no layer of this model; the nearest names are mlp.up_proj, lm_head, self_attn.k_proj, self_attn.q_proj, self_attn.xq_proj",
        );
    }

    #[test]
    fn expressions_that_cannot_be_used_are_told() {
        for (expression, reason) in [
            ("(", "unclosed group"),
            ("(?=x)q", "look-around, including look-ahead and look-behind, is not supported"),
            (r"(q)_\1", "backreferences are not supported"),
            (r"q_proj\Z", "unrecognized escape sequence"),
            ("x)(y", "unopened group"),
        ] {
            let end = format!(": '{expression}' cannot be used as a regular expression: {reason}");
            says(&pattern(expression), &format!("target_modules{end}"));
            let mut config = names(&["q_proj"]);
            config.rank_pattern = keys(&[(expression, 4)]);
            says(&config, &format!("rank_pattern{end}"));
            assert!(config.resolve("q_proj").is_err());
            config = names(&["q_proj"]);
            config.layers_to_transform = vec![0];
            config.layers_pattern = strings(&[expression, "layers"]);
            says(&config, &format!("layers_pattern{end}"));
            config = names(&["q_proj"]);
            config.modules_to_save = strings(&[expression]);
            says(&config, &format!("modules_to_save{end}"));
            config.modules_to_save = Vec::new();
            config.exclude_modules = Some(ExcludeModules::Pattern(expression.to_owned()));
            says(&config, &format!("exclude_modules{end}"));
        }
    }

    /// As an adapter of experts is saved where their names would mean other layers too.
    #[test]
    fn a_pattern_may_list_all_layers_of_a_large_model() {
        let paths = (0..48 * 128 * 3).map(|layer| {
            let (block, expert) = (layer / 384, layer / 3 % 128);
            let name = ["gate_proj", "up_proj", "down_proj"][layer % 3];
            format!("model.layers.{block}.mlp.experts.{expert}.{name}")
        });
        let paths: Vec<String> = paths.collect();
        let escaped: Vec<String> = paths.iter().map(|path| regex::escape(path)).collect();
        let some = [&paths[0], &paths[paths.len() - 1], "head"];
        let selection = pattern(&format!("(?:{})", escaped.join("|"))).select(&some, None);
        assert_eq!(selection.into_result().unwrap(), [true, true, false]);
    }

    #[test]
    fn all_problems_are_told_at_once() {
        let mut config = names(&["q_porj", "up_proj"]);
        config.exclude_modules = Some(ExcludeModules::names(["lm_haed"]));
        config.layers_to_transform = vec![0, 30, 31];
        config.rank_pattern = keys(&[("up_proj", 0), ("k_proj", 2)]);
        config.alpha_pattern = keys(&[("(", 2.0)]);
        config.alpha = f64::NAN;
        says(
            &config,
            "7 problems in the settings: \
             (1) target_modules: 'q_porj' matches no layer of this model; the nearest names \
             are q_proj, k_proj, xq_proj; \
             (2) exclude_modules: 'lm_haed' matches no layer of this model; the nearest \
             names are lm_head, k_proj, q_proj; \
             (3) layers_to_transform: this model has no layer 30-31; it has 0-2; \
             (4) alpha_pattern: '(' cannot be used as a regular expression: unclosed group; \
             (5) rank_pattern: 'k_proj' matches only layers that are no targets, such as \
             model.layers.0.self_attn.k_proj; \
             (6) alpha: expected a finite number above 0, found NaN; \
             (7) rank_pattern: expected at least 1, found 0 at 'up_proj'",
        );
    }

    #[test]
    fn an_adapters_file_may_name_what_the_model_does_not_have() {
        let load = |config: &LoraConfig| {
            config.select(&PATHS, Some("lm_head")).into_result_for_loading().is_ok()
        };
        let mut config = names(&["q_proj", "query_key_value"]);
        config.exclude_modules = Some(ExcludeModules::names(["dense"]));
        config.layers_to_transform = vec![0, 40];
        config.layers_pattern = strings(&["h", "layers"]);
        config.rank_pattern = keys(&[("dense", 2)]);
        assert!(load(&config));
        config.layers_to_transform = Vec::new();
        assert!(load(&config));
        config.rank_pattern = keys(&[("(", 2)]);
        assert!(!load(&config));
        assert!(!load(&names(&["query_key_value"])));
        config = pattern(".*q_proj");
        config.layers_to_transform = vec![0];
        assert!(!load(&config));
    }

    #[test]
    fn where_python_would_read_an_expression_otherwise() {
        let matches = |expression: &str| pattern(expression).select(&["aaa"], None).selected[0];
        // Possessive in Python 3.11 and later, where this matches nothing.
        assert!(matches("a*+a"));
        // Zero to three in Python.
        let open = pattern("a{,3}").select(&["aaa"], None).problems;
        assert!(matches!(open[0], ConfigProblem::NoRegex { .. }), "{open:?}");
    }

    #[test]
    fn edit_distances() {
        for (a, b, distance) in [("", "abc", 3), ("q_porj", "q_proj", 2), ("kitten", "sitting", 3)]
        {
            assert_eq!(edit_distance(a, b), distance, "{a} {b}");
            assert_eq!(edit_distance(b, a), distance, "{b} {a}");
        }
    }
}
