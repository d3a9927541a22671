//! Where the weights of a decoder are put.

#[cfg(feature = "flex")]
use std::cell::RefCell;

use burn::tensor::{Device, TensorData};
#[cfg(feature = "flex")]
use lora_flex::WeightMemory;

use crate::weights::{HostTensor, HostValues, each_type, transpose};

/// What takes the tensors of one decoder: large pages on Flex, and what Burn allocates elsewhere.
pub(crate) struct Memory {
    #[cfg(feature = "flex")]
    pages: Option<RefCell<WeightMemory>>,
}

/// A model of fewer bytes fits into the caches of many processors, and a tensor more beside it counts: on large
/// pages each is there twice while it is put in its place.
#[cfg(feature = "flex")]
const SMALL: usize = 128 << 20;

impl Memory {
    /// For a model of `size` bytes in all.
    pub(crate) fn of(size: usize, device: &Device) -> Self {
        #[cfg(feature = "flex")]
        {
            // Equal whether with autodiff or without.
            let are_large = *device == Device::flex() && size >= SMALL;
            Self { pages: are_large.then(|| RefCell::new(WeightMemory::for_size(size))) }
        }
        #[cfg(not(feature = "flex"))]
        {
            let _ = (size, device);
            Self {}
        }
    }

    /// Whether a tensor is copied to its place.
    pub(crate) fn copies(&self) -> bool {
        #[cfg(feature = "flex")]
        let copies = self.pages.is_some();
        #[cfg(not(feature = "flex"))]
        let copies = false;
        copies
    }

    /// As Burn takes it.
    pub(crate) fn data(&self, tensor: HostTensor) -> TensorData {
        #[cfg(feature = "flex")]
        if let Some(pages) = &self.pages {
            let dtype = tensor.values.dtype().dtype();
            let bytes = each_type!(tensor.values, values => {
                pages.borrow_mut().place(values.len(), |place| place.copy_from_slice(&values))
            });
            return TensorData::from_bytes(bytes, tensor.shape, dtype);
        }
        tensor.into_data()
    }

    /// A tensor `[rows, columns]` as `[columns, rows]`.
    pub(crate) fn transposed(&self, tensor: HostTensor) -> TensorData {
        let [rows, columns] = [tensor.shape[0], tensor.shape[1]];
        #[cfg(feature = "flex")]
        if let Some(pages) = &self.pages {
            let dtype = tensor.values.dtype().dtype();
            let bytes = each_type!(tensor.values, values => {
                let turn = |place: &mut [_]| transpose(&values, [rows, columns], place);
                pages.borrow_mut().place(values.len(), turn)
            });
            return TensorData::from_bytes(bytes, [columns, rows], dtype);
        }
        each_type!(tensor.values, values => {
            let mut turned = vec![Default::default(); values.len()];
            transpose(&values, [rows, columns], &mut turned);
            TensorData::new(turned, [columns, rows])
        })
    }
}

#[cfg(all(test, feature = "flex"))]
mod tests {
    use super::*;
    use crate::weights::WeightDtype;

    #[test]
    fn on_large_pages_the_values_are_those_that_burn_would_hold() {
        let device = Device::flex();
        let (pages, plain) = (Memory::of(SMALL, &device), Memory::of(SMALL - 1, &device));
        assert!(pages.copies() && !plain.copies());
        assert!(Memory::of(SMALL, &device.autodiff()).copies());
        for dtype in [WeightDtype::F32, WeightDtype::BF16, WeightDtype::F16] {
            for [rows, columns] in [[3, 5], [331, 257], [1, 40_001], [0, 4]] {
                let values: Vec<f32> = (0..rows * columns).map(|value| value as f32).collect();
                let values = HostValues::from(values).cast(dtype);
                let tensor = || HostTensor { shape: vec![rows, columns], values: values.clone() };
                assert_eq!(pages.data(tensor()), plain.data(tensor()));
                let [turned, expected] = [&pages, &plain].map(|memory| memory.transposed(tensor()));
                assert_eq!(turned, expected);
                assert_eq!(turned.shape()[..], [columns, rows]);
            }
        }
    }
}
