//! A mixture of experts.

use burn::module::Module;
use burn::tensor::{DType, IndexingUpdateOp, Int, Tensor, TensorData, activation::softmax};
use lora_core::{AdaptableLinear, VisitLayer, VisitLayerMut, VisitLora, join_path};

use crate::family::ExpertNames;
use crate::mlp::Mlp;

/// A router and the MLPs that it chooses from; only those that a token goes through are computed for it.
///
/// y = Σ p_e · MLP_e(x) over the `per_token` experts with the largest p = softmax(router(x)), where the
/// p of the chosen may be scaled to sum to one. The choice itself has no gradient.
///
/// In a mixed batch of adapters (`AdapterSets::mixed`) experts can have none: tokens of several samples
/// go through one together.
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
        // Which tokens go where has to be known here, to run each expert once over all of its own.
        let ranked = probabilities.clone().without_autodiff().topk_with_indices(self.per_token, 1);
        let chosen = ranked.1.into_data().convert::<i32>();
        let weights = probabilities.gather(1, Tensor::from_data(chosen.clone(), &device));
        let chosen: Vec<usize> = chosen.iter::<i32>().map(|expert| expert as usize).collect();
        let weights = match self.normalised {
            true => weights.clone() / weights.sum_dim(1),
            false => weights,
        };
        let weights = match self.names.rounds_probabilities {
            true => weights.cast(dtype).cast(DType::F32),
            false => weights,
        };
        let weights = weights.reshape([tokens * self.per_token, 1]);

        let mut output = Tensor::zeros([tokens, width], (&device, dtype));
        for (number, expert) in self.experts.iter().enumerate() {
            let slots: Vec<i32> = (0..chosen.len())
                .filter(|slot| chosen[*slot] == number)
                .map(|slot| slot as i32)
                .collect();
            if slots.is_empty() {
                continue;
            }
            let count = slots.len();
            let rows: Vec<i32> = slots.iter().map(|slot| slot / self.per_token as i32).collect();
            let index = |values: Vec<i32>| {
                Tensor::<1, Int>::from_data(TensorData::new(values, [count]), &device)
            };
            let (slots, rows) = (index(slots), index(rows));
            let own = x.clone().select(0, rows.clone()).reshape([1, count, width]);
            let answer = expert.forward(own).reshape([count, width]);
            let answer = answer.cast(DType::F32) * weights.clone().select(0, slots);
            output = output.select_assign(0, rows, answer.cast(dtype), IndexingUpdateOp::Add);
        }
        output.reshape([batch, length, width])
    }

    fn expert_paths(&self, path: &str, number: usize) -> [String; 3] {
        let expert = join_path(path, &format!("experts.{number}"));
        self.names.projections.map(|name| join_path(&expert, name))
    }
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
