//! Merging an adapter into a checkpoint's files, against merging the loaded model.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use lora_core::{ErrorKind, load_adapter, merge, merge_checkpoint};

use lora_models::{Decoder, SafetensorsFile, WeightDtype, read_config};
use safetensors::SafeTensors;
use safetensors::tensor::{Dtype, TensorView};

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name)
}

fn decoder(folder: &Path) -> Decoder {
    let weights = SafetensorsFile::open(folder.join("model.safetensors")).unwrap();
    Decoder::from_weights(
        &read_config(folder).unwrap(),
        &weights,
        &lora_core::device_from_env().unwrap(),
    )
    .unwrap()
}

type Tensors = BTreeMap<String, (Dtype, Vec<usize>, Vec<u8>)>;

fn read(path: &Path) -> Tensors {
    let bytes = fs::read(path).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let tensors = file.tensors().into_iter();
    tensors
        .map(|(name, view)| (name, (view.dtype(), view.shape().to_vec(), view.data().to_vec())))
        .collect()
}

fn write(path: &Path, tensors: &Tensors) {
    let views = tensors.iter().map(|(name, (dtype, shape, bytes))| {
        (name.clone(), TensorView::new(*dtype, shape.clone(), bytes).unwrap())
    });
    fs::write(path, safetensors::serialize(views, None).unwrap()).unwrap();
}

/// The checkpoint `name` with some of its files changed by `change`.
fn checkpoint(name: &str, change: impl FnOnce(&mut Tensors)) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let mut tensors = read(&golden(name).join("model.safetensors"));
    change(&mut tensors);
    write(&folder.path().join("model.safetensors"), &tensors);
    fs::copy(golden(name).join("config.json"), folder.path().join("config.json")).unwrap();
    folder
}

#[test]
fn the_files_are_those_of_the_merged_model_to_the_bit() {
    let temp = tempfile::tempdir().unwrap();
    for name in ["peft_plain", "peft_patterns_rslora", "peft_gaussian_regex"] {
        let output = temp.path().join(name);
        let (base, adapter) = (golden("tiny_llama"), golden(name));
        let report =
            merge_checkpoint(&base, &adapter, &output, &lora_core::device_from_env().unwrap())
                .unwrap();

        let (mut model, _) = load_adapter(decoder(&base), &adapter).unwrap();
        let expected = merge(&mut model).unwrap();
        let paths = |report: &lora_core::MergeReport| {
            let mut paths: Vec<String> =
                report.layers.iter().map(|layer| layer.path.clone()).collect();
            paths.sort();
            paths
        };
        assert_eq!(paths(&report), paths(&expected), "{name}");
        let merged = read(&output.join("model.safetensors"));
        let original = read(&base.join("model.safetensors"));
        let mut changed = 0;
        for (key, tensor) in model.named_tensors() {
            let (dtype, shape, bytes) = &merged[&key];
            assert_eq!((*dtype, shape), (Dtype::F32, &tensor.shape), "{key}");
            assert!(*bytes == tensor.values.to_le_bytes(), "{name}: {key}");
            changed += usize::from(original[&key].2 != *bytes);
        }
        assert_eq!(changed, report.layers.len(), "{name}: no other tensor has changed");
        for file in ["config.json", "golden.safetensors"] {
            if base.join(file).exists() && file == "config.json" {
                assert_eq!(
                    fs::read(output.join(file)).unwrap(),
                    fs::read(base.join(file)).unwrap()
                );
            }
        }
        assert!(decoder(&output).config() == decoder(&base).config());
    }
    let left: Vec<_> = fs::read_dir(temp.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert_eq!(left.len(), 3, "{left:?}");
}

/// On a device that does not compute in a checkpoint's type, nothing is merged.
fn refuses_half_precision() {
    let folder = checkpoint("tiny_llama", |tensors| {
        for (dtype, _, bytes) in tensors.values_mut() {
            (*dtype, *bytes) = (Dtype::BF16, bytes[..bytes.len() / 2].to_vec());
        }
    });
    let output = folder.path().join("merged");
    let device = lora_core::device_from_env().unwrap();
    let answer = merge_checkpoint(folder.path(), golden("peft_plain"), &output, &device);
    let error = answer.unwrap_err().to_string();
    assert!(error.contains("found bf16") && !output.exists(), "{error}");
}

#[test]
fn a_half_precision_checkpoint_is_rounded_once_and_shards_stay_shards() {
    if !lora_core::supports_dtype(&lora_core::device_from_env().unwrap(), burn::tensor::DType::BF16)
    {
        return refuses_half_precision();
    }
    let folder = checkpoint("tiny_llama", |tensors| {
        for (dtype, _, bytes) in tensors.values_mut() {
            let (four, _) = bytes.as_chunks::<4>();
            let halves = four
                .iter()
                .flat_map(|bytes| half::bf16::from_f32(f32::from_le_bytes(*bytes)).to_le_bytes());
            let halves: Vec<u8> = halves.collect();
            (*dtype, *bytes) = (Dtype::BF16, halves);
        }
    });
    let all = read(&folder.path().join("model.safetensors"));
    fs::remove_file(folder.path().join("model.safetensors")).unwrap();
    let (first, second): (Tensors, Tensors) =
        all.clone().into_iter().partition(|(name, _)| name.contains("layers.0"));
    write(&folder.path().join("model-00001-of-00002.safetensors"), &first);
    write(&folder.path().join("model-00002-of-00002.safetensors"), &second);

    let output = tempfile::tempdir().unwrap();
    let output = output.path().join("merged");
    let adapter = golden("peft_plain");
    let report =
        merge_checkpoint(folder.path(), &adapter, &output, &lora_core::device_from_env().unwrap())
            .unwrap();
    assert!(report.layers.iter().all(|layer| layer.rounding.largest > 0.0));
    let mut merged = read(&output.join("model-00001-of-00002.safetensors"));
    assert_eq!(merged.keys().collect::<Vec<_>>(), first.keys().collect::<Vec<_>>());
    merged.extend(read(&output.join("model-00002-of-00002.safetensors")));

    // The same in f32 from the rounded base, rounded here.
    let wide = checkpoint("tiny_llama", |tensors| {
        for (name, (_, _, bytes)) in tensors.iter_mut() {
            let (two, _) = all[name].2.as_chunks::<2>();
            let values = two.iter().map(|two| half::bf16::from_le_bytes(*two).to_f32());
            *bytes = values.flat_map(f32::to_le_bytes).collect();
        }
    });
    let (mut model, _) = load_adapter(decoder(wide.path()), &adapter).unwrap();
    merge(&mut model).unwrap();
    for (key, tensor) in model.named_tensors() {
        let expected = tensor.values.cast(WeightDtype::BF16).to_le_bytes();
        assert!(merged[&key].2 == expected, "{key}");
    }
}

#[test]
fn what_does_not_fit_is_named_and_nothing_is_written() {
    let temp = tempfile::tempdir().unwrap();
    let output = temp.path().join("merged");
    let merged = |base: &Path| {
        let error = merge_checkpoint(
            base,
            golden("peft_plain"),
            &output,
            &lora_core::device_from_env().unwrap(),
        );
        assert_eq!(fs::read_dir(temp.path()).unwrap().count(), 0);
        error.unwrap_err()
    };
    const Q: &str = "model.layers.0.self_attn.q_proj.weight";

    let error = merged(checkpoint("tiny_llama", |tensors| drop(tensors.remove(Q))).path());
    assert!(error.to_string().contains(&format!("{Q} is not in the checkpoint")), "{error}");

    let folder = checkpoint("tiny_llama", |tensors| {
        let (_, shape, bytes) = tensors.get_mut(Q).unwrap();
        shape[1] -= 1;
        bytes.truncate(shape[0] * shape[1] * 4);
    });
    let error = merged(folder.path());
    assert!(matches!(error.kind(), ErrorKind::AdapterMismatch { .. }), "{error}");
    assert!(error.to_string().contains("lora_A.weight: expected shape [4, 63]"), "{error}");

    let folder = checkpoint("tiny_llama", |tensors| {
        tensors.get_mut(Q).unwrap().2[..4].copy_from_slice(&f32::NAN.to_le_bytes());
    });
    let error = merged(folder.path());
    assert!(matches!(error.kind(), ErrorKind::NonFinite { .. }), "{error}");
    assert!(error.to_string().contains("model.layers.0.self_attn.q_proj"), "{error}");

    let empty = tempfile::tempdir().unwrap();
    assert!(merged(empty.path()).to_string().contains("a file that ends with .safetensors"));
    assert!(matches!(merged(&empty.path().join("none")).kind(), ErrorKind::Io { .. }));

    let folder = checkpoint("tiny_llama", |_| {});
    let path = folder.path().join("model.safetensors");
    let bytes = fs::read(&path).unwrap();
    for (length, part) in [(4, "bytes in all"), (bytes.len() - 1, "bytes")] {
        fs::write(&path, &bytes[..length]).unwrap();
        assert!(merged(folder.path()).to_string().contains(part));
    }
    fs::write(&path, [&u64::MAX.to_le_bytes()[..], &bytes[8..]].concat()).unwrap();
    assert!(merged(folder.path()).to_string().contains("a length of 18446744073709551615"));
    fs::write(&path, [&8u64.to_le_bytes()[..], b"{\"a\": 1}"].concat()).unwrap();
    assert!(merged(folder.path()).to_string().contains("the header"));

    fs::write(&path, &bytes).unwrap();
    fs::create_dir(&output).unwrap();
    let error = merge_checkpoint(
        folder.path(),
        golden("peft_plain"),
        &output,
        &lora_core::device_from_env().unwrap(),
    )
    .unwrap_err();
    assert!(matches!(error.kind(), ErrorKind::Exists { .. }), "{error}");
}
