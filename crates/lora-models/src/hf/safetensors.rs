//! `model.safetensors`, read tensor by tensor.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use half::{bf16, f16};
use safetensors::tensor::{Dtype, Metadata, TensorInfo};

use crate::error::{Error, Result};
use crate::weights::{HostTensor, HostValues, WeightDtype, WeightSource};

/// A safetensors file of f32, f16 or bf16 tensors. Only its header is held in memory.
#[derive(Debug)]
pub struct SafetensorsFile {
    path: PathBuf,
    file: Mutex<File>,
    metadata: Metadata,
    data_start: u64,
}

/// Longest header that is read, the format's own limit.
const MAX_HEADER_BYTES: u64 = 100_000_000;

impl SafetensorsFile {
    /// Opens a file and reads its header.
    ///
    /// # Errors
    /// When the file cannot be read, is no safetensors file, or is shorter than its header says.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let io = |source| Error::io(path, source);
        let mut file = File::open(path).map_err(io)?;
        let file_bytes = file.metadata().map_err(io)?.len();
        let damaged = |place: &str, expected: &str, found: String| {
            Error::malformed(path, place, expected, found)
        };
        if file_bytes < 8 {
            let found = format!("{file_bytes} bytes in all");
            return Err(damaged("header", "8 bytes with its length", found));
        }
        let mut length = [0; 8];
        file.read_exact(&mut length).map_err(io)?;
        let header_bytes = u64::from_le_bytes(length);
        if header_bytes > MAX_HEADER_BYTES.min(file_bytes - 8) {
            let expected = "a header inside the file; is the file complete?";
            return Err(damaged("header", expected, format!("a length of {header_bytes} bytes")));
        }
        let mut header = vec![0; header_bytes as usize];
        file.read_exact(&mut header).map_err(io)?;
        let metadata: Metadata = serde_json::from_slice(&header).map_err(|source| {
            damaged(
                "header",
                "a safetensors header; download the file again",
                format!("an error: {source}"),
            )
        })?;

        let data_start = 8 + header_bytes;
        // A header may name any size, and fit itself.
        let expected_bytes = data_start.saturating_add(metadata.data_len() as u64);
        if file_bytes != expected_bytes {
            let expected = format!("{expected_bytes} bytes; is the file complete?");
            return Err(damaged("length", &expected, format!("{file_bytes} bytes")));
        }
        Ok(Self { path: path.to_owned(), file: Mutex::new(file), metadata, data_start })
    }

    fn info(&self, name: &str) -> Result<&TensorInfo> {
        self.metadata.info(name).ok_or_else(|| {
            Error::malformed(&self.path, format!("tensor '{name}'"), "a tensor", "no such tensor")
        })
    }
}

impl WeightSource for SafetensorsFile {
    fn path(&self) -> &Path {
        &self.path
    }

    fn names(&self) -> Vec<String> {
        let mut names: Vec<String> = self.metadata.tensors().into_keys().collect();
        names.sort_unstable();
        names
    }

    fn shape(&self, name: &str) -> Option<Vec<usize>> {
        self.metadata.info(name).map(|info| info.shape.clone())
    }

    fn read_as(&self, name: &str, dtype: WeightDtype) -> Result<HostTensor> {
        let info = self.info(name)?;
        let count = info.shape.iter().product();
        let values: HostValues = match (info.dtype, dtype) {
            (Dtype::F32, WeightDtype::F32) => self.values(info, count, f32::from_le_bytes)?.into(),
            (Dtype::F16, WeightDtype::F16) => self.values(info, count, f16::from_le_bytes)?.into(),
            (Dtype::BF16, WeightDtype::BF16) => {
                self.values(info, count, bf16::from_le_bytes)?.into()
            }
            (Dtype::F32, dtype) => self.rounded(info, count, dtype, f32::from_le_bytes)?,
            (Dtype::F16, dtype) => {
                self.rounded(info, count, dtype, |bytes| f16::from_le_bytes(bytes).to_f32())?
            }
            (Dtype::BF16, dtype) => {
                self.rounded(info, count, dtype, |bytes| bf16::from_le_bytes(bytes).to_f32())?
            }
            (other, _) => {
                let what = format!("the type of tensor '{name}'");
                let found = format!("{other:?}");
                return Err(Error::unsupported(&self.path, what, found, "F32, F16, BF16"));
            }
        };
        Ok(HostTensor::new(info.shape.clone(), values))
    }
}

/// Bytes that are read at once: small beside a tensor, so that a tensor is never held twice.
const CHUNK_BYTES: usize = 1 << 20;

impl SafetensorsFile {
    /// A tensor's values, each from its `N` bytes.
    fn values<const N: usize, T>(
        &self,
        info: &TensorInfo,
        count: usize,
        from_bytes: impl Fn([u8; N]) -> T,
    ) -> Result<Vec<T>> {
        let (start, end) = info.data_offsets;
        let mut values = Vec::with_capacity(count);
        let mut buffer = vec![0; CHUNK_BYTES.min(end - start)];
        // A reader that panicked leaves a file position behind, which the seek replaces.
        let mut file = self.file.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        let io = |source| Error::io(&self.path, source);
        file.seek(SeekFrom::Start(self.data_start + start as u64)).map_err(io)?;
        let mut left = end - start;
        while left > 0 {
            let chunk = left.min(CHUNK_BYTES);
            file.read_exact(&mut buffer[..chunk]).map_err(io)?;
            let (whole, _) = buffer[..chunk].as_chunks::<N>();
            values.extend(whole.iter().map(|bytes| from_bytes(*bytes)));
            left -= chunk;
        }
        Ok(values)
    }

    /// The same, rounded to `dtype`.
    fn rounded<const N: usize>(
        &self,
        info: &TensorInfo,
        count: usize,
        dtype: WeightDtype,
        from_bytes: impl Fn([u8; N]) -> f32,
    ) -> Result<HostValues> {
        Ok(match dtype {
            WeightDtype::F32 => self.values(info, count, from_bytes)?.into(),
            WeightDtype::F16 => {
                self.values(info, count, |bytes| f16::from_f32(from_bytes(bytes)))?.into()
            }
            WeightDtype::BF16 => {
                self.values(info, count, |bytes| bf16::from_f32(from_bytes(bytes)))?.into()
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use safetensors::tensor::TensorView;

    fn valid_file() -> Vec<u8> {
        let (f32s, halves) = (1.5f32.to_le_bytes(), half::f16::from_f32(-2.0).to_le_bytes());
        let bf16 = half::bf16::from_f32(0.25).to_le_bytes();
        let view = |dtype, bytes| TensorView::new(dtype, vec![1], bytes).unwrap();
        let tensors = [
            ("a", view(Dtype::F32, &f32s[..])),
            ("b", view(Dtype::F16, &halves[..])),
            ("c", view(Dtype::BF16, &bf16[..])),
            ("d", view(Dtype::U8, &[7][..])),
        ];
        safetensors::serialize(tensors, None).unwrap()
    }

    fn open(bytes: &[u8]) -> Result<SafetensorsFile> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("model.safetensors");
        fs::write(&path, bytes).unwrap();
        SafetensorsFile::open(path)
    }

    #[test]
    fn the_three_float_types_are_read_and_others_refused() {
        let file = open(&valid_file()).unwrap();
        assert_eq!(file.names(), ["a", "b", "c", "d"]);
        for (name, value) in [("a", 1.5), ("b", -2.0), ("c", 0.25)] {
            for dtype in [WeightDtype::F32, WeightDtype::F16, WeightDtype::BF16] {
                let tensor = file.read_as(name, dtype).unwrap();
                assert_eq!(tensor.shape, [1]);
                assert_eq!((tensor.values.dtype(), tensor.values.to_f32()), (dtype, vec![value]));
            }
        }
        assert!(file.read("d").unwrap_err().to_string().contains("U8"));
        assert!(file.read("e").is_err());
    }

    #[test]
    fn a_tensor_of_almost_all_there_is_is_refused() {
        let size = u64::MAX;
        let header = format!(
            r#"{{"a": {{"dtype": "U8", "shape": [{size}], "data_offsets": [0, {size}]}}}}"#
        );
        let length = (header.len() as u64).to_le_bytes();
        let error = open(&[&length, header.as_bytes()].concat()).unwrap_err().to_string();
        assert!(error.contains("model.safetensors"), "{error}");
    }

    #[test]
    fn a_file_cut_short_at_any_byte_is_an_error() {
        let bytes = valid_file();
        for length in 0..bytes.len() {
            assert!(open(&bytes[..length]).is_err(), "{length} of {} bytes", bytes.len());
        }
    }

    #[test]
    fn a_file_with_any_byte_flipped_never_panics() {
        let bytes = valid_file();
        for index in 0..bytes.len() {
            let mut damaged = bytes.clone();
            damaged[index] ^= 0xFF;
            if let Ok(file) = open(&damaged) {
                for name in file.names() {
                    let _ = file.read(&name);
                }
            }
        }
    }
}
