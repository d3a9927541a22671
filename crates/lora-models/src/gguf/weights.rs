//! A GGUF file as a source of weights in Hugging Face's layout.

use std::path::Path;

use half::{bf16, f16};

use super::names::Rows;
use super::reader::{GgufFile, ROPE_FREQS, Tensor};
use crate::error::{Error, Result};
use crate::weights::{HostTensor, HostValues, WeightDtype, WeightSource};

impl WeightSource for GgufFile {
    fn path(&self) -> &Path {
        self.file_path()
    }

    fn names(&self) -> Vec<String> {
        // RoPE's factors are part of the config.
        self.tensors().keys().filter(|name| *name != ROPE_FREQS).cloned().collect()
    }

    fn shape(&self, name: &str) -> Option<Vec<usize>> {
        self.tensors().get(name).map(|tensor| tensor.info.shape.clone())
    }

    fn read_as(&self, name: &str, dtype: WeightDtype) -> Result<HostTensor> {
        let tensor = self.tensors().get(name).ok_or_else(|| {
            Error::malformed(self.file_path(), format!("tensor '{name}'"), "such a tensor", "none")
        })?;
        let values: HostValues = match dtype {
            WeightDtype::F32 => self.values_as(tensor, |value| value)?.into(),
            WeightDtype::F16 => self.values_as(tensor, f16::from_f32)?.into(),
            WeightDtype::BF16 => self.values_as(tensor, bf16::from_f32)?.into(),
        };
        Ok(HostTensor::new(tensor.info.shape.clone(), values))
    }
}

impl GgufFile {
    /// The number of heads whose rows the writer of this file reordered. llama.cpp does that for the
    /// architecture `llama` alone, whose RoPE it computes on neighbouring rows.
    fn reordered_heads(&self, rows: Rows) -> Result<Option<usize>> {
        if self.architecture()? != Some("llama") {
            return Ok(None);
        }
        match rows {
            Rows::Query => self.query_heads().map(Some),
            Rows::Key => self.key_heads().map(Some),
            Rows::Other => Ok(None),
        }
    }

    /// A tensor's values in Hugging Face's order of rows, each rounded by `round`, without an f32 copy of
    /// all of them.
    fn values_as<T: Copy>(&self, tensor: &Tensor, round: impl Fn(f32) -> T) -> Result<Vec<T>> {
        let heads = self.reordered_heads(tensor.rows)?;
        let mut values = Vec::with_capacity(tensor.info.shape.iter().product());
        self.each_piece(&tensor.gguf_name, &tensor.info, |piece| {
            values.extend(piece.iter().map(|value| round(*value)));
        })?;
        match heads {
            Some(heads) => self.halved_rows(tensor, heads, &values),
            None => Ok(values),
        }
    }

    /// `data`, of the shape `[heads * head_dim, ..]`, in Hugging Face's order of rows.
    fn halved_rows<T: Copy>(&self, tensor: &Tensor, heads: usize, data: &[T]) -> Result<Vec<T>> {
        let n_rows = tensor.info.shape[0]; // the header's check lets no tensor without dimensions in
        if !n_rows.is_multiple_of(2 * heads) {
            return Err(Error::malformed(
                self.file_path(),
                format!("tensor '{}'", tensor.gguf_name),
                format!("an even number of rows for each of {heads} heads"),
                format!("{n_rows} rows"),
            ));
        }
        Ok(halved_rows(data, n_rows, n_rows / heads))
    }
}

/// Puts the rows of each head back from pairs into halves, which is where Hugging Face has them.
///
/// Within a head, row `2*i + j` of the file (`i` in `0..head_dim/2`, `j` in `0..2`) is Hugging Face's
/// row `j*head_dim/2 + i`.
///
/// # Shapes
/// `data`: `[n_rows, ..]`, row-major; `n_rows` is a multiple of `head_dim`, and `head_dim` is even.
pub(super) fn halved_rows<T: Copy>(data: &[T], n_rows: usize, head_dim: usize) -> Vec<T> {
    let width = data.len() / n_rows; // 1 for a bias
    let mut halved = Vec::with_capacity(data.len());
    for head in data.chunks_exact(head_dim * width) {
        for j in 0..2 {
            for pair in head.chunks_exact(2 * width) {
                halved.extend_from_slice(&pair[j * width..(j + 1) * width]);
            }
        }
    }
    halved
}

/// The other way: the rows of each head from halves into pairs, as llama.cpp's `permute`
/// (convert_hf_to_gguf.py) lays them: `reshape(heads, 2, head_dim/2, width)`, `swapaxes(1, 2)`.
///
/// # Shapes
/// As [`halved_rows`].
pub(super) fn paired_rows(data: &[f32], n_rows: usize, head_dim: usize) -> Vec<f32> {
    let width = data.len() / n_rows;
    let mut paired = Vec::with_capacity(data.len());
    for head in data.chunks_exact(head_dim * width) {
        let (first, second) = head.split_at(head_dim / 2 * width);
        for (one, other) in first.chunks_exact(width).zip(second.chunks_exact(width)) {
            paired.extend_from_slice(one);
            paired.extend_from_slice(other);
        }
    }
    paired
}

#[cfg(test)]
mod tests {
    use super::{halved_rows, paired_rows};

    #[test]
    fn pairs_become_halves() {
        // One head of six rows: the file has 0 3 1 4 2 5 for Hugging Face's 0 1 2 3 4 5.
        assert_eq!(halved_rows(&[0., 3., 1., 4., 2., 5.], 6, 6), [0., 1., 2., 3., 4., 5.]);
        assert_eq!(paired_rows(&[0., 1., 2., 3., 4., 5.], 6, 6), [0., 3., 1., 4., 2., 5.]);
        // Two heads of four rows, two columns.
        let file: Vec<f32> =
            [0, 2, 1, 3, 4, 6, 5, 7].iter().flat_map(|&r| [r as f32, r as f32 + 0.5]).collect();
        let hf: Vec<f32> = (0..8).flat_map(|r| [r as f32, r as f32 + 0.5]).collect();
        assert_eq!(halved_rows(&file, 8, 4), hf);
    }

    #[test]
    fn halving_undoes_llama_cpps_pairing() {
        for (heads, head_dim, width) in [(1, 2, 1), (3, 4, 5), (9, 64, 3), (2, 6, 1)] {
            let data: Vec<f32> = (0..heads * head_dim * width).map(|i| i as f32).collect();
            let paired = paired_rows(&data, heads * head_dim, head_dim);
            assert_eq!(halved_rows(&paired, heads * head_dim, head_dim), data);
        }
    }
}
