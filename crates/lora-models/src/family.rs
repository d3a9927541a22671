//! What sets one family of decoders apart from the others, as data.

use crate::config::{AttentionBias, DecoderConfig};

/// A family of decoders: its names in files, and what its `config.json` says or leaves unsaid.
///
/// Everything else is in [`DecoderConfig`], so that one decoder serves them all. A new family is a row
/// of [`FAMILIES`] with a golden test; CONTRIBUTING says how.
#[derive(Debug, PartialEq)]
pub struct Family {
    /// `model_type` in `config.json`.
    pub name: &'static str,
    /// The class in transformers, in `architectures` of `config.json`.
    pub architecture: &'static str,
    /// `general.architecture` in a GGUF file, if this crate knows llama.cpp's names of its tensors. Of
    /// several families with the same, a file without experts is read as the first, and one with
    /// experts as the first that has some.
    pub gguf_architecture: Option<&'static str>,
    /// Which attention projections have a bias.
    pub(crate) attention_bias: BiasRule,
    /// Whether `mlp_bias` is asked.
    pub(crate) has_mlp_bias: bool,
    /// Whether the heads of queries and keys are normalised before they are rotated.
    pub(crate) qk_norm: bool,
    pub(crate) window: WindowRule,
    /// How the experts are written, where the family has them.
    pub(crate) experts: Option<ExpertNames>,
    pub(crate) defaults: Defaults,
}

/// Where the biases of the attention projections come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum BiasRule {
    /// `attention_bias` in `config.json`: all four, or none.
    Asked,
    /// The same for every model of the family.
    Always(AttentionBias),
}

/// How `config.json` says which layers see a window only.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum WindowRule {
    /// No layer does.
    Never,
    /// `sliding_window`, unless it is null, for every layer.
    AllLayers,
    /// `sliding_window`, if `use_sliding_window`, for every layer.
    AllLayersIfUsed,
    /// `sliding_window`, if `use_sliding_window`, for the layers from `max_window_layers`, or those that
    /// `layer_types` calls `sliding_attention`.
    UpperLayersIfUsed,
}

/// The names of a mixture of experts in a checkpoint, and where its reference rounds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct ExpertNames {
    /// The part of a block: `model.layers.0.<part>.gate`.
    pub(crate) part: &'static str,
    /// An expert's projections, as a dense MLP's gate, up and down: `<part>.experts.0.<gate>`.
    pub(crate) projections: [&'static str; 3],
    /// The field of `config.json` with the number of experts.
    pub(crate) count: &'static str,
    /// The field with the width inside one expert.
    pub(crate) intermediate_size: &'static str,
    /// Whether the chosen experts' probabilities are always made to sum to one; otherwise
    /// `norm_topk_prob` says so.
    pub(crate) always_normalised: bool,
    /// Whether the chosen experts' probabilities are rounded to the type of the weights before the experts'
    /// answers are multiplied by them; otherwise the product is formed in f32.
    pub(crate) rounds_probabilities: bool,
}

/// What transformers takes where `config.json` leaves a field out.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Defaults {
    /// None: as many as there are query heads.
    pub(crate) num_key_value_heads: Option<usize>,
    /// None: `hidden_size / num_attention_heads`.
    pub(crate) head_dim: Option<usize>,
    pub(crate) max_position_embeddings: usize,
    pub(crate) rms_norm_eps: f64,
    pub(crate) rope_theta: f64,
    pub(crate) sliding_window: Option<usize>,
    pub(crate) num_experts: usize,
    pub(crate) num_experts_per_tok: usize,
    pub(crate) expert_intermediate_size: Option<usize>,
    pub(crate) bos_and_eos: Option<(u32, u32)>,
}

const LLAMA_DEFAULTS: Defaults = Defaults {
    num_key_value_heads: None,
    head_dim: None,
    max_position_embeddings: 2048,
    rms_norm_eps: 1e-6,
    rope_theta: 10_000.0,
    sliding_window: None,
    num_experts: 0,
    num_experts_per_tok: 0,
    expert_intermediate_size: None,
    bos_and_eos: Some((1, 2)),
};

const QWEN_DEFAULTS: Defaults = Defaults {
    num_key_value_heads: Some(32),
    max_position_embeddings: 32_768,
    sliding_window: Some(4096),
    bos_and_eos: None,
    ..LLAMA_DEFAULTS
};

/// The field with the width of a dense MLP.
pub(crate) const DENSE_WIDTH: &str = "intermediate_size";

pub(crate) const QWEN3_EXPERTS: ExpertNames = ExpertNames {
    part: "mlp",
    projections: ["gate_proj", "up_proj", "down_proj"],
    count: "num_experts",
    intermediate_size: "moe_intermediate_size",
    always_normalised: false,
    rounds_probabilities: true,
};

/// The families that this crate knows.
///
/// Llama, Llama 2, 3, 3.1 and 3.2, SmolLM, SmolLM2 and TinyLlama are all `llama`; Qwen2.5 is `qwen2`.
///
/// Source: the configuration and model classes of transformers 5.23 for each `model_type`.
pub static FAMILIES: [Family; 6] = [
    Family {
        name: "llama",
        architecture: "LlamaForCausalLM",
        gguf_architecture: Some("llama"),
        attention_bias: BiasRule::Asked,
        has_mlp_bias: true,
        qk_norm: false,
        window: WindowRule::Never,
        experts: None,
        defaults: LLAMA_DEFAULTS,
    },
    Family {
        name: "mistral",
        architecture: "MistralForCausalLM",
        gguf_architecture: Some("llama"), // llama.cpp reads it without the window
        attention_bias: BiasRule::Always(AttentionBias::None),
        has_mlp_bias: false,
        qk_norm: false,
        window: WindowRule::AllLayers,
        experts: None,
        defaults: Defaults {
            num_key_value_heads: Some(8),
            max_position_embeddings: 131_072,
            sliding_window: Some(4096),
            ..LLAMA_DEFAULTS
        },
    },
    Family {
        name: "qwen2",
        architecture: "Qwen2ForCausalLM",
        gguf_architecture: Some("qwen2"),
        attention_bias: BiasRule::Always(AttentionBias::QueryKeyValue),
        has_mlp_bias: false,
        qk_norm: false,
        window: WindowRule::UpperLayersIfUsed,
        experts: None,
        defaults: QWEN_DEFAULTS,
    },
    Family {
        name: "qwen3",
        architecture: "Qwen3ForCausalLM",
        gguf_architecture: Some("qwen3"),
        attention_bias: BiasRule::Asked,
        has_mlp_bias: false,
        qk_norm: true,
        window: WindowRule::UpperLayersIfUsed,
        experts: None,
        defaults: Defaults { head_dim: Some(128), ..QWEN_DEFAULTS },
    },
    Family {
        name: "mixtral",
        architecture: "MixtralForCausalLM",
        gguf_architecture: Some("llama"),
        attention_bias: BiasRule::Always(AttentionBias::None),
        has_mlp_bias: false,
        qk_norm: false,
        window: WindowRule::AllLayers,
        experts: Some(ExpertNames {
            part: "block_sparse_moe",
            projections: ["w1", "w3", "w2"],
            count: "num_local_experts",
            intermediate_size: DENSE_WIDTH,
            always_normalised: true,
            rounds_probabilities: false,
        }),
        defaults: Defaults {
            num_key_value_heads: Some(8),
            max_position_embeddings: 131_072,
            rms_norm_eps: 1e-5,
            rope_theta: 1_000_000.0,
            num_experts: 8,
            num_experts_per_tok: 2,
            ..LLAMA_DEFAULTS
        },
    },
    Family {
        name: "qwen3_moe",
        architecture: "Qwen3MoeForCausalLM",
        gguf_architecture: Some("qwen3moe"),
        attention_bias: BiasRule::Asked,
        has_mlp_bias: false,
        qk_norm: true,
        window: WindowRule::AllLayersIfUsed,
        experts: Some(QWEN3_EXPERTS),
        defaults: Defaults {
            num_key_value_heads: Some(4),
            num_experts: 128,
            num_experts_per_tok: 8,
            expert_intermediate_size: Some(768),
            ..QWEN_DEFAULTS
        },
    },
];

impl Family {
    /// The family with this `model_type`.
    pub fn named(model_type: &str) -> Option<&'static Self> {
        FAMILIES.iter().find(|family| family.name == model_type)
    }

    /// The family of a GGUF file: the first with this architecture, among those that have experts if the
    /// file has some.
    pub(crate) fn in_gguf(architecture: &str, has_experts: bool) -> Option<&'static Self> {
        FAMILIES.iter().find(|family| {
            family.gguf_architecture == Some(architecture)
                && family.experts.is_some() == has_experts
        })
    }

    /// The names of all families, for messages.
    pub(crate) fn names() -> String {
        FAMILIES.each_ref().map(|family| family.name).join(", ")
    }

    /// Whether a `config.json` of this family can say all of `config`'s switches.
    pub(crate) fn suits(&self, config: &DecoderConfig) -> bool {
        let bias = match self.attention_bias {
            BiasRule::Asked => config.attention_bias != AttentionBias::QueryKeyValue,
            BiasRule::Always(bias) => config.attention_bias == bias,
        };
        let layers = 0..config.num_hidden_layers;
        let everywhere = layers.clone().all(|layer| config.window(layer).is_some());
        let window = match self.window {
            _ if config.sliding_window.is_none() => true,
            WindowRule::Never => false,
            WindowRule::AllLayers | WindowRule::AllLayersIfUsed => everywhere,
            WindowRule::UpperLayersIfUsed => true,
        };
        let experts = match (self.experts, &config.experts) {
            (None, experts) => experts.is_none(),
            // Mixtral's config has neither a switch for the scaling nor a list of layers.
            (Some(names), Some(experts)) if names.always_normalised => {
                experts.normalised && layers.clone().all(|layer| config.experts(layer).is_some())
            }
            (Some(names), None) => !names.always_normalised,
            (Some(_), Some(_)) => true,
        };
        let bias = bias && (self.has_mlp_bias || !config.mlp_bias);
        bias && self.qk_norm == config.qk_norm && window && experts
    }
}
