//! Tokenizers in GGUF files against Hugging Face's: tests/gguf_tokenizers.py wrote files and ids.

use std::path::{Path, PathBuf};

use lora_models::{GgufFile, Message, Tokenizer};
use serde_json::Value as Json;

/// The text of which `ids.json` has the ids with what goes around it.
const WHOLE: usize = 1;

fn data() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/tokenizers")
}

fn tokenizer(name: &str) -> Tokenizer {
    open(&data().join(name).with_extension("gguf"))
}

fn open(path: &Path) -> Tokenizer {
    let file = GgufFile::open(path).unwrap();
    let parts = file.tokenizer_parts().unwrap();
    let (template, bos, eos) = (parts.chat_template, parts.bos_token, parts.eos_token);
    Tokenizer::new(parts.tokenizer, template, bos, eos).unwrap()
}

fn ids(json: &Json) -> Vec<u32> {
    serde_json::from_value(json.clone()).unwrap()
}

/// Compares every text, and reports all that differ.
#[track_caller]
fn same_as_hugging_face(name: &str) {
    same_ids(name, &tokenizer(name));
}

#[track_caller]
fn same_ids(name: &str, tokenizer: &Tokenizer) {
    let golden = std::fs::read_to_string(data().join("ids.json")).unwrap();
    let golden: Json = serde_json::from_str(&golden).unwrap();
    let texts: Vec<String> = serde_json::from_value(golden["texts"].clone()).unwrap();
    let expected = &golden[name];

    assert!(texts.len() > 30);
    let mut differences = Vec::new();
    for (i, text) in texts.iter().enumerate() {
        let found = tokenizer.encode(text).unwrap();
        if found != ids(&expected["ids"][i]) {
            differences.push(format!("{text:?}: {found:?}, expected {}", expected["ids"][i]));
        }
        let decoded = tokenizer.decode(&ids(&expected["ids"][i])).unwrap();
        if Some(decoded.as_str()) != expected["decoded"][i].as_str() {
            differences.push(format!("decoded {decoded:?}, expected {}", expected["decoded"][i]));
        }
    }
    assert!(differences.is_empty(), "{name}:\n{}", differences.join("\n"));
    assert_eq!(tokenizer.encode_whole_text(&texts[WHOLE]).unwrap(), ids(&expected["whole"]));
}

#[test]
fn gpt_2() {
    same_as_hugging_face("gpt-2");
}

#[test]
fn smollm() {
    same_as_hugging_face("smollm");
}

#[test]
fn llama_3() {
    same_as_hugging_face("llama-bpe");
}

#[test]
fn qwen_2() {
    same_as_hugging_face("qwen2");
}

#[test]
fn other_names_of_the_same_rules() {
    // A text in the file: its length and its bytes. Between key and value stands the type.
    let text = |text: &str| [&(text.len() as u64).to_le_bytes(), text.as_bytes()].concat();
    for (name, other) in [("llama-bpe", "falcon3"), ("qwen2", "deepseek-r1-qwen")] {
        let bytes = std::fs::read(data().join(name).with_extension("gguf")).unwrap();
        let pre = |name: &str| {
            [text("tokenizer.ggml.pre"), 8_u32.to_le_bytes().to_vec(), text(name)].concat()
        };
        let old = pre(name);
        let start = bytes.windows(old.len()).position(|window| window == old).unwrap();
        let bytes = [&bytes[..start], &pre(other), &bytes[start + old.len()..]].concat();
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("model.gguf");
        std::fs::write(&path, bytes).unwrap();
        same_ids(name, &open(&path));
    }
}

#[test]
fn llama_cpps_default() {
    same_as_hugging_face("default");
}

#[test]
fn sentence_piece() {
    same_as_hugging_face("llama");
}

#[test]
fn sentence_piece_without_a_space_before_the_text() {
    same_as_hugging_face("llama-no-prefix");
}

#[test]
fn sentence_piece_with_its_merges_listed() {
    same_as_hugging_face("llama-merges");
}

#[test]
fn the_template_has_the_files_tokens() {
    let messages = [Message::user("hi"), Message::assistant("a")];
    let rendered = tokenizer("llama-bpe").render(&messages, false).unwrap();
    let turns = "<|turn|>user\nhi<|end|><|turn|>assistant\na<|end|>";
    assert_eq!(rendered, format!("<|begin|>{turns}"));
    let rendered = tokenizer("llama").render(&messages, false).unwrap();
    assert_eq!(rendered, format!("<s>{}", turns.replace("<|end|>", "</s>")));
}
