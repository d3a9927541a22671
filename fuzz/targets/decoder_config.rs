//! A model's config.json.
#![no_main]

use burn_lora_fuzz::{golden, seeds, with_files};
use libfuzzer_sys::fuzz_target;
use lora_models::{WeightDtype, config_to_json, read_config};

fuzz_target!(init: seeds(|| golden("config.json")), |data: &[u8]| {
    with_files(&[("config.json", data)], |folder| {
        let Ok(config) = read_config(folder) else { return };
        let text = config_to_json(&config, WeightDtype::F32).expect("it was read").to_string();
        with_files(&[("config.json", text.as_bytes())], |folder| {
            let again = read_config(folder).expect("what was written is read");
            assert!(again == config);
        });
    });
});
