//! An adapter's config, and the rules in it over some paths.
#![no_main]

use burn_lora_fuzz::{golden, seeds, with_files};
use libfuzzer_sys::fuzz_target;
use lora_core::{read_adapter_config, read_adapter_info};

const PATHS: [&str; 5] = [
    "model.layers.0.self_attn.q_proj",
    "model.layers.1.self_attn.q_proj",
    "model.layers.1.mlp.up_proj",
    "transformer.h.3.attn.c_attn",
    "lm_head",
];

fuzz_target!(init: seeds(|| golden("adapter_config.json")), |data: &[u8]| {
    with_files(&[("adapter_config.json", data)], |folder| {
        let _ = read_adapter_info(folder);
        let Ok(config) = read_adapter_config(folder) else { return };
        let selection = config.select(&PATHS, Some("lm_head"));
        assert_eq!(selection.selected.len(), PATHS.len());
        assert!(selection.selected.contains(&true) || !selection.problems.is_empty());
        for path in PATHS {
            let _ = config.resolve(path);
        }
        let _ = selection.into_result().map_err(|error| error.to_string());
    });
});
