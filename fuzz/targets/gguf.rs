//! A GGUF file: its header, config, tokenizer and tensors.
#![no_main]

use burn_lora_fuzz::{gguf, golden, seeds, text, with_files};
use libfuzzer_sys::fuzz_target;
use lora_models::{Checkpoint, GgufFile, WeightSource};

/// A file with all the keys of a small Llama, and one of each kind of block.
fn inputs() -> Vec<Vec<u8>> {
    const U32: u32 = 4;
    const F32: u32 = 6;
    const TEXT: u32 = 8;
    const LIST: u32 = 9;

    let number = |value: u32| value.to_le_bytes().to_vec();
    let list = |kind: u32, values: Vec<Vec<u8>>| {
        let length = (values.len() as u64).to_le_bytes();
        [&kind.to_le_bytes()[..], &length, &values.concat()].concat()
    };
    let texts = |texts: &[&str]| list(TEXT, texts.iter().map(|value| text(value)).collect());
    let keys = vec![
        ("general.architecture", TEXT, text("llama")),
        ("llama.embedding_length", U32, number(32)),
        ("llama.feed_forward_length", U32, number(32)),
        ("llama.block_count", U32, number(1)),
        ("llama.attention.head_count", U32, number(2)),
        ("llama.attention.head_count_kv", U32, number(1)),
        ("llama.attention.layer_norm_rms_epsilon", F32, 1e-5f32.to_le_bytes().to_vec()),
        ("llama.rope.freq_base", F32, 1e4f32.to_le_bytes().to_vec()),
        ("llama.context_length", U32, number(16)),
        ("tokenizer.ggml.model", TEXT, text("gpt2")),
        ("tokenizer.ggml.pre", TEXT, text("smollm")),
        ("tokenizer.ggml.tokens", LIST, texts(&["a", "b", "ab", "<s>"])),
        ("tokenizer.ggml.token_type", LIST, list(U32, [1, 1, 1, 3].map(number).to_vec())),
        ("tokenizer.ggml.merges", LIST, texts(&["a b"])),
        ("tokenizer.ggml.eos_token_id", U32, number(3)),
        ("tokenizer.chat_template", TEXT, text("{{ messages[0].content }}")),
    ];
    let floats = |values: &[f32]| {
        list(F32, values.iter().map(|value| value.to_le_bytes().to_vec()).collect())
    };
    let sentence_piece = vec![
        ("tokenizer.ggml.model", TEXT, text("llama")),
        ("tokenizer.ggml.tokens", LIST, texts(&["<unk>", "<s>", "a", "b", "ab", "▁ab", "▁"])),
        ("tokenizer.ggml.token_type", LIST, list(U32, [2, 3, 1, 1, 1, 1, 1].map(number).to_vec())),
        ("tokenizer.ggml.scores", LIST, floats(&[0.0, 0.0, -3.0, -4.0, -1.0, -2.0, -5.0])),
        ("tokenizer.ggml.bos_token_id", U32, number(1)),
    ];
    // The type of a block, its values and its bytes.
    let blocks = [
        ("token_embd.weight", 0, 32, 128),
        ("blk.0.attn_q.weight", 1, 32, 64),
        ("blk.0.attn_k.weight", 30, 32, 64),
        ("blk.0.ffn_up.weight", 8, 32, 34),
        ("output.weight", 2, 32, 18),
        ("q4_1", 3, 32, 20),
        ("q5_0", 6, 32, 22),
        ("q5_1", 7, 32, 24),
        ("q2_k", 10, 256, 84),
        ("q3_k", 11, 256, 110),
        ("q4_k", 12, 256, 144),
        ("q5_k", 13, 256, 176),
        ("q6_k", 14, 256, 210),
    ];
    let shapes = blocks.map(|(_, _, values, _)| [values, 4]);
    let named: Vec<_> = blocks
        .iter()
        .zip(&shapes)
        .map(|(&(name, kind, _, bytes), shape)| (name, kind, &shape[..], vec![7; 4 * bytes]))
        .collect();
    let made =
        [gguf(&keys, &named), gguf(&keys, &[]), gguf(&[], &named), gguf(&sentence_piece, &[])];
    made.into_iter().chain(golden("model.gguf")).collect()
}

fuzz_target!(init: seeds(inputs), |data: &[u8]| {
    with_files(&[("model.gguf", data)], |folder| {
        let path = folder.join("model.gguf");
        if let Ok(file) = GgufFile::open(&path) {
            let _ = file.config();
            if let Ok(parts) = file.tokenizer_parts() {
                let _ = parts.tokenizer.encode("ab é 12<s>", true);
            }
            for name in WeightSource::names(&file) {
                if let Ok(tensor) = WeightSource::read(&file, &name) {
                    assert_eq!(tensor.values.len(), tensor.shape.iter().product::<usize>());
                }
            }
        }
        let _ = Checkpoint::open(&path);
    });
});
