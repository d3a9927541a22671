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

/// A model of fewer bytes fits into the caches of many processors, and a tensor more beside it counts: on large pages
/// each is there twice while it is put in its place.
#[cfg(feature = "flex")]
const SMALL: usize = 128 << 20;

impl Memory {
    /// For a model of `size` bytes in all.
    pub(crate) fn of(size: usize, device: &Device) -> Self {
        #[cfg(feature = "flex")]
        {
            let is_flex = [Device::flex(), Device::flex().autodiff()].contains(device);
            let pages = || RefCell::new(WeightMemory::for_size(size));
            Self { pages: (is_flex && size >= SMALL).then(pages) }
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
