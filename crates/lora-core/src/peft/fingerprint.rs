//! Which weights an adapter was made over.

use burn::tensor::{DType, Int, Tensor, TensorData};

use crate::visit::VisitLora;

/// Rows and columns of a layer's weight that are looked at, at most.
const ROWS: usize = 8;
const COLUMNS: usize = 32;

/// Some of the values of a layer's weight.
#[derive(Clone)]
pub(super) struct Sample {
    dims: [usize; 2],
    values: Vec<f32>,
}

impl Sample {
    /// At most 8 × 32 values, spread over the matrix `[d_input, d_output]`.
    pub(super) fn of(weight: Tensor<2>) -> Self {
        let weight = weight.without_autodiff();
        let [rows, columns] = weight.dims();
        let device = weight.device();
        let spread = |size: usize, most: usize| {
            let count = size.min(most);
            let places: Vec<i32> = (0..count).map(|i| (i * size / count) as i32).collect();
            Tensor::<1, Int>::from_data(TensorData::new(places, [count]), &device)
        };
        let some = weight.select(0, spread(rows, ROWS)).select(1, spread(columns, COLUMNS));
        let values = some.cast(DType::F32).into_data().try_to_vec().unwrap_or_default();
        Self { dims: [rows, columns], values }
    }
}

/// A fingerprint of the frozen weights of the layers at `paths`, see [`of_samples`].
pub(super) fn fingerprint<M: VisitLora>(model: &M, paths: &[&str]) -> String {
    let mut samples = Vec::new();
    model.visit_lora("", &mut |path, layer| {
        if paths.contains(&path) {
            samples.push((path.to_owned(), Sample::of(layer.weight())));
        }
    });
    of_samples(samples)
}

/// FNV-1a over each path, in alphabetical order, with its size and values as f32: 16 hexadecimal digits.
///
/// The same weights in another dtype that holds them exactly (a bf16 file read as f32) give the same
/// fingerprint; quantised or fine-tuned ones another.
pub(super) fn of_samples(mut samples: Vec<(String, Sample)>) -> String {
    let mut hash: u64 = 0xcbf2_9ce4_8422_2325;
    let mut add = |bytes: &[u8]| {
        for byte in bytes {
            hash = (hash ^ u64::from(*byte)).wrapping_mul(0x100_0000_01b3);
        }
    };
    // A checkpoint's files have another order than the model.
    samples.sort_by(|(one, _), (other, _)| one.cmp(other));
    for (path, Sample { dims, values }) in samples {
        add(path.as_bytes());
        for size in dims {
            add(&(size as u64).to_le_bytes());
        }
        for value in values {
            // 0 and -0 are the same weight.
            let value = if value == 0.0 { 0.0 } else { value };
            add(&value.to_le_bytes());
        }
    }
    format!("{hash:016x}")
}
