//! An adapter of llama.cpp's. What is read is written again, and comes back with the same layers.
#![no_main]

use std::fs;
use std::sync::LazyLock;

use burn_lora_fuzz::{decoder, seeds, with_files};
use libfuzzer_sys::fuzz_target;
use lora_core::{LoraConfig, TargetModules, inject};
use lora_models::{Decoder, read_gguf_adapter, save_gguf_adapter};

static DECODER: LazyLock<Decoder> = LazyLock::new(decoder);

fn inputs() -> Vec<Vec<u8>> {
    let folder = tempfile::tempdir().expect("the temporary folder can be written");
    let all = TargetModules::AllLinear;
    let some = TargetModules::names(["q_proj", "down_proj"]);
    let input = |(index, targets)| {
        let config = LoraConfig { target_modules: targets, ..LoraConfig::new(2, 4.0) };
        let (model, _) = inject(DECODER.clone(), &config).expect("the config fits");
        let path = folder.path().join(format!("{index}"));
        save_gguf_adapter(&model, &path).expect("it can be written");
        fs::read(path).expect("it was written")
    };
    [all, some].into_iter().enumerate().map(input).collect()
}

fuzz_target!(init: seeds(inputs), |data: &[u8]| {
    with_files(&[("adapter.gguf", data)], |folder| {
        let Ok(set) = read_gguf_adapter(&DECODER, folder.join("adapter.gguf")) else { return };
        let paths: Vec<String> = set.paths().map(str::to_owned).collect();
        let (model, _) = set.attach(DECODER.clone()).expect("what was read for a model fits it");
        let copy = folder.join("copy.gguf");
        if save_gguf_adapter(&model, &copy).is_ok() {
            let again = read_gguf_adapter(&DECODER, &copy).expect("what was written is read");
            assert!(again.paths().eq(&paths));
        }
    });
});
