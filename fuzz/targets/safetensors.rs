//! A checkpoint's safetensors file: its header and every tensor.
#![no_main]

use burn_lora_fuzz::{seeds, with_files};
use libfuzzer_sys::fuzz_target;
use lora_models::{SafetensorsFile, WeightSource};
use safetensors::tensor::{Dtype, TensorView};

fn inputs() -> Vec<Vec<u8>> {
    let of = |dtype: Dtype| {
        let bytes = vec![0x3c; 12 * dtype.bitsize() / 8];
        let view = |shape| TensorView::new(dtype, shape, &bytes).expect("the bytes fit");
        let views = [("a.weight", view(vec![3, 4])), ("b", view(vec![12]))];
        safetensors::serialize(views, None).expect("it can be written")
    };
    vec![of(Dtype::F32), of(Dtype::BF16), of(Dtype::F16)]
}

fuzz_target!(init: seeds(inputs), |data: &[u8]| {
    with_files(&[("model.safetensors", data)], |folder| {
        let Ok(file) = SafetensorsFile::open(folder.join("model.safetensors")) else { return };
        for name in file.names() {
            if let Ok(tensor) = file.read(&name) {
                assert_eq!(tensor.values.len(), tensor.shape.iter().product::<usize>());
            }
        }
    });
});
