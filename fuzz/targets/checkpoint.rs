//! A checkpoint's weight file into which an adapter is merged: what is written has the same header.
#![no_main]

use std::fs;
use std::path::PathBuf;
use std::sync::LazyLock;

use burn::nn::LinearConfig;
use burn::tensor::Device;
use burn_lora_fuzz::{seeds, with_files};
use libfuzzer_sys::fuzz_target;
use lora_core::{
    AdaptableLinear, AdapterInfo, LoraConfig, MergeOptions, inject, merge_checkpoint_with,
    save_adapter,
};
use safetensors::tensor::{Dtype, TensorView};

/// An adapter of the layers `0` and `1`, 4 x 3 each.
static ADAPTER: LazyLock<PathBuf> = LazyLock::new(|| {
    let device = Device::flex();
    let layer = || AdaptableLinear::from(LinearConfig::new(4, 3).with_bias(false).init(&device));
    let (model, _) = inject(vec![layer(), layer()], &LoraConfig::new(2, 4.0)).expect("it fits");
    let folder = tempfile::tempdir().expect("the temporary folder can be written").keep();
    let folder = folder.join("adapter");
    save_adapter(&model, &folder, &AdapterInfo::default()).expect("it can be written");
    folder
});

fn inputs() -> Vec<Vec<u8>> {
    let of = |dtype: Dtype, names: &[&str]| {
        let bytes = vec![0x3c; 12 * dtype.bitsize() / 8];
        let view = || TensorView::new(dtype, vec![3, 4], &bytes).expect("the bytes fit");
        let views = names.iter().map(|name| (*name, view()));
        safetensors::serialize(views, None).expect("it can be written")
    };
    vec![
        of(Dtype::F32, &["0.weight", "1.weight"]),
        of(Dtype::BF16, &["1.weight", "0.weight", "norm.weight"]),
        of(Dtype::F64, &["0.weight", "1.weight"]),
    ]
}

fuzz_target!(init: seeds(inputs), |data: &[u8]| {
    with_files(&[], |folder| {
        let (base, output) = (folder.join("base"), folder.join("output"));
        fs::create_dir(&base).expect("it can be written");
        fs::write(base.join("model.safetensors"), data).expect("it can be written");
        let options = MergeOptions { check_base: false, ..MergeOptions::default() };
        match merge_checkpoint_with(&base, &*ADAPTER, &output, &Device::flex(), &options) {
            Ok(_) => {
                let merged = fs::read(output.join("model.safetensors")).expect("it was written");
                assert_eq!(merged.len(), data.len());
                let header = 8 + u64::from_le_bytes(data[..8].try_into().expect("8 bytes")) as usize;
                assert_eq!(merged[..header], data[..header]);
            }
            Err(_) => assert!(!output.exists()),
        }
    });
});
