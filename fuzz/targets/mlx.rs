//! An adapter of mlx-lm's: a config in the first line, then the weights. What is read is written again,
//! and comes back with the same layers.
#![no_main]

use std::sync::LazyLock;

use burn_lora_fuzz::{Net, adapters, in_two, seeds, with_files};
use libfuzzer_sys::fuzz_target;
use lora_core::{AdapterInfo, read_mlx_adapter, save_mlx_adapter};

static NET: LazyLock<Net> = LazyLock::new(Net::new);

fn inputs() -> Vec<Vec<u8>> {
    adapters(&NET, "adapters.safetensors", |net, folder| {
        save_mlx_adapter(net, folder, &AdapterInfo::default())
    })
}

fuzz_target!(init: seeds(inputs), |data: &[u8]| {
    let (config, weights) = in_two(data);
    let files = [("adapter_config.json", config), ("adapters.safetensors", weights)];
    with_files(&files, |folder| {
        let Ok(set) = read_mlx_adapter(&*NET, folder) else { return };
        let paths: Vec<String> = set.paths().map(str::to_owned).collect();
        let (model, _) = set.attach(NET.clone()).expect("what was read for a model fits it");
        let copy = folder.join("copy");
        if save_mlx_adapter(&model, &copy, &AdapterInfo::default()).is_ok() {
            let again = read_mlx_adapter(&*NET, &copy).expect("what was written is read");
            assert!(again.paths().eq(&paths));
        }
    });
});
