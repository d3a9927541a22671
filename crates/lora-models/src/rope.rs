//! Rotary position embedding, half-rotated as in Hugging Face checkpoints.

use burn::tensor::{Device, Tensor, TensorData};

/// Rotates queries and keys by their position.
///
/// With x = [x1, x2] split in the middle of the head: x cos + [-x2, x1] sin, where the angle of
/// pair i at position p is p · theta^(-2i / head_dim). (The interleaved form pairs neighbours
/// instead; llama.cpp's files are made for that one.)
///
/// Source: "RoFormer", [arXiv:2104.09864](https://arxiv.org/abs/2104.09864).
#[derive(Debug, Clone)]
pub(crate) struct Rope {
    cos: Tensor<4>, // [1, 1, length, head_dim]
    sin: Tensor<4>, // [1, 1, length, head_dim]
}

impl Rope {
    /// The tables for `length` positions from `start`.
    pub(crate) fn new(
        head_dim: usize,
        theta: f64,
        start: usize,
        length: usize,
        device: &Device,
    ) -> Self {
        // In f32 throughout, as transformers does: models were trained with these rounded angles,
        // and at position 8,000 they differ from exact ones in the fourth digit.
        let frequencies: Vec<f32> = (0..head_dim / 2)
            .map(|pair| 1.0 / (theta as f32).powf((2 * pair) as f32 / head_dim as f32))
            .collect();
        let angles = || {
            (start..start + length).flat_map(|position| {
                let row = frequencies.iter().map(move |frequency| position as f32 * frequency);
                row.clone().chain(row)
            })
        };
        let table = |f: fn(f32) -> f32| {
            let values: Vec<f32> = angles().map(f).collect();
            Tensor::from_data(TensorData::new(values, [1, 1, length, head_dim]), device)
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
