//! PEFT's files in both directions: every case of `tests/golden/make_peft_cases.py`.
//!
//! What is saved after loading PEFT's file is PEFT's file again, tensor for tensor and bit for bit, but
//! for what PEFT adds of the frozen model; `scripts/peft_roundtrip.sh tests/golden` has PEFT read it.

mod tiny;

use std::path::Path;

use burn::module::{Module, Param};
use burn::nn::conv::{Conv1d, Conv1dConfig, Conv2d, Conv2dConfig};
use burn::nn::{Embedding, Linear, PaddingConfig1d, PaddingConfig2d};
use burn::tensor::{Device, Int, Tensor, TensorData};
use lora_core::{
    AdaptableConv1d, AdaptableConv2d, AdaptableEmbedding, AdaptableLinear, AdapterInfo, ErrorKind,
    LoadOptions, LoadReport, VisitLora, load_adapter, load_adapter_with, merge, save_adapter,
    unmerge, write_folder,
};
use lora_models::{Decoder, WeightDtype, save_folder};
use tiny::{
    FileTensor, change_config, change_tensors, copy_adapter, decoder, difference, file_tensors,
    golden, largest_difference, logits, tensor, tensors_of, write_tensors,
};

/// Each case and its base.
const CASES: [(&str, &str); 20] = [
    ("peft_plain", "tiny_llama"),
    ("peft_patterns_rslora", "tiny_llama"),
    ("peft_gaussian_regex", "tiny_llama"),
    ("peft_layers", "tiny_llama"),
    ("peft_orthogonal", "tiny_llama"),
    ("peft_negative_alpha", "tiny_llama"),
    ("peft_dora", "tiny_llama_tied"),
    ("peft_dora_rslora", "tiny_llama"),
    ("peft_lora_bias", "tiny_llama_tied"),
    ("peft_bias_all", "tiny_llama_tied"),
    ("peft_bias_lora_only", "tiny_llama_tied"),
    ("peft_saved_head", "tiny_llama"),
    ("peft_saved_embedding_tied", "tiny_llama_tied"),
    ("peft_embedding", "tiny_llama"),
    ("peft_embedding_tied", "tiny_llama_tied"),
    ("peft_embedding_dora", "tiny_llama"),
    ("peft_tokens", "tiny_llama"),
    ("peft_tokens_tied", "tiny_llama_tied"),
    ("peft_pissa", "tiny_llama"),
    ("peft_olora", "tiny_llama"),
];

fn base(name: &str) -> Decoder {
    decoder(&golden(name), &lora_core::device_from_env().unwrap())
}

fn load(case: &str, base_name: &str) -> (Decoder, LoadReport) {
    load_adapter(base(base_name), golden(case)).unwrap_or_else(|error| panic!("{case}: {error}"))
}

fn save<M: VisitLora>(model: &M, folder: &Path) {
    save_adapter(model, folder, &AdapterInfo::default()).unwrap();
}

#[test]
fn every_adapter_of_peft_has_the_logits_of_peft_merged_or_not() {
    for (case, base_name) in CASES {
        let path = golden(case).join("golden.safetensors");
        for device in [
            lora_core::device_from_env().unwrap(),
            lora_core::device_from_env().unwrap().autodiff(),
        ] {
            let base = decoder(&golden(base_name), &device);
            let (mut model, report) =
                load_adapter(base, golden(case)).unwrap_or_else(|error| panic!("{case}: {error}"));
            assert_eq!((report.missing.len(), report.unused.len()), (0, 0), "{case}: {report}");
            assert!(report.unchanged.is_empty(), "{case}: {report}");
            let found = logits(&model, &path);
            let apart = difference(&found, &path);
            println!("{case}: difference {apart:.2e}");
            assert!(apart <= 1e-5, "{case}: largest relative difference {apart:e}");

            merge(&mut model).unwrap();
            let apart = difference(&logits(&model, &path), &path);
            assert!(apart <= 2e-5, "{case} merged: largest relative difference {apart:e}");
            unmerge(&mut model).unwrap();
            assert_eq!(logits(&model, &path), found, "{case}: unmerged");
        }
    }
}

/// What PEFT adds to a file beside what trains.
fn is_frozen(tensor: &FileTensor) -> bool {
    [".base_layer.weight", ".original_module.bias", ".modules_to_save.bias"]
        .iter()
        .any(|end| tensor.name.ends_with(end))
}

#[test]
fn what_is_saved_is_what_peft_saved_bit_for_bit() {
    for (case, base_name) in CASES {
        let path = golden(case).join("golden.safetensors");
        let temp = tempfile::tempdir().unwrap();
        let [once, twice] = ["once", "twice"].map(|name| temp.path().join(name));
        let (model, report) = load(case, base_name);
        save(&model, &once);
        let (again, again_report) = load_adapter(base(base_name), &once).unwrap();
        save(&again, &twice);
        assert_eq!(logits(&again, &path), logits(&model, &path), "{case}");
        assert_eq!((report.same_base, again_report.same_base), (None, Some(true)), "{case}");

        let mut expected = file_tensors(&golden(case));
        expected.retain(|tensor| !is_frozen(tensor));
        let saved = file_tensors(&once);
        let names = |tensors: &[FileTensor]| -> Vec<String> {
            tensors.iter().map(|tensor| tensor.name.clone()).collect()
        };
        assert_eq!(names(&saved), names(&expected), "{case}");
        // A start out of the weight is written in its plain form, of twice the rank.
        if !["peft_pissa", "peft_olora"].contains(&case) {
            assert_eq!(saved, expected, "{case}");
            assert_eq!(again_report.applied, report.applied, "{case}");
        }
        assert_eq!(file_tensors(&twice), saved, "{case}: saved, loaded and saved again");
        let config = |folder: &Path| std::fs::read(folder.join("adapter_config.json")).unwrap();
        assert_eq!(config(&twice), config(&once), "{case}");
    }
}

/// `tiny_llama` with other weights.
fn base_with(change: impl Fn(&mut FileTensor)) -> Decoder {
    let folder = tempfile::tempdir().unwrap();
    let mut tensors = tensors_of(&golden("tiny_llama").join("model.safetensors"));
    tensors.iter_mut().for_each(change);
    write_tensors(&folder.path().join("model.safetensors"), &tensors);
    let config = golden("tiny_llama").join("config.json");
    std::fs::copy(config, folder.path().join("config.json")).unwrap();
    decoder(folder.path(), &lora_core::device_from_env().unwrap())
}

/// `tiny_llama` with one weight changed a little.
fn base_with_other(name: &str) -> Decoder {
    base_with(|tensor| {
        if tensor.name == name {
            let (values, _) = tensor.bytes.as_chunks_mut::<4>();
            for value in values {
                *value = (1.001 * f32::from_le_bytes(*value)).to_le_bytes();
            }
        }
    })
}

/// The base with the weights that PEFT's PiSSA start left over.
fn residual_base() -> Decoder {
    let residual = tensors_of(&golden("peft_pissa").join("residual_base.safetensors"));
    base_with(|tensor| {
        let own = |other: &&FileTensor| other.name.replace(".base_layer", "") == tensor.name;
        if let Some(other) = residual.iter().find(own) {
            tensor.bytes = other.bytes.clone();
        }
    })
}

#[test]
fn over_the_residual_base_an_adapter_is_read_as_it_is() {
    let path = golden("peft_pissa").join("golden.safetensors");
    let options = LoadOptions { residual_base: true, ..LoadOptions::default() };
    let (model, _) = load_adapter_with(residual_base(), golden("peft_pissa"), &options).unwrap();
    let apart = difference(&logits(&model, &path), &path);
    assert!(apart <= 1e-5, "largest relative difference {apart:e}");
    let temp = tempfile::tempdir().unwrap();
    let copy = temp.path().join("copy");
    save(&model, &copy);
    let mut expected = file_tensors(&golden("peft_pissa"));
    expected.retain(|tensor| !is_frozen(tensor));
    assert_eq!(file_tensors(&copy), expected, "the same rank");

    // What was saved is valid over the residual base only, and says so.
    load_adapter(residual_base(), &copy).unwrap();
    let error = load_adapter(base("tiny_llama"), &copy).unwrap_err();
    assert!(matches!(error.kind(), ErrorKind::OtherBase { .. }), "{error}");

    // Any start will do over the weights that it left over.
    for start in ["pissa_niter_4", "corda", "loftq", "lora_ga"] {
        let folder = copy_adapter("peft_pissa");
        change_config(folder.path(), |config| config["init_lora_weights"] = start.into());
        load_adapter_with(residual_base(), folder.path(), &options).unwrap();
        load_adapter(base("tiny_llama"), folder.path()).unwrap_err();
    }
}

#[test]
fn a_merged_embedding_parts_from_a_tied_head_where_peft_changes_the_head() {
    for (case, parts, peft_keeps_the_logits) in [
        ("peft_embedding_tied", true, false),
        ("peft_saved_embedding_tied", true, true),
        ("peft_tokens_tied", false, true),
    ] {
        let path = golden(case).join("golden.safetensors");
        let (mut model, _) = load(case, "tiny_llama_tied");
        let report = merge(&mut model).unwrap();
        let apart = difference(&logits(&model, &path), &path);
        assert!(apart <= 2e-5, "{case}: largest relative difference {apart:e}");
        assert_eq!(report.parted.as_deref() == Some("model.embed_tokens"), parts, "{case}");
        let told = report.to_string().contains(
            "\nthe output keeps the frozen weight of model.embed_tokens: the two are tied no more",
        );
        assert_eq!(told, parts, "{case}: {report}");

        let (peft, _) = tensor(&path, "peft_merged", f32::from_le_bytes);
        let apart = difference(&peft, &path);
        assert_eq!(apart <= 1e-5, peft_keeps_the_logits, "{case}: PEFT's is {apart:e} away");

        let temp = tempfile::tempdir().unwrap();
        let copy = temp.path().join("merged");
        save_folder(&model, &copy, WeightDtype::F32, &[]).unwrap();
        let written = decoder(&copy, &lora_core::device_from_env().unwrap());
        assert_eq!(written.config().tie_word_embeddings, !parts, "{case}");
        let apart = difference(&logits(&written, &path), &path);
        assert!(apart <= 2e-5, "{case} written: largest relative difference {apart:e}");
    }
    let (mut model, _) = load("peft_plain", "tiny_llama");
    let report = merge(&mut model).unwrap();
    assert_eq!(report.to_string(), "merged 14 layers");
    let (mut model, _) = load("peft_embedding", "tiny_llama");
    let report = merge(&mut model).unwrap();
    assert_eq!(report.to_string(), "merged 4 layers (1 embedding, 3 linear)");
}

/// The twin of `ConvNet` in `make_peft_cases.py`.
#[derive(Module, Debug, VisitLora)]
#[lora(output = "head")]
struct ConvNet {
    embed: AdaptableEmbedding, // [11, 6]
    along: AdaptableConv1d,
    plain: AdaptableConv2d,
    grouped: AdaptableConv2d,
    head: AdaptableLinear, // [32, 5]
}

impl ConvNet {
    fn golden(device: &Device) -> Self {
        let file = golden("conv_net").join("model.safetensors");
        let read = |name: &str| tensor(&file, name, f32::from_le_bytes);
        fn param<const D: usize>(
            (values, shape): (Vec<f32>, Vec<usize>),
            device: &Device,
        ) -> Param<Tensor<D>> {
            Param::from_tensor(Tensor::from_data(TensorData::new(values, shape), device))
        }
        let along = Conv1dConfig::new(6, 8, 3)
            .with_stride(2)
            .with_padding(PaddingConfig1d::Explicit(1, 1))
            .init(device);
        let plain = Conv2dConfig::new([4, 6], [3, 2])
            .with_stride([1, 2])
            .with_padding(PaddingConfig2d::Explicit(1, 0, 1, 0))
            .with_bias(false)
            .init(device);
        let grouped = Conv2dConfig::new([6, 4], [3, 3])
            .with_padding(PaddingConfig2d::Explicit(1, 1, 1, 1))
            .with_groups(2)
            .init(device);
        let along = Conv1d {
            weight: param(read("along.weight"), device),
            bias: Some(param(read("along.bias"), device)),
            ..along
        };
        let plain = Conv2d { weight: param(read("plain.weight"), device), ..plain };
        let grouped = Conv2d {
            weight: param(read("grouped.weight"), device),
            bias: Some(param(read("grouped.bias"), device)),
            ..grouped
        };
        let (values, shape) = read("head.weight");
        let (rows, columns) = (shape[0], shape[1]);
        let transposed = (0..columns * rows).map(|at| values[at % rows * columns + at / rows]);
        let head = Linear {
            weight: param((transposed.collect(), vec![columns, rows]), device),
            bias: Some(param(read("head.bias"), device)),
        };
        Self {
            embed: Embedding { weight: param(read("embed.weight"), device) }.into(),
            along: along.into(),
            plain: plain.into(),
            grouped: grouped.into(),
            head: head.into(),
        }
    }

    /// `[batch, 16]` to `[batch, 5]`.
    fn forward(&self, ids: Tensor<2, Int>) -> Tensor<2> {
        let [batch, _] = ids.dims();
        let x = self.along.forward(self.embed.forward(ids).swap_dims(1, 2)).tanh(); // [batch, 8, 8]
        let x = self.plain.forward(x.reshape([batch, 4, 4, 4])).tanh(); // [batch, 6, 4, 2]
        let x = self.grouped.forward(x).tanh(); // [batch, 4, 4, 2]
        self.head.forward(x.reshape([batch, 32]))
    }

    fn output(&self, case: &str) -> Vec<f32> {
        let path = golden(case).join("golden.safetensors");
        let (ids, shape) = tensor(&path, "ids", i64::from_le_bytes);
        let ids = TensorData::new(ids, [shape[0], shape[1]]);
        self.forward(Tensor::from_data(ids, &self.devices()[0])).into_data().iter::<f32>().collect()
    }
}

#[test]
fn adapters_of_a_net_of_convolutions_have_the_outputs_of_peft() {
    for (case, merges) in [("peft_conv", false), ("peft_conv_dora", true)] {
        for device in [
            lora_core::device_from_env().unwrap(),
            lora_core::device_from_env().unwrap().autodiff(),
        ] {
            let net = ConvNet::golden(&device);
            let (mut net, report) = load_adapter(net, golden(case)).unwrap();
            assert!(report.unchanged.is_empty(), "{report}");
            let path = golden(case).join("golden.safetensors");
            let (expected, _) = tensor(&path, "output", f32::from_le_bytes);
            let found = net.output(case);
            let apart = largest_difference(&found, &expected);
            println!("{case}: difference {apart:.2e}");
            assert!(apart <= 1e-5, "{case}: largest relative difference {apart:e}");

            let temp = tempfile::tempdir().unwrap();
            let copy = temp.path().join("copy");
            save(&net, &copy);
            assert_eq!(file_tensors(&copy), file_tensors(&golden(case)), "{case}");
            let (again, _) = load_adapter(ConvNet::golden(&device), &copy).unwrap();
            assert_eq!(again.output(case), found, "{case}: saved and loaded");

            if merges {
                merge(&mut net).unwrap();
                let apart = largest_difference(&net.output(case), &expected);
                assert!(apart <= 1e-5, "{case} merged: largest relative difference {apart:e}");
                unmerge(&mut net).unwrap();
            } else {
                let error = merge(&mut net).unwrap_err();
                let grouped = ErrorKind::GroupedConvolution { path: "grouped".to_owned() };
                assert_eq!(error.to_string(), grouped.to_string());
            }
            assert_eq!(net.output(case), found, "{case}: as before");
        }
    }
}

/// A key in another form.
type Rename<'a> = &'a dyn Fn(&str) -> String;

/// An adapter with its keys in another form.
fn renamed(case: &str, rename: impl Fn(&str) -> String) -> tempfile::TempDir {
    let folder = copy_adapter(case);
    change_tensors(folder.path(), |tensors| {
        tensors.iter_mut().for_each(|tensor| tensor.name = rename(&tensor.name));
    });
    folder
}

#[test]
fn keys_of_older_and_other_writers_are_read() {
    for (case, base_name) in CASES {
        let path = golden(case).join("golden.safetensors");
        let (model, _) = load(case, base_name);
        let expected = logits(&model, &path);
        let with_name = |key: &str| {
            let key = key
                .replace(".lora_A.", ".lora_A.default.")
                .replace(".lora_B.", ".lora_B.default.")
                .replace(".lora_magnitude_vector", ".lora_magnitude_vector.default.weight")
                .replace(".trainable_tokens_delta", ".trainable_tokens_delta.default");
            match key.contains(".lora_embedding_") {
                true => format!("{key}.default"),
                false => key,
            }
        };
        let forms: [(&str, Rename); 4] = [
            ("the adapter's name", &with_name),
            ("no prefix", &|key| key.replacen("base_model.model.", "", 1)),
            ("a compiled model", &|key| {
                key.replacen("base_model.model.", "base_model.model._orig_mod.", 1)
            }),
            ("a compiled adapter", &|key| format!("_orig_mod.{key}")),
        ];
        for (form, rename) in forms {
            let folder = renamed(case, rename);
            let (model, report) = load_adapter(base(base_name), folder.path())
                .unwrap_or_else(|error| panic!("{case}, {form}: {error}"));
            assert!(report.unused.is_empty(), "{case}, {form}: {report}");
            assert_eq!(logits(&model, &path), expected, "{case}, {form}");
        }
    }
    // What trained as a whole, with the infix that PEFT takes out today.
    let folder = renamed("peft_saved_head", |key| {
        key.replace("lm_head.weight", "lm_head.modules_to_save.default.weight")
    });
    load_adapter(base("tiny_llama"), folder.path()).unwrap();
}

#[test]
fn without_strictness_what_is_missing_or_unused_is_reported() {
    let folder = copy_adapter("peft_plain");
    let gone = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight";
    let unknown = ["base_model.model.model.layers.9.self_attn.q_proj.lora_A.weight", "who knows"];
    change_tensors(folder.path(), |tensors| {
        let place = tensors.iter().position(|tensor| tensor.name == gone).unwrap();
        let mut other = tensors.remove(place);
        for name in unknown {
            name.clone_into(&mut other.name);
            tensors.push(other.clone());
        }
    });
    let error = load_adapter(base("tiny_llama"), folder.path()).unwrap_err().to_string();
    for key in [gone, unknown[0], unknown[1]] {
        assert!(error.contains(key), "{error}");
    }
    let options = LoadOptions { strict: false, ..LoadOptions::default() };
    let (_, report) = load_adapter_with(base("tiny_llama"), folder.path(), &options).unwrap();
    assert_eq!(report.missing, [gone]);
    assert_eq!(report.unused, [unknown[1], unknown[0]]);
    assert_eq!(report.applied.adapted.len(), 13, "the layer got no adapter");
    let text = report.to_string();
    assert!(text.contains(&format!("\nmissing: {gone}\nunused: who knows, ")), "{text}");
    // A tensor that is there and does not fit is an error all the same.
    change_tensors(folder.path(), |tensors| tensors[0].shape.reverse());
    let error = load_adapter_with(base("tiny_llama"), folder.path(), &options).unwrap_err();
    assert!(error.to_string().contains("expected shape"), "{error}");
}

#[test]
fn an_adapter_of_other_weights_is_refused_unless_it_is_wanted() {
    let temp = tempfile::tempdir().unwrap();
    let copy = temp.path().join("copy");
    let (model, _) = load("peft_plain", "tiny_llama");
    save(&model, &copy);
    let other = || base_with_other("model.layers.1.mlp.up_proj.weight");
    let error = load_adapter(other(), &copy).unwrap_err().to_string();
    let expected = "expected an adapter for this base, found one that was made over other weights \
                    (another model, or another quantisation or dtype of it); to use it all the same, load it \
                    without checking the base";
    assert!(error.ends_with(expected) && error.contains("copy"), "{error}");
    let options = LoadOptions { check_base: false, ..LoadOptions::default() };
    let (_, report) = load_adapter_with(other(), &copy, &options).unwrap();
    assert_eq!(report.same_base, Some(false));
    assert!(report.to_string().ends_with("\nmade over another base"), "{report}");

    // Weights of layers that it does not adapt do not matter.
    let (_, report) = load_adapter(base_with_other("lm_head.weight"), &copy).unwrap();
    assert_eq!(report.same_base, Some(true));

    // Nor do tensors that are missing; as long as the header, a key of no layer.
    let file = copy.join("adapter_model.safetensors");
    let mut bytes = std::fs::read(&file).unwrap();
    let key = b"layers.0.self_attn.q_proj.lora_A.weight";
    let place = bytes.windows(key.len()).position(|window| window == key).unwrap();
    bytes[place + 7] = b'7';
    std::fs::write(&file, bytes).unwrap();
    let options = LoadOptions { strict: false, ..LoadOptions::default() };
    let (_, report) = load_adapter_with(base("tiny_llama"), &copy, &options).unwrap();
    assert_eq!((report.missing.len(), report.unused.len(), report.same_base), (1, 1, Some(true)));
}

#[test]
fn an_adapter_that_changes_nothing_is_reported() {
    let folder = copy_adapter("peft_gaussian_regex");
    let zero = |tensors: &mut Vec<FileTensor>, part: &str| {
        let parts = tensors.iter_mut().filter(|tensor| tensor.name.contains(part));
        parts.for_each(|tensor| tensor.bytes.fill(0));
    };
    change_tensors(folder.path(), |tensors| zero(tensors, "up_proj.lora_B"));
    let (_, report) = load_adapter(base("tiny_llama"), folder.path()).unwrap();
    assert_eq!(report.unchanged, ["model.layers.1.mlp.up_proj"]);
    assert!(
        report.to_string().ends_with("\nchanges nothing: model.layers.1.mlp.up_proj"),
        "{report}"
    );
    change_tensors(folder.path(), |tensors| zero(tensors, "lora_A"));
    let (_, report) = load_adapter(base("tiny_llama"), folder.path()).unwrap();
    assert_eq!(report.unchanged.len(), 2);
    let told = "every layer stays as it is: was the adapter trained?";
    assert!(report.to_string().ends_with(told), "{report}");
}

/// PEFT makes and reads such files for every model of the Llama kind.
#[test]
fn a_bias_setting_without_effect_does_not_bar_a_file() {
    for bias in ["lora_only", "all"] {
        let folder = copy_adapter("peft_plain");
        change_config(folder.path(), |config| config["bias"] = bias.into());
        let (model, _) = load_adapter(base("tiny_llama"), folder.path()).unwrap();
        let (plain, _) = load("peft_plain", "tiny_llama");
        assert_eq!(
            lora_core::AdapterSet::of(&model).num_parameters(),
            lora_core::AdapterSet::of(&plain).num_parameters()
        );
    }
}

#[test]
fn embeddings_that_peft_adds_for_a_changed_vocabulary_must_be_the_models() {
    let folder = copy_adapter("peft_plain");
    let weights = tensors_of(&golden("tiny_llama").join("model.safetensors"));
    let embedding = weights.iter().find(|tensor| tensor.name == "model.embed_tokens.weight");
    let mut embedding = embedding.unwrap().clone();
    embedding.name = format!("base_model.model.{}", embedding.name);
    change_tensors(folder.path(), |tensors| tensors.push(embedding.clone()));
    load_adapter(base("tiny_llama"), folder.path()).unwrap();

    // Of a tied model PEFT writes it again as the head's, which it is.
    let tied = copy_adapter("peft_lora_bias");
    let weights = tensors_of(&golden("tiny_llama_tied").join("model.safetensors"));
    let shared = weights.iter().find(|tensor| tensor.name == "model.embed_tokens.weight");
    let named = |name: &str| FileTensor { name: name.to_owned(), ..shared.unwrap().clone() };
    let [own, again] = ["model.embed_tokens", "lm_head"]
        .map(|path| named(&format!("base_model.model.{path}.weight")));
    change_tensors(tied.path(), |tensors| tensors.extend([own, again.clone()]));
    load_adapter(base("tiny_llama_tied"), tied.path()).unwrap();
    change_tensors(tied.path(), |tensors| {
        let place = tensors.iter_mut().find(|tensor| tensor.name == again.name).unwrap();
        place.bytes[..4].copy_from_slice(&9f32.to_le_bytes());
    });
    let error = load_adapter(base("tiny_llama_tied"), tied.path()).unwrap_err().to_string();
    assert!(error.contains("lm_head.weight is in the file, but belongs to no target"), "{error}");
    let lenient = LoadOptions { strict: false, ..LoadOptions::default() };
    let (_, report) = load_adapter_with(base("tiny_llama_tied"), tied.path(), &lenient).unwrap();
    assert_eq!(report.unused, std::slice::from_ref(&again.name));

    // Also where another copy of the embedding trained.
    let whole = copy_adapter("peft_saved_embedding_tied");
    change_tensors(whole.path(), |tensors| tensors.push(named("base_model.model.lm_head.weight")));
    load_adapter(base("tiny_llama_tied"), whole.path()).unwrap();

    change_tensors(folder.path(), |tensors| {
        let place = tensors.iter_mut().find(|tensor| tensor.name == embedding.name).unwrap();
        place.bytes[..4].copy_from_slice(&9f32.to_le_bytes());
    });
    let error = load_adapter(base("tiny_llama"), folder.path()).unwrap_err().to_string();
    let expected = "base_model.model.model.embed_tokens.weight is in the file, but belongs to no target, and \
         is not this model's weight: they differ by ";
    assert!(error.contains(expected), "{error}");
}

/// The keys that PEFT 0.21.2 wrote for a model whose number of tokens was changed, beside what trained.
#[test]
fn frozen_weights_of_a_changed_vocabulary_stand_beside_what_trained() {
    let frozen = |model: &str, name: &str| {
        let weights = tensors_of(&golden(model).join("model.safetensors"));
        weights.into_iter().find(|tensor| tensor.name == name).unwrap()
    };
    let named = |tensor: &FileTensor, name: &str| FileTensor {
        name: format!("base_model.model.{name}"),
        ..tensor.clone()
    };
    let embedding = frozen("tiny_llama", "model.embed_tokens.weight");
    let head = frozen("tiny_llama", "lm_head.weight");

    let folder = copy_adapter("peft_saved_head");
    change_tensors(folder.path(), |tensors| {
        let own = tensors.iter().find(|tensor| tensor.name == "base_model.model.lm_head.weight");
        let own = own.unwrap().clone();
        tensors.extend([
            named(&own, "lm_head.modules_to_save.weight"),
            named(&head, "lm_head.original_module.weight"),
            named(&embedding, "model.embed_tokens.weight"),
        ]);
    });
    load_adapter(base("tiny_llama"), folder.path()).unwrap();

    let folder = copy_adapter("peft_tokens");
    change_tensors(folder.path(), |tensors| {
        tensors.extend([
            named(&embedding, "model.embed_tokens.token_adapter.base_layer.weight"),
            named(&head, "lm_head.weight"),
        ]);
    });
    load_adapter(base("tiny_llama"), folder.path()).unwrap();
    // A head of its own would miss the rows that a tied one had.
    change_tensors(folder.path(), |tensors| {
        let own = tensors.iter().find(|tensor| tensor.name.ends_with("trainable_tokens_delta"));
        let again = named(own.unwrap(), "lm_head.token_adapter.trainable_tokens_delta");
        tensors.push(again);
    });
    let error = load_adapter(base("tiny_llama"), folder.path()).unwrap_err().to_string();
    assert!(
        error.contains("lm_head.token_adapter.trainable_tokens_delta is in the file"),
        "{error}"
    );

    let embedding = frozen("tiny_llama_tied", "model.embed_tokens.weight");
    let folder = copy_adapter("peft_tokens_tied");
    let rows = "model.embed_tokens.token_adapter.trainable_tokens_delta";
    change_tensors(folder.path(), |tensors| {
        let own = tensors.iter().find(|tensor| tensor.name.ends_with(rows)).unwrap().clone();
        let path = own.name.trim_end_matches(".trainable_tokens_delta").to_owned();
        tensors.extend([
            FileTensor { name: format!("{path}.base_layer.weight"), ..embedding.clone() },
            named(&embedding, "lm_head.token_adapter.base_layer.weight"),
            named(&own, "lm_head.token_adapter.trainable_tokens_delta"),
        ]);
    });
    load_adapter(base("tiny_llama_tied"), folder.path()).unwrap();
    // Rows that only the head has would be lost.
    change_tensors(folder.path(), |tensors| {
        let head = "base_model.model.lm_head.token_adapter.trainable_tokens_delta";
        let place = tensors.iter_mut().find(|tensor| tensor.name == head).unwrap();
        place.bytes[..4].copy_from_slice(&9f32.to_le_bytes());
    });
    let error = load_adapter(base("tiny_llama_tied"), folder.path()).unwrap_err().to_string();
    assert!(
        error.contains("lm_head.token_adapter.trainable_tokens_delta is in the file"),
        "{error}"
    );
}

#[test]
fn a_folder_is_written_whole_or_not_at_all() {
    let temp = tempfile::tempdir().unwrap();
    let folder = temp.path().join("adapter");
    write_folder(&folder, &[("whole", b"x")]).unwrap();
    let names = |folder: &Path| -> Vec<String> {
        let entries = std::fs::read_dir(folder).unwrap();
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
    };
    assert_eq!(names(&folder), ["whole"]);
    assert_eq!(names(temp.path()), ["adapter"]);

    let error = write_folder(&folder, &[("other", b"y")]).unwrap_err().to_string();
    let expected = "exists already; choose another folder or remove it";
    assert!(error.contains(expected), "{error}");
    assert_eq!(names(&folder), ["whole"], "as it was");

    // The second file cannot be written, and the first goes with it.
    let error = write_folder(&temp.path().join("new"), &[("one", b"x"), ("one/such", b"y")]);
    assert!(matches!(error.unwrap_err().kind(), ErrorKind::Io { .. }));
    assert_eq!(names(temp.path()), ["adapter"]);
}
