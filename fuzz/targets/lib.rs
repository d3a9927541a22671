//! What the targets share: a model of every kind of layer, first inputs, and a folder for each input.

use std::path::Path;
use std::{env, fs, process};

use burn::module::Module;
use burn::nn::conv::{Conv1dConfig, Conv2dConfig};
use burn::nn::{EmbeddingConfig, LinearConfig};
use burn::tensor::Device;
use lora_core::{
    AdaptableConv1d, AdaptableConv2d, AdaptableEmbedding, AdaptableLinear, Init, LoraConfig,
    TargetModules, TrainedBias, VisitLora, inject,
};
use lora_models::{
    AttentionBias, Decoder, DecoderConfig, ExpertsConfig, FAMILIES, RandomWeights, RopeScaling,
};

/// A model with a slot of every kind.
#[derive(Module, Debug, VisitLora)]
#[lora(output = "head")]
pub struct Net {
    pub embed_tokens: AdaptableEmbedding,
    pub layers: Vec<AdaptableLinear>,
    pub conv1: AdaptableConv1d,
    pub conv2: AdaptableConv2d,
    pub head: AdaptableLinear,
}

impl Net {
    #[allow(clippy::new_without_default)]
    pub fn new() -> Self {
        let device = Device::flex();
        let linear = |d_input, d_output, bias| {
            LinearConfig::new(d_input, d_output).with_bias(bias).init(&device).into()
        };
        Self {
            embed_tokens: EmbeddingConfig::new(5, 4).init(&device).into(),
            layers: vec![linear(4, 3, true), linear(3, 4, false)],
            conv1: Conv1dConfig::new(2, 4, 3).init(&device).into(),
            conv2: Conv2dConfig::new([4, 2], [2, 1]).with_groups(2).init(&device).into(),
            head: linear(4, 5, false),
        }
    }
}

/// Configs that use every part of the format between them.
fn configs() -> Vec<LoraConfig> {
    let of = |names: &[&str]| LoraConfig {
        target_modules: TargetModules::names(names.iter().copied()),
        ..LoraConfig::new(2, 4.0)
    };
    vec![
        of(&["0", "1"]),
        LoraConfig { dora: true, bias: TrainedBias::LoraOnly, ..of(&["0", "embed_tokens"]) },
        LoraConfig { lora_bias: true, modules_to_save: vec!["head".to_owned()], ..of(&["1"]) },
        LoraConfig {
            trainable_tokens: vec![("embed_tokens".to_owned(), vec![1, 3])],
            ..of(&["0"])
        },
        LoraConfig { rank_pattern: vec![("conv2".to_owned(), 4)], ..of(&["conv1", "conv2"]) },
        LoraConfig { init: Init::Olora, bias: TrainedBias::All, ..of(&["0", "1", "head"]) },
    ]
}

/// The model with an adapter of each config, written by `save` and [`joined`]; without those that the
/// format cannot hold.
pub fn adapters(
    net: &Net,
    weights: &str,
    save: impl Fn(&Net, &Path) -> lora_core::Result<()>,
) -> Vec<Vec<u8>> {
    let folder = tempfile::tempdir().expect("the temporary folder can be written");
    let input = |(index, config)| {
        let (model, _) = inject(net.clone(), &config).expect("the config fits");
        let folder = folder.path().join(format!("{index}"));
        save(&model, &folder).ok()?;
        Some(joined(&folder, weights))
    };
    configs().into_iter().enumerate().filter_map(input).collect()
}

/// Decoders of 8 tokens, one block and width 4: a Llama, and a Mixtral of three experts.
pub fn decoders() -> [Decoder; 2] {
    let experts = ExpertsConfig {
        count: 3,
        per_token: 2,
        intermediate_size: 6,
        normalised: true,
        layers: vec![true],
    };
    [("llama", None), ("mixtral", Some(experts))].map(|(name, experts)| decoder(name, experts))
}

fn decoder(family: &str, experts: Option<ExpertsConfig>) -> Decoder {
    let family = FAMILIES.iter().find(|known| known.name == family).expect("it is in the table");
    let config = DecoderConfig {
        family,
        vocab_size: 8,
        hidden_size: 4,
        intermediate_size: 6,
        num_hidden_layers: 1,
        num_attention_heads: 2,
        num_key_value_heads: 1,
        head_dim: 2,
        rms_norm_eps: 1e-5,
        rope_theta: 1e4,
        rope_scaling: RopeScaling::None,
        max_position_embeddings: 16,
        attention_bias: AttentionBias::None,
        mlp_bias: false,
        qk_norm: false,
        sliding_window: None,
        experts,
        tie_word_embeddings: true,
        initializer_range: 0.02,
        bos_token_id: None,
        eos_token_ids: vec![2],
    };
    let weights = RandomWeights::new(&config, 1).expect("the config is valid");
    Decoder::from_weights(&config, &weights, &Device::flex()).expect("the weights fit")
}

/// Where `FUZZ_SEEDS` names a folder: writes the first inputs there and ends the program.
pub fn seeds(inputs: impl FnOnce() -> Vec<Vec<u8>>) {
    let Some(folder) = env::var_os("FUZZ_SEEDS") else { return };
    fs::create_dir_all(&folder).expect("the folder can be made");
    for (index, input) in inputs().into_iter().enumerate() {
        let path = Path::new(&folder).join(format!("seed-{index}"));
        fs::write(path, input).expect("it can be written");
    }
    process::exit(0);
}

/// The contents of the repository's files with this name: golden cases beside the tests.
pub fn golden(name: &str) -> Vec<Vec<u8>> {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/golden");
    let mut found = Vec::new();
    for cases in [Path::new(folder).to_owned(), Path::new(folder).join("families")] {
        let cases = fs::read_dir(cases).expect("the repository has golden cases");
        let paths = cases.filter_map(|case| Some(case.ok()?.path().join(name)));
        found.extend(paths.filter_map(|path| fs::read(path).ok()));
    }
    found
}

/// Calls `read` with a new folder that holds these files.
pub fn with_files(files: &[(&str, &[u8])], read: impl FnOnce(&Path)) {
    let folder = tempfile::tempdir().expect("the temporary folder can be written");
    for (name, bytes) in files {
        fs::write(folder.path().join(name), bytes).expect("it can be written");
    }
    read(folder.path());
}

/// An adapter's folder as one input: the config in the first line, then the weights.
fn joined(folder: &Path, weights: &str) -> Vec<u8> {
    let read = |name: &str| fs::read(folder.join(name)).expect("the adapter was written");
    let mut input = read("adapter_config.json");
    input.retain(|byte| *byte != b'\n');
    input.push(b'\n');
    input.extend(read(weights));
    input
}

/// The two parts of such an input.
pub fn in_two(data: &[u8]) -> (&[u8], &[u8]) {
    match data.iter().position(|byte| *byte == b'\n') {
        Some(place) => (&data[..place], &data[place + 1..]),
        None => (data, &[]),
    }
}

/// The bytes of a GGUF file of version 3: keys as (name, type, value) and tensors as (name, type,
/// shape with the inner axis first, bytes).
pub fn gguf(keys: &[(&str, u32, Vec<u8>)], tensors: &[(&str, u32, &[u64], Vec<u8>)]) -> Vec<u8> {
    const ALIGNMENT: usize = 32;
    let mut file = b"GGUF".to_vec();
    file.extend(3u32.to_le_bytes());
    file.extend((tensors.len() as u64).to_le_bytes());
    file.extend((keys.len() as u64).to_le_bytes());
    for (name, kind, value) in keys {
        file.extend(text(name));
        file.extend(kind.to_le_bytes());
        file.extend(value);
    }
    let mut data = Vec::new();
    for (name, kind, shape, bytes) in tensors {
        file.extend(text(name));
        file.extend((shape.len() as u32).to_le_bytes());
        shape.iter().for_each(|size| file.extend(size.to_le_bytes()));
        file.extend(kind.to_le_bytes());
        data.resize(usize::next_multiple_of(data.len(), ALIGNMENT), 0);
        file.extend((data.len() as u64).to_le_bytes());
        data.extend(bytes);
    }
    file.resize(file.len().next_multiple_of(ALIGNMENT), 0);
    file.extend(data);
    file
}

/// A text as GGUF has it, with its length in front.
pub fn text(text: &str) -> Vec<u8> {
    [&(text.len() as u64).to_le_bytes()[..], text.as_bytes()].concat()
}
