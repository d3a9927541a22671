//! The loss: how surprised the model is by the tokens that it should have written.

use burn::tensor::{Tensor, TensorData};
use lora_models::cross_entropy;

use crate::data::{Batch, Sample};
use crate::error::Result;
use crate::model::CausalLm;

/// The mean over the batch's trained tokens of -ln p(token | what stands before it), in nats.
///
/// # Shapes
/// - output `[1]`
pub fn batch_loss<M: CausalLm>(model: &M, batch: &Batch) -> Tensor<1> {
    let device = model.device();
    let count = batch.targets.len();
    let ids = TensorData::new(batch.ids.clone(), [batch.rows, batch.length]);
    let positions = TensorData::new(batch.positions.clone(), [count]);
    let targets = TensorData::new(batch.targets.clone(), [count]);
    let logits = model
        .next_token_logits(Tensor::from_data(ids, &device), Tensor::from_data(positions, &device));
    cross_entropy(logits, Tensor::from_data(targets, &device)).mean()
}

/// The mean loss over all trained tokens of `samples`, in nats per token; every token counts the
/// same, however the samples fall into batches. Give it a model in validation mode
/// ([`Module::valid`](burn::module::Module::valid)), so that nothing is kept for a backward pass.
///
/// # Errors
/// When there is no trained token.
pub fn evaluate<M: CausalLm>(model: &M, samples: &[Sample], batch_size: usize) -> Result<f64> {
    let mut sum = 0.0;
    let mut tokens = 0;
    for samples in samples.chunks(batch_size.max(1)) {
        let batch = Batch::collate(&samples.iter().collect::<Vec<_>>(), PAD_ID);
        if !batch.targets.is_empty() {
            let mean = batch_loss(model, &batch).into_scalar::<f32>();
            sum += f64::from(mean) * batch.targets.len() as f64;
            tokens += batch.targets.len();
        }
    }
    if tokens == 0 {
        return Err(crate::Error::settings("held-out data", "at least one trained token", "none"));
    }
    Ok(sum / tokens as f64)
}

/// Padding is seen by no real token, so any id that every vocabulary has will do.
pub(crate) const PAD_ID: u32 = 0;
