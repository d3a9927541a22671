//! The loop.

use std::time::Instant;

use burn::lr_scheduler::module_lr_scheduler::{ModuleLearningRate, ModuleLrScheduler};
use burn::module::ParamGroup;
use burn::optim::{AdamWConfig, GradientsParams};
use lora_core::{LearningRates, audit_gradients};
use serde::{Deserialize, Serialize};

use crate::data::{Batch, Batches, SplitData};
use crate::error::{Error, ErrorKind, Result};
use crate::loss::{PAD_ID, batch_loss, evaluate};
use crate::model::CausalLm;
use crate::schedule::Schedule;

/// The settings of the loop.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TrainConfig {
    /// Optimiser steps.
    pub steps: usize,
    /// Samples a step.
    pub batch: usize,
    /// Peak learning rate.
    pub learning_rate: f64,
    /// How the learning rate goes after the warm-up.
    pub schedule: Schedule,
    /// Steps in which the learning rate rises to its peak.
    pub warmup: usize,
    /// B, the up matrix of an adapter, learns so many times as fast as everything else: LoRA+
    /// ([`LearningRates`] says why). 1: as fast.
    #[serde(default = "one")]
    pub lora_plus_ratio: f64,
    /// AdamW's decay of every trained value, a fraction of it for each unit of learning rate.
    pub weight_decay: f64,
    /// The held-out loss is measured after every so many steps, and after the last; 0: there only.
    pub eval_every: usize,
    /// Seed of the order of the data.
    pub seed: u64,
}

impl TrainConfig {
    /// Checks the settings for a run over `rows` samples, as [`train`] does before its first step.
    ///
    /// # Errors
    /// When a setting cannot be used.
    pub fn check(&self, rows: usize) -> Result<()> {
        for (name, value) in [("steps", self.steps), ("batch", self.batch)] {
            if value == 0 {
                return Err(Error::settings(name, "at least 1", value));
            }
        }
        if !(self.learning_rate.is_finite() && self.learning_rate > 0.0) {
            let found = self.learning_rate;
            return Err(Error::settings("learning rate", "a finite number above 0", found));
        }
        if !(self.weight_decay.is_finite() && self.weight_decay >= 0.0) {
            let found = self.weight_decay;
            return Err(Error::settings("weight decay", "a finite number of at least 0", found));
        }
        if !(self.lora_plus_ratio.is_finite() && self.lora_plus_ratio > 0.0) {
            let found = self.lora_plus_ratio;
            return Err(Error::settings("lora_plus_ratio", "a finite number above 0", found));
        }
        if self.batch > rows {
            let expected = format!("at most the {rows} rows to train on");
            return Err(Error::settings("batch", expected, self.batch));
        }
        if self.warmup > self.steps {
            let expected = format!("at most the {} steps", self.steps);
            return Err(Error::settings("warmup", expected, self.warmup));
        }
        Ok(())
    }
}

fn one() -> f64 {
    1.0
}

/// The rates of one step, as the optimiser takes them. Without a ratio there is one rate and no group.
fn rates(rates: LearningRates, lora_b: &ParamGroup) -> ModuleLearningRate {
    if rates.lora_b() == rates.base() {
        return rates.base().into();
    }
    ModuleLrScheduler::new(rates.base()).with_group(lora_b.clone(), rates.lora_b()).step()
}

/// What one step did.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct StepReport {
    /// Counted from 1.
    pub step: usize,
    /// Mean loss over the step's trained tokens before the step, in nats.
    pub loss: f64,
    /// The step's learning rate; B's is [`TrainConfig::lora_plus_ratio`] times it.
    pub learning_rate: f64,
    /// Tokens of the batch, prompts included, padding not.
    pub tokens: usize,
    /// Time for forward, backward and optimiser.
    pub seconds: f64,
    /// Held-out loss after the step, in nats per token, where it was measured.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub held_out_loss: Option<f64>,
}

/// Trains what is trainable in `model`: a decoder with adapters, or a whole one.
///
/// `on_step` is told about every step as soon as it is done. The same model, data and settings give
/// the same steps.
///
/// # Errors
/// When a setting cannot be used, nothing in the model trains, something that adapts it gets no
/// gradient in the first step, or a loss is not finite.
pub fn train<M: CausalLm>(
    mut model: M,
    data: &SplitData,
    config: &TrainConfig,
    mut on_step: impl FnMut(&StepReport) -> Result<()>,
) -> Result<M> {
    config.check(data.train.len())?;
    if !model.device().is_autodiff() {
        let expected = "one that records gradients: device.autodiff()";
        return Err(Error::settings("device", expected, "one that does not"));
    }
    let mut batches = Batches::new(data.train.len(), config.batch, config.seed)?;
    let mut optimizer =
        AdamWConfig::new().with_epsilon(1e-8).with_weight_decay(config.weight_decay as f32).init();

    let lora_b = LearningRates::lora_b_parameters(&model);

    for step in 1..=config.steps {
        let start = Instant::now();
        let indices = batches.next().expect("batches never end");
        let samples: Vec<_> = indices.into_iter().map(|index| &data.train[index]).collect();
        let batch = Batch::collate(&samples, PAD_ID);

        let loss = batch_loss(&model, &batch);
        let value = f64::from(loss.clone().into_scalar::<f32>());
        if !value.is_finite() {
            return Err(ErrorKind::Diverged { step, what: "loss" }.into());
        }
        if !loss.is_tracked() {
            return Err(Error::settings("model", "trainable parameters", "none"));
        }
        let gradients = loss.backward();
        if step == 1 {
            audit_gradients(&model, &gradients)?;
        }
        let gradients = GradientsParams::from_grads(gradients, &model);
        let learning_rate =
            config.schedule.learning_rate(config.learning_rate, step, config.steps, config.warmup);
        let both = LearningRates::new(learning_rate, config.lora_plus_ratio)?;
        model = optimizer.step(rates(both, &lora_b), model, gradients);
        let seconds = start.elapsed().as_secs_f64();

        let due = step == config.steps || (config.eval_every > 0 && step % config.eval_every == 0);
        let held_out_loss = match due && !data.held_out.is_empty() {
            true => Some(evaluate(&model.valid(), &data.held_out, config.batch)?),
            false => None,
        };
        if held_out_loss.is_some_and(|loss| !loss.is_finite()) {
            return Err(ErrorKind::Diverged { step, what: "held-out loss" }.into());
        }
        let tokens = batch.tokens;
        on_step(&StepReport { step, loss: value, learning_rate, tokens, seconds, held_out_loss })?;
    }
    Ok(model)
}
