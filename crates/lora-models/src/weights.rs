//! Where the tensors of a checkpoint come from, whatever the file format.

use std::path::Path;

use burn::tensor::{DType, TensorData};
use half::{bf16, f16};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use crate::error::Result;

/// The type of weights in memory or in a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum WeightDtype {
    /// 4 bytes a value, exact.
    #[default]
    F32,
    /// 2 bytes a value, 11 bits of precision, at most 65,504.
    F16,
    /// 2 bytes a value, 8 bits of precision, the range of f32.
    BF16,
}

impl WeightDtype {
    /// Bytes of one value.
    pub fn size(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::BF16 => 2,
        }
    }

    /// Its name in `config.json`.
    pub(crate) fn torch_name(self) -> &'static str {
        match self {
            Self::F32 => "float32",
            Self::F16 => "float16",
            Self::BF16 => "bfloat16",
        }
    }

    pub(crate) fn dtype(self) -> DType {
        match self {
            Self::F32 => DType::F32,
            Self::F16 => DType::F16,
            Self::BF16 => DType::BF16,
        }
    }
}

impl std::str::FromStr for WeightDtype {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        match text {
            "f32" | "float32" => Ok(Self::F32),
            "f16" | "float16" => Ok(Self::F16),
            "bf16" | "bfloat16" => Ok(Self::BF16),
            _ => Err("expected f32, f16 or bf16".to_owned()),
        }
    }
}

/// One tensor on the host, row-major.
#[derive(Debug, Clone, PartialEq)]
pub struct HostTensor {
    /// Sizes, outermost first, as in the Hugging Face checkpoint (a linear weight is `[d_output, d_input]`).
    pub shape: Vec<usize>,
    /// `shape.product()` values.
    pub values: HostValues,
}

/// The values of a [`HostTensor`].
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub enum HostValues {
    /// 4 bytes a value.
    F32(Vec<f32>),
    /// 2 bytes a value.
    F16(Vec<f16>),
    /// 2 bytes a value.
    BF16(Vec<bf16>),
}

/// Runs `$body` with `$values` as the vector, whatever its type.
macro_rules! each_type {
    ($host:expr, $values:ident => $body:expr) => {
        match $host {
            HostValues::F32($values) => $body,
            HostValues::F16($values) => $body,
            HostValues::BF16($values) => $body,
        }
    };
}
pub(crate) use each_type;

impl From<Vec<f32>> for HostValues {
    fn from(values: Vec<f32>) -> Self {
        Self::F32(values)
    }
}

impl From<Vec<f16>> for HostValues {
    fn from(values: Vec<f16>) -> Self {
        Self::F16(values)
    }
}

impl From<Vec<bf16>> for HostValues {
    fn from(values: Vec<bf16>) -> Self {
        Self::BF16(values)
    }
}

impl HostValues {
    /// The type of the values.
    pub fn dtype(&self) -> WeightDtype {
        match self {
            Self::F32(_) => WeightDtype::F32,
            Self::F16(_) => WeightDtype::F16,
            Self::BF16(_) => WeightDtype::BF16,
        }
    }

    /// Number of values.
    pub fn len(&self) -> usize {
        each_type!(self, values => values.len())
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The values in another type, each rounded once.
    pub fn cast(self, dtype: WeightDtype) -> Self {
        if self.dtype() == dtype {
            return self;
        }
        match dtype {
            WeightDtype::F32 => self.to_f32().into(),
            WeightDtype::F16 => {
                each_type!(self, values => values.iter().map(|value| f16::from_f32(value.widened())).collect::<Vec<_>>()).into()
            }
            WeightDtype::BF16 => {
                each_type!(self, values => values.iter().map(|value| bf16::from_f32(value.widened())).collect::<Vec<_>>()).into()
            }
        }
    }

    /// The values in f32.
    pub fn to_f32(&self) -> Vec<f32> {
        each_type!(self, values => values.iter().map(|value| value.widened()).collect())
    }

    /// The values as a file holds them, little-endian.
    pub fn to_le_bytes(&self) -> Vec<u8> {
        match self {
            Self::F32(values) => values.iter().flat_map(|value| value.to_le_bytes()).collect(),
            Self::F16(values) => values.iter().flat_map(|value| value.to_le_bytes()).collect(),
            Self::BF16(values) => values.iter().flat_map(|value| value.to_le_bytes()).collect(),
        }
    }

    pub(crate) fn is_finite(&self) -> bool {
        each_type!(self, values => values.par_chunks(CHUNK).all(|chunk| {
            // No early end within a chunk, so that it becomes vector code.
            chunk.iter().fold(true, |finite, value| finite & value.is_a_number())
        }))
    }
}

/// Values that one task of a parallel loop works on.
const CHUNK: usize = 1 << 16;

/// What the three types share.
pub(crate) trait Float: Copy + Send + Sync + Default {
    fn widened(self) -> f32;
    fn is_a_number(self) -> bool;
}

impl Float for f32 {
    fn widened(self) -> f32 {
        self
    }
    fn is_a_number(self) -> bool {
        self.is_finite()
    }
}

impl Float for f16 {
    fn widened(self) -> f32 {
        self.to_f32()
    }
    fn is_a_number(self) -> bool {
        self.is_finite()
    }
}

impl Float for bf16 {
    fn widened(self) -> f32 {
        self.to_f32()
    }
    fn is_a_number(self) -> bool {
        self.is_finite()
    }
}

impl HostTensor {
    /// A tensor of `shape`.
    ///
    /// # Panics
    /// When there are more or fewer values than the shape asks for.
    pub fn new(shape: Vec<usize>, values: impl Into<HostValues>) -> Self {
        let values = values.into();
        assert_eq!(shape.iter().product::<usize>(), values.len(), "a tensor of shape {shape:?}");
        Self { shape, values }
    }

    /// The tensor in another type, each value rounded once.
    pub fn cast(self, dtype: WeightDtype) -> Self {
        Self { shape: self.shape, values: self.values.cast(dtype) }
    }

    /// As Burn takes it, without a copy.
    pub(crate) fn into_data(self) -> TensorData {
        each_type!(self.values, values => TensorData::new(values, self.shape))
    }
}

/// Writes the transpose of `values` `[rows, columns]` to `data`, in tiles, so that reads and writes both stay in
/// the cache, and bands of tiles side by side.
pub(crate) fn transpose<T: Float>(values: &[T], [rows, columns]: [usize; 2], data: &mut [T]) {
    const TILE: usize = 32;
    if values.is_empty() {
        return;
    }
    data.par_chunks_mut(TILE * rows).enumerate().for_each(|(band, data)| {
        let first = band * TILE;
        let width = data.len() / rows;
        for row_start in (0..rows).step_by(TILE) {
            for column in 0..width {
                let line = &mut data[column * rows..][row_start..rows.min(row_start + TILE)];
                for (row, value) in (row_start..).zip(line) {
                    *value = values[row * columns + first + column];
                }
            }
        }
    });
}

/// A checkpoint that can be read tensor by tensor, under the names of the Hugging Face checkpoint
/// (`model.layers.0.self_attn.q_proj.weight`) and in its layout.
pub trait WeightSource {
    /// The file or folder, for messages.
    fn path(&self) -> &Path;

    /// The names of all tensors, sorted.
    fn names(&self) -> Vec<String>;

    /// The shape of one tensor, or `None` when the checkpoint has no such tensor.
    fn shape(&self, name: &str) -> Option<Vec<usize>>;

    /// Reads one tensor in the type asked for, each value rounded once where the file's is another.
    ///
    /// # Errors
    /// When the tensor is absent, or its bytes cannot be read or decoded.
    fn read_as(&self, name: &str, dtype: WeightDtype) -> Result<HostTensor>;

    /// Reads one tensor in f32.
    ///
    /// # Errors
    /// As [`read_as`](Self::read_as).
    fn read(&self, name: &str) -> Result<HostTensor> {
        self.read_as(name, WeightDtype::F32)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_transpose_of_uneven_tiles() {
        for (rows, columns) in [(37, 70), (1, 5), (5, 1), (64, 32), (33, 31)] {
            let values: Vec<f32> = (0..rows * columns).map(|value| value as f32).collect();
            let mut found = vec![0.0; rows * columns];
            transpose(&values, [rows, columns], &mut found);
            for row in 0..rows {
                for column in 0..columns {
                    assert_eq!(found[column * rows + row], values[row * columns + column]);
                }
            }
        }
    }

    #[test]
    fn values_are_rounded_once() {
        let values = HostValues::from(vec![1.0_f32, 1.0 + 1.0 / 512.0, 3.3]);
        let rounded = values.clone().cast(WeightDtype::BF16);
        assert_eq!(rounded.to_f32(), [1.0, 1.0, 3.296_875]);
        assert_eq!(rounded.clone().cast(WeightDtype::F16).to_f32(), [1.0, 1.0, 3.296_875]);
        assert_eq!(values.clone().cast(WeightDtype::F32), values);
        assert_eq!(rounded.to_le_bytes(), [0x80, 0x3f, 0x80, 0x3f, 0x53, 0x40]);
    }

    #[test]
    fn one_value_that_is_no_number_is_found_anywhere() {
        for dtype in [WeightDtype::F32, WeightDtype::F16, WeightDtype::BF16] {
            for (at, wrong) in [(0, f32::NAN), (CHUNK, f32::INFINITY), (CHUNK + 7, -f32::INFINITY)]
            {
                let mut values = vec![1.0_f32; CHUNK + 8];
                assert!(HostValues::from(values.clone()).cast(dtype).is_finite());
                values[at] = wrong;
                assert!(!HostValues::from(values).cast(dtype).is_finite(), "{dtype:?} {at}");
            }
        }
    }
}
