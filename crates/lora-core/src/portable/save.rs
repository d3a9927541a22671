//! One folder that every reader reads as the same function.

use std::path::Path;

use super::mlx::{MLX_FOLDER, mlx_files};
use super::rules::{Reader, check_written_for, vllm_rank};
use crate::error::{Error, Result};
use crate::layer::Adaptation;
use crate::peft::{AdapterInfo, adapter_files, write_folder};
use crate::visit::VisitLora;

/// What [`save_portable`] wrote.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PortableReport {
    /// The one rank of all adapters in the file. vLLM must be started with a `--max-lora-rank` of at
    /// least this, 16 unless it is told.
    pub rank: usize,
    /// The layers that have an adapter.
    pub layers: usize,
}

/// Writes the model's adapters as a new folder in PEFT's format that all of `readers` read as the
/// function that the model computes, as PEFT and [`load_adapter`](crate::load_adapter) do:
///
/// - the scaling of each layer is folded into its B in f32, so that alpha = rank and the factor is 1
///   whichever rule it came from (rsLoRA, other alphas and ranks of some layers);
/// - every rank is padded to one with zeros, which changes nothing: the largest, and for vLLM the next
///   of those that its `--max-lora-rank` may be (1, 8, 16, 32, 64, 128, 256, 320, 512);
/// - an adapter with an offset is written in its plain form, of twice the rank, over the original base;
/// - dropout, which acts in training only, is written as 0;
/// - `target_modules` is a list, or a pattern where names would mean more layers; `bias` is none, and no other
///   field is set.
///
/// For [`Reader::Mlx`], which reads a format of its own, the subfolder `mlx` holds the same adapters as
/// [`save_mlx_adapter`](crate::save_mlx_adapter) writes them.
///
/// # Errors
/// [`ErrorKind::NotPortable`](crate::ErrorKind::NotPortable) with every rule that cannot be met by
/// folding, as [`check_written_for`] answers; as [`save_adapter`](crate::save_adapter) besides.
/// Nothing is written then.
pub fn save_portable<M: VisitLora>(
    model: &M,
    folder: impl AsRef<Path>,
    info: &AdapterInfo,
    readers: &[Reader],
) -> Result<PortableReport> {
    check_written_for(model, readers)?;
    let ranks = plain_ranks(model);
    let Some(largest) = ranks.iter().copied().max() else {
        return Err(Error::setting("adapter", "a model with adapters", "a model without"));
    };
    let rank = match readers.contains(&Reader::Vllm) {
        true => vllm_rank(largest).unwrap_or(largest),
        false => largest,
    };
    let mut files: Vec<(String, Vec<u8>)> = Vec::new();
    for (name, bytes) in adapter_files(model, info, |adapter| adapter.into_folded(rank))? {
        files.push((name.to_owned(), bytes));
    }
    if readers.contains(&Reader::Mlx) {
        for (name, bytes) in mlx_files(model, info)? {
            files.push((format!("{MLX_FOLDER}/{name}"), bytes));
        }
    }
    let files: Vec<(&str, &[u8])> =
        files.iter().map(|(name, bytes)| (name.as_str(), bytes.as_slice())).collect();
    write_folder(folder.as_ref(), &files)?;
    Ok(PortableReport { rank, layers: ranks.len() })
}

/// The ranks of the low-rank adapters in their plain forms.
pub(super) fn plain_ranks<M: VisitLora>(model: &M) -> Vec<usize> {
    let mut ranks = Vec::new();
    model.visit_lora("", &mut |_, layer| {
        if let Some(Adaptation::LowRank(adapter)) = layer.adaptation() {
            ranks.push(adapter.into_plain().rank());
        }
    });
    ranks
}
