//! An adapter of llama.cpp's. What is read is written again, and comes back with the same layers.
#![no_main]

use std::fs;
use std::sync::LazyLock;

use burn_lora_fuzz::{decoders, seeds, with_files};
use libfuzzer_sys::fuzz_target;
use lora_core::{LoraConfig, TargetModules, inject};
use lora_models::{Decoder, read_gguf_adapter, save_gguf_adapter};

static DECODERS: LazyLock<[Decoder; 2]> = LazyLock::new(decoders);

fn inputs() -> Vec<Vec<u8>> {
    let folder = tempfile::tempdir().expect("the temporary folder can be written");
    let all = TargetModules::AllLinear;
    let some = TargetModules::names(["q_proj", "down_proj"]);
    let few = TargetModules::names(["experts.1.w1", "experts.2.w2", "gate"]);
    let input = |(index, (decoder, targets)): (usize, (usize, TargetModules))| {
        let config = LoraConfig { target_modules: targets, ..LoraConfig::new(2, 4.0) };
        let (model, _) = inject(DECODERS[decoder].clone(), &config).expect("the config fits");
        let path = folder.path().join(format!("{index}"));
        save_gguf_adapter(&model, &path).expect("it can be written");
        fs::read(path).expect("it was written")
    };
    [(0, all.clone()), (0, some), (1, all), (1, few)].into_iter().enumerate().map(input).collect()
}

fuzz_target!(init: seeds(inputs), |data: &[u8]| {
    with_files(&[("adapter.gguf", data)], |folder| {
        for (number, decoder) in DECODERS.iter().enumerate() {
            let Ok(set) = read_gguf_adapter(decoder, folder.join("adapter.gguf")) else { continue };
            let paths: Vec<String> = set.paths().map(str::to_owned).collect();
            let (model, _) = set.attach(decoder.clone()).expect("what was read fits the model");
            let copy = folder.join(format!("copy-{number}.gguf"));
            if save_gguf_adapter(&model, &copy).is_ok() {
                let again = read_gguf_adapter(decoder, &copy).expect("what was written is read");
                // Folding a factor may make the last values of an expert too small for f32.
                assert!(again.paths().all(|path| paths.iter().any(|other| other == path)));
            }
        }
    });
});
