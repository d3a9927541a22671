//! An adapter's folder: a config in the first line, then the weights. What is read is written again,
//! and comes back the same.
#![no_main]

use std::sync::LazyLock;

use burn_lora_fuzz::{Net, adapters, in_two, seeds, with_files};
use libfuzzer_sys::fuzz_target;
use lora_core::{
    AdapterInfo, AdapterSet, LoadOptions, load_adapter, merge, read_adapter, save_adapter,
};

static NET: LazyLock<Net> = LazyLock::new(Net::new);

fn inputs() -> Vec<Vec<u8>> {
    adapters(&NET, "adapter_model.safetensors", |net, folder| {
        save_adapter(net, folder, &AdapterInfo::default())
    })
}

fuzz_target!(init: seeds(inputs), |data: &[u8]| {
    let (config, weights) = in_two(data);
    let files = [("adapter_config.json", config), ("adapter_model.safetensors", weights)];
    with_files(&files, |folder| {
        let lenient = LoadOptions { strict: false, ..LoadOptions::default() };
        let _ = read_adapter(&*NET, folder, &lenient);
        let Ok((set, _)) = read_adapter(&*NET, folder, &LoadOptions::default()) else { return };
        let (mut model, _) = set.attach(NET.clone()).expect("what was read for a model fits it");
        let copy = folder.join("copy");
        if save_adapter(&model, &copy, &AdapterInfo::default()).is_ok() {
            let (again, report) = load_adapter(NET.clone(), &copy).expect("what was written is read");
            assert_eq!(report.same_base, Some(true));
            let (before, after) = (AdapterSet::of(&model), AdapterSet::of(&again));
            assert!(before.paths().eq(after.paths()));
        }
        let _ = merge(&mut model);
    });
});
