//! What the names in an adapter's file mean is what the model has.
#![cfg(any(
    feature = "flex",
    feature = "ndarray",
    feature = "tch",
    feature = "wgpu",
    feature = "cuda"
))]

mod small;

use std::fs;

use burn::module::Module;
use burn::nn::EmbeddingConfig;
use lora_core::*;
use small::{device, linear, sentence, targets};

#[derive(Module, Debug, VisitLora)]
struct Tower {
    layers: Vec<AdaptableLinear>,
    head: AdaptableLinear,
}

#[derive(Module, Debug, VisitLora)]
struct Towers {
    layers: Vec<AdaptableLinear>,
    vision: Tower,
    head: AdaptableLinear,
}

fn towers() -> Towers {
    let layers = || vec![linear(4, 4), linear(4, 4)];
    Towers {
        layers: layers(),
        vision: Tower { layers: layers(), head: linear(4, 4) },
        head: linear(4, 4),
    }
}

/// The paths of what is adapted.
fn adapted<M: VisitLora>(model: &M) -> Vec<String> {
    AdapterSet::of(model).paths().map(str::to_owned).collect()
}

#[test]
fn whatever_is_adapted_is_what_its_file_says() {
    let temp = tempfile::tempdir().unwrap();
    let base = towers();
    let mut paths = Vec::new();
    base.visit_lora("", &mut |path, _| paths.push(path.to_owned()));
    for chosen in 1..1_u32 << paths.len() {
        let is_chosen = |place: &usize| chosen >> place & 1 == 1;
        let chosen_paths =
            (0..paths.len()).filter(is_chosen).map(|place| regex::escape(&paths[place]));
        let mut config = LoraConfig::new(2, 4.0);
        let pattern = chosen_paths.collect::<Vec<_>>().join("|");
        config.target_modules = TargetModules::Pattern(format!("(?:{pattern})"));
        let (model, _) = inject(base.clone(), &config).unwrap();
        let folder = temp.path().join(chosen.to_string());
        save_adapter(&model, &folder, &AdapterInfo::default()).unwrap();
        let (read, _) = load_adapter(base.clone(), &folder).unwrap();
        assert_eq!(adapted(&read), adapted(&model));
    }
}

#[test]
fn what_names_cannot_say_is_not_saved() {
    let temp = tempfile::tempdir().unwrap();
    let (base, mut config) = (towers(), targets(&["0", "1"]));
    config.modules_to_save = vec!["vision.head".to_owned()];
    let (model, _) = inject(base.clone(), &config).unwrap();
    let folder = temp.path().join("vision.head");
    save_adapter(&model, &folder, &AdapterInfo::default()).unwrap();
    let (read, _) = load_adapter(base.clone(), &folder).unwrap();
    assert_eq!(adapted(&read), adapted(&model));

    // By hand a set can be put on that no config makes.
    let (mut model, _) = inject(base.clone(), &config).unwrap();
    model.visit_lora_mut("", &mut |path, layer| {
        if path.starts_with("vision.") {
            layer.detach();
        } else if path == "head" {
            layer.attach(Adaptation::Replacement(layer.copy_of_layer())).unwrap();
        }
    });
    let error =
        sentence(save_adapter(&model, temp.path().join("by hand"), &AdapterInfo::default()));
    assert!(error.contains("modules_to_save") && error.contains("'vision.head'"), "{error}");
}

#[derive(Module, Debug, VisitLora)]
struct Inner {
    embed: AdaptableEmbedding,
    head: AdaptableLinear,
}

#[derive(Module, Debug, VisitLora)]
struct Outer {
    inner: Inner,
    embed: AdaptableEmbedding,
    q: AdaptableLinear,
}

#[test]
fn tokens_of_embeddings_whose_paths_end_alike_come_back_or_are_not_saved() {
    let embedding = || EmbeddingConfig::new(9, 4).init(&device());
    let base = Outer {
        inner: Inner { embed: embedding().into(), head: linear(4, 4) },
        embed: embedding().into(),
        q: linear(4, 4),
    };
    let temp = tempfile::tempdir().unwrap();
    let of = |entries: &[(&str, &[usize])]| {
        let entries = entries.iter().map(|(name, ids)| ((*name).to_owned(), ids.to_vec()));
        LoraConfig { trainable_tokens: entries.collect(), ..targets(&["q"]) }
    };
    for (name, entries) in [
        ("both", &[("embed", &[3, 5][..])][..]),
        ("the inner one", &[("inner.embed", &[3, 5][..])][..]),
    ] {
        let (model, _) = inject(base.clone(), &of(entries)).unwrap();
        let folder = temp.path().join(name);
        save_adapter(&model, &folder, &AdapterInfo::default()).unwrap();
        let (read, _) = load_adapter(base.clone(), &folder).unwrap();
        assert_eq!(adapted(&read), adapted(&model), "{name}");
    }
    // The outer alone, and other tokens of each, are beyond what names can say.
    let (both, _) = inject(base.clone(), &of(&[("embed", &[3, 5])])).unwrap();
    let (inner, _) = inject(base.clone(), &of(&[("inner.embed", &[1])])).unwrap();
    let mut outer = both.clone();
    outer.inner.embed = base.inner.embed.clone();
    let mut other = both;
    other.inner.embed = inner.inner.embed.clone();
    for (name, model) in [("outer", outer), ("other", other)] {
        let error = sentence(save_adapter(&model, temp.path().join(name), &AdapterInfo::default()));
        assert!(error.contains("trainable_tokens") && error.contains("'inner.embed'"), "{error}");
    }
}

#[derive(Module, Debug, VisitLora)]
struct Predictions {
    decoder: AdaptableLinear,
}

#[derive(Module, Debug, VisitLora)]
struct MaskedModel {
    decoder: Vec<AdaptableLinear>,
    predictions: Predictions,
}

/// A name in `modules_to_save` means all that lies in a module of that name.
#[test]
fn a_whole_layer_called_as_a_module_elsewhere_comes_back() {
    let base = MaskedModel {
        decoder: vec![linear(4, 4), linear(4, 4)],
        predictions: Predictions { decoder: linear(4, 4) },
    };
    let mut config = targets(&["0", "1"]);
    config.modules_to_save = vec!["predictions.decoder".to_owned()];
    let (model, _) = inject(base.clone(), &config).unwrap();
    let temp = tempfile::tempdir().unwrap();
    let folder = temp.path().join("adapter");
    save_adapter(&model, &folder, &AdapterInfo::default()).unwrap();
    let (read, report) = load_adapter(base, &folder).unwrap();
    assert_eq!(adapted(&read), adapted(&model));
    assert_eq!(report.applied.replaced.len(), 1);
}

#[test]
fn every_reader_takes_names_and_patterns() {
    let temp = tempfile::tempdir().unwrap();
    let file = |target_modules: TargetModules, name: &str| -> serde_json::Value {
        let config = LoraConfig { target_modules, ..LoraConfig::new(2, 4.0) };
        let (model, _) = inject(towers(), &config).unwrap();
        let folder = temp.path().join(name);
        save_portable(&model, &folder, &AdapterInfo::default(), &Reader::ALL).unwrap();
        let json = fs::read_to_string(folder.join("adapter_config.json")).unwrap();
        serde_json::from_str::<serde_json::Value>(&json).unwrap()["target_modules"].clone()
    };
    // Where names will do, the file has them.
    assert_eq!(file(TargetModules::names(["head"]), "names"), serde_json::json!(["head"]));
    assert_eq!(file(TargetModules::Pattern("head".to_owned()), "one"), "(?:head)");
}

#[derive(Module, Debug, VisitLora)]
struct Classifier {
    pre_classifier: AdaptableLinear,
    classifier: AdaptableLinear,
    layers: Vec<AdaptableLinear>,
}

fn classifier() -> Classifier {
    let [pre_classifier, classifier] = [linear(4, 4), linear(4, 2)];
    Classifier { pre_classifier, classifier, layers: (0..12).map(|_| linear(4, 4)).collect() }
}

/// As PEFT, for which DistilBERT's `pre_classifier` is a `classifier`, and the layer 11 a 1.
#[test]
fn a_name_of_what_trains_in_full_means_all_that_ends_with_its_letters() {
    let temp = tempfile::tempdir().unwrap();
    let base = classifier();
    let whole = |name: &str, target: &str| LoraConfig {
        modules_to_save: vec![name.to_owned()],
        ..targets(&[target])
    };
    for (name, target, expected) in [
        ("classifier", "layers.0", &["pre_classifier", "classifier", "layers.0"][..]),
        ("pre_classifier", "layers.0", &["pre_classifier", "layers.0"]),
        ("layers.2", "layers.0", &["layers.0", "layers.2"]),
    ] {
        let (model, _) = inject(base.clone(), &whole(name, target)).unwrap();
        assert_eq!(adapted(&model), expected, "{name}");
        let folder = temp.path().join(name);
        save_adapter(&model, &folder, &AdapterInfo::default()).unwrap();
        let (read, _) = load_adapter(base.clone(), &folder).unwrap();
        assert_eq!(adapted(&read), expected, "{name}");
    }
    // What is an adapter's already cannot train in full.
    let error = sentence(inject(base.clone(), &whole("classifier", "pre_classifier")));
    assert!(
        error.contains("modules_to_save: expected names that mean no target, found 'classifier'"),
        "{error}"
    );
    // One sentence for each name, however many targets it means.
    let mut two = whole("classifier", "pre_classifier");
    two.target_modules = TargetModules::names(["pre_classifier", "classifier"]);
    let error = sentence(inject(base.clone(), &two));
    assert_eq!(error.matches("names that mean no target").count(), 1, "{error}");
    let error = sentence(inject(base.clone(), &whole("", "pre_classifier")));
    assert!(error.contains("modules_to_save: '' matches no layer"), "{error}");

    // By hand, one can train in full that its name does not tell from another.
    let (mut model, _) = inject(base.clone(), &whole("classifier", "layers.0")).unwrap();
    model.pre_classifier.detach();
    let error =
        sentence(save_adapter(&model, temp.path().join("by hand"), &AdapterInfo::default()));
    assert!(error.contains("modules_to_save") && error.contains("'pre_classifier'"), "{error}");
    let (mut model, _) = inject(base.layers.clone(), &whole("1", "0")).unwrap();
    assert_eq!(adapted(&model), ["0", "1", "11"]);
    model[11].detach();
    let error = sentence(save_adapter(&model, temp.path().join("1"), &AdapterInfo::default()));
    assert!(error.contains("modules_to_save") && error.contains("'11'"), "{error}");
}

#[derive(Module, Debug, VisitLora)]
struct Embeddings {
    pos_embed: AdaptableEmbedding,
    embed: AdaptableEmbedding,
    q: AdaptableLinear,
}

#[test]
fn a_name_of_trained_tokens_does_too() {
    let embedding = || EmbeddingConfig::new(9, 4).init(&device()).into();
    let base = Embeddings { pos_embed: embedding(), embed: embedding(), q: linear(4, 4) };
    let trainable_tokens = vec![("embed".to_owned(), vec![1, 2])];
    let config = LoraConfig { trainable_tokens, ..targets(&["q"]) };
    let (mut model, _) = inject(base.clone(), &config).unwrap();
    assert_eq!(adapted(&model), ["pos_embed", "embed", "q"]);
    let temp = tempfile::tempdir().unwrap();
    save_adapter(&model, temp.path().join("both"), &AdapterInfo::default()).unwrap();
    let (read, _) = load_adapter(base, temp.path().join("both")).unwrap();
    assert_eq!(adapted(&read), adapted(&model));
    model.pos_embed.detach();
    let error = sentence(save_adapter(&model, temp.path().join("one"), &AdapterInfo::default()));
    assert!(error.contains("trainable_tokens") && error.contains("'pos_embed'"), "{error}");
}

/// PEFT looks for targets among all modules, and refuses those that hold others.
#[test]
fn a_target_called_as_a_module_elsewhere_is_told_by_its_path() {
    let base = MaskedModel {
        decoder: vec![linear(4, 4), linear(4, 4)],
        predictions: Predictions { decoder: linear(4, 4) },
    };
    let (model, _) = inject(base, &targets(&["predictions.decoder"])).unwrap();
    let temp = tempfile::tempdir().unwrap();
    let folder = temp.path().join("adapter");
    save_adapter(&model, &folder, &AdapterInfo::default()).unwrap();
    let json = fs::read_to_string(folder.join("adapter_config.json")).unwrap();
    let json: serde_json::Value = serde_json::from_str(&json).unwrap();
    assert_eq!(json["target_modules"], serde_json::json!(["predictions.decoder"]));
}

/// The derive refuses such names; whoever implements the trait may not.
#[test]
fn two_layers_of_one_path_are_not_saved() {
    #[derive(Module, Debug)]
    struct Twice {
        layers: Vec<AdaptableLinear>,
    }
    impl VisitLora for Twice {
        fn visit_lora<'a>(&'a self, _: &str, visit: &mut VisitLayer<'_, 'a>) {
            self.layers.iter().for_each(|layer| visit("same", layer));
        }
        fn visit_lora_mut(&mut self, _: &str, visit: &mut VisitLayerMut<'_>) {
            self.layers.iter_mut().for_each(|layer| visit("same", layer));
        }
    }
    let net = Twice { layers: vec![linear(6, 4), linear(6, 4)] };
    let (model, _) = inject(net, &LoraConfig::new(2, 4.0)).unwrap();
    let temp = tempfile::tempdir().unwrap();
    let folder = temp.path().join("adapter");
    let error = sentence(save_adapter(&model, &folder, &AdapterInfo::default()));
    assert_eq!(error, "model: expected a path of its own for each layer, found 'same' twice");
    assert!(!folder.exists());
}

/// A path with a word of the format in it may be read as another.
#[test]
fn a_path_that_the_format_cannot_hold_is_not_saved() {
    #[derive(Module, Debug, VisitLora)]
    struct Model {
        base_layer: AdaptableLinear,
        _orig_mod: AdaptableLinear,
        q: AdaptableLinear,
    }
    let [base_layer, _orig_mod, q] = std::array::from_fn(|_| linear(6, 4));
    let base = Model { base_layer, _orig_mod, q };
    let temp = tempfile::tempdir().unwrap();
    let save = |folder: &str, target: &str, whole: &str| {
        let modules_to_save = vec![whole.to_owned()];
        let (model, _) =
            inject(base.clone(), &LoraConfig { modules_to_save, ..targets(&[target]) }).unwrap();
        save_adapter(&model, temp.path().join(folder), &AdapterInfo::default())
    };
    save("whole", "base_layer", "q").unwrap();
    let (read, _) = load_adapter(base.clone(), temp.path().join("whole")).unwrap();
    assert_eq!(adapted(&read), ["base_layer", "q"]);
    for (target, whole, path) in
        [("q", "base_layer", "'base_layer'"), ("_orig_mod", "q", "'_orig_mod'")]
    {
        let error = sentence(save(path, target, whole));
        assert!(error.contains("the words of the format") && error.contains(path), "{error}");
    }
}
