//! The sizes and switches of a decoder, in the names of Hugging Face's `config.json`.

use crate::error::{ErrorKind, Result};
use crate::family::{ExpertNames, Family};
use crate::rope::has_usable_frequencies;

/// Everything that distinguishes one Llama-like decoder from another.
#[derive(Debug, Clone, PartialEq)]
pub struct DecoderConfig {
    /// Whose names the files use. The decoder itself goes by the fields below alone.
    pub family: &'static Family,
    /// Number of tokens that the embedding knows.
    pub vocab_size: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width inside a dense MLP.
    pub intermediate_size: usize,
    /// Number of blocks.
    pub num_hidden_layers: usize,
    /// Number of query heads.
    pub num_attention_heads: usize,
    /// Number of key and value heads; each serves `num_attention_heads / num_key_value_heads` query heads.
    pub num_key_value_heads: usize,
    /// Width of one head.
    pub head_dim: usize,
    /// Added to the mean square under RMSNorm's root.
    pub rms_norm_eps: f64,
    /// Base of the rotary frequencies.
    pub rope_theta: f64,
    /// What stretches the rotary frequencies for longer texts.
    pub rope_scaling: RopeScaling,
    /// Longest sequence that the model was made for, in tokens.
    pub max_position_embeddings: usize,
    /// Which attention projections have a bias.
    pub attention_bias: AttentionBias,
    /// Whether gate, up and down projections have a bias.
    pub mlp_bias: bool,
    /// Whether each head of queries and keys is normalised before it is rotated.
    pub qk_norm: bool,
    /// Layers that see the newest positions only.
    pub sliding_window: Option<SlidingWindow>,
    /// A mixture of experts instead of the MLP.
    pub experts: Option<ExpertsConfig>,
    /// Whether the head is the transposed embedding.
    pub tie_word_embeddings: bool,
    /// Standard deviation of a new weight; only a model trained from scratch uses it.
    pub initializer_range: f64,
    /// Token that begins a text, where the model has one.
    pub bos_token_id: Option<u32>,
    /// Tokens that end a text.
    pub eos_token_ids: Vec<u32>,
}

/// Which of the attention's projections have a bias.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AttentionBias {
    /// None of them.
    None,
    /// Those of queries, keys and values, as in Qwen2.
    QueryKeyValue,
    /// Those and the one of the output.
    All,
}

/// Attention to the newest positions only: a query at position i sees the positions from
/// i − `width` + 1 to i.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SlidingWindow {
    /// Positions that a query sees, its own included; above 0.
    pub width: usize,
    /// For each layer, whether it has the window.
    pub layers: Vec<bool>,
}

/// A mixture of experts: a router chooses few of many MLPs for each token.
///
/// y = Σ p_e · MLP_e(x) over the `per_token` experts with the largest p = softmax(router(x)).
///
/// Source: "Mixtral of Experts", [arXiv:2401.04088](https://arxiv.org/abs/2401.04088).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExpertsConfig {
    /// Number of experts in a layer.
    pub count: usize,
    /// Number of experts that a token goes through.
    pub per_token: usize,
    /// Width inside one expert.
    pub intermediate_size: usize,
    /// Whether the chosen experts' probabilities are scaled to sum to one.
    pub normalised: bool,
    /// For each layer, whether it has experts; the others have a dense MLP.
    pub layers: Vec<bool>,
}

/// How the rotary frequencies f_i = theta^(−2i / head_dim) are changed for longer texts than the model
/// was first trained on.
///
/// Source: `transformers/modeling_rope_utils.py` of transformers 5.23, whose formulas these are.
#[derive(Debug, Clone, PartialEq)]
pub enum RopeScaling {
    /// Not at all.
    None,
    /// f_i / factor.
    Linear {
        /// How much longer the texts may be.
        factor: f64,
    },
    /// Beyond `max_position_embeddings`, a larger theta that grows with the length n of the text:
    /// theta · (factor · n / max_position_embeddings − factor + 1)^(head_dim / (head_dim − 2)).
    Dynamic {
        /// How much longer the texts may be.
        factor: f64,
    },
    /// f_i / factor for wavelengths above original / low, f_i for those below original / high, and
    /// between them a linear mixture of the two, as in Llama 3.1.
    Llama3 {
        /// How much longer the texts may be.
        factor: f64,
        /// Divides the longest wavelength that is not wholly stretched.
        low_freq_factor: f64,
        /// Divides the shortest wavelength that is stretched at all.
        high_freq_factor: f64,
        /// The longest text of the first training.
        original_max_position_embeddings: usize,
    },
    /// f_i / factor for the slow pairs, f_i for the fast, a ramp between; the rotated vectors are
    /// scaled too.
    ///
    /// Source: "YaRN", [arXiv:2309.00071](https://arxiv.org/abs/2309.00071).
    Yarn {
        /// How much longer the texts may be.
        factor: f64,
        /// The longest text of the first training.
        original_max_position_embeddings: usize,
        /// Turns over the original length above which a pair keeps its frequency.
        beta_fast: f64,
        /// Turns below which a pair's frequency is divided by the factor.
        beta_slow: f64,
        /// By what rotated vectors are multiplied.
        attention_factor: f64,
        /// Whether the ends of the ramp are rounded to whole pairs.
        truncate: bool,
    },
    /// f_i / factors_i, as GGUF files carry Llama 3.1's scaling.
    Divided {
        /// One for each pair.
        factors: Vec<f32>,
    },
}

// Limits far above any model: products of two sizes cannot overflow, and the list of a model's
// tensors cannot fill the memory.
pub(crate) const LARGEST: usize = 1 << 28;
pub(crate) const MOST_LAYERS: usize = 10_000;
pub(crate) const MOST_EXPERTS: usize = 1 << 16;
pub(crate) const WIDEST_HEAD: usize = 1 << 16;

/// A field that does not fit the others, or nothing.
pub(crate) struct ConfigProblem {
    pub(crate) field: &'static str,
    pub(crate) expected: String,
    pub(crate) found: String,
}

impl DecoderConfig {
    /// Whether there can be such a decoder. What a file says was checked when it was read; building a
    /// [`Decoder`](crate::Decoder) from a config made by hand asks it too.
    ///
    /// # Errors
    /// When a size is 0 or absurd, or a field does not fit the others.
    pub fn check(&self) -> Result<()> {
        match self.problem() {
            None => Ok(()),
            Some(ConfigProblem { field, expected, found }) => {
                Err(ErrorKind::Argument { what: field, expected, found }.into())
            }
        }
    }

    /// The first field that is wrong.
    pub(crate) fn problem(&self) -> Option<ConfigProblem> {
        let wrong =
            |field, expected: String, found: String| Some(ConfigProblem { field, expected, found });
        for (name, size, largest) in [
            ("vocab_size", self.vocab_size, LARGEST),
            ("hidden_size", self.hidden_size, LARGEST),
            ("num_hidden_layers", self.num_hidden_layers, MOST_LAYERS),
            ("num_attention_heads", self.num_attention_heads, LARGEST),
            ("num_key_value_heads", self.num_key_value_heads, LARGEST),
            ("max_position_embeddings", self.max_position_embeddings, LARGEST),
        ] {
            if !(1..=largest).contains(&size) {
                return wrong(name, format!("1 to {largest}"), size.to_string());
            }
        }
        let dense = (0..self.num_hidden_layers).any(|layer| self.experts(layer).is_none());
        if dense && !(1..=LARGEST).contains(&self.intermediate_size) {
            let found = self.intermediate_size.to_string();
            return wrong("intermediate_size", format!("1 to {LARGEST}"), found);
        }
        for (name, value) in [("rms_norm_eps", self.rms_norm_eps), ("rope_theta", self.rope_theta)]
        {
            if !(value.is_finite() && value > 0.0) {
                return wrong(name, "a finite number above 0".to_owned(), value.to_string());
            }
        }
        let (heads, kv_heads) = (self.num_attention_heads, self.num_key_value_heads);
        if !heads.is_multiple_of(kv_heads) {
            let expected = format!("a divisor of num_attention_heads = {heads}");
            return wrong("num_key_value_heads", expected, kv_heads.to_string());
        }
        if !self.head_dim.is_multiple_of(2) || !(2..=WIDEST_HEAD).contains(&self.head_dim) {
            let expected = format!("an even number from 2 to {WIDEST_HEAD}");
            return wrong("head_dim", expected, self.head_dim.to_string());
        }
        if heads * self.head_dim > LARGEST {
            let expected = format!("at most {LARGEST} in all heads");
            return wrong("head_dim", expected, format!("{heads} heads of {}", self.head_dim));
        }
        if !has_usable_frequencies(self) {
            let found = format!("{:?} with theta {}", self.rope_scaling, self.rope_theta);
            let expected = "parameters that give finite frequencies".to_owned();
            return wrong("rope_parameters", expected, found);
        }
        if let RopeScaling::Divided { factors } = &self.rope_scaling
            && factors.len() != self.head_dim / 2
        {
            let expected = format!("{} factors, one for each pair of a head", self.head_dim / 2);
            return wrong("rope_parameters", expected, factors.len().to_string());
        }
        if let RopeScaling::Yarn { attention_factor, .. } = self.rope_scaling
            && !attention_factor.is_finite()
        {
            let expected = "a finite attention_factor".to_owned();
            return wrong("rope_parameters", expected, attention_factor.to_string());
        }
        let each_layer = format!("one for each of {} layers", self.num_hidden_layers);
        if let Some(window) = &self.sliding_window {
            if window.width == 0 {
                let expected = "a number of positions above 0".to_owned();
                return wrong("sliding_window.width", expected, "0".to_owned());
            }
            if window.layers.len() != self.num_hidden_layers {
                let found = window.layers.len().to_string();
                return wrong("sliding_window.layers", each_layer, found);
            }
        }
        let experts = self.experts.as_ref()?;
        let sizes = [
            ("experts.count", experts.count, MOST_EXPERTS / self.num_hidden_layers),
            ("experts.per_token", experts.per_token, experts.count),
            ("experts.intermediate_size", experts.intermediate_size, LARGEST),
        ];
        for (name, size, largest) in sizes {
            if !(1..=largest).contains(&size) {
                return wrong(name, format!("1 to {largest}"), size.to_string());
            }
        }
        if experts.layers.len() != self.num_hidden_layers {
            return wrong("experts.layers", each_layer, experts.layers.len().to_string());
        }
        None
    }

    /// The longest text in tokens: `max_position_embeddings`, or what RoPE is stretched to where that is
    /// more. Configs of Llama 3.1 give the stretched length itself; older ones, and Qwen's with YaRN, the
    /// length of the first training.
    pub fn longest_text(&self) -> usize {
        let first = self.max_position_embeddings;
        let stretched = match self.rope_scaling {
            RopeScaling::Linear { factor } | RopeScaling::Dynamic { factor } => {
                first as f64 * factor
            }
            RopeScaling::Yarn { factor, original_max_position_embeddings: original, .. } => {
                original as f64 * factor
            }
            _ => 0.0,
        };
        first.max(stretched as usize).min(u32::MAX as usize)
    }

    /// How many positions the layer sees, or `None` when it sees all before its own.
    pub fn window(&self, layer: usize) -> Option<usize> {
        let window = self.sliding_window.as_ref()?;
        window.layers.get(layer).is_some_and(|has| *has).then_some(window.width)
    }

    /// The layer's mixture of experts, or `None` when it has a dense MLP.
    pub fn experts(&self, layer: usize) -> Option<&ExpertsConfig> {
        let experts = self.experts.as_ref()?;
        experts.layers.get(layer).is_some_and(|has| *has).then_some(experts)
    }

    /// The names of experts in this family's files; Qwen3's for a family that has none.
    pub(crate) fn expert_names(&self) -> ExpertNames {
        self.family.experts.unwrap_or(crate::family::QWEN3_EXPERTS)
    }

    /// The name and shape of every tensor of a checkpoint of this decoder, in Hugging Face's names
    /// and layout, in the order of the model.
    pub fn tensor_shapes(&self) -> Vec<(String, Vec<usize>)> {
        let hidden = self.hidden_size;
        let mut shapes = vec![(EMBEDDING.to_owned(), vec![self.vocab_size, hidden])];
        for layer in 0..self.num_hidden_layers {
            self.add_block(layer, &format!("model.layers.{layer}"), &mut shapes);
        }
        shapes.push((NORM.to_owned(), vec![hidden]));
        if !self.tie_word_embeddings {
            shapes.push((HEAD.to_owned(), vec![self.vocab_size, hidden]));
        }
        shapes
    }

    fn add_block(&self, layer: usize, path: &str, shapes: &mut Vec<(String, Vec<usize>)>) {
        let hidden = self.hidden_size;
        let q = self.num_attention_heads * self.head_dim;
        let kv = self.num_key_value_heads * self.head_dim;
        for norm in ["input_layernorm", "post_attention_layernorm"] {
            shapes.push((format!("{path}.{norm}.weight"), vec![hidden]));
        }
        if self.qk_norm {
            for norm in ["q_norm", "k_norm"] {
                shapes.push((format!("{path}.self_attn.{norm}.weight"), vec![self.head_dim]));
            }
        }
        let mut linear = |name: &str, d_output, d_input, bias| {
            shapes.push((format!("{path}.{name}.weight"), vec![d_output, d_input]));
            if bias {
                shapes.push((format!("{path}.{name}.bias"), vec![d_output]));
            }
        };
        let qkv_bias = self.attention_bias != AttentionBias::None;
        linear("self_attn.q_proj", q, hidden, qkv_bias);
        linear("self_attn.k_proj", kv, hidden, qkv_bias);
        linear("self_attn.v_proj", kv, hidden, qkv_bias);
        linear("self_attn.o_proj", hidden, q, self.attention_bias == AttentionBias::All);
        let mut mlp = |path: &str, [gate, up, down]: [&str; 3], width, bias| {
            linear(&format!("{path}.{gate}"), width, hidden, bias);
            linear(&format!("{path}.{up}"), width, hidden, bias);
            linear(&format!("{path}.{down}"), hidden, width, bias);
        };
        match self.experts(layer) {
            None => mlp("mlp", DENSE, self.intermediate_size, self.mlp_bias),
            Some(experts) => {
                let names = self.expert_names();
                for expert in 0..experts.count {
                    let path = format!("{}.experts.{expert}", names.part);
                    mlp(&path, names.projections, experts.intermediate_size, self.mlp_bias);
                }
                linear(&format!("{}.gate", names.part), experts.count, hidden, false);
            }
        }
    }
}

/// Names of the tensors outside the blocks.
pub(crate) const EMBEDDING: &str = "model.embed_tokens.weight";
pub(crate) const NORM: &str = "model.norm.weight";
pub(crate) const HEAD: &str = "lm_head.weight";

/// The projections of a dense MLP: gate, up, down.
pub(crate) const DENSE: [&str; 3] = ["gate_proj", "up_proj", "down_proj"];

#[cfg(test)]
mod tests {
    use super::*;
    use crate::family::FAMILIES;

    fn config() -> DecoderConfig {
        DecoderConfig {
            family: &FAMILIES[4],
            vocab_size: 11,
            hidden_size: 12,
            intermediate_size: 20,
            num_hidden_layers: 3,
            num_attention_heads: 6,
            num_key_value_heads: 2,
            head_dim: 4,
            rms_norm_eps: 1e-5,
            rope_theta: 1e4,
            rope_scaling: RopeScaling::None,
            max_position_embeddings: 32,
            attention_bias: AttentionBias::None,
            mlp_bias: false,
            qk_norm: false,
            sliding_window: Some(SlidingWindow { width: 5, layers: vec![true; 3] }),
            experts: Some(ExpertsConfig {
                count: 4,
                per_token: 2,
                intermediate_size: 8,
                normalised: true,
                layers: vec![true; 3],
            }),
            tie_word_embeddings: false,
            initializer_range: 0.02,
            bos_token_id: None,
            eos_token_ids: vec![],
        }
    }

    /// What is wrong with the config after a change.
    fn refused(change: impl Fn(&mut DecoderConfig), field: &str) {
        let mut config = config();
        change(&mut config);
        let error = config.check().unwrap_err();
        assert!(
            matches!(error.kind(), ErrorKind::Argument { what, .. } if *what == field),
            "{error}"
        );
    }

    #[test]
    fn each_field_of_a_config_made_by_hand_is_checked() {
        config().check().unwrap();
        refused(|config| config.vocab_size = 0, "vocab_size");
        refused(|config| config.hidden_size = 1 << 40, "hidden_size");
        let dense = |config: &mut DecoderConfig| {
            config.intermediate_size = 0;
            config.experts.as_mut().unwrap().layers[1] = false;
        };
        refused(dense, "intermediate_size");
        DecoderConfig { intermediate_size: 0, ..config() }.check().unwrap();
        refused(|config| config.num_hidden_layers = usize::MAX, "num_hidden_layers");
        refused(|config| config.num_attention_heads = 0, "num_attention_heads");
        refused(|config| config.num_key_value_heads = 4, "num_key_value_heads");
        refused(|config| config.max_position_embeddings = 0, "max_position_embeddings");
        refused(|config| config.rms_norm_eps = f64::NAN, "rms_norm_eps");
        refused(|config| config.rope_theta = 0.0, "rope_theta");
        for head_dim in [0, 3, 1 << 20] {
            refused(|config| config.head_dim = head_dim, "head_dim");
        }
        refused(
            |config| {
                config.num_attention_heads = LARGEST;
                config.num_key_value_heads = 1;
            },
            "head_dim",
        );
        let divided = |factors| RopeScaling::Divided { factors };
        for count in [1, 3] {
            refused(|config| config.rope_scaling = divided(vec![1.0; count]), "rope_parameters");
        }
        let yarn = RopeScaling::Yarn {
            factor: 2.0,
            original_max_position_embeddings: 16,
            beta_fast: 32.0,
            beta_slow: 1.0,
            attention_factor: f64::NAN,
            truncate: true,
        };
        refused(|config| config.rope_scaling = yarn.clone(), "rope_parameters");
        let linear = RopeScaling::Linear { factor: 0.0 };
        refused(|config| config.rope_scaling = linear.clone(), "rope_parameters");

        let window = |config: &mut DecoderConfig| config.sliding_window.take().unwrap();
        let narrow = |config: &mut DecoderConfig| {
            config.sliding_window = Some(SlidingWindow { width: 0, ..window(config) });
        };
        refused(narrow, "sliding_window.width");
        let short = |config: &mut DecoderConfig| {
            config.sliding_window = Some(SlidingWindow { layers: vec![true], ..window(config) });
        };
        refused(short, "sliding_window.layers");
        refused(|config| config.experts.as_mut().unwrap().count = 30_000, "experts.count");
        refused(|config| config.experts.as_mut().unwrap().per_token = 5, "experts.per_token");
        refused(|config| config.experts.as_mut().unwrap().per_token = 0, "experts.per_token");
        let width = |config: &mut DecoderConfig| {
            config.experts.as_mut().unwrap().intermediate_size = 0;
        };
        refused(width, "experts.intermediate_size");
        refused(|config| config.experts.as_mut().unwrap().layers.push(true), "experts.layers");
    }
}
