//! An open GGUF file: its keys at once, its tensors' bytes when asked for.

use std::collections::BTreeMap;
use std::fmt;
use std::fs::File;
use std::io::{BufReader, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use super::blocks::BlockType;
use super::header::{Header, TensorInfo};
use super::names::{self, Expert, Naming, Rows};
use super::value::Value;
use crate::config::MOST_EXPERTS;
use crate::error::{Error, Result};
use crate::family::ExpertNames;

/// llama.cpp's tensor of factors by which the rotary frequencies are divided (Llama 3.1 and later).
pub(super) const ROPE_FREQS: &str = "rope_freqs.weight";

/// Most tensors that tensors of all experts are taken apart into, so that a file made to harm cannot fill the memory
/// with names: three projections of each expert.
const MOST_SPLIT: usize = 3 * MOST_EXPERTS;

/// How many values are unpacked at a time: whole blocks of every type, in a buffer that stays in a cache.
const PIECE: usize = 1 << 16;

/// A GGUF file, seen as a Hugging Face checkpoint through [`WeightSource`](crate::WeightSource).
///
/// Opening reads the header alone; each tensor's bytes are read when the tensor is asked for.
///
/// Tensors have the names and the layout of the Hugging Face checkpoint. A tensor for which no such
/// name is known keeps llama.cpp's, so that a loader reports it as unused.
///
/// # Examples
/// ```no_run
/// use lora_models::{GgufFile, WeightSource};
///
/// # fn main() -> Result<(), lora_models::Error> {
/// let file = GgufFile::open("models/SmolLM2-135M-Instruct.Q4_1.gguf")?;
/// let config = file.config()?;
/// let embedding = file.read("model.embed_tokens.weight")?;
/// assert_eq!(embedding.shape, [config.vocab_size, config.hidden_size]);
/// # Ok(())
/// # }
/// ```
pub struct GgufFile {
    path: PathBuf,
    // Behind a lock, since a seek and the read after it must stay together.
    file: Mutex<File>,
    version: u32,
    metadata: BTreeMap<String, Value>,
    /// Under Hugging Face's names.
    tensors: BTreeMap<String, Tensor>,
    /// Tensors of single experts.
    split: usize,
}

/// A tensor of the file.
#[derive(Debug)]
pub(super) struct Tensor {
    /// llama.cpp's name, which the user finds in other tools.
    pub(super) gguf_name: String,
    pub(super) rows: Rows,
    pub(super) info: TensorInfo,
}

impl GgufFile {
    /// Opens a file, and reads and checks its header.
    ///
    /// # Errors
    /// When the file cannot be read, is truncated or otherwise malformed, is of an unknown version,
    /// or has a tensor of a type that ggml did not have when this was written. A model that this
    /// crate cannot run opens all the same: [`config`](Self::config) says so.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let io = |source| Error::io(path, source);
        let mut file = File::open(path).map_err(io)?;
        let file_bytes = file.metadata().map_err(io)?.len();
        let header = Header::parse(BufReader::new(&mut file), file_bytes, path)?;

        let mut opened = Self {
            path: path.to_owned(),
            file: Mutex::new(file),
            version: header.version,
            metadata: header.metadata,
            tensors: BTreeMap::new(),
            split: 0,
        };
        let experts = opened.expert_names();
        for (gguf_name, info) in header.tensors {
            // Factors of one change nothing, and Hugging Face has no such tensor. Others stay among
            // the names, so that nobody runs the model without them and never hears of it.
            if gguf_name == ROPE_FREQS && opened.is_all_ones(&info)? {
                continue;
            }
            opened.name(gguf_name, info, experts)?;
        }
        Ok(opened)
    }

    /// The version of the format that the file was written in.
    pub fn version(&self) -> u32 {
        self.version
    }

    /// Every key with its value.
    pub fn metadata(&self) -> &BTreeMap<String, Value> {
        &self.metadata
    }

    /// The string under `key`, or `None` when the file has no such key.
    ///
    /// # Errors
    /// When the value is not a string.
    pub fn string(&self, key: &str) -> Result<Option<&str>> {
        self.get(key, "a string", Value::as_str)
    }

    /// The truth value under `key`, or `None` when the file has no such key.
    ///
    /// # Errors
    /// When the value is not a truth value.
    pub fn bool(&self, key: &str) -> Result<Option<bool>> {
        self.get(key, "true or false", Value::as_bool)
    }

    /// The integer under `key`, of whatever width, or `None` when the file has no such key.
    ///
    /// # Errors
    /// When the value is not an integer from 0 to 2^32 - 1.
    pub fn u32(&self, key: &str) -> Result<Option<u32>> {
        self.get(key, "an integer from 0 to 4294967295", |value| value.as_u64()?.try_into().ok())
    }

    /// The floating point number under `key`, or `None` when the file has no such key.
    ///
    /// # Errors
    /// When the value is not a floating point number.
    pub fn f64(&self, key: &str) -> Result<Option<f64>> {
        self.get(key, "a floating point number", Value::as_f64)
    }

    /// The array of strings under `key`, or `None` when the file has no such key.
    ///
    /// # Errors
    /// When the value is not an array of strings.
    pub fn strings(&self, key: &str) -> Result<Option<Vec<&str>>> {
        self.get(key, "an array of strings", |value| {
            value.as_array()?.iter().map(Value::as_str).collect()
        })
    }

    /// The array of integers under `key`, or `None` when the file has no such key.
    ///
    /// # Errors
    /// When the value is not an array of integers from 0 to 2^32 - 1.
    pub fn u32s(&self, key: &str) -> Result<Option<Vec<u32>>> {
        self.get(key, "an array of integers from 0 to 4294967295", |value| {
            value.as_array()?.iter().map(|value| value.as_u64()?.try_into().ok()).collect()
        })
    }

    /// The array of 32-bit floating point numbers under `key`, or `None` when the file has no such key.
    ///
    /// # Errors
    /// When the value is not an array of 32-bit floating point numbers.
    pub fn f32s(&self, key: &str) -> Result<Option<Vec<f32>>> {
        self.get(key, "an array of 32-bit floating point numbers", |value| {
            let number = |value: &Value| match *value {
                Value::F32(number) => Some(number),
                _ => None,
            };
            value.as_array()?.iter().map(number).collect()
        })
    }

    /// What `cast` makes of the value under `key`; `expected` says what it asks for.
    fn get<'a, T>(
        &'a self,
        key: &str,
        expected: &str,
        cast: impl Fn(&'a Value) -> Option<T>,
    ) -> Result<Option<T>> {
        let Some(value) = self.metadata.get(key) else {
            return Ok(None);
        };
        match cast(value) {
            Some(value) => Ok(Some(value)),
            None => Err(self.malformed_key(key, expected, value.describe())),
        }
    }

    /// Turns the absence of a key into an error.
    pub(super) fn required<T>(&self, key: &str, value: Option<T>) -> Result<T> {
        value.ok_or_else(|| self.malformed_key(key, "this key", "none"))
    }

    pub(super) fn malformed_key(
        &self,
        key: &str,
        expected: impl Into<String>,
        found: impl Into<String>,
    ) -> Error {
        Error::malformed(&self.path, format!("key '{key}'"), expected, found)
    }

    /// The tensors under Hugging Face's names.
    pub(super) fn tensors(&self) -> &BTreeMap<String, Tensor> {
        &self.tensors
    }

    pub(super) fn file_path(&self) -> &Path {
        &self.path
    }

    /// The values of one part of a tensor along its outermost axis.
    pub(super) fn part(&self, name: &str, number: usize) -> Result<Vec<f32>> {
        let tensor = &self.tensors[name];
        self.values(&tensor.gguf_name, &tensor.info.part(number))
    }

    /// The values of a tensor in the file's own order of rows.
    pub(super) fn values(&self, gguf_name: &str, info: &TensorInfo) -> Result<Vec<f32>> {
        let mut values = Vec::with_capacity(info.shape.iter().product());
        self.each_piece(gguf_name, info, |piece| values.extend_from_slice(piece))?;
        Ok(values)
    }

    /// Hands the values of a tensor to `take`, [`PIECE`] at a time and in the file's own order of rows, so
    /// that whoever wants them in another form never holds all of them packed, or as f32.
    pub(super) fn each_piece(
        &self,
        gguf_name: &str,
        info: &TensorInfo,
        mut take: impl FnMut(&[f32]),
    ) -> Result<()> {
        let block_type = info.block_type;
        let decode = block_type.decoder().ok_or_else(|| {
            let what = format!("tensor '{gguf_name}' of the type");
            Error::unsupported(&self.path, what, block_type.name, BlockType::readable())
        })?;
        let BlockType { block_bytes, block_len, .. } = *block_type;
        let n_blocks = info.n_bytes / block_bytes;
        let at_once = n_blocks.min(PIECE / block_len); // not 0: the header's check lets no empty tensor in
        let mut bytes = vec![0; at_once * block_bytes];
        let mut values = vec![0.0; at_once * block_len];
        for first in (0..n_blocks).step_by(at_once) {
            let n = at_once.min(n_blocks - first);
            let (bytes, values) = (&mut bytes[..n * block_bytes], &mut values[..n * block_len]);
            self.read_at(info.offset + (first * block_bytes) as u64, bytes)?;
            decode(bytes, values);
            take(values);
        }
        Ok(())
    }

    fn read_at(&self, offset: u64, bytes: &mut [u8]) -> Result<()> {
        // A thread that panicked while it held the lock leaves nothing half done: we seek anyway.
        let mut file = self.file.lock().unwrap_or_else(PoisonError::into_inner);
        file.seek(SeekFrom::Start(offset))
            .and_then(|_| file.read_exact(bytes))
            .map_err(|source| Error::io(&self.path, source))
    }

    fn is_all_ones(&self, info: &TensorInfo) -> Result<bool> {
        Ok(self.values(ROPE_FREQS, info)?.iter().all(|&value| value == 1.0))
    }

    /// Files a tensor under its Hugging Face name; one that holds a projection of all experts, as one of each.
    fn name(
        &mut self,
        gguf_name: String,
        info: TensorInfo,
        experts: Option<ExpertNames>,
    ) -> Result<()> {
        // Some tools write Hugging Face's names into GGUF files. Whether they also reorder the rows
        // of q and k cannot be told, so they are refused rather than guessed at.
        if gguf_name.starts_with("model.") || gguf_name.starts_with("lm_head.") {
            let supported = "llama.cpp's names, such as 'blk.0.attn_q.weight'";
            return Err(Error::unsupported(&self.path, "tensor name", gguf_name, supported));
        }
        let naming = names::hugging_face(&gguf_name, experts);
        let naming = naming.unwrap_or_else(|| Naming::of_any(gguf_name.clone(), Rows::Other));
        let Naming { name, rows, expert } = &naming;
        if *expert != Expert::All {
            self.tensors.insert(name.clone(), Tensor { gguf_name, rows: *rows, info });
            return Ok(());
        }
        let count = self.expert_count()?;
        let has_each = info.shape.len() > 1 && info.shape[0] == count;
        self.split += count;
        if !has_each || self.split > MOST_SPLIT {
            // Under its own name, where `config` finds it.
            self.tensors.insert(gguf_name.clone(), Tensor { gguf_name, rows: *rows, info });
            return Ok(());
        }
        for number in 0..count {
            let tensor =
                Tensor { gguf_name: gguf_name.clone(), rows: *rows, info: info.part(number) };
            self.tensors.insert(naming.of_expert(number), tensor);
        }
        Ok(())
    }
}

impl fmt::Debug for GgufFile {
    // The keys hold a whole vocabulary, which nobody wants to see in a message.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("GgufFile")
            .field("path", &self.path)
            .field("version", &self.version)
            .field("keys", &self.metadata.len())
            .field("tensors", &self.tensors.len())
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gguf::writer::Writer;

    fn open(writer: Writer) -> Result<GgufFile> {
        GgufFile::open(writer.write().path())
    }

    #[test]
    fn a_getter_answers_none_for_an_absent_key_and_names_a_mistyped_one() {
        let file = open(Writer::new().key("word", "a").key("negative", -1_i32)).unwrap();
        assert_eq!(file.string("word").unwrap(), Some("a"));
        assert_eq!(file.string("absent").unwrap(), None);
        let error = file.u32("word").unwrap_err().to_string();
        assert!(error.contains("key 'word'") && error.contains("the string 'a'"), "{error}");
        let error = file.u32("negative").unwrap_err().to_string();
        assert!(error.contains("found -1"), "{error}");
        let error = file.required("absent", None::<u32>).unwrap_err().to_string();
        assert!(error.contains("key 'absent'"), "{error}");
    }

    #[test]
    fn arrays_are_read_whole_or_refused() {
        let file = open(
            Writer::new()
                .key("words", ["a", "b"])
                .key("numbers", [3_i32, 4])
                .key("negative", [3_i32, -4])
                .key("fractions", [0.5_f32, -1.0]),
        )
        .unwrap();
        assert_eq!(file.strings("words").unwrap(), Some(vec!["a", "b"]));
        assert_eq!(file.u32s("numbers").unwrap(), Some(vec![3, 4]));
        assert_eq!(file.f32s("fractions").unwrap(), Some(vec![0.5, -1.0]));
        assert!(file.f32s("numbers").is_err());
        assert!(file.u32s("words").is_err());
        assert!(file.u32s("negative").is_err());
        assert!(file.strings("numbers").is_err());
    }

    #[test]
    fn a_tensor_comes_in_pieces_of_whole_blocks() {
        // 2 * 32 * 1025 values of Q8_0: one piece of 65536 and one of 64. A block's scale is 1; its bytes
        // are the block's number, modulo 101.
        let blocks = 2 * 1025;
        let bytes: Vec<u8> = (0..blocks)
            .flat_map(|block| [[0x00, 0x3c].as_slice(), &[(block % 101) as u8; 32]].concat())
            .collect();
        let file = open(Writer::new().tensor("t", 8, &[2, 32 * 1025], &bytes)).unwrap();
        let info = &file.tensors()["t"].info;
        let (mut sizes, mut values) = (Vec::new(), Vec::new());
        file.each_piece("t", info, |piece| {
            sizes.push(piece.len());
            values.extend_from_slice(piece);
        })
        .unwrap();
        assert_eq!(sizes, [PIECE, 64]);
        let expected: Vec<f32> = (0..blocks).flat_map(|block| [(block % 101) as f32; 32]).collect();
        assert_eq!(values, expected);
        assert_eq!(file.values("t", info).unwrap(), expected);
    }

    #[test]
    fn tensors_already_in_hugging_face_names_are_refused() {
        let writer = Writer::new().f32s("model.norm.weight", &[1], &[1.0]);
        let error = open(writer).unwrap_err().to_string();
        assert!(error.contains("tensor name 'model.norm.weight' is not supported"), "{error}");
    }

    #[test]
    fn the_debug_form_is_short() {
        let file = open(Writer::new().key("word", "a").f32s("t", &[1], &[1.0])).unwrap();
        let text = format!("{file:?}");
        assert!(text.contains("keys: 1, tensors: 1"), "{text}");
    }
}
