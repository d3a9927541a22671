//! Starting weights for a decoder that is trained from scratch.

use std::collections::BTreeMap;
use std::path::Path;

use rand::SeedableRng;
use rand::rngs::Xoshiro256PlusPlus;
use rand_distr::{Distribution, Normal};

use crate::config::DecoderConfig;
use crate::error::{Error, Result};
use crate::weights::{HostTensor, WeightDtype, WeightSource};

/// A checkpoint that was never trained: weights ~ N(0, initializer_range²), biases 0, norms 1, as
/// transformers starts a Llama. The same seed gives the same values.
#[derive(Debug, Clone)]
pub struct RandomWeights {
    /// Under their names, and the place in the model's order, which the values depend on.
    shapes: BTreeMap<String, (usize, Vec<usize>)>,
    normal: Normal<f32>,
    seed: u64,
}

impl RandomWeights {
    /// Starting weights for the decoder that `config` describes.
    ///
    /// # Errors
    /// When there can be no such decoder ([`DecoderConfig::check`]), or `initializer_range` is negative or
    /// not finite.
    pub fn new(config: &DecoderConfig, seed: u64) -> Result<Self> {
        config.check()?;
        let std = config.initializer_range as f32;
        let normal = Normal::new(0.0, std).map_err(|_| {
            Error::malformed(
                PLACE,
                "initializer_range",
                "a finite number of at least 0",
                std.to_string(),
            )
        })?;
        let shapes = config.tensor_shapes().into_iter().enumerate();
        let shapes = shapes.map(|(place, (name, shape))| (name, (place, shape))).collect();
        Ok(Self { shapes, normal, seed })
    }
}

const PLACE: &str = "random weights";

impl WeightSource for RandomWeights {
    fn path(&self) -> &Path {
        Path::new(PLACE)
    }

    fn names(&self) -> Vec<String> {
        self.shapes.keys().cloned().collect()
    }

    fn shape(&self, name: &str) -> Option<Vec<usize>> {
        self.shapes.get(name).map(|(_, shape)| shape.clone())
    }

    fn read_as(&self, name: &str, dtype: WeightDtype) -> Result<HostTensor> {
        let (position, shape) = self.shapes.get(name).cloned().ok_or_else(|| {
            Error::malformed(PLACE, name, "a tensor of the model", "no such tensor")
        })?;
        let count = shape.iter().product();
        let values: Vec<f32> = if name.ends_with("norm.weight") {
            vec![1.0; count]
        } else if name.ends_with(".bias") {
            vec![0.0; count]
        } else {
            let seed = self.seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) ^ position as u64;
            let rng = Xoshiro256PlusPlus::seed_from_u64(seed);
            self.normal.sample_iter(rng).take(count).collect()
        };
        Ok(HostTensor::new(shape, values).cast(dtype))
    }
}
