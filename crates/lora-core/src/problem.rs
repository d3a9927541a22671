//! What is wrong with a configuration, one problem a value, so that all of them can be told at once.

use std::fmt;

/// One thing that is wrong with a [`LoraConfig`](crate::LoraConfig), or that it asks for and would not
/// get from the model at hand. Prints as a sentence.
///
/// `setting` is the field of `LoraConfig`, `entry` the entry of its list as it was written.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum ConfigProblem {
    /// A setting has a value that cannot be used.
    Setting {
        /// The field.
        setting: &'static str,
        /// What it may be.
        expected: String,
        /// What was given.
        found: String,
    },
    /// An entry is no regular expression, or one with look-around or back-references.
    NoRegex {
        /// The field.
        setting: &'static str,
        /// The entry.
        entry: String,
        /// What the parser says.
        reason: String,
    },
    /// A name matches no linear layer, even if others do.
    NoMatch {
        /// The field.
        setting: &'static str,
        /// The entry.
        entry: String,
        /// Names that the model does have, the most similar first.
        nearest: Vec<String>,
    },
    /// A name is no linear layer but a part of the model that holds some.
    HoldsLayers {
        /// The field.
        setting: &'static str,
        /// The entry.
        entry: String,
        /// The last names of the layers in that part.
        layers: Vec<String>,
    },
    /// A pattern matches no linear layer.
    PatternNoMatch {
        /// The field.
        setting: &'static str,
        /// The pattern.
        entry: String,
        /// A whole path of the model, one in which the pattern finds something if there is any.
        example: String,
    },
    /// All layers that an entry of the targets matches are left out by other settings.
    AllLeftOut {
        /// The entry of `target_modules`.
        entry: String,
        /// The fields that leave them out.
        by: Vec<&'static str>,
    },
    /// A key of `rank_pattern` or `alpha_pattern` matches layers, but no target.
    NoTarget {
        /// The field.
        setting: &'static str,
        /// The key.
        entry: String,
        /// The path of a layer that it matches.
        example: String,
    },
    /// A key of `rank_pattern` or `alpha_pattern` counts nowhere: wherever it matches a target,
    /// a key before it does too.
    NeverFirst {
        /// The field.
        setting: &'static str,
        /// The key.
        entry: String,
        /// The first key that comes before it.
        before: String,
    },
    /// Indices of `layers_to_transform` that the model does not have.
    NoSuchIndex {
        /// The indices.
        indices: Vec<usize>,
        /// Those that the model has.
        existing: Vec<usize>,
        /// The names of lists in the model's paths.
        lists: Vec<String>,
    },
    /// Indices of `layers_to_transform` under which no target is left.
    NoTargetAtIndex {
        /// The indices.
        indices: Vec<usize>,
    },
    /// An entry of `layers_pattern` names no list of layers.
    NoSuchList {
        /// The entry.
        entry: String,
        /// The names of lists in the model's paths, the most similar first.
        nearest: Vec<String>,
    },
}

impl ConfigProblem {
    pub(crate) fn setting(
        setting: &'static str,
        expected: impl Into<String>,
        found: impl ToString,
    ) -> Self {
        Self::Setting { setting, expected: expected.into(), found: found.to_string() }
    }

    /// The same problem of a value that stands at a key.
    pub(crate) fn found_at(mut self, key: &str) -> Self {
        if let Self::Setting { found, .. } = &mut self {
            found.push_str(&format!(" at '{key}'"));
        }
        self
    }

    /// The same problem where settings have other names.
    pub(crate) fn renamed(mut self, name_of: fn(&'static str) -> &'static str) -> Self {
        match &mut self {
            Self::Setting { setting, .. }
            | Self::NoRegex { setting, .. }
            | Self::NoMatch { setting, .. }
            | Self::HoldsLayers { setting, .. }
            | Self::PatternNoMatch { setting, .. }
            | Self::NoTarget { setting, .. }
            | Self::NeverFirst { setting, .. } => *setting = name_of(setting),
            Self::AllLeftOut { .. }
            | Self::NoSuchIndex { .. }
            | Self::NoTargetAtIndex { .. }
            | Self::NoSuchList { .. } => {}
        }
        self
    }

    /// Whether an entry is no expression that can be used, so that what it means is not known.
    pub(crate) fn is_no_regex(&self) -> bool {
        matches!(self, Self::NoRegex { .. })
    }

    /// Whether it also stands against reading an adapter's file, whose tensors say what is adapted.
    pub(crate) fn bars_loading(&self) -> bool {
        match self {
            // A new adapter's is above 0; of a file's the reader has asked what it needs.
            Self::Setting { setting: "alpha" | "alpha_pattern", .. } => false,
            // Without layers_to_transform the one has no effect, without a bias the other, in PEFT as here.
            Self::Setting { setting: "layers_pattern" | "bias", .. } => false,
            Self::Setting { .. } => true,
            Self::NoRegex { .. } => true,
            _ => false,
        }
    }

    /// The sentence, with at most `names` of the nearest names.
    pub(crate) fn sentence(&self, names: usize) -> String {
        let shown = |list: &[String]| list[..list.len().min(names)].join(", ");
        match self {
            Self::Setting { setting, expected, found } => {
                format!("{setting}: expected {expected}, found {found}")
            }
            Self::NoRegex { setting, entry, reason } => {
                format!("{setting}: '{entry}' cannot be used as a regular expression: {reason}")
            }
            Self::NoMatch { setting, entry, nearest } if nearest.is_empty() => format!(
                "{setting}: '{entry}' matches no layer of this model; \
                 the model has no adaptable layer"
            ),
            Self::NoMatch { setting, entry, nearest } => format!(
                "{setting}: '{entry}' matches no layer of this model; \
                 the nearest names are {}",
                shown(nearest)
            ),
            Self::HoldsLayers { setting, entry, layers } => format!(
                "{setting}: '{entry}' matches no layer of this model, but a part of it; \
                 name the layers in it: {}",
                // All of them at any length: who copies a part of the list adapts less than meant.
                layers.join(", ")
            ),
            Self::PatternNoMatch { setting, entry, example } => format!(
                "{setting}: the pattern '{entry}' matches no layer of this model; \
                 it must match a whole path, such as {example}"
            ),
            Self::AllLeftOut { entry, by } => format!(
                "target_modules: all layers that '{entry}' matches are left out by {}",
                by.join(" and ")
            ),
            Self::NoTarget { setting, entry, example } => format!(
                "{setting}: '{entry}' matches only layers that are no targets, such as {example}"
            ),
            Self::NeverFirst { setting, entry, before } => format!(
                "{setting}: '{entry}' never counts, since the first key that matches does; \
                 put it before '{before}', or remove it"
            ),
            Self::NoSuchIndex { indices, existing, lists } => {
                let hint = match (existing.is_empty(), lists.is_empty()) {
                    (false, _) => format!("it has {}", ranges(existing)),
                    (true, false) => {
                        format!(
                            "name the list that holds its layers in layers_pattern: {}",
                            shown(lists)
                        )
                    }
                    (true, true) => "its layers are in no list".to_owned(),
                };
                format!("layers_to_transform: this model has no layer {}; {hint}", ranges(indices))
            }
            Self::NoTargetAtIndex { indices } => {
                format!("layers_to_transform: no target is in layer {}", ranges(indices))
            }
            Self::NoSuchList { entry, nearest } if nearest.is_empty() => format!(
                "layers_pattern: '{entry}' is no list of layers in this model; it has no such list"
            ),
            Self::NoSuchList { entry, nearest } => format!(
                "layers_pattern: '{entry}' is no list of layers in this model; \
                 the nearest names are {}",
                shown(nearest)
            ),
        }
    }
}

impl fmt::Display for ConfigProblem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.sentence(8))
    }
}

/// One problem is its sentence; of several, each sentence is numbered and names less.
pub(crate) fn sentences(problems: &[ConfigProblem]) -> String {
    if let [problem] = problems {
        return problem.to_string();
    }
    let numbered = problems.iter().enumerate();
    let all: Vec<String> = numbered
        .map(|(index, problem)| format!("({}) {}", index + 1, problem.sentence(3)))
        .collect();
    format!("{} problems in the settings: {}", problems.len(), all.join("; "))
}

/// Sorted numbers with their gaps: `0-3, 7, 9-11`.
pub(crate) fn ranges(numbers: &[usize]) -> String {
    let mut runs: Vec<(usize, usize)> = Vec::new();
    for &number in numbers {
        match runs.last_mut() {
            Some((_, last)) if *last + 1 == number => *last = number,
            _ => runs.push((number, number)),
        }
    }
    let run = |(first, last): &(usize, usize)| match first == last {
        true => first.to_string(),
        false => format!("{first}-{last}"),
    };
    runs.iter().map(run).collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_written_as_ranges() {
        for (numbers, text) in
            [(&[][..], ""), (&[3], "3"), (&[0, 1, 2, 3], "0-3"), (&[0, 2, 3, 7], "0, 2-3, 7")]
        {
            assert_eq!(ranges(numbers), text);
        }
    }
}
