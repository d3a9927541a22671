//! What of a checkpoint's files and an adapter's can be merged, and what cannot.
#![cfg(any(
    feature = "flex",
    feature = "ndarray",
    feature = "tch",
    feature = "wgpu",
    feature = "cuda"
))]

mod types;

use std::fs;
use std::path::Path;

use burn::module::{Module, Param};
use burn::nn::{EmbeddingConfig, LinearConfig};
use burn::tensor::{Distribution, Tensor};
use lora_core::*;
use safetensors::tensor::{Dtype, TensorView};
use serde_json::{Value, json};
use types::has;

fn linear(d_input: usize, d_output: usize) -> AdaptableLinear {
    LinearConfig::new(d_input, d_output).init(&lora_core::device_from_env().unwrap()).into()
}

fn sentence<T>(result: Result<T>) -> String {
    result.map(|_| ()).unwrap_err().to_string()
}

/// Of a checkpoint or an adapter: name, shape, values in f32.
type Named<'a> = (&'a str, &'a [usize], Vec<f32>);

/// A file of these tensors, and its folder.
fn write(path: &Path, tensors: &[Named], dtype: Dtype) {
    let bytes: Vec<Vec<u8>> = tensors
        .iter()
        .map(|(_, _, values)| match dtype {
            Dtype::F16 => {
                values.iter().flat_map(|value| half::f16::from_f32(*value).to_le_bytes()).collect()
            }
            _ => values.iter().flat_map(|value| value.to_le_bytes()).collect(),
        })
        .collect();
    let views = tensors.iter().zip(&bytes).map(|((name, shape, _), bytes)| {
        (*name, TensorView::new(dtype, shape.to_vec(), bytes).unwrap())
    });
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(path, safetensors::serialize(views, None).unwrap()).unwrap();
}

/// What comes of an adapter over a checkpoint of this dtype.
fn merged(config: Value, adapter: &[Named], base: &[Named], dtype: Dtype) -> Result<MergeReport> {
    merged_as(&MergeOptions::default(), config, adapter, base, dtype).map(|(report, _)| report)
}

/// The same as the options say, and the bytes of the new weights' file.
fn merged_as(
    options: &MergeOptions,
    config: Value,
    adapter: &[Named],
    base: &[Named],
    dtype: Dtype,
) -> Result<(MergeReport, Vec<u8>)> {
    let temp = tempfile::tempdir().unwrap();
    let [base_folder, adapter_folder, output] =
        ["base", "adapter", "output"].map(|name| temp.path().join(name));
    write(&base_folder.join("model.safetensors"), base, dtype);
    fs::write(base_folder.join("config.json"), r#"{"tie_word_embeddings": true}"#).unwrap();
    write(&adapter_folder.join("adapter_model.safetensors"), adapter, Dtype::F32);
    fs::write(adapter_folder.join("adapter_config.json"), config.to_string()).unwrap();
    let device = lora_core::device_from_env().unwrap();
    let report = merge_checkpoint_with(&base_folder, &adapter_folder, &output, &device, options);
    assert_eq!(report.is_ok(), output.exists());
    report.map(|report| (report, fs::read(output.join("model.safetensors")).unwrap()))
}

/// The values of an f32 tensor of such a file.
fn values(file: &[u8], name: &str) -> Vec<f32> {
    let tensors = safetensors::SafeTensors::deserialize(file).unwrap();
    let (four, _) = tensors.tensor(name).unwrap().data().as_chunks::<4>();
    four.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect()
}

fn config(extra: Value) -> Value {
    let mut config = json!({"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": ["q"]});
    config.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
    config
}

fn factors() -> [Named<'static>; 2] {
    [
        ("base_model.model.q.lora_A.weight", &[1, 4], vec![1.0; 4]),
        ("base_model.model.q.lora_B.weight", &[4, 1], vec![1.0; 4]),
    ]
}

fn q() -> Named<'static> {
    ("q.weight", &[4, 4], vec![0.0; 16])
}

#[test]
fn a_checkpoint_takes_all_of_an_adapter_or_nothing() {
    merged(config(json!({})), &factors(), &[q()], Dtype::F32).unwrap();
    merged(config(json!({"lora_alpha": -1})), &factors(), &[q()], Dtype::F32).unwrap();

    for (name, shape) in [
        ("q.lora_magnitude_vector", &[4][..]),
        ("q.lora_B.bias", &[4]),
        ("q.base_layer.bias", &[4]),
        ("q.weight", &[4, 4]),
        ("v.lora_magnitude_vector", &[4]),
        ("v.base_layer.bias", &[4]),
    ] {
        let name = format!("base_model.model.{name}");
        let count = shape.iter().product();
        let [a, b] = factors();
        let adapter = [a, b, (name.as_str(), shape, vec![3.0; count])];
        let base = [q(), ("q.bias", &[4], vec![0.0; 4]), ("v.weight", &[4, 4], vec![0.0; 16])];
        let error = sentence(merged(config(json!({})), &adapter, &base, Dtype::F32));
        assert!(error.contains("is in the file, but belongs to no target"), "{name}: {error}");
    }

    let base = [q(), ("v.weight", &[4, 4], vec![0.0; 16])];
    let two = config(json!({"target_modules": ["q", "v"]}));
    let error = sentence(merged(two, &factors(), &base, Dtype::F32));
    assert!(error.contains("v is a target, and the file has nothing for it"), "{error}");
}

/// With what PEFT adds for a head, its frozen weight, and a bias that trained.
#[test]
fn weight_and_bias_of_a_layer_are_merged_each_for_itself() {
    let weight: Vec<f32> = (0..16).map(|value| value as f32).collect();
    let [a, b] = factors();
    let adapter = [
        a,
        b,
        ("base_model.model.q.base_layer.weight", &[4, 4][..], weight.clone()),
        ("base_model.model.q.base_layer.bias", &[4], vec![7.0; 4]),
    ];
    let base = [("q.weight", &[4, 4][..], weight.clone()), ("q.bias", &[4], vec![1.0; 4])];
    let options = MergeOptions::default();
    let config = config(json!({"bias": "lora_only"}));
    let (_, file) = merged_as(&options, config, &adapter, &base, Dtype::F32).unwrap();
    let expected: Vec<f32> = weight.iter().map(|value| value + 1.0).collect();
    assert_eq!(values(&file, "q.weight"), expected);
    assert_eq!(values(&file, "q.bias"), [7.0; 4]);
}

#[test]
fn over_what_a_start_left_the_update_is_added_as_it_is() {
    let mut weight = vec![0.0; 16];
    weight[0] = 3.0; // the largest singular value, [0][0] in either order
    weight[5] = 2.0;
    let base = [("q.weight", &[4, 4][..], weight.clone())];
    let merged = |residual_base: bool| {
        let options = MergeOptions { residual_base, ..MergeOptions::default() };
        let config = config(json!({"init_lora_weights": "pissa"}));
        let (_, file) = merged_as(&options, config, &factors(), &base, Dtype::F32).unwrap();
        values(&file, "q.weight")
    };
    let mut expected: Vec<f32> = weight.iter().map(|value| value + 1.0).collect();
    assert_eq!(merged(true), expected);
    // Over the original weight, the start is taken out: 3 at [0][0].
    expected[0] -= 3.0;
    for (found, expected) in merged(false).iter().zip(&expected) {
        assert!((found - expected).abs() < 1e-5, "{found} {expected}");
    }
}

#[test]
fn a_checkpoint_whose_weights_are_the_other_way_round_is_refused() {
    let transposed = config(json!({"fan_in_fan_out": true}));
    let error = sentence(merged(transposed, &factors(), &[q()], Dtype::F32));
    assert!(error.contains("fan_in_fan_out: expected false"), "{error}");
}

#[test]
fn a_tied_embedding_that_trained_as_a_whole_is_not_merged_into_files() {
    let saved = config(json!({"modules_to_save": ["embed_tokens"]}));
    let [a, b] = factors();
    let name = "base_model.model.model.embed_tokens.weight";
    let adapter = [a, b, (name, &[3, 4][..], vec![9.0; 12])];
    let base = [q(), ("model.embed_tokens.weight", &[3, 4], vec![1.0; 12])];
    let error = sentence(merged(saved, &adapter, &base, Dtype::F32));
    assert!(error.contains("tied to the embedding"), "{error}");
}

#[test]
fn a_value_that_the_checkpoint_cannot_hold_is_an_error() {
    if !has(burn::tensor::DType::F16) {
        return;
    }
    for (part, shape, config) in [
        ("v.weight", &[4, 4][..], config(json!({"modules_to_save": ["v"]}))),
        ("q.base_layer.bias", &[4], config(json!({"bias": "lora_only"}))),
        ("v.bias", &[4], config(json!({"bias": "all"}))),
    ] {
        let name = format!("base_model.model.{part}");
        let [a, b] = factors();
        let count = shape.iter().product();
        let adapter = [a, b, (name.as_str(), shape, vec![1e6; count])];
        // Of the biases, the one that the adapter has.
        let bias = part.replace(".base_layer", "").replace(".weight", ".bias");
        let base = [q(), ("v.weight", &[4, 4], vec![0.0; 16]), (&bias, &[4], vec![0.0; 4])];
        let base = if part == "v.weight" { &base[..2] } else { &base[..] };
        let error = merged(config, &adapter, base, Dtype::F16).unwrap_err();
        assert!(matches!(error.kind(), ErrorKind::NonFinite { .. }), "{part}: {error}");
    }
}

/// As [`load_adapter`] does.
#[test]
fn what_the_config_does_not_mean_is_not_merged() {
    let one = |name: &'static str, shape: &'static [usize], value: f32| -> Named<'static> {
        (name, shape, vec![value; shape.iter().product()])
    };
    let base = [
        q(),
        one("q.bias", &[4], 1.0),
        one("v.weight", &[4, 4], 2.0),
        one("v.bias", &[4], 3.0),
        one("embed_tokens.weight", &[3, 4], 4.0),
    ];
    let merge = |extra: &[Named<'static>]| {
        let adapter: Vec<Named> = factors().into_iter().chain(extra.iter().cloned()).collect();
        merged(config(json!({})), &adapter, &base, Dtype::F32)
    };
    // Another value than the base's was trained, and nothing says so.
    for extra in [
        &[
            one("base_model.model.v.lora_A.weight", &[1, 4], 1.0),
            one("base_model.model.v.lora_B.weight", &[4, 1], 1.0),
        ][..],
        &[one("base_model.model.v.weight", &[4, 4], 9.0)],
        &[one("base_model.model.v.bias", &[4], 9.0)],
        &[one("base_model.model.q.base_layer.bias", &[4], 9.0)],
        &[one("base_model.model.embed_tokens.weight", &[3, 4], 9.0)],
    ] {
        let error = sentence(merge(extra));
        assert!(error.contains("is in the file, but belongs to no target"), "{error}");
    }
    // The base's own stand in files of PEFT whose vocabulary was changed.
    for extra in [
        one("base_model.model.embed_tokens.weight", &[3, 4], 4.0),
        one("base_model.model.v.bias", &[4], 3.0),
        one("base_model.model.q.base_layer.bias", &[4], 1.0),
    ] {
        assert_eq!(merge(&[extra]).unwrap().layers.len(), 1);
    }
    // Of a tied model also under the name of the head, which its files do not have.
    let head = |value| one("base_model.model.lm_head.weight", &[3, 4], value);
    let embedding = || one("base_model.model.embed_tokens.weight", &[3, 4], 4.0);
    merge(&[embedding(), head(4.0)]).unwrap();
    for extra in [&[embedding(), head(5.0)][..], &[head(4.0)]] {
        let error = sentence(merge(extra));
        assert!(error.contains("lm_head.weight is not in the checkpoint"), "{error}");
    }

    let [a, b] = factors();
    for (extra, expected) in [
        (json!({"modules_to_save": ["v"]}), "v trained as a whole, and the file has nothing"),
        (json!({"bias": "all"}), "v has a trained bias, and the file has nothing"),
        (
            json!({"trainable_token_indices": {"embed_tokens": [1]}}),
            "embed_tokens has trained tokens",
        ),
    ] {
        let error = sentence(merged(config(extra), &[a.clone(), b.clone()], &base, Dtype::F32));
        assert!(error.contains(expected), "{error}");
    }
    for (extra, expected) in [
        (json!({"target_modules": ["q", "v"], "modules_to_save": ["v"]}), None),
        (json!({"target_modules": ["q", "xv"], "modules_to_save": ["v"]}), Some("means 'xv' too")),
        (
            json!({"trainable_token_indices": {"embed_tokens": [1], "tokens": [2]}}),
            Some("'tokens', which means 'embed_tokens' again"),
        ),
    ] {
        let whole = one("base_model.model.v.weight", &[4, 4], 9.0);
        let v_bias = one("base_model.model.v.bias", &[4], 9.0);
        let mut adapter: Vec<Named> = factors().into_iter().chain([whole, v_bias]).collect();
        adapter.extend([
            one("base_model.model.xv.lora_A.weight", &[1, 4], 1.0),
            one("base_model.model.xv.lora_B.weight", &[4, 1], 1.0),
        ]);
        let xv = one("xv.weight", &[4, 4], 0.0);
        let base: Vec<Named> = base.iter().cloned().chain([xv]).collect();
        if expected.is_none() {
            adapter.truncate(4);
        }
        let result = merged(config(extra), &adapter, &base, Dtype::F32);
        match expected {
            None => assert_eq!(result.unwrap().layers.len(), 2),
            Some(expected) => {
                let error = sentence(result);
                assert!(error.contains(expected), "{error}");
            }
        }
    }
    // A bias that trains beside a frozen weight.
    let [a, b] = factors();
    let [weight, bias, q_bias] = [
        one("base_model.model.v.weight", &[4, 4], 2.0),
        one("base_model.model.v.bias", &[4], 9.0),
        one("base_model.model.q.base_layer.bias", &[4], 9.0),
    ];
    let all = config(json!({"bias": "all"}));
    let adapter = [a, b, weight, bias, q_bias];
    let options = MergeOptions::default();
    let (_, file) = merged_as(&options, all.clone(), &adapter, &base, Dtype::F32).unwrap();
    assert_eq!(values(&file, "v.bias"), [9.0; 4]);
    let two = Param::from_tensor(Tensor::full([4, 4], 2.0, &lora_core::device_from_env().unwrap()));
    let model = || {
        let mut model = Pair { v: linear(4, 4), q: linear(4, 4) };
        if let AdaptableLinear::Dense(layer) = &mut model.v {
            layer.weight = two.clone();
        }
        model
    };
    let temp = tempfile::tempdir().unwrap();
    let read = |adapter: &[Named]| {
        write(&temp.path().join("adapter_model.safetensors"), adapter, Dtype::F32);
        fs::write(temp.path().join("adapter_config.json"), all.to_string()).unwrap();
        load_adapter(model(), temp.path())
    };
    read(&adapter).unwrap();
    let mut adapter = adapter;
    adapter[2].2[0] = 3.0;
    assert!(sentence(read(&adapter)).contains("is not this model's weight"));
    // What Python's expressions alone can say, the file's tensors do.
    let ahead = config(json!({"target_modules": "^(?!.*vision).*q$"}));
    merged(ahead, &factors(), &base, Dtype::F32).unwrap();

    // Of a model without biases PEFT writes none; what lies beside the model in its files does not count.
    let stray = [one("v_head.summary.weight", &[1, 4], 1.0), one("v_head.summary.bias", &[1], 1.0)];
    let beside: Vec<Named> = [q()].into_iter().chain(stray).collect();
    merged(all.clone(), &factors(), &beside, Dtype::F32).unwrap();
    let beside = [q(), one("v.weight", &[4, 4], 2.0), one("v.bias", &[4], 3.0)];
    let error = sentence(merged(all.clone(), &factors(), &beside, Dtype::F32));
    assert!(error.contains("v has a trained bias, and the file has nothing"), "{error}");
    // Of the model is what begins as the layers of the file do.
    let [(_, a_dims, a), (_, b_dims, b)] = factors();
    let deep: [Named; 2] = [
        ("base_model.model.model.mlp.q.lora_A.weight", a_dims, a),
        ("base_model.model.model.mlp.q.lora_B.weight", b_dims, b),
    ];
    let (_, q_dims, q_values) = q();
    let mut beside: Vec<Named> = vec![
        ("model.mlp.q.weight", q_dims, q_values),
        one("v_head.summary.weight", &[1, 4], 1.0),
        one("v_head.summary.bias", &[1], 1.0),
        one("model.attention.v.weight", &[4, 4], 2.0),
    ];
    merged(all.clone(), &deep, &beside, Dtype::F32).unwrap();
    beside.push(one("model.attention.v.bias", &[4], 3.0));
    let error = sentence(merged(all.clone(), &deep, &beside, Dtype::F32));
    assert!(error.contains("model.attention.v has a trained bias, and the file has"), "{error}");

    let base = [q(), one("q.bias", &[3], 1.0)];
    let error = sentence(merged(config(json!({})), &factors(), &base, Dtype::F32));
    assert!(error.contains("q.bias: expected shape [4], found [3]"), "{error}");
}

#[test]
fn tokens_of_a_tied_head_that_the_files_hold_twice_are_not_merged() {
    let rows = "base_model.model.embed_tokens.token_adapter.trainable_tokens_delta";
    let config = config(json!({"trainable_token_indices": {"embed_tokens": [1]}}));
    let [a, b] = factors();
    let adapter = [a, b, (rows, &[1, 4][..], vec![9.0; 4])];
    let embedding = || -> Named { ("embed_tokens.weight", &[3, 4], vec![1.0; 12]) };
    let merge = |head: &[f32]| {
        let base: Vec<Named> = match head {
            [] => vec![q(), embedding()],
            head => vec![q(), embedding(), ("lm_head.weight", &[3, 4], head.to_vec())],
        };
        merged_as(&MergeOptions::default(), config.clone(), &adapter, &base, Dtype::F32)
    };
    for head in [&[][..], &[2.0; 12]] {
        let (_, file) = merge(head).unwrap();
        assert_eq!(values(&file, "embed_tokens.weight")[4..8], [9.0; 4]);
    }
    let error = sentence(merge(&[1.0; 12]));
    assert!(error.contains("tied to the embedding"), "{error}");
}

/// PEFT writes a head's frozen weight, which is what the start left of it, and its bias, trained or not.
#[test]
fn what_a_start_left_of_a_head_may_stand_beside_it() {
    let head = linear(4, 3);
    let weight = head.weight();
    let mut lora = LoraConfig::new(1, 2.0);
    for (init, name) in [(Init::Pissa { iterations: None }, "pissa"), (Init::Olora, "olora")] {
        lora.init = init;
        let start = LoraAdapter::new(&weight, None, &lora.resolve("head").unwrap()).unwrap();
        let (a, b) = (start.lora_a.val(), start.lora_b.val());
        let residual = weight.clone() - a.clone().matmul(b.clone()).mul_scalar(2.0);
        let values = |matrix: Tensor<2>| matrix.transpose().into_data().iter::<f32>().collect();
        let bias: Vec<f32> = head.bias().unwrap().into_data().iter::<f32>().collect();
        let temp = tempfile::tempdir().unwrap();
        let [base, adapter] = ["base", "adapter"].map(|name| temp.path().join(name));
        write(
            &base.join("model.safetensors"),
            &[("head.weight", &[3, 4], values(weight.clone())), ("head.bias", &[3], bias.clone())],
            Dtype::F32,
        );
        let extra = json!({"lora_alpha": 2, "target_modules": ["head"], "init_lora_weights": name});
        fs::create_dir_all(&adapter).unwrap();
        fs::write(adapter.join("adapter_config.json"), config(extra).to_string()).unwrap();
        let files = |residual: Vec<f32>, bias: Vec<f32>| {
            let tensors: [Named; 4] = [
                ("base_model.model.head.lora_A.weight", &[1, 4], values(a.clone())),
                ("base_model.model.head.lora_B.weight", &[3, 1], values(b.clone())),
                ("base_model.model.head.base_layer.weight", &[3, 4], residual),
                ("base_model.model.head.base_layer.bias", &[3], bias),
            ];
            write(&adapter.join("adapter_model.safetensors"), &tensors, Dtype::F32);
            let load = load_adapter(Head { head: head.clone() }, &adapter).map(|_| ());
            let output = temp.path().join("output");
            let merge =
                merge_checkpoint(&base, &adapter, &output, &lora_core::device_from_env().unwrap())
                    .map(|_| ());
            let _ = fs::remove_dir_all(output);
            [load, merge]
        };
        for result in files(values(residual.clone()), bias.clone()) {
            result.unwrap();
        }
        for result in files(values(weight.clone()), bias.clone()) {
            let error = sentence(result);
            assert!(error.contains("head.base_layer.weight is not this model's weight"), "{error}");
        }
        for result in files(values(residual.clone()), vec![9.0; 3]) {
            let error = sentence(result);
            assert!(error.contains("is not this model's bias"), "{error}");
        }
        // Without A there is no start to compare with: what is missing is told, and nothing else.
        let tensors: [Named; 2] = [
            ("base_model.model.head.lora_B.weight", &[3, 1], values(b.clone())),
            ("base_model.model.head.base_layer.weight", &[3, 4], values(residual)),
        ];
        write(&adapter.join("adapter_model.safetensors"), &tensors, Dtype::F32);
        let error = load_adapter(Head { head: head.clone() }, &adapter).unwrap_err();
        let ErrorKind::AdapterMismatch { problems, .. } = error.kind() else { panic!("{error}") };
        assert_eq!(problems, &["base_model.model.head.lora_A.weight is missing"]);
    }
}

#[derive(Module, Debug, VisitLora)]
struct Head {
    head: AdaptableLinear,
}

#[derive(Module, Debug, VisitLora)]
struct Untied {
    embed_tokens: AdaptableEmbedding, // [5, 4]
    q: AdaptableLinear,               // [4, 4]
    lm_head: AdaptableLinear,         // [4, 5]
    decoder_embed: AdaptableLinear,   // [4, 5], no embedding
    embed_out: AdaptableLinear,       // [4, 5], neither
    patch_embed: AdaptableLinear,     // [4, 5], nor this, which has no bias either
}

#[test]
fn what_trained_as_a_whole_is_merged_over_its_own_base() {
    let embed_tokens =
        EmbeddingConfig::new(5, 4).init(&lora_core::device_from_env().unwrap()).into();
    let [embed_out, patch_embed] = [0, 1].map(|_| {
        LinearConfig::new(4, 5).with_bias(false).init(&lora_core::device_from_env().unwrap()).into()
    });
    let (q, [lm_head, decoder_embed]) = (linear(4, 4), [0, 1].map(|_| linear(4, 5)));
    let base = Untied { embed_tokens, q, lm_head, decoder_embed, embed_out, patch_embed };
    let mut lora = LoraConfig::new(2, 4.0);
    lora.target_modules = TargetModules::names(["q"]);
    lora.modules_to_save = ["embed_tokens", "lm_head", "decoder_embed", "embed_out", "patch_embed"]
        .map(str::to_owned)
        .to_vec();
    let (model, _) = inject(base.clone(), &lora).unwrap();
    let temp = tempfile::tempdir().unwrap();
    let [folder, adapter, output] =
        ["base", "adapter", "output"].map(|name| temp.path().join(name));
    save_adapter(&model, &adapter, &AdapterInfo::default()).unwrap();
    let values = |tensor: Tensor<2>| tensor.into_data().iter::<f32>().collect::<Vec<f32>>();
    let matrix = |layer: &dyn AdaptableLayer| values(layer.weight().transpose());
    let bias = |layer: &dyn AdaptableLayer| values(layer.bias().unwrap().unsqueeze());
    let tensors: [Named; 9] = [
        ("embed_tokens.weight", &[5, 4], values(base.embed_tokens.weight())),
        ("q.weight", &[4, 4], matrix(&base.q)),
        ("q.bias", &[4], bias(&base.q)),
        ("lm_head.weight", &[5, 4], matrix(&base.lm_head)),
        ("lm_head.bias", &[5], bias(&base.lm_head)),
        ("decoder_embed.weight", &[5, 4], matrix(&base.decoder_embed)),
        ("decoder_embed.bias", &[5], bias(&base.decoder_embed)),
        ("embed_out.weight", &[5, 4], matrix(&base.embed_out)),
        ("patch_embed.weight", &[5, 4], matrix(&base.patch_embed)),
    ];
    write(&folder.join("model.safetensors"), &tensors, Dtype::F32);
    let report =
        merge_checkpoint(&folder, &adapter, &output, &lora_core::device_from_env().unwrap())
            .unwrap();
    let kind = |path: &str| report.layers.iter().find(|layer| layer.path == path).unwrap().kind;
    assert_eq!(report.layers.len(), 6);
    assert_eq!(kind("embed_tokens"), LayerKind::Embedding);
    assert_eq!([kind("embed_out"), kind("decoder_embed")], [LayerKind::Linear; 2]);
}

#[derive(Module, Debug, VisitLora)]
struct Pair {
    v: AdaptableLinear, // [4, 4]
    q: AdaptableLinear,
}

#[test]
fn a_checkpoint_must_be_the_base_of_the_adapter_unless_it_is_wanted() {
    let base = Pair { v: linear(4, 4), q: linear(4, 4) };
    let (mut model, _) = inject(base, &LoraConfig::new(2, 4.0)).unwrap();
    for layer in [&mut model.v, &mut model.q] {
        let adapter = layer.adapter_mut().unwrap();
        let a = adapter.lora_a.val().random_like(Distribution::Default);
        adapter.lora_a = Param::from_tensor(a);
    }
    let temp = tempfile::tempdir().unwrap();
    let adapter = temp.path().join("adapter");
    save_adapter(&model, &adapter, &AdapterInfo::default()).unwrap();

    let merge = |name: &str, scale: f32, options: &MergeOptions| {
        let [base, output] =
            ["base", "output"].map(|kind| temp.path().join(format!("{name}-{kind}")));
        fs::create_dir(&base).unwrap();
        // In torch's order, v in another file than q.
        for (name, layer) in [("q", &model.q), ("v", &model.v)] {
            let weight = layer.weight().without_autodiff().mul_scalar(scale).transpose();
            let bytes = weight.into_data().into_bytes().to_vec();
            let view = TensorView::new(Dtype::F32, vec![4, 4], &bytes).unwrap();
            let file = safetensors::serialize([(format!("{name}.weight"), view)], None).unwrap();
            fs::write(base.join(format!("{name}.safetensors")), file).unwrap();
        }
        merge_checkpoint_with(
            base,
            &adapter,
            output,
            &lora_core::device_from_env().unwrap(),
            options,
        )
    };
    let strict = MergeOptions::default();
    assert_eq!(merge("same", 1.0, &strict).unwrap().layers.len(), 2);
    let error = merge("other", 2.0, &strict).unwrap_err();
    assert!(matches!(error.kind(), ErrorKind::OtherBase { .. }), "{error}");
    let options = MergeOptions { check_base: false, ..strict };
    assert_eq!(merge("wanted", 2.0, &options).unwrap().layers.len(), 2);
}

#[test]
fn a_weight_without_values_is_refused() {
    for shape in [[0, 4], [4, 0]] {
        let adapter: [Named; 2] = [
            ("base_model.model.q.lora_A.weight", &[1, shape[1]], vec![1.0; shape[1]]),
            ("base_model.model.q.lora_B.weight", &[shape[0], 1], vec![1.0; shape[0]]),
        ];
        let error = sentence(merged(
            config(json!({})),
            &adapter,
            &[("q.weight", &shape, vec![])],
            Dtype::F32,
        ));
        assert!(error.contains("no layer has the shape"), "{error}");
    }
}

/// Whoever opens the new folder must not find the old weights in it under another name.
#[test]
fn weights_beside_those_of_the_model_are_left_out_and_named() {
    const INDEX: &str = "model.safetensors.index.json";
    let temp = tempfile::tempdir().unwrap();
    let [base, adapter] = ["base", "adapter"].map(|name| temp.path().join(name));
    write(&adapter.join("adapter_model.safetensors"), &factors(), Dtype::F32);
    fs::write(adapter.join("adapter_config.json"), config(json!({})).to_string()).unwrap();
    for name in ["consolidated.safetensors", "model.safetensors"] {
        write(&base.join(name), &[q()], Dtype::F32);
    }
    let mut left = vec!["consolidated.safetensors", "flax_model.msgpack", "model.GGUF"];
    left.extend(["pytorch_model.bin", "pytorch_model.bin.index.json"]);
    let mut kept = vec!["bin", "config.json", "model.safetensors", "tokenizer.model"];
    for name in left.iter().chain(&kept) {
        if !base.join(name).exists() {
            fs::write(base.join(name), "{}").unwrap();
        }
    }
    let merge = |name: &str| {
        let output = temp.path().join(name);
        let report =
            merge_checkpoint(&base, &adapter, &output, &lora_core::device_from_env().unwrap())?;
        let entries = fs::read_dir(&output).unwrap();
        let mut found: Vec<String> =
            entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        found.sort();
        Ok::<_, Error>((report, found))
    };

    let templates = base.join("additional_chat_templates");
    fs::create_dir_all(base.join("original")).unwrap();
    fs::create_dir_all(&templates).unwrap();
    fs::write(templates.join("tool.jinja"), "{{ messages }}").unwrap();
    left.insert(3, "original/");
    kept.insert(0, "additional_chat_templates");

    let (report, found) = merge("single").unwrap();
    assert_eq!(report.left_out, left);
    let copied = temp.path().join("single/additional_chat_templates/tool.jinja");
    assert_eq!(fs::read_to_string(copied).unwrap(), "{{ messages }}");
    assert!(report.to_string().ends_with(&left.join(", ")), "{report}");
    assert_eq!(found, kept);

    // One file wins over an index, as where a model is loaded, whatever the index names.
    fs::write(base.join(INDEX), r#"{"weight_map": {"q.weight": "gone.safetensors"}}"#).unwrap();
    let (report, found) = merge("both").unwrap();
    assert!(report.left_out.contains(&INDEX.to_owned()), "{report}");
    assert_eq!(found, kept);

    // Beside an index, whatever it does not name.
    fs::rename(base.join("model.safetensors"), base.join("first.safetensors")).unwrap();
    fs::write(base.join(INDEX), r#"{"weight_map": {"q.weight": "first.safetensors"}}"#).unwrap();
    kept[3] = "first.safetensors";
    kept.insert(4, INDEX);
    let (report, found) = merge("shards").unwrap();
    assert_eq!(
        (report.left_out, found.len()),
        (left.iter().map(|name| name.to_string()).collect(), 6)
    );
    assert_eq!(found, kept);

    for (index, expected) in [
        (
            r#"{"weight_map": {"q.weight": "second.safetensors"}}"#,
            "download the missing one, found second.safetensors, which is not there",
        ),
        (
            r#"{"weight_map": {"q.weight": "../base/first.safetensors"}}"#,
            "beside the index, found \"../",
        ),
        (r#"{"weight_map": {}}"#, "a file that ends with .safetensors"),
        ("[]", "weight_map: expected an object"),
    ] {
        fs::write(base.join(INDEX), index).unwrap();
        let error = sentence(merge("none"));
        assert!(error.contains(expected), "{error}");
        assert!(!temp.path().join("none").exists());
    }
}

/// As in the cache of an unfinished download.
#[cfg(unix)]
#[test]
fn a_link_that_leads_nowhere_is_told() {
    let temp = tempfile::tempdir().unwrap();
    let [base, adapter, output] = ["base", "adapter", "output"].map(|name| temp.path().join(name));
    write(&adapter.join("adapter_model.safetensors"), &factors(), Dtype::F32);
    fs::write(adapter.join("adapter_config.json"), config(json!({})).to_string()).unwrap();
    write(&base.join("model.safetensors"), &[q()], Dtype::F32);
    // Nothing is missed of what is not copied.
    for name in ["pytorch_model.bin", ".#config.json"] {
        std::os::unix::fs::symlink("gone", base.join(name)).unwrap();
    }
    let report =
        merge_checkpoint(&base, &adapter, &output, &lora_core::device_from_env().unwrap()).unwrap();
    assert_eq!(report.left_out, [".#config.json", "pytorch_model.bin"]);
    fs::remove_dir_all(&output).unwrap();

    std::os::unix::fs::symlink("gone", base.join("tokenizer.json")).unwrap();
    let error = sentence(merge_checkpoint(
        &base,
        &adapter,
        &output,
        &lora_core::device_from_env().unwrap(),
    ));
    assert!(error.contains("tokenizer.json: cannot be read"), "{error}");
    assert!(!output.exists());

    // Without an index every file of weights may be a part of the model.
    let part = temp.path().join("part");
    write(&part.join("model-00001-of-00002.safetensors"), &[q()], Dtype::F32);
    for name in ["model-00002-of-00002.safetensors", "model.safetensors"] {
        std::os::unix::fs::symlink("gone", part.join(name)).unwrap();
        let error = sentence(merge_checkpoint(
            &part,
            &adapter,
            &output,
            &lora_core::device_from_env().unwrap(),
        ));
        assert!(error.contains(&format!("{name}: cannot be read")), "{error}");
        assert!(!output.exists());
        fs::remove_file(part.join(name)).unwrap();
    }
    fs::remove_file(part.join("model-00001-of-00002.safetensors")).unwrap();
    std::os::unix::fs::symlink("gone", part.join("model.safetensors")).unwrap();
    let error = sentence(merge_checkpoint(
        &part,
        &adapter,
        &output,
        &lora_core::device_from_env().unwrap(),
    ));
    assert!(error.contains("model.safetensors: cannot be read"), "{error}");
}

#[test]
fn all_that_does_not_fit_is_named_before_anything_is_written() {
    let adapter: [Named; 6] = [
        ("base_model.model.q.lora_A.weight", &[1, 5], vec![1.0; 5]),
        ("base_model.model.q.lora_B.weight", &[4, 1], vec![1.0; 4]),
        ("base_model.model.k.lora_A.weight", &[1, 4], vec![1.0; 4]),
        ("base_model.model.v.lora_A.weight", &[1, 4], vec![f32::NAN; 4]),
        ("base_model.model.v.lora_B.weight", &[3, 1], vec![1.0; 3]),
        ("base_model.model.o.lora_B.weight", &[4, 1], vec![1.0; 4]),
    ];
    let weights = ["q.weight", "k.weight", "v.weight", "o.weight"];
    let weights = weights.map(|name| -> Named { (name, &[4, 4], vec![1.0; 16]) });
    let config = config(json!({ "target_modules": ["q", "k", "v", "o"] }));
    let error = sentence(merged(config, &adapter, &weights, Dtype::F32));
    for expected in [
        "q.lora_A.weight: expected shape [1, 4], found [1, 5]",
        "k.lora_B.weight is missing",
        "o.lora_A.weight is missing",
    ] {
        assert!(error.contains(expected), "{expected}: {error}");
    }
    assert!(error.contains("and 1 more") || error.contains("v.lora_B"), "{error}");
}
