//! Rules that say which layers are adapted. Strings only: no tensors, no model.

use regex::Regex;

use crate::error::{Error, ErrorKind, Result};

/// Which linear layers get an adapter, by their dotted path (`model.layers.0.self_attn.q_proj`).
///
/// ```
/// use lora_core::TargetModules;
///
/// let targets = TargetModules::names(["q_proj", "v_proj"]);
/// let paths = ["layers.0.q_proj", "layers.0.k_proj", "layers.0.v_proj"];
/// assert_eq!(targets.select(&paths, None)?, [true, false, true]);
/// # Ok::<(), lora_core::Error>(())
/// ```
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

    /// Which of `paths` are targets; `output_layer` is the path that [`TargetModules::AllLinear`]
    /// leaves out.
    ///
    /// # Errors
    /// When any entry matches nothing, also when others do; when the pattern is no regular
    /// expression; when nothing is asked for.
    pub fn select<P: AsRef<str>>(
        &self,
        paths: &[P],
        output_layer: Option<&str>,
    ) -> Result<Vec<bool>> {
        self.select_with(paths, output_layer, Unmatched::IsError)
    }

    pub(crate) fn select_with<P: AsRef<str>>(
        &self,
        paths: &[P],
        output_layer: Option<&str>,
        unmatched: Unmatched,
    ) -> Result<Vec<bool>> {
        let paths: Vec<&str> = paths.iter().map(AsRef::as_ref).collect();
        let selected: Vec<bool> = match self {
            Self::AllLinear => paths.iter().map(|path| Some(*path) != output_layer).collect(),
            Self::Names(names) => {
                if names.is_empty() {
                    return Err(Error::setting("target_modules", "at least one name", "none"));
                }
                let matches_nothing = |name: &&String| !paths.iter().any(|p| is_named(p, name));
                match names.iter().find(matches_nothing) {
                    Some(name) if unmatched == Unmatched::IsError => {
                        return Err(not_found(name, &paths));
                    }
                    _ => {}
                }
                paths.iter().map(|path| names.iter().any(|name| is_named(path, name))).collect()
            }
            Self::Pattern(pattern) => {
                let regex = whole(pattern)?;
                paths.iter().map(|path| regex.is_match(path)).collect()
            }
        };
        if !selected.contains(&true) {
            return Err(not_found(&self.as_written(), &paths));
        }
        Ok(selected)
    }

    fn as_written(&self) -> String {
        match self {
            Self::AllLinear => "all-linear".to_owned(),
            Self::Names(names) => names.join(", "),
            Self::Pattern(pattern) => pattern.clone(),
        }
    }
}

/// What an entry means that matches no layer while others do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Unmatched {
    /// A spelling mistake.
    IsError,
    /// A list that was made for several kinds of model, as adapter files have them: there the tensors
    /// say what is adapted.
    Ignored,
}

/// Whether `path` equals `name`, or ends with a dot and `name`.
fn is_named(path: &str, name: &str) -> bool {
    path.strip_suffix(name).is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))
}

/// The rule of PEFT's `rank_pattern` and `alpha_pattern` keys: a regular expression that matches
/// the path from its start, or from after one of its dots, to its end.
pub(crate) fn suffix_pattern(key: &str) -> Result<Regex> {
    compile(&format!(r"^(?:.*\.)?(?:{key})$"), key)
}

fn whole(pattern: &str) -> Result<Regex> {
    compile(&format!("^(?:{pattern})$"), pattern)
}

fn compile(anchored: &str, as_written: &str) -> Result<Regex> {
    Regex::new(anchored).map_err(|_| {
        Error::setting(
            "target pattern",
            "a regular expression without look-around or back-references",
            format!("'{as_written}'"),
        )
    })
}

fn not_found(entry: &str, paths: &[&str]) -> Error {
    ErrorKind::TargetNotFound { entry: entry.to_owned(), nearest: nearest(entry, paths) }.into()
}

/// The module names of `paths` that are spelt most like `entry`, at most eight.
///
/// A path of many layers counts once, by its last name; an entry with dots is compared with whole
/// paths.
fn nearest(entry: &str, paths: &[&str]) -> Vec<String> {
    let mut names: Vec<&str> = match entry.contains('.') {
        true => paths.to_vec(),
        false => paths.iter().map(|path| path.rsplit('.').next().unwrap_or(path)).collect(),
    };
    names.sort_unstable();
    names.dedup();
    names.sort_by_key(|name| edit_distance(entry, name));
    names.into_iter().take(8).map(str::to_owned).collect()
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

    const PATHS: [&str; 5] = [
        "model.layers.0.self_attn.q_proj",
        "model.layers.0.self_attn.k_proj",
        "model.layers.1.self_attn.q_proj",
        "model.layers.1.self_attn.xq_proj",
        "lm_head",
    ];

    #[test]
    fn a_name_matches_a_whole_last_part_only() {
        let selected = TargetModules::names(["q_proj"]).select(&PATHS, None).unwrap();
        assert_eq!(selected, [true, false, true, false, false]);
        let selected = TargetModules::names(["lm_head"]).select(&PATHS, None).unwrap();
        assert_eq!(selected, [false, false, false, false, true]);
    }

    #[test]
    fn all_linear_leaves_out_the_output_layer() {
        let selected = TargetModules::AllLinear.select(&PATHS, Some("lm_head")).unwrap();
        assert_eq!(selected, [true, true, true, true, false]);
    }

    #[test]
    fn a_pattern_must_match_the_whole_path() {
        let pattern = TargetModules::Pattern(r".*\.0\..*_proj".to_owned());
        assert_eq!(pattern.select(&PATHS, None).unwrap(), [true, true, false, false, false]);
        let part = TargetModules::Pattern("q_proj".to_owned());
        assert!(part.select(&PATHS, None).is_err());
    }

    #[test]
    fn one_misspelt_entry_is_an_error_even_if_others_match() {
        let error = TargetModules::names(["q_proj", "k_porj"]).select(&PATHS, None).unwrap_err();
        let ErrorKind::TargetNotFound { entry, nearest } = error.kind() else {
            panic!("{error}");
        };
        assert_eq!(entry, "k_porj");
        assert_eq!(nearest[0], "k_proj");
    }

    #[test]
    fn an_empty_list_and_a_broken_pattern_are_errors() {
        assert!(TargetModules::Names(vec![]).select(&PATHS, None).is_err());
        assert!(TargetModules::Pattern("(".to_owned()).select(&PATHS, None).is_err());
        assert!(TargetModules::names([""]).select(&PATHS, None).is_err());
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
