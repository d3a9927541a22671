//! The target rules: against PEFT's own choices (golden/make_targets.py), and as laws.

use lora_core::{ExcludeModules, LoraConfig, TargetModules};
use proptest::prelude::*;
use serde_json::{Map, Value};

fn strings(value: &Value) -> Vec<String> {
    match value {
        Value::String(one) if one.is_empty() => Vec::new(),
        Value::String(one) => vec![one.clone()],
        many => many.as_array().unwrap().iter().map(|s| s.as_str().unwrap().to_owned()).collect(),
    }
}

fn pattern<T>(value: &Value, read: impl Fn(&Value) -> T) -> Vec<(String, T)> {
    value.as_object().unwrap().iter().map(|(key, value)| (key.clone(), read(value))).collect()
}

fn config(rank: usize, alpha: f64, settings: &Map<String, Value>) -> LoraConfig {
    let mut config = LoraConfig::new(rank, alpha);
    for (field, value) in settings {
        match field.as_str() {
            "target_modules" => {
                config.target_modules = match value.as_str() {
                    Some(text) if text.to_lowercase() == "all-linear" => TargetModules::AllLinear,
                    Some(text) => TargetModules::Pattern(text.to_owned()),
                    None => TargetModules::Names(strings(value)),
                }
            }
            "exclude_modules" => {
                config.exclude_modules = Some(match value.as_str() {
                    Some(text) if !text.is_empty() => ExcludeModules::Pattern(text.to_owned()),
                    _ => ExcludeModules::Names(strings(value)),
                })
            }
            "layers_to_transform" => {
                let index = |value: &Value| value.as_u64().unwrap() as usize;
                config.layers_to_transform = match value.as_array() {
                    Some(indices) => indices.iter().map(index).collect(),
                    None => vec![index(value)],
                }
            }
            "layers_pattern" => config.layers_pattern = strings(value),
            "modules_to_save" => config.modules_to_save = strings(value),
            "rank_pattern" => {
                config.rank_pattern = pattern(value, |rank| rank.as_u64().unwrap() as usize)
            }
            "alpha_pattern" => config.alpha_pattern = pattern(value, |a| a.as_f64().unwrap()),
            field => panic!("{field}"),
        }
    }
    config
}

#[test]
fn the_same_layers_rank_and_alpha_as_peft() {
    let golden: Value = serde_json::from_str(include_str!("golden/targets.json")).unwrap();
    let (rank, alpha) = (golden["rank"].as_u64().unwrap(), golden["alpha"].as_f64().unwrap());
    let cases = golden["cases"].as_array().unwrap();
    assert!(cases.len() > 300);
    let mut wrong = Vec::new();
    for case in cases {
        let paths = strings(&golden["models"][case[0].as_str().unwrap()]);
        let settings = case[1].as_object().unwrap();
        let config = config(rank as usize, alpha, settings);
        // `all-linear` is the one rule for which PEFT needs the model; these are plain modules
        // without an output layer.
        let selection = config.select(&paths, None);
        let chosen: Vec<usize> = (0..paths.len()).filter(|i| selection.selected[*i]).collect();
        let agrees = match &case[2] {
            // An empty list beside a pattern is refused by PEFT, and is as good as none here.
            Value::String(outcome) if outcome == "config" => {
                let empty = settings.get("layers_to_transform") == Some(&Value::Array(Vec::new()));
                empty || !selection.problems.is_empty()
            }
            Value::String(_) => chosen.is_empty() && !selection.problems.is_empty(),
            indices => {
                let expected: Vec<usize> = indices
                    .as_array()
                    .unwrap()
                    .iter()
                    .map(|i| i.as_u64().unwrap() as usize)
                    .collect();
                let values_agree = expected.iter().all(|index| {
                    let own = config.resolve(&paths[*index]).unwrap();
                    let (rank, alpha) = match &case[3][index.to_string()] {
                        Value::Null => (rank, alpha),
                        values => (values[0].as_u64().unwrap(), values[1].as_f64().unwrap()),
                    };
                    (own.rank as u64, own.alpha) == (rank, alpha)
                });
                chosen == expected && values_agree
            }
        };
        if !agrees {
            wrong.push(format!("{case}: chose {chosen:?}, {:?}", selection.problems));
        }
    }
    assert!(wrong.is_empty(), "{} differ:\n{}", wrong.len(), wrong.join("\n"));
}

/// Paths of few names, so that names and indices meet often.
fn paths() -> impl Strategy<Value = Vec<String>> {
    let part = prop::sample::select(vec!["a", "b", "ab", "layers", "h", "0", "1", "2", "10"]);
    let path = prop::collection::vec(part, 1..6).prop_map(|parts| parts.join("."));
    prop::collection::btree_set(path, 1..12).prop_map(|paths| paths.into_iter().collect())
}

fn some_names() -> impl Strategy<Value = Vec<String>> {
    let part = prop::sample::select(vec!["a", "b", "ab", "layers", "0", "1"]);
    let name = prop::collection::vec(part, 1..3).prop_map(|parts| parts.join("."));
    prop::collection::vec(name, 1..4)
}

fn some_indices() -> impl Strategy<Value = Vec<usize>> {
    prop::collection::vec(prop::sample::select(vec![0, 1, 2, 10, 33]), 1..4)
}

fn by_names(names: &[String]) -> LoraConfig {
    let mut config = LoraConfig::new(8, 16.0);
    config.target_modules = TargetModules::names(names.iter().cloned());
    config
}

fn selected(config: &LoraConfig, paths: &[String]) -> Vec<bool> {
    config.select(paths, None).selected
}

/// The rule of names over parts instead of characters.
fn is_named(path: &str, names: &[String]) -> bool {
    let path: Vec<&str> = path.split('.').collect();
    names.iter().any(|name| path.ends_with(&name.split('.').collect::<Vec<_>>()))
}

/// The index over parts: after the list's name, or after any two names, and not at the end.
fn index(path: &str, list: Option<&str>) -> Option<usize> {
    let parts: Vec<&str> = path.split('.').collect();
    let first = if list.is_some() { 1 } else { 2 };
    (first..parts.len().saturating_sub(1))
        .find(|i| parts[*i].parse::<usize>().is_ok() && list.is_none_or(|l| parts[*i - 1] == l))
        .map(|i| parts[i].parse().unwrap())
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..Default::default() })]

    #[test]
    fn names_are_last_parts(paths in paths(), names in some_names()) {
        let expected: Vec<bool> = paths.iter().map(|path| is_named(path, &names)).collect();
        prop_assert_eq!(selected(&by_names(&names), &paths), expected);
    }

    #[test]
    fn a_name_is_the_pattern_of_its_escape(paths in paths(), names in some_names()) {
        let mut config = LoraConfig::new(8, 16.0);
        let any: Vec<String> = names.iter().map(|name| name.replace('.', r"\.")).collect();
        config.target_modules = TargetModules::Pattern(format!(r"(.*\.)?({})", any.join("|")));
        prop_assert_eq!(selected(&config, &paths), selected(&by_names(&names), &paths));
    }

    #[test]
    fn the_order_of_paths_and_of_entries_does_not_matter(
        paths in paths(), names in some_names(), excluded in some_names(), layers in some_indices(),
    ) {
        let mut config = by_names(&names);
        config.exclude_modules = Some(ExcludeModules::Names(excluded.clone()));
        config.layers_to_transform = layers.clone();
        let there = selected(&config, &paths);
        let backwards: Vec<String> = paths.iter().rev().cloned().collect();
        let mut again: Vec<bool> = selected(&config, &backwards);
        again.reverse();
        prop_assert_eq!(&there, &again);

        let turned = |list: &[String]| -> Vec<String> { list.iter().rev().cloned().collect() };
        let mut config = by_names(&turned(&names));
        config.exclude_modules = Some(ExcludeModules::Names(turned(&excluded)));
        config.layers_to_transform = layers.iter().chain(&layers).rev().copied().collect();
        prop_assert_eq!(selected(&config, &paths), there);
    }

    #[test]
    fn what_is_excluded_or_saved_is_never_selected(
        paths in paths(), names in some_names(), excluded in some_names(), saved in some_names(),
    ) {
        let mut config = by_names(&names);
        let all = selected(&config, &paths);
        config.exclude_modules = Some(ExcludeModules::Names(excluded.clone()));
        let kept = selected(&config, &paths);
        for (path, (all, kept)) in paths.iter().zip(all.iter().zip(&kept)) {
            prop_assert_eq!(*kept, *all && !is_named(path, &excluded));
        }
        config.exclude_modules = None;
        config.modules_to_save = saved.clone();
        for (path, (all, kept)) in paths.iter().zip(all.into_iter().zip(selected(&config, &paths))) {
            let inside = |name: &String| format!(".{path}.").contains(&format!(".{name}."));
            prop_assert_eq!(kept, all && !saved.iter().any(inside), "{}", path);
        }
    }

    #[test]
    fn layers_part_the_targets(paths in paths(), names in some_names(), list in prop::sample::select(vec![None, Some("layers"), Some("h")])) {
        let all = selected(&by_names(&names), &paths);
        let mut times = vec![0; paths.len()];
        for layer in [0, 1, 2, 10] {
            let mut config = by_names(&names);
            config.layers_to_transform = vec![layer];
            config.layers_pattern = list.iter().map(|list| (*list).to_owned()).collect();
            for (i, path) in paths.iter().enumerate() {
                let here = selected(&config, &paths)[i];
                let whole = names.contains(path);
                prop_assert_eq!(here, all[i] && (whole || index(path, list) == Some(layer)), "{}", path);
                times[i] += usize::from(here && !whole);
            }
        }
        for (i, path) in paths.iter().enumerate().filter(|(_, path)| !names.contains(path)) {
            prop_assert_eq!(times[i], usize::from(all[i] && index(path, list).is_some()), "{}", path);
        }
    }

    #[test]
    fn an_entry_without_effect_is_always_told(
        paths in paths(), names in some_names(), excluded in some_names(), layers in some_indices(), key in some_names(),
    ) {
        let mut config = by_names(&names);
        config.exclude_modules = Some(ExcludeModules::Names(excluded.clone()));
        config.layers_to_transform = layers.clone();
        config.rank_pattern = key.iter().map(|key| (key.clone(), 2)).collect();
        let selection = config.select(&paths, None);
        if selection.problems.is_empty() {
            let targets: Vec<&String> =
                paths.iter().zip(&selection.selected).filter(|(_, s)| **s).map(|(p, _)| p).collect();
            let matches = |paths: &[&String], name: &String| {
                paths.iter().any(|path| is_named(path, std::slice::from_ref(name)))
            };
            let every: Vec<&String> = paths.iter().collect();
            prop_assert!(names.iter().all(|name| matches(&targets, name)));
            prop_assert!(excluded.iter().all(|name| matches(&every, name)));
            prop_assert!(layers.iter().all(|l| targets.iter().any(|p| index(p, None) == Some(*l))));
        }
        prop_assert!(selection.selected.contains(&true) || !selection.problems.is_empty());
    }

    #[test]
    fn no_text_makes_it_panic(paths in prop::collection::vec(".{0,12}", 0..4), entry in "\\PC{0,8}") {
        let mut config = by_names(std::slice::from_ref(&entry));
        config.layers_to_transform = vec![0];
        config.layers_pattern = vec![entry.clone()];
        config.modules_to_save = vec![entry.clone()];
        config.exclude_modules = Some(ExcludeModules::Pattern(entry.clone()));
        config.rank_pattern = vec![(entry.clone(), 1)];
        for problem in config.select(&paths, None).problems {
            prop_assert!(!problem.to_string().is_empty());
        }
        config.target_modules = TargetModules::Pattern(entry);
        config.select(&paths, None);
    }
}

#[cfg(any(
    feature = "flex",
    feature = "ndarray",
    feature = "tch",
    feature = "wgpu",
    feature = "cuda"
))]
mod on_a_model {
    use burn::module::Module;
    use burn::nn::conv::Conv1dConfig;
    use burn::nn::{EmbeddingConfig, LinearConfig};

    use lora_core::{
        AdaptableConv1d, AdaptableEmbedding, AdaptableLinear, ErrorKind, ExcludeModules,
        InjectReport, LoraConfig, TargetModules, TrainedBias, VisitLora, inject,
    };

    #[derive(Module, Debug, VisitLora)]
    struct Layer {
        up: AdaptableLinear,
        down: AdaptableLinear,
    }

    #[derive(Module, Debug, VisitLora)]
    #[lora(output = "head")]
    struct Model {
        layers: Vec<Layer>,
        head: AdaptableLinear,
    }

    fn linear(d_input: usize, d_output: usize) -> AdaptableLinear {
        LinearConfig::new(d_input, d_output)
            .init(&lora_core::device_from_env().unwrap().autodiff())
            .into()
    }

    fn model() -> Model {
        let layers = (0..4).map(|_| Layer { up: linear(4, 6), down: linear(6, 4) }).collect();
        Model { layers, head: linear(4, 9) }
    }

    #[test]
    fn the_report_says_what_was_left_out() {
        let mut config = LoraConfig::new(2, 3.0);
        config.target_modules = TargetModules::names(["up", "down"]);
        config.exclude_modules = Some(ExcludeModules::names(["layers.3.up"]));
        config.layers_to_transform = vec![0, 2, 3];
        config.layers_pattern = vec!["layers".to_owned()];
        config.rank_pattern = vec![("0.up".to_owned(), 1)];
        let (_, report) = inject(model(), &config).unwrap();
        assert_eq!(
            report.to_string(),
            "\
module  layers  shape  rank  alpha  scaling  parameters  indices
up      1 of 4  4 x 6     1      3        3          10        0
down    3 of 4  6 x 4     2      3      1.5          60   0, 2-3
up      1 of 4  4 x 6     2      3      1.5          20        2
not adapted: up 2, down 1, head 1
trainable: 90 of 367 (24.523 %)"
        );
    }

    #[test]
    fn all_problems_come_in_one_error() {
        let mut config = LoraConfig::new(0, 3.0);
        config.modules_to_save = vec!["haed".to_owned()];
        config.target_modules = TargetModules::names(["upp"]);
        let error = inject(model(), &config).unwrap_err();
        let ErrorKind::Config { problems } = error.kind() else { panic!("{error}") };
        assert_eq!(problems.len(), 3, "{error}");
    }

    #[test]
    fn a_module_that_is_saved_trains_in_full_and_is_no_target() {
        let mut config = LoraConfig::new(2, 3.0);
        config.modules_to_save = vec!["layers.3".to_owned(), "head".to_owned()];
        let (model, report) = inject(model(), &config).unwrap();
        let paths: Vec<&str> = report.replaced.iter().map(|layer| layer.path.as_str()).collect();
        assert_eq!(paths, ["layers.3.up", "layers.3.down", "head"]);
        assert_eq!(report.adapted.len(), 6);
        let in_full = (4 * 6 + 6) + (6 * 4 + 4) + (4 * 9 + 9);
        assert_eq!(report.parameters.trainable, 6 * 2 * (4 + 6) + in_full);
        assert_eq!(lora_core::ParameterCount::of(&model), report.parameters);
    }

    #[derive(Module, Debug, VisitLora)]
    struct Kinds {
        q: AdaptableLinear,
        conv: AdaptableConv1d,
        embed: AdaptableEmbedding,
    }

    #[test]
    fn a_report_counts_layers_of_every_kind_whatever_they_have() {
        let device = lora_core::device_from_env().unwrap().autodiff();
        let kinds = || Kinds {
            q: linear(4, 4),
            conv: Conv1dConfig::new(4, 4, 3).init(&device).into(),
            embed: EmbeddingConfig::new(9, 4).init(&device).into(),
        };
        let targets = |names: &[&str]| LoraConfig {
            target_modules: TargetModules::names(names.iter().copied()),
            ..LoraConfig::new(2, 4.0)
        };
        let model = vec![kinds(), kinds()];
        let line = |report: &InjectReport, name: &str| {
            let text = report.to_string();
            let line = text.lines().find(|line| line.starts_with(name)).map(str::to_owned);
            line.unwrap_or_else(|| panic!("{name} in {text}"))
        };
        let (_, report) = inject(model.clone(), &targets(&["0.q", "0.conv", "0.embed"])).unwrap();
        for name in ["q", "conv", "embed"] {
            assert!(line(&report, name).contains("1 of 2"), "{report}");
        }
        assert_eq!(line(&report, "not adapted"), "not adapted: q 1, conv 1, embed 1");
        // Of other kinds it is no news that they have none.
        let (_, report) = inject(model.clone(), &targets(&["0.q"])).unwrap();
        assert_eq!(line(&report, "not adapted"), "not adapted: q 1");

        let whole = LoraConfig { modules_to_save: vec!["1.q".to_owned()], ..targets(&["0.q"]) };
        let biases = LoraConfig { bias: TrainedBias::All, ..targets(&["0.q"]) };
        for config in [whole, biases] {
            let (_, report) = inject(model.clone(), &config).unwrap();
            assert!(line(&report, "q").contains("1 of 2"), "{report}");
        }
    }
}
