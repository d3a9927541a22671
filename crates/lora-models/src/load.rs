//! From a checkpoint's tensors to a decoder, and back to named tensors.

use std::collections::{HashMap, HashSet};

use burn::module::Param;
use burn::nn::{Embedding, Linear, RmsNorm};
use burn::tensor::{DType, Device, Tensor, TensorData};
use lora_core::{AdaptableLayer, AdaptableLinear, VisitLora, Weights, check_dtype};

use crate::attention::Attention;
use crate::block::{Block, FeedForward};
use crate::config::{AttentionBias, DENSE, DecoderConfig, EMBEDDING, HEAD, NORM};
use crate::decoder::{Decoder, DecoderStack};
use crate::error::{Error, Result};
use crate::experts::Experts;
use crate::memory::Memory;
use crate::mlp::Mlp;
use crate::weights::{HostTensor, HostValues, WeightDtype, WeightSource};

impl Decoder {
    /// Builds the decoder that `config` describes from the tensors of `source`, in f32.
    ///
    /// # Errors
    /// When no decoder can be as `config` says ([`DecoderConfig::check`]); when a tensor is missing, unused,
    /// of another shape (all of them are named, before anything is read), or cannot be read.
    pub fn from_weights(
        config: &DecoderConfig,
        source: &dyn WeightSource,
        device: &Device,
    ) -> Result<Self> {
        Self::from_weights_as(config, source, WeightDtype::F32, device)
    }

    /// The same in `dtype`. One tensor after the other is read, so that beside the model there is never
    /// more than one.
    ///
    /// # Errors
    /// As [`from_weights`](Self::from_weights), and when the device does not compute in `dtype`.
    pub fn from_weights_as(
        config: &DecoderConfig,
        source: &dyn WeightSource,
        dtype: WeightDtype,
        device: &Device,
    ) -> Result<Self> {
        config.check()?;
        check_dtype(device, dtype.dtype())?;
        check_tensors(config, source)?;
        let config = &with_the_head_of(config, source, dtype)?;
        let memory = Memory::of(size_of_model(config, dtype), device);
        let builder = Builder { config, source, dtype, device, memory };
        // The largest first where each is there twice while it is put in its place, and last elsewhere.
        let embedding = || builder.tensor::<2>(EMBEDDING);
        let first = builder.memory.copies().then(embedding).transpose()?;
        let lm_head = match config.tie_word_embeddings {
            true => None,
            false => Some(builder.linear("lm_head", false)?),
        };
        let layers = (0..config.num_hidden_layers)
            .map(|layer| builder.block(layer))
            .collect::<Result<_>>()?;
        let weight = Param::from_tensor(first.map_or_else(embedding, Ok)?);
        Ok(Self {
            model: DecoderStack {
                embed_tokens: Embedding { weight }.into(),
                layers,
                norm: builder.norm(NORM)?,
            },
            lm_head,
            config: config.clone(),
        })
    }

    /// Every tensor under its Hugging Face name and in that layout, one after the other in the order of
    /// [`DecoderConfig::tensor_shapes`], in the type that it has here: of a merged layer the merged
    /// weight, of one that has an adapter beside it the weight without.
    ///
    /// The tensors are those of [`saved_config`](Self::saved_config).
    pub fn named_tensors(&self) -> impl Iterator<Item = (String, HostTensor)> + '_ {
        let tensors = NamedTensors::of(self);
        self.saved_config().tensor_shapes().into_iter().map(move |(name, shape)| {
            let tensor = HostTensor::new(shape, tensors.values(&name));
            (name, tensor)
        })
    }

    /// The config of this decoder as it would be saved. A head that is tied to the embedding becomes
    /// one of its own where a merged adapter changed the embedding and not the head.
    pub fn saved_config(&self) -> DecoderConfig {
        let mut config = self.config.clone();
        let embedding = &self.model.embed_tokens;
        let parted = embedding.is_merged()
            && embedding.replacement().is_none_or(|replacement| replacement.weight.is_some());
        config.tie_word_embeddings &= !parted;
        config
    }
}

/// A decoder's tensors by the names of a checkpoint.
pub(crate) struct NamedTensors<'a> {
    decoder: &'a Decoder,
    layers: HashMap<String, &'a dyn AdaptableLayer>,
}

impl<'a> NamedTensors<'a> {
    pub(crate) fn of(decoder: &'a Decoder) -> Self {
        let mut layers = HashMap::new();
        decoder.visit_lora("", &mut |path, layer| {
            layers.insert(path.to_owned(), layer);
        });
        Self { decoder, layers }
    }

    /// The values of one of the names in [`DecoderConfig::tensor_shapes`].
    pub(crate) fn values(&self, name: &str) -> HostValues {
        let decoder = self.decoder;
        match name {
            EMBEDDING => return to_host(acting_weights(&decoder.model.embed_tokens).weight),
            HEAD if decoder.lm_head.is_none() => {
                return to_host(decoder.model.embed_tokens.weight());
            }
            _ => {}
        }
        if let Some(norm) = self.norm(name) {
            return to_host(norm.gamma.val());
        }
        let (path, kind) = name.rsplit_once('.').expect("every tensor name has a dot");
        let layer = self.layers.get(path).expect("the name is of a tensor of this decoder");
        let weights = acting_weights(*layer);
        match (kind, weights.bias) {
            ("bias", Some(bias)) => to_host(bias),
            _ => to_host(weights.weight.transpose()),
        }
    }

    fn norm(&self, name: &str) -> Option<&RmsNorm> {
        if name == NORM {
            return Some(&self.decoder.model.norm);
        }
        let (layer, part) = name.strip_prefix("model.layers.")?.split_once('.')?;
        let block = self.decoder.model.layers.get(layer.parse::<usize>().ok()?)?;
        match part {
            "input_layernorm.weight" => Some(&block.input_layernorm),
            "post_attention_layernorm.weight" => Some(&block.post_attention_layernorm),
            "self_attn.q_norm.weight" => block.self_attn.q_norm.as_ref(),
            "self_attn.k_norm.weight" => block.self_attn.k_norm.as_ref(),
            _ => None,
        }
    }
}

/// The weights that act where they are plain; the frozen ones beside an adapter.
fn acting_weights(layer: &dyn AdaptableLayer) -> Weights {
    let frozen = || Weights { weight: layer.weight(), bias: layer.bias() };
    layer.plain_weights().unwrap_or_else(frozen)
}

fn to_host<const D: usize>(tensor: Tensor<D>) -> HostValues {
    let data = tensor.without_autodiff().into_data();
    let values = match data.dtype() {
        DType::F16 => data.try_to_vec().map(HostValues::F16),
        DType::BF16 => data.try_to_vec().map(HostValues::BF16),
        _ => data.convert::<f32>().try_to_vec().map(HostValues::F32),
    };
    values.expect("the type was just looked at")
}

/// Names every tensor that does not fit, at once.
fn check_tensors(config: &DecoderConfig, source: &dyn WeightSource) -> Result<()> {
    let expected = config.tensor_shapes();
    let mut problems = Vec::new();
    for (name, shape) in &expected {
        match source.shape(name) {
            None => problems.push(format!("'{name}' is missing")),
            Some(found) if found != *shape => {
                problems.push(format!("'{name}': expected shape {shape:?}, found {found:?}"));
            }
            Some(_) => {}
        }
    }
    let known: HashSet<&str> = expected.iter().map(|(name, _)| name.as_str()).collect();
    for name in source.names() {
        // Old checkpoints carry the rotary frequencies, which follow from the config; tied ones may
        // carry a head, which is compared with the embedding.
        let derived =
            name.ends_with("rotary_emb.inv_freq") || (config.tie_word_embeddings && name == HEAD);
        if !known.contains(name.as_str()) && !derived {
            problems.push(format!("'{name}' is unused"));
        }
    }
    if problems.is_empty() {
        return Ok(());
    }
    Err(Error::weights(source.path(), problems))
}

/// The config, not tied where the checkpoint has a head of its own all the same: as transformers does
/// since version 5, and the only reading that loses nothing.
fn with_the_head_of(
    config: &DecoderConfig,
    source: &dyn WeightSource,
    dtype: WeightDtype,
) -> Result<DecoderConfig> {
    let mut config = config.clone();
    if config.tie_word_embeddings
        && let Some(shape) = source.shape(HEAD)
    {
        let embedding = source.read_as(EMBEDDING, dtype)?;
        if shape != embedding.shape {
            let problem =
                format!("'{HEAD}': expected shape {:?}, found {shape:?}", embedding.shape);
            return Err(Error::weights(source.path(), vec![problem]));
        }
        config.tie_word_embeddings = source.read_as(HEAD, dtype)? == embedding;
    }
    Ok(config)
}

/// The bytes of all tensors.
fn size_of_model(config: &DecoderConfig, dtype: WeightDtype) -> usize {
    let values = |(_, shape): (_, Vec<usize>)| shape.iter().product::<usize>();
    let shapes = config.tensor_shapes().into_iter();
    shapes.map(values).fold(0, usize::saturating_add).saturating_mul(dtype.size())
}

struct Builder<'a> {
    config: &'a DecoderConfig,
    source: &'a dyn WeightSource,
    dtype: WeightDtype,
    device: &'a Device,
    memory: Memory,
}

impl Builder<'_> {
    fn block(&self, layer: usize) -> Result<Block> {
        let config = self.config;
        let path = format!("model.layers.{layer}");
        let qkv_bias = config.attention_bias != AttentionBias::None;
        let attention = |name: &str, bias| self.linear(&format!("{path}.self_attn.{name}"), bias);
        let head_norm = |name: &str| match config.qk_norm {
            true => self.norm(&format!("{path}.self_attn.{name}.weight")).map(Some),
            false => Ok(None),
        };
        Ok(Block {
            input_layernorm: self.norm(&format!("{path}.input_layernorm.weight"))?,
            self_attn: Attention {
                q_proj: attention("q_proj", qkv_bias)?,
                k_proj: attention("k_proj", qkv_bias)?,
                v_proj: attention("v_proj", qkv_bias)?,
                o_proj: attention("o_proj", config.attention_bias == AttentionBias::All)?,
                q_norm: head_norm("q_norm")?,
                k_norm: head_norm("k_norm")?,
                head_dim: config.head_dim,
                window: config.window(layer),
                rounds_scores: false,
            },
            post_attention_layernorm: self
                .norm(&format!("{path}.post_attention_layernorm.weight"))?,
            feed_forward: self.feed_forward(layer, &path)?,
        })
    }

    fn feed_forward(&self, layer: usize, path: &str) -> Result<FeedForward> {
        let Some(experts) = self.config.experts(layer) else {
            return Ok(FeedForward::Dense(self.mlp(&format!("{path}.mlp"), DENSE)?));
        };
        let names = self.config.expert_names();
        let path = format!("{path}.{}", names.part);
        let expert = |number| self.mlp(&format!("{path}.experts.{number}"), names.projections);
        Ok(FeedForward::Experts(Experts {
            experts: (0..experts.count).map(expert).collect::<Result<_>>()?,
            gate: self.linear(&format!("{path}.gate"), false)?,
            per_token: experts.per_token,
            normalised: experts.normalised,
            names,
        }))
    }

    fn mlp(&self, path: &str, [gate, up, down]: [&str; 3]) -> Result<Mlp> {
        let linear = |name| self.linear(&format!("{path}.{name}"), self.config.mlp_bias);
        Ok(Mlp { gate_proj: linear(gate)?, up_proj: linear(up)?, down_proj: linear(down)? })
    }

    fn linear(&self, path: &str, bias: bool) -> Result<AdaptableLinear> {
        let weight = self.memory.transposed(self.read(&format!("{path}.weight"))?);
        let weight = Param::from_tensor(self.upload(weight));
        let bias = match bias {
            true => Some(Param::from_tensor(self.tensor(&format!("{path}.bias"))?)),
            false => None,
        };
        Ok(Linear { weight, bias }.into())
    }

    fn norm(&self, name: &str) -> Result<RmsNorm> {
        Ok(RmsNorm {
            gamma: Param::from_tensor(self.tensor(name)?),
            epsilon: self.config.rms_norm_eps,
        })
    }

    fn tensor<const D: usize>(&self, name: &str) -> Result<Tensor<D>> {
        Ok(self.upload(self.memory.data(self.read(name)?)))
    }

    fn read(&self, name: &str) -> Result<HostTensor> {
        let tensor = self.source.read_as(name, self.dtype)?;
        if !tensor.values.is_finite() {
            let place = format!("tensor '{name}'");
            let found =
                "NaN or infinity; the model is damaged, or too large for the type asked for";
            return Err(Error::malformed(self.source.path(), place, "finite values", found));
        }
        Ok(tensor)
    }

    fn upload<const D: usize>(&self, data: TensorData) -> Tensor<D> {
        Tensor::from_data(data, (self.device, self.dtype.dtype()))
    }
}
