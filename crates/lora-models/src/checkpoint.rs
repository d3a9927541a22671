//! A model on disk: a Hugging Face folder or a GGUF file.

use std::path::{Path, PathBuf};

use burn::tensor::Device;

use crate::config::DecoderConfig;
use crate::decoder::Decoder;
use crate::error::{Error, ErrorKind, Result};
use crate::gguf::{GgufFile, TokenizerParts};
use crate::hf::{
    CONFIG_FILE, GENERATION_CONFIG_FILE, SHARDS_FILE, SaveOptions, WEIGHTS_FILE, open_weights,
    read_config, save_folder_with,
};
use crate::tokenizer::{TOKENIZER_FILE, Tokenizer};
use crate::weights::{WeightDtype, WeightSource};

/// An opened model: its config and tokenizer are read, its weights are not yet.
///
/// ```no_run
/// # #[cfg(feature = "flex")] {
/// use lora_models::{Checkpoint, Sampling};
///
/// let checkpoint = Checkpoint::open("models/SmolLM2-135M-Instruct.Q4_1.gguf")?;
/// let decoder = checkpoint.decoder(&burn::tensor::Device::flex())?;
/// let prompt = checkpoint.tokenizer.encode("Once upon a time")?;
/// let answer = decoder.generate(&prompt, 32, Sampling::greedy(), |_| {})?;
/// println!("{}", checkpoint.tokenizer.decode(&answer)?);
/// # }
/// # Ok::<(), lora_models::Error>(())
/// ```
pub struct Checkpoint {
    path: PathBuf,
    /// Sizes and switches.
    pub config: DecoderConfig,
    /// Text to ids and back, and the chat template.
    pub tokenizer: Tokenizer,
    weights: Box<dyn WeightSource>,
}

impl std::fmt::Debug for Checkpoint {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Checkpoint")
            .field("path", &self.path)
            .field("config", &self.config)
            .finish_non_exhaustive()
    }
}

impl Checkpoint {
    /// Opens a Hugging Face folder (`config.json`, `model.safetensors` or
    /// `model.safetensors.index.json` with its shards, `tokenizer.json`) or a GGUF file.
    ///
    /// # Errors
    /// When `path` is neither, or a file is missing, damaged, or asks for something that this crate
    /// does not have.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let (config, tokenizer, weights): (_, _, Box<dyn WeightSource>) = if path.is_dir() {
            check_files(path)?;
            let config = read_config(path)?;
            let tokenizer = Tokenizer::from_folder(path)?;
            (config, tokenizer, open_weights(path)?)
        } else if !path.exists() {
            return Err(not_a_model(path, "nothing"));
        } else {
            let file = GgufFile::open(path)?;
            // First, since a file of another architecture is likely to have another tokenizer too.
            let config = file.config()?;
            let parts = file.tokenizer_parts()?;
            let tokenizer = Tokenizer::new(
                parts.tokenizer,
                parts.chat_template,
                parts.bos_token,
                parts.eos_token,
            )?;
            (config, tokenizer, Box::new(file))
        };
        let ids = config.eos_token_ids.iter().chain(&config.bos_token_id);
        if let Some(id) = ids.clone().find(|id| **id as usize >= config.vocab_size) {
            let expected = format!("ids below vocab_size = {}", config.vocab_size);
            return Err(Error::malformed(
                path,
                "bos_token_id, eos_token_id",
                expected,
                id.to_string(),
            ));
        }
        let tokenizer =
            tokenizer.for_embedding(config.vocab_size).map_err(|error| match error.kind() {
                ErrorKind::Argument { what, expected, found } => {
                    Error::malformed(path, *what, expected, found)
                }
                _ => error,
            })?;
        Ok(Self { path: path.to_owned(), config, tokenizer, weights })
    }

    /// Writes a decoder of this checkpoint, with merged adapters, as a new Hugging Face folder that holds
    /// the tokenizer, its templates and the generation settings too: complete or not at all.
    ///
    /// From a folder these files are copied as they are; from a GGUF file they are made of its metadata.
    ///
    /// # Errors
    /// As [`save_folder_with`]; when a file of the tokenizer cannot be read.
    pub fn save(
        &self,
        decoder: &Decoder,
        folder: impl AsRef<Path>,
        options: &SaveOptions,
    ) -> Result<()> {
        let others = match self.path.is_dir() {
            true => copied_files(&self.path)?,
            false => tokenizer_files(&GgufFile::open(&self.path)?.tokenizer_parts()?)?,
        };
        let others: Vec<(&str, &[u8])> =
            others.iter().map(|(name, bytes)| (name.as_str(), &bytes[..])).collect();
        save_folder_with(decoder, folder, options, &others)
    }

    /// The folder or file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Reads the weights onto a device, in f32.
    ///
    /// # Errors
    /// When a tensor is missing, unused, of another shape, or cannot be read.
    pub fn decoder(&self, device: &Device) -> Result<Decoder> {
        self.decoder_as(WeightDtype::F32, device)
    }

    /// Reads the weights onto a device, in `dtype`. Beside the model, one tensor at most is in memory.
    ///
    /// # Errors
    /// As [`decoder`](Self::decoder).
    pub fn decoder_as(&self, dtype: WeightDtype, device: &Device) -> Result<Decoder> {
        Decoder::from_weights_as(&self.config, self.weights.as_ref(), dtype, device)
    }
}

/// Says which file a folder lacks, before any of them is read.
fn check_files(folder: &Path) -> Result<()> {
    let lacks = |name: &str| !folder.join(name).exists();
    for name in [CONFIG_FILE, WEIGHTS_FILE, TOKENIZER_FILE] {
        if lacks(name) && (name != WEIGHTS_FILE || lacks(SHARDS_FILE)) {
            let pickle = PICKLES.into_iter().find(|pickle| name == WEIGHTS_FILE && !lacks(pickle));
            let advice = pickle.map_or(String::new(), |pickle| {
                format!(
                    ", whose pickled weights ({pickle}) can hold programs and are not read: have them \
                     converted to safetensors"
                )
            });
            return Err(not_a_model(folder, &format!("a folder without {name}{advice}")));
        }
    }
    Ok(())
}

/// The weights of older folders.
const PICKLES: [&str; 2] = ["pytorch_model.bin", "pytorch_model.bin.index.json"];

fn not_a_model(path: &Path, found: &str) -> Error {
    ErrorKind::NotAModel { path: path.to_owned(), found: found.to_owned() }.into()
}

/// What belongs to a model beside its weights and its config, as far as a folder has it.
const OTHER_FILES: [&str; 10] = [
    TOKENIZER_FILE,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "chat_template.json",
    GENERATION_CONFIG_FILE,
];

fn copied_files(folder: &Path) -> Result<Vec<(String, Vec<u8>)>> {
    let there = OTHER_FILES.iter().map(|name| (name, folder.join(name)));
    let there = there.filter(|(_, path)| path.exists());
    there
        .map(|(name, path)| {
            let bytes = std::fs::read(&path).map_err(|source| Error::io(&path, source))?;
            Ok(((*name).to_owned(), bytes))
        })
        .collect()
}

fn tokenizer_files(parts: &TokenizerParts) -> Result<Vec<(String, Vec<u8>)>> {
    let tokenizer = parts.tokenizer.to_string(true).map_err(|source| ErrorKind::Tokenizer {
        place: TOKENIZER_FILE.to_owned(),
        reason: source.to_string(),
    })?;
    let config = serde_json::json!({
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": parts.bos_token,
        "eos_token": parts.eos_token,
        "chat_template": parts.chat_template,
        "clean_up_tokenization_spaces": false,
    });
    let config = format!("{config:#}");
    Ok(vec![
        (TOKENIZER_FILE.to_owned(), tokenizer.into_bytes()),
        ("tokenizer_config.json".to_owned(), config.into_bytes()),
    ])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_unknown_architecture_is_told_before_an_unknown_tokenizer() {
        let text = |text: &str| [&(text.len() as u64).to_le_bytes(), text.as_bytes()].concat();
        let keys = [
            ("general.architecture", "mamba"),
            ("tokenizer.ggml.model", "gpt2"),
            ("tokenizer.ggml.pre", "abacus"),
        ];
        // The format's version, no tensors, the keys with their type: text.
        let mut bytes = [&b"GGUF"[..], &3_u32.to_le_bytes(), &0_u64.to_le_bytes()].concat();
        bytes.extend((keys.len() as u64).to_le_bytes());
        for (key, value) in keys {
            bytes.extend([text(key), 8_u32.to_le_bytes().to_vec(), text(value)].concat());
        }
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("model.gguf");
        std::fs::write(&path, bytes).unwrap();
        let message = Checkpoint::open(path).unwrap_err().to_string();
        assert!(message.contains("'mamba'") && !message.contains("abacus"), "{message}");
    }
}
