//! Rotary position embedding, half-rotated as in Hugging Face checkpoints.

use std::f64::consts::PI;

use burn::tensor::{DType, Device, Tensor, TensorData};

use crate::config::{DecoderConfig, RopeScaling};

/// Rotates queries and keys by their position.
///
/// With x = [x1, x2] split in the middle of the head: x cos + [-x2, x1] sin, where the angle of
/// pair i at position p is p · f_i, with f_i = theta^(-2i / head_dim) unless [`RopeScaling`] changes it.
/// (The interleaved form pairs neighbours instead; llama.cpp's files are made for that one.)
///
/// Source: "RoFormer", [arXiv:2104.09864](https://arxiv.org/abs/2104.09864).
#[derive(Debug, Clone)]
pub(crate) struct Rope {
    pub(crate) cos: Tensor<4>, // [1 or batch, 1, length, head_dim]
    pub(crate) sin: Tensor<4>, // [1 or batch, 1, length, head_dim]
}

impl Rope {
    /// The tables for `rows` rows of positions, one after the other in `positions`, in `dtype`.
    pub(crate) fn new(
        config: &DecoderConfig,
        positions: &[u32],
        rows: usize,
        dtype: DType,
        device: &Device,
    ) -> Self {
        // In f32 throughout, as transformers does: models were trained with these rounded angles,
        // and at position 8,000 they differ from exact ones in the fourth digit.
        let length = positions.iter().max().map_or(0, |last| *last as usize + 1);
        let frequencies = frequencies(config, length);
        let scale = match config.rope_scaling {
            RopeScaling::Yarn { attention_factor, .. } => attention_factor as f32,
            _ => 1.0,
        };
        let table = |f: fn(f32) -> f32| {
            let values: Vec<f32> = positions
                .iter()
                .flat_map(|position| {
                    let row = frequencies.iter().map(move |f| *position as f32 * f);
                    row.clone().chain(row)
                })
                .map(|angle| f(angle) * scale)
                .collect();
            let shape = [rows, 1, positions.len() / rows, config.head_dim];
            let table = TensorData::new(values, shape);
            Tensor::<4>::from_data(table, (device, DType::F32)).cast(dtype)
        };
        Self { cos: table(f32::cos), sin: table(f32::sin) }
    }

    /// Rotates `x` `[batch, heads, length, head_dim]`.
    pub(crate) fn apply(&self, x: Tensor<4>) -> Tensor<4> {
        let head_dim = x.dims()[3];
        let first = x.clone().narrow(3, 0, head_dim / 2);
        let second = x.clone().narrow(3, head_dim / 2, head_dim / 2);
        let rotated = Tensor::cat(vec![second.neg(), first], 3);
        x * self.cos.clone() + rotated * self.sin.clone()
    }
}

/// Whether the config's frequencies are finite and not negative, for short texts and for long ones.
pub(crate) fn has_usable_frequencies(config: &DecoderConfig) -> bool {
    [1, 2 * config.max_position_embeddings].into_iter().all(|length| {
        let frequencies = frequencies(config, length);
        frequencies.len() == config.head_dim / 2
            && frequencies.iter().all(|f| f.is_finite() && *f >= 0.0)
    })
}

/// f_i of each pair, radians per position, for a text of `length` positions.
fn frequencies(config: &DecoderConfig, length: usize) -> Vec<f32> {
    let dim = config.head_dim;
    let theta = config.rope_theta;
    let plain = |theta: f64| {
        let powers = (0..dim / 2).map(move |i| (theta as f32).powf((2 * i) as f32 / dim as f32));
        powers.map(|power| 1.0 / power)
    };
    match &config.rope_scaling {
        RopeScaling::None => plain(theta).collect(),
        RopeScaling::Linear { factor } => plain(theta).map(|f| f / *factor as f32).collect(),
        RopeScaling::Dynamic { factor } => {
            let longest = config.max_position_embeddings;
            let stretch = factor * length.max(longest) as f64 / longest as f64 - (factor - 1.0);
            plain(theta * stretch.powf(dim as f64 / (dim as f64 - 2.0))).collect()
        }
        RopeScaling::Llama3 {
            factor,
            low_freq_factor: low,
            high_freq_factor: high,
            original_max_position_embeddings: original,
        } => {
            let (factor, original) = (*factor as f32, *original as f64);
            let (longest, shortest) = ((original / low) as f32, (original / high) as f32);
            let mixed = |f: f32| {
                let wavelength = 2.0 * PI as f32 / f;
                if wavelength > longest {
                    f / factor
                } else if wavelength < shortest {
                    f
                } else {
                    let smooth = original as f32 / wavelength - *low as f32;
                    let smooth = smooth / (high - low) as f32;
                    (1.0 - smooth) * (f / factor) + smooth * f
                }
            };
            plain(theta).map(mixed).collect()
        }
        RopeScaling::Yarn {
            factor,
            original_max_position_embeddings: original,
            beta_fast,
            beta_slow,
            truncate,
            ..
        } => {
            // The pair that turns `turns` times over the original length.
            let pair = |turns: f64| {
                dim as f64 * (*original as f64 / (turns * 2.0 * PI)).ln() / (2.0 * theta.ln())
            };
            let (mut low, mut high) = (pair(*beta_fast), pair(*beta_slow));
            if *truncate {
                (low, high) = (low.floor(), high.ceil());
            }
            let (low, mut high) = (low.max(0.0), high.min(dim as f64 - 1.0));
            if low == high {
                high += 0.001; // no division by zero, as in the reference
            }
            let ramp = |i: usize| ((i as f32 - low as f32) / (high - low) as f32).clamp(0.0, 1.0);
            let kept = |(i, f): (usize, f32)| {
                let stretched = 1.0 / (*factor as f32 * (1.0 / f));
                let kept = 1.0 - ramp(i);
                stretched * (1.0 - kept) + f * kept
            };
            plain(theta).enumerate().map(kept).collect()
        }
        RopeScaling::Divided { factors } => {
            plain(theta).zip(factors).map(|(f, factor)| f / factor).collect()
        }
    }
}

/// What YaRN multiplies rotated vectors by where a config does not say.
pub(crate) fn yarn_attention_factor(factor: f64, mscales: Option<(f64, f64)>) -> f64 {
    let scale = |mscale: f64| if factor <= 1.0 { 1.0 } else { 0.1 * mscale * factor.ln() + 1.0 };
    match mscales {
        Some((mscale, all_dim)) => scale(mscale) / scale(all_dim),
        None => scale(1.0),
    }
}
