//! Which weights an adapter was made over.

use burn::tensor::{DType, Int, Tensor, TensorData};

use crate::visit::VisitLora;

/// Rows and columns of a layer's weight that are looked at, at most.
const ROWS: usize = 8;
const COLUMNS: usize = 32;

/// A fingerprint of the frozen weights of the layers at `paths`: FNV-1a over each path, its size and
/// some of its values as f32, 16 hexadecimal digits.
///
/// At most 8 × 32 values of a layer are read, spread over its matrix. The same weights in another
/// dtype that holds them exactly (a bf16 file read as f32) give the same fingerprint; quantised or
/// fine-tuned ones another.
pub(super) fn fingerprint<M: VisitLora>(model: &M, paths: &[&str]) -> String {
    let mut hash: u64 = 0xcbf2_9ce4_8422_2325;
    let mut add = |bytes: &[u8]| {
        for byte in bytes {
            hash = (hash ^ u64::from(*byte)).wrapping_mul(0x100_0000_01b3);
        }
    };
    model.visit_lora("", &mut |path, layer| {
        if !paths.contains(&path) {
            return;
        }
        let weight = layer.weight().without_autodiff();
        let [rows, columns] = weight.dims();
        add(path.as_bytes());
        for size in [rows, columns] {
            add(&(size as u64).to_le_bytes());
        }
        let device = weight.device();
        let spread = |size: usize, most: usize| {
            let count = size.min(most);
            let places: Vec<i32> = (0..count).map(|i| (i * size / count) as i32).collect();
            Tensor::<1, Int>::from_data(TensorData::new(places, [count]), &device)
        };
        let some = weight.select(0, spread(rows, ROWS)).select(1, spread(columns, COLUMNS));
        let values: Vec<f32> = some.cast(DType::F32).into_data().try_to_vec().unwrap_or_default();
        for value in values {
            // 0 and -0 are the same weight.
            let value = if value == 0.0 { 0.0 } else { value };
            add(&value.to_le_bytes());
        }
    });
    format!("{hash:016x}")
}
