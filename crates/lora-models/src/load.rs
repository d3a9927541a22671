//! From a checkpoint's tensors to a decoder, and back to named tensors.

use burn::module::Param;
use burn::nn::{Embedding, Linear, RmsNorm};
use burn::tensor::{DType, Device, Tensor, TensorData};
use lora_core::{AdaptableLayer, AdaptableLinear, VisitLora, Weights};

use crate::attention::Attention;
use crate::block::Block;
use crate::config::{DecoderConfig, EMBEDDING, HEAD, NORM};
use crate::decoder::{Decoder, DecoderStack};
use crate::error::{Error, ErrorKind, Result};
use crate::mlp::Mlp;
use crate::weights::{HostTensor, WeightSource};

impl Decoder {
    /// Builds the decoder that `config` describes from the tensors of `source`, in f32.
    ///
    /// # Errors
    /// When a tensor is missing, unused, of another shape (all of them are named, before anything is
    /// read), or cannot be read.
    pub fn from_weights(
        config: &DecoderConfig,
        source: &dyn WeightSource,
        device: &Device,
    ) -> Result<Self> {
        check_tensors(config, source)?;
        let builder = Builder { config, source, device };
        let layers = (0..config.num_hidden_layers)
            .map(|layer| builder.block(&format!("model.layers.{layer}")))
            .collect::<Result<_>>()?;
        let lm_head = match config.tie_word_embeddings {
            true => None,
            false => Some(builder.linear("lm_head", false)?),
        };
        Ok(Self {
            model: DecoderStack {
                embed_tokens: Embedding { weight: Param::from_tensor(builder.tensor(EMBEDDING)?) }
                    .into(),
                layers,
                norm: builder.norm(NORM)?,
            },
            lm_head,
            config: config.clone(),
        })
    }

    /// Every tensor under its Hugging Face name and in that layout, one after the other in the order of
    /// [`DecoderConfig::tensor_shapes`]: of a merged layer the merged weight, of one that has an
    /// adapter beside it the weight without.
    ///
    /// The tensors are those of [`saved_config`](Self::saved_config).
    pub fn named_tensors(&self) -> impl Iterator<Item = (String, HostTensor)> + '_ {
        self.saved_config().tensor_shapes().into_iter().map(|(name, shape)| {
            let data = self.host_tensor(&name);
            (name, HostTensor { shape, data })
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

    fn host_tensor(&self, name: &str) -> Vec<f32> {
        let norm = |norm: &RmsNorm| to_host(norm.gamma.val());
        match name {
            EMBEDDING => return to_host(acting_weights(&self.model.embed_tokens).weight),
            HEAD if self.lm_head.is_none() => return to_host(self.model.embed_tokens.weight()),
            NORM => return norm(&self.model.norm),
            _ => {}
        }
        for (index, block) in self.model.layers.iter().enumerate() {
            let Some(part) = name.strip_prefix(&format!("model.layers.{index}.")) else { continue };
            match part {
                "input_layernorm.weight" => return norm(&block.input_layernorm),
                "post_attention_layernorm.weight" => return norm(&block.post_attention_layernorm),
                _ => {}
            }
        }
        let (path, kind) = name.rsplit_once('.').expect("every tensor name has a dot");
        let mut values = None;
        self.visit_lora("", &mut |layer_path, layer| {
            if layer_path == path {
                let weights = acting_weights(layer);
                values = Some(match (kind, weights.bias) {
                    ("bias", Some(bias)) => to_host(bias),
                    _ => to_host(weights.weight.transpose()),
                });
            }
        });
        values.expect("tensor_shapes names tensors of this decoder only")
    }
}

/// The weights that act where they are plain; the frozen ones beside an adapter.
fn acting_weights(layer: &dyn AdaptableLayer) -> Weights {
    let frozen = || Weights { weight: layer.weight(), bias: layer.bias() };
    layer.plain_weights().unwrap_or_else(frozen)
}

fn to_host<const D: usize>(tensor: Tensor<D>) -> Vec<f32> {
    let data = tensor.without_autodiff().cast(DType::F32).into_data();
    data.try_to_vec().expect("the tensor was just cast to f32")
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
    for name in source.names() {
        let known = expected.iter().any(|(expected, _)| *expected == name);
        // Old checkpoints carry the rotary frequencies, which follow from the config; tied ones may
        // carry the head as a second copy of the embedding.
        let derived =
            name.ends_with("rotary_emb.inv_freq") || (config.tie_word_embeddings && name == HEAD);
        if !known && !derived {
            problems.push(format!("'{name}' is unused"));
        }
    }
    if problems.is_empty() {
        return Ok(());
    }
    // A wrong config can make hundreds of them.
    const SHOWN: usize = 4;
    let more = problems.len().saturating_sub(SHOWN);
    problems.truncate(SHOWN);
    if more > 0 {
        problems.push(format!("and {more} more"));
    }
    Err(ErrorKind::Weights { path: source.path().to_owned(), problems }.into())
}

struct Builder<'a> {
    config: &'a DecoderConfig,
    source: &'a dyn WeightSource,
    device: &'a Device,
}

impl Builder<'_> {
    fn block(&self, path: &str) -> Result<Block> {
        let config = self.config;
        let attention =
            |name: &str| self.linear(&format!("{path}.self_attn.{name}"), config.attention_bias);
        let mlp = |name: &str| self.linear(&format!("{path}.mlp.{name}"), config.mlp_bias);
        Ok(Block {
            input_layernorm: self.norm(&format!("{path}.input_layernorm.weight"))?,
            self_attn: Attention {
                q_proj: attention("q_proj")?,
                k_proj: attention("k_proj")?,
                v_proj: attention("v_proj")?,
                o_proj: attention("o_proj")?,
                head_dim: config.head_dim,
            },
            post_attention_layernorm: self
                .norm(&format!("{path}.post_attention_layernorm.weight"))?,
            mlp: Mlp {
                gate_proj: mlp("gate_proj")?,
                up_proj: mlp("up_proj")?,
                down_proj: mlp("down_proj")?,
            },
        })
    }

    fn linear(&self, path: &str, bias: bool) -> Result<AdaptableLinear> {
        let weight = transpose(self.read(&format!("{path}.weight"))?);
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
        Ok(self.upload(self.read(name)?))
    }

    fn read(&self, name: &str) -> Result<HostTensor> {
        let tensor = self.source.read(name)?;
        if tensor.data.iter().any(|value| !value.is_finite()) {
            let place = format!("tensor '{name}'");
            let (expected, found) = ("finite values", "NaN or infinity; the model is damaged");
            return Err(Error::malformed(self.source.path(), place, expected, found));
        }
        Ok(tensor)
    }

    fn upload<const D: usize>(&self, tensor: HostTensor) -> Tensor<D> {
        Tensor::from_data(TensorData::new(tensor.data, tensor.shape), self.device)
    }
}

/// `[rows, columns]` to `[columns, rows]`, in tiles, so that reads and writes both stay in the cache.
fn transpose(tensor: HostTensor) -> HostTensor {
    const TILE: usize = 32;
    let (rows, columns) = (tensor.shape[0], tensor.shape[1]);
    let mut data = vec![0.0; tensor.data.len()];
    for row_start in (0..rows).step_by(TILE) {
        for column_start in (0..columns).step_by(TILE) {
            for row in row_start..rows.min(row_start + TILE) {
                for column in column_start..columns.min(column_start + TILE) {
                    data[column * rows + row] = tensor.data[row * columns + column];
                }
            }
        }
    }
    HostTensor { shape: vec![columns, rows], data }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_transpose_of_uneven_tiles() {
        let (rows, columns) = (37, 70);
        let data: Vec<f32> = (0..rows * columns).map(|value| value as f32).collect();
        let transposed = transpose(HostTensor { shape: vec![rows, columns], data: data.clone() });
        assert_eq!(transposed.shape, [columns, rows]);
        for row in 0..rows {
            for column in 0..columns {
                assert_eq!(transposed.data[column * rows + row], data[row * columns + column]);
            }
        }
    }
}
