//! Adapt a model of one's own, here a small MLP-Mixer that names the wave in a time series.
//!
//! It learns clean waves in full, then LoRA fits it to a sensor that drifts.
//!
//! `cargo run --release --example own_model`

use std::process::ExitCode;

use burn::module::Module;
use burn::nn::loss::CrossEntropyLossConfig;
use burn::nn::{Gelu, LayerNorm, LayerNormConfig, LinearConfig};
use burn::optim::{AdamWConfig, GradientsParams};
use burn::tensor::{Device, Int, Tensor, TensorData};
use burn_lora::{Error, Result, say, tell_of_kernels};
use lora_core::{
    AdaptableLinear, AdapterInfo, LoraConfig, TargetModules, VisitLora, inject, load_adapter,
    merge, save_adapter,
};
use rand::rngs::Xoshiro256PlusPlus;
use rand::{RngExt, SeedableRng};

const PATCHES: usize = 8; // of a series
const PATCH: usize = 4; // values
const WIDTH: usize = 32;
const CLASSES: usize = 4;

#[derive(Module, Debug, VisitLora)]
#[lora(output = "head")]
struct Mixer {
    embed: AdaptableLinear, // [PATCH, WIDTH]
    blocks: Vec<Block>,
    norm: LayerNorm,
    head: AdaptableLinear, // [WIDTH, CLASSES]
}

#[derive(Module, Debug, VisitLora)]
struct Block {
    norm: LayerNorm,
    patches: AdaptableLinear, // [PATCHES, PATCHES], mixes along the series
    up: AdaptableLinear,      // [WIDTH, 2 * WIDTH]
    gelu: Gelu,
    down: AdaptableLinear, // [2 * WIDTH, WIDTH]
}

impl Mixer {
    fn new(device: &Device) -> Self {
        let linear = |d_input, d_output| LinearConfig::new(d_input, d_output).init(device).into();
        let norm = || LayerNormConfig::new(WIDTH).init(device);
        let block = || Block {
            norm: norm(),
            patches: linear(PATCHES, PATCHES),
            up: linear(WIDTH, 2 * WIDTH),
            gelu: Gelu::new(),
            down: linear(2 * WIDTH, WIDTH),
        };
        let [embed, head] = [linear(PATCH, WIDTH), linear(WIDTH, CLASSES)];
        Self { embed, blocks: vec![block(), block()], norm: norm(), head }
    }

    /// `[batch, PATCHES, PATCH]` to `[batch, CLASSES]`.
    fn forward(&self, series: Tensor<3>) -> Tensor<2> {
        let mut x = self.embed.forward(series);
        for block in &self.blocks {
            let along = block.norm.forward(x.clone()).swap_dims(1, 2); // [batch, WIDTH, PATCHES]
            x = x + block.patches.forward(along).swap_dims(1, 2);
            x = x.clone() + block.down.forward(block.gelu.forward(block.up.forward(x)));
        }
        self.head.forward(self.norm.forward(x).mean_dim(1).squeeze_dim::<2>(1))
    }

    fn loss(&self, (series, labels): (Tensor<3>, Tensor<1, Int>)) -> Tensor<1> {
        let criterion = CrossEntropyLossConfig::new().init(&labels.device());
        criterion.forward(self.forward(series), labels)
    }
}

/// Waves of `CLASSES` frequencies with noise, and a drift of up to `drift` over the series.
fn waves(drift: f32, rows: usize, seed: u64, device: &Device) -> (Tensor<3>, Tensor<1, Int>) {
    let mut rng = Xoshiro256PlusPlus::seed_from_u64(seed);
    let (mut values, mut labels) = (Vec::new(), Vec::new());
    for row in 0..rows {
        let class = row % CLASSES;
        let phase = rng.random_range(0.0..std::f32::consts::TAU);
        let slope = rng.random_range(-drift..=drift);
        for step in 0..PATCHES * PATCH {
            let time = step as f32 / (PATCHES * PATCH) as f32;
            let wave = (std::f32::consts::TAU * (class + 1) as f32 * time + phase).sin();
            values.push(wave + slope * time + rng.random_range(-0.3..0.3));
        }
        labels.push(class as i32);
    }
    let values = TensorData::new(values, [rows, PATCHES, PATCH]);
    (Tensor::from_data(values, device), Tensor::from_data(TensorData::new(labels, [rows]), device))
}

fn train(mut model: Mixer, drift: f32, steps: u64, device: &Device) -> Mixer {
    let mut optimizer = AdamWConfig::new().init();
    for step in 0..steps {
        let gradients = model.loss(waves(drift, 64, step, device)).backward();
        let gradients = GradientsParams::from_grads(gradients, &model);
        model = optimizer.step(0.005, model, gradients);
    }
    model
}

fn main() -> ExitCode {
    burn_lora::run(own_model)
}

fn own_model() -> Result<()> {
    let device = lora_core::device_from_env()?.autodiff();
    tell_of_kernels(&device);
    device.seed(1);
    let clean = waves(0.0, 256, 1000, &device); // no training step has this seed
    let drifting = waves(6.0, 256, 1001, &device);
    let loss = |model: &Mixer, (series, labels): &(Tensor<3>, Tensor<1, Int>)| {
        model.loss((series.clone(), labels.clone())).into_scalar::<f32>()
    };

    let base = train(Mixer::new(&device), 0.0, 150, &device);
    say(format!("pretrained   loss {:.3} on clean waves", loss(&base, &clean)));

    let mut config = LoraConfig::new(4, 8.0);
    config.target_modules = TargetModules::AllLinear; // but for the head, see `output`
    let (model, report) = inject(base.clone(), &config)?;
    say(format!("adapted      {} layers: {}", report.adapted.len(), report.parameters));
    say(format!("before       loss {:.3} on drifting waves", loss(&model, &drifting)));
    let mut model = train(model, 6.0, 150, &device);
    say(format!("after        loss {:.3} on drifting waves", loss(&model, &drifting)));

    let folder = std::env::temp_dir().join(format!("own_model-{}", std::process::id()));
    save_adapter(&model, &folder, &AdapterInfo::default())?;
    let loaded = load_adapter(base, &folder);
    std::fs::remove_dir_all(&folder).map_err(|error| burn_lora::io_error(&folder, &error))?;
    let outputs = model.forward(drifting.0.clone());
    let same = |name: &str, other: &Mixer| {
        let difference = (other.forward(drifting.0.clone()) - outputs.clone()).abs().max();
        match difference.into_scalar::<f32>() {
            difference if difference < 1e-4 => {
                say(format!("{name:<12} the same outputs, to {difference:.1e}"));
                Ok(())
            }
            difference => Err(Error::other(format!("{name}: outputs differ by {difference}"))),
        }
    };
    same("loaded", &loaded?.0)?;
    merge(&mut model)?;
    same("merged", &model)
}
