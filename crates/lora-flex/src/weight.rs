//! Types of weights, as the kernels of this crate read them.

use burn::backend::Flex;
use burn::backend::ops::FloatTensorOps;
use burn::tensor::{Element, Shape, TensorData};
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
use pulp::Simd;

use crate::FlexTensor;

/// A type of weights, as the kernels read it: in words of one f32 or of two halves.
///
/// A vector of words becomes two vectors of f32, of the first and of the second value in each word, so that
/// nothing has to be moved between lanes; an f32 word has no second. Outputs and x are in the same
/// order meanwhile, first values before second ones.
pub(crate) trait Weight: Element + Copy + Send + Sync + bytemuck::Pod {
    /// 1 or 2.
    const PER_WORD: usize;

    fn widen(self) -> f32;
    fn round(value: f32) -> Self;
    fn split<S: Simd>(simd: S, words: S::u32s) -> [S::f32s; 2];
    fn widen_all(values: &[Self], wide: &mut [f32]);
    fn round_all(wide: &[f32], values: &mut [Self]);
}

impl Weight for f32 {
    const PER_WORD: usize = 1;

    fn widen(self) -> f32 {
        self
    }

    fn round(value: f32) -> Self {
        value
    }

    #[inline(always)]
    fn split<S: Simd>(simd: S, words: S::u32s) -> [S::f32s; 2] {
        [simd.transmute_f32s_u32s(words), simd.splat_f32s(0.0)]
    }

    fn widen_all(values: &[Self], wide: &mut [f32]) {
        wide.copy_from_slice(values);
    }

    fn round_all(wide: &[f32], values: &mut [Self]) {
        values.copy_from_slice(wide);
    }
}

impl Weight for bf16 {
    const PER_WORD: usize = 2;

    fn widen(self) -> f32 {
        self.to_f32()
    }

    fn round(value: f32) -> Self {
        Self::from_f32(value)
    }

    /// bf16 is the upper half of an f32.
    #[inline(always)]
    fn split<S: Simd>(simd: S, words: S::u32s) -> [S::f32s; 2] {
        let first = simd.wrapping_dyn_shl_u32s(words, simd.splat_u32s(16));
        let second = simd.and_u32s(words, simd.splat_u32s(0xffff_0000));
        [simd.transmute_f32s_u32s(first), simd.transmute_f32s_u32s(second)]
    }

    fn widen_all(values: &[Self], wide: &mut [f32]) {
        values.convert_to_f32_slice(wide);
    }

    fn round_all(wide: &[f32], values: &mut [Self]) {
        values.convert_from_f32_slice(wide);
    }
}

impl Weight for f16 {
    const PER_WORD: usize = 2;

    fn widen(self) -> f32 {
        self.to_f32()
    }

    fn round(value: f32) -> Self {
        Self::from_f32(value)
    }

    #[inline(always)]
    fn split<S: Simd>(simd: S, words: S::u32s) -> [S::f32s; 2] {
        let second = simd.wrapping_dyn_shr_u32s(words, simd.splat_u32s(16));
        [widened_halves(simd, words), widened_halves(simd, second)]
    }

    fn widen_all(values: &[Self], wide: &mut [f32]) {
        values.convert_to_f32_slice(wide);
    }

    fn round_all(wide: &[f32], values: &mut [Self]) {
        values.convert_from_f32_slice(wide);
    }
}

/// The f16 in the lower half of each word.
#[inline(always)]
fn widened_halves<S: Simd>(simd: S, words: S::u32s) -> S::f32s {
    let masked = |mask| simd.and_u32s(words, simd.splat_u32s(mask));
    let shifted = |words, by| simd.wrapping_dyn_shl_u32s(words, simd.splat_u32s(by));
    let magnitude = simd.transmute_f32s_u32s(shifted(masked(0x7fff), 13));
    // 2^112 moves the exponent from f16's place to f32's, and makes normal numbers of the subnormal.
    let scaled = simd.mul_f32s(magnitude, simd.splat_f32s(f32::from_bits(0x7780_0000)));
    // The largest exponent stands for infinity and NaN, here as there.
    let exponent = simd.splat_u32s(0x7c00);
    let is_special = simd.equal_u32s(masked(0x7c00), exponent);
    let special = simd.select_u32s(is_special, simd.splat_u32s(0x7f80_0000), simd.splat_u32s(0));
    let sign = shifted(masked(0x8000), 16);
    let bits = simd.or_u32s(simd.transmute_u32s_f32s(scaled), simd.or_u32s(special, sign));
    simd.transmute_f32s_u32s(bits)
}

/// The values of a tensor without gaps, in their order; `None` for one with gaps or of another type.
pub(crate) fn values_of<T: Weight>(tensor: &FlexTensor) -> Option<&[T]> {
    let layout = tensor.layout();
    if tensor.dtype() != T::dtype() || !tensor.is_contiguous() {
        return None;
    }
    tensor.storage::<T>().get(layout.start_offset()..)?.get(..layout.num_elements())
}

/// The words that a tensor without gaps takes up, in the order in which they are stored; `None` where it
/// begins within one.
pub(crate) fn words_of<T: Weight>(tensor: &FlexTensor) -> Option<&[u32]> {
    let layout = tensor.layout();
    let values =
        tensor.storage::<T>().get(layout.start_offset()..)?.get(..layout.num_elements())?;
    bytemuck::try_cast_slice(values).ok()
}

/// A tensor of these values.
pub(crate) fn tensor_of<T: Weight>(values: Vec<T>, shape: impl Into<Shape>) -> FlexTensor {
    Flex::float_from_data(TensorData::new(values, shape.into()), &Default::default())
}

/// Calls a function of one type of weights by a tensor's dtype: f32, bf16 or f16; others give `None`.
macro_rules! by_dtype {
    ($dtype:expr, $function:ident($($argument:expr),*)) => {
        match $dtype {
            burn::tensor::DType::F32 => $function::<f32>($($argument),*),
            burn::tensor::DType::BF16 => $function::<half::bf16>($($argument),*),
            burn::tensor::DType::F16 => $function::<half::f16>($($argument),*),
            _ => None,
        }
    };
}
pub(crate) use by_dtype;
