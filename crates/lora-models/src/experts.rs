//! A mixture of experts.

use burn::module::Module;
use burn::tensor::{DType, IndexingUpdateOp, Int, Tensor, TensorData, activation::softmax};
use lora_core::{AdaptableLayer, AdaptableLinear, VisitLayer, VisitLayerMut, VisitLora, join_path};

use crate::family::ExpertNames;
use crate::mlp::Mlp;

/// A router and the MLPs that it chooses from; only those that a token goes through are computed for it.
///
/// y = Σ p_e · MLP_e(x) over the `per_token` experts with the largest p = softmax(router(x)), where the
/// p of the chosen may be scaled to sum to one. The choice itself has no gradient.
///
/// In a mixed batch of adapters (`AdapterSets::mixed`) an expert with adapters gets the tokens of each sample
/// apart, filled up to as many as the sample with the most of them has.
///
/// # Shapes
/// - input and output `[batch, length, hidden_size]`
///
/// Source: "Mixtral of Experts", [arXiv:2401.04088](https://arxiv.org/abs/2401.04088).
#[derive(Module, Debug)]
pub struct Experts {
    pub(crate) experts: Vec<Mlp>,
    pub(crate) gate: AdaptableLinear, // [hidden, experts]
    pub(crate) per_token: usize,
    pub(crate) normalised: bool,
    #[module(skip)]
    pub(crate) names: ExpertNames,
}

impl Experts {
    pub(crate) fn forward(&self, x: Tensor<3>) -> Tensor<3> {
        let [batch, length, width] = x.dims();
        let tokens = batch * length;
        let (dtype, device) = (x.dtype(), x.device());
        // With its batch axis, which a mixed batch of adapters needs.
        let scores = self.gate.forward(x.clone()).cast(DType::F32);
        let x = x.reshape([tokens, width]);
        let scores = scores.reshape([tokens, self.experts.len()]);
        let probabilities = softmax(scores, 1); // [tokens, experts]
        // Which tokens go where has to be known here, to run each expert once over all of its own; so they are ranked
        // here too, and of equals the first comes first on every backend.
        let known = probabilities.clone().without_autodiff().into_data();
        let chosen = most_likely(
            &known.iter::<f32>().collect::<Vec<_>>(),
            self.experts.len(),
            self.per_token,
        );
        let indices: Vec<i32> = chosen.iter().map(|expert| *expert as i32).collect();
        let indices = TensorData::new(indices, [tokens, self.per_token]);
        let weights = probabilities.gather(1, Tensor::from_data(indices, &device));
        let weights = match self.normalised {
            true => weights.clone() / weights.sum_dim(1),
            false => weights,
        };
        let weights = match self.names.rounds_probabilities {
            true => weights.cast(dtype).cast(DType::F32),
            false => weights,
        };
        // In one axis: in a kernel that Burn fuses for wgpu, what was gathered is not spread over columns as it should.
        let weights = weights.reshape([tokens * self.per_token]);

        let mut output = Tensor::zeros([tokens, width], (&device, dtype));
        for (number, expert) in self.experts.iter().enumerate() {
            let slots: Vec<usize> =
                (0..chosen.len()).filter(|slot| chosen[*slot] == number).collect();
            if slots.is_empty() {
                continue;
            }
            let rows: Vec<usize> = slots.iter().map(|slot| slot / self.per_token).collect();
            let index = |values: Vec<usize>| -> Tensor<1, Int> {
                let values: Vec<i32> = values.into_iter().map(|value| value as i32).collect();
                let count = values.len();
                Tensor::from_data(TensorData::new(values, [count]), &device)
            };
            let answer = if is_mixed(expert) {
                let (taken, kept) = by_sample(&rows, [batch, length]);
                let most = taken.len() / batch;
                let own = x.clone().select(0, index(taken)).reshape([batch, most, width]);
                expert.forward(own).reshape([batch * most, width]).select(0, index(kept))
            } else {
                let own = x.clone().select(0, index(rows.clone())).reshape([1, rows.len(), width]);
                expert.forward(own).reshape([rows.len(), width])
            };
            let weights = weights.clone().select(0, index(slots)).reshape([rows.len(), 1]);
            let answer = (answer.cast(DType::F32) * weights).cast(dtype);
            output = output.select_assign(0, index(rows), answer, IndexingUpdateOp::Add);
        }
        output.reshape([batch, length, width])
    }

    fn expert_paths(&self, path: &str, number: usize) -> [String; 3] {
        let expert = join_path(path, &format!("experts.{number}"));
        self.names.projections.map(|name| join_path(&expert, name))
    }
}

/// The `count` most likely of each row's `experts`, the most likely first, and of equals the first.
fn most_likely(probabilities: &[f32], experts: usize, count: usize) -> Vec<usize> {
    let mut ranked = Vec::with_capacity(experts);
    let rows = probabilities.chunks_exact(experts);
    rows.flat_map(|row| {
        ranked.clear();
        ranked.extend(0..experts);
        ranked.sort_by(|one, other| row[*other].total_cmp(&row[*one]));
        ranked[..count].to_vec()
    })
    .collect()
}

fn is_mixed(expert: &Mlp) -> bool {
    [&expert.gate_proj, &expert.up_proj, &expert.down_proj].iter().any(|layer| layer.is_mixed())
}

/// For ascending `rows` of `[batch, length]`: which rows to take so that each sample has equally many, one
/// sample after the other, and where among these the rows asked for are. What fills up is a sample's first.
fn by_sample(rows: &[usize], [batch, length]: [usize; 2]) -> (Vec<usize>, Vec<usize>) {
    let mut samples = vec![Vec::new(); batch];
    for row in rows {
        samples[row / length].push(*row);
    }
    let most = samples.iter().map(Vec::len).max().unwrap_or_default();
    let kept = samples.iter().enumerate();
    let kept =
        kept.flat_map(|(sample, rows)| (0..rows.len()).map(move |place| sample * most + place));
    let kept = kept.collect();
    for (sample, rows) in samples.iter_mut().enumerate() {
        rows.resize(most, sample * length);
    }
    (samples.concat(), kept)
}

// By hand, since a checkpoint's names of an expert's projections differ by family.
impl VisitLora for Experts {
    fn visit_lora<'a>(&'a self, path: &str, visit: &mut VisitLayer<'_, 'a>) {
        for (number, expert) in self.experts.iter().enumerate() {
            let paths = self.expert_paths(path, number);
            let layers = [&expert.gate_proj, &expert.up_proj, &expert.down_proj];
            for (path, layer) in paths.iter().zip(layers) {
                layer.visit_lora(path, visit);
            }
        }
        self.gate.visit_lora(&join_path(path, "gate"), visit);
    }

    fn visit_lora_mut(&mut self, path: &str, visit: &mut VisitLayerMut<'_>) {
        for number in 0..self.experts.len() {
            let paths = self.expert_paths(path, number);
            let expert = &mut self.experts[number];
            let layers = [&mut expert.gate_proj, &mut expert.up_proj, &mut expert.down_proj];
            for (path, layer) in paths.iter().zip(layers) {
                layer.visit_lora_mut(path, visit);
            }
        }
        self.gate.visit_lora_mut(&join_path(path, "gate"), visit);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_most_likely_experts_come_first_and_of_equals_the_first() {
        let rows = [0.1, 0.4, 0.3, 0.2, 0.25, 0.25, 0.25, 0.25];
        assert_eq!(most_likely(&rows, 4, 1), [1, 0]);
        assert_eq!(most_likely(&rows, 4, 3), [1, 2, 3, 0, 1, 2]);
        assert!(most_likely(&[], 4, 3).is_empty());
    }

    #[test]
    fn samples_get_equally_many_rows() {
        // Three samples of four rows: two, none and one of them go through the expert.
        let (taken, kept) = by_sample(&[1, 3, 8], [3, 4]);
        assert_eq!(taken, [1, 3, 4, 4, 8, 8]);
        assert_eq!(kept, [0, 1, 4]);
    }
}
