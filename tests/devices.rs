//! Devices by name: which this build takes, and what it says about the others.

use std::env;
use std::fs;
use std::panic::AssertUnwindSafe;
use std::path::Path;
use std::process::{Command, Output};

use burn::nn::LinearConfig;
use burn::tensor::{DType, Int, Tensor};
use lora_core::{
    AdaptableLinear, BackendName, DeviceProblem, ErrorKind, LoraConfig, backends, check_dtype,
    default_device_name, device_by_name, device_from_env, device_name_from_env, inject,
    supports_dtype,
};

fn problem(name: &str) -> DeviceProblem {
    match device_by_name(name).unwrap_err().kind() {
        ErrorKind::Device { name: named, variable, problem } => {
            assert_eq!((named.as_str(), *variable), (name, None));
            problem.clone()
        }
        kind => panic!("{name}: {kind:?}"),
    }
}

#[test]
fn a_name_that_no_device_has_is_refused_with_those_that_there_are() {
    let large = format!("wgpu:{}0", u64::MAX);
    for name in [
        "",
        "gpu",
        "Flex",
        "flex:",
        "flex:0",
        "ndarray:1",
        "tch:",
        "tch:gpu",
        "tch:cuda:",
        "tch:cuda:-1",
        "wgpu:",
        "wgpu:+1",
        "wgpu:a",
        "wgpu:0:1",
        "cuda: 0",
        "cuda:0 ",
        &large,
    ] {
        assert_eq!(problem(name), DeviceProblem::Unknown, "{name}");
        let message = device_by_name(name).unwrap_err().to_string();
        assert!(message.starts_with(&format!("device '{name}': expected ")), "{message}");
        for backend in BackendName::ALL {
            assert!(message.contains(backend.as_str()), "{message}");
        }
    }
}

#[test]
fn a_backend_that_is_not_in_this_build_is_refused_with_its_feature() {
    for backend in BackendName::ALL.into_iter().filter(|backend| !backend.is_compiled()) {
        assert_eq!(problem(backend.as_str()), DeviceProblem::FeatureOff { backend });
        let message = device_by_name(backend.as_str()).unwrap_err().to_string();
        assert!(message.contains(&format!("the Cargo feature {backend}")), "{message}");
        assert!(message.contains(default_device_name()), "{message}");
    }
}

/// What is listed can be had by its name; what the machine lacks is said.
#[test]
fn what_is_listed_is_there_and_the_rest_is_explained() {
    for info in backends() {
        for device in &info.devices {
            if device.refused.is_none() {
                device_by_name(&device.name).unwrap();
                assert!(device.dtypes.contains(&DType::F32), "{device:?}");
            }
        }
        if !info.backend.is_compiled() {
            assert!(info.devices.is_empty());
            continue;
        }
        let gpus = info.devices.iter().filter(|device| device.name.contains(char::is_numeric));
        let count = gpus.count();
        let next = match info.backend {
            BackendName::Flex | BackendName::NdArray => continue,
            BackendName::Tch => format!("tch:cuda:{count}"),
            backend => format!("{backend}:{count}"),
        };
        match (count, problem(&next)) {
            (0, DeviceProblem::Absent { reason }) => {
                let helps = ["driver", "built for the processor", "macOS"];
                assert!(helps.iter().any(|help| reason.contains(help)), "{reason}");
            }
            (1.., DeviceProblem::NoSuchIndex { names }) => assert_eq!(names.len(), count),
            (_, other) => panic!("{next}: {other:?}"),
        }
    }
}

/// The cells of the guide's table of what each device cannot do, for the device with this name.
fn row_of(name: &str) -> Vec<String> {
    let page = fs::read_to_string(
        Path::new(env!("CARGO_MANIFEST_DIR")).join("crates/lora-core/docs/backends.md"),
    );
    let page = page.unwrap();
    let name = if name == "tch" { "tch:cpu" } else { name };
    let backend = match name.rsplit_once(':') {
        Some((backend, number)) if number.parse::<usize>().is_ok() => backend,
        _ => name,
    };
    // Their kernels are those of the device `wgpu` too.
    let backend = match backend {
        "wgpu" if cfg!(feature = "vulkan") => "vulkan",
        "wgpu" if cfg!(feature = "metal") => "metal",
        other => other,
    };
    // The table of features before it has rows of these names too.
    let (_, table) =
        page.split_once("| device | f32 | bf16 | f16 | f64 | no such class |").unwrap();
    let row = table
        .lines()
        .find(|line| line.starts_with(&format!("| `{backend}` |")))
        .unwrap_or_else(|| panic!("backends.md has no row for {backend}"));
    row.split('|').map(|cell| cell.trim().to_owned()).collect()
}

/// The guide says which types of weights each device takes.
#[test]
fn the_table_of_types_in_the_documentation_is_true_of_this_device() {
    let name = device_name_from_env();
    let device = device_from_env().unwrap();
    let cells = row_of(&name);
    let dtypes = [DType::F32, DType::BF16, DType::F16, DType::F64];
    for (cell, dtype) in cells[2..6].iter().zip(dtypes) {
        let says = match cell.as_str() {
            "yes" => true,
            "no" => false,
            // What the adapter decides.
            "depends" => continue,
            other => panic!("{cells:?}: expected yes, no or depends, found {other}"),
        };
        assert_eq!(supports_dtype(&device, dtype), says, "{name}, {dtype:?}");
        let layer = LinearConfig::new(4, 3).init(&device);
        let config = LoraConfig { dtype: Some(dtype), ..LoraConfig::new(2, 4.0) };
        let adapted = inject(vec![AdaptableLinear::from(layer)], &config);
        assert_eq!(adapted.is_ok(), says, "{name}, an adapter in {dtype:?}");
        match check_dtype(&device, dtype) {
            Ok(()) => assert!(says),
            Err(error) => {
                let message = error.to_string();
                assert!(!says && message.contains(dtype.name()), "{message}");
                assert!(message.starts_with(&format!("device {name}")), "{message}");
            }
        }
    }
}

/// A layer whose product would not end is refused before there is an adapter beside it, by whatever way, and so is
/// an adapter of that type.
#[test]
#[cfg(feature = "tch")]
fn a_layer_in_a_type_that_its_device_lacks_is_refused() {
    use burn::module::{Lora, Module};
    use burn::nn::Linear;
    use burn::tensor::FloatDType;
    use lora_core::{
        AdaptableLayer, Adaptation, AdapterInfo, AdapterSet, LoadOptions, LoraAdapter, LoraLinear,
        Scaling, load_adapter, read_adapter, save_adapter,
    };
    let device = device_by_name("tch:cpu").unwrap();
    let layer = LinearConfig::new(4, 3).with_bias(false).init(&device);
    let half =
        |layer: Linear| Linear { weight: layer.weight.map(|w| w.cast(DType::F16)), bias: None };
    let in_half = half(layer.clone());
    let lora = LoraLinear::wrap(layer.clone(), 2, 4.0).unwrap();
    let adapter = lora.adapter().clone();
    let adaptation = || Adaptation::LowRank(adapter.clone());
    let temp = tempfile::tempdir().unwrap();
    let folder = temp.path().join("adapter");
    save_adapter(&vec![AdaptableLinear::from(lora)], &folder, &AdapterInfo::default()).unwrap();
    let model = || vec![AdaptableLinear::from(in_half.clone())];
    let set = AdapterSet::from_adapters([("0".to_owned(), adapter.clone())]);

    let options = LoadOptions::default();
    let of_model = [
        inject(model(), &LoraConfig::new(2, 4.0)).unwrap_err(),
        set.attach(model()).unwrap_err(),
        read_adapter(&model(), &folder, &options).unwrap_err(),
        load_adapter(model(), &folder).unwrap_err(),
    ];
    for error in of_model.map(|error| error.to_string()) {
        assert!(error.starts_with("device tch:cpu: expected weights in f32 or bf16, "), "{error}");
        assert!(error.contains("found f16 for 0; "), "{error}");
    }
    let [a, b] = [[4, 2], [2, 3]].map(|dims| Tensor::<2>::ones(dims, &device).cast(DType::F16));
    let in_f16 = LoraAdapter::from_tensors(a, b, 4.0, Scaling::AlphaOverRank).unwrap();
    let burn_in_f16 = Lora::new(2, 4.0).set_dtype(FloatDType::F16);
    let of_layer = [
        LoraLinear::wrap(in_half.clone(), 2, 4.0).unwrap_err(),
        LoraLinear::from_burn(half(layer.clone()).apply_lora(Lora::new(2, 4.0))).unwrap_err(),
        LoraLinear::from_burn(layer.clone().apply_lora(burn_in_f16)).unwrap_err(),
        AdaptableLinear::from(in_half).attach(adaptation()).unwrap_err(),
        AdaptableLinear::from(layer).attach(Adaptation::LowRank(in_f16)).unwrap_err(),
    ];
    for error in of_layer.map(|error| error.to_string()) {
        assert!(error.starts_with("device tch:cpu: ") && error.contains("found f16; "), "{error}");
    }
}

/// What a device cannot compute with can come from another one, and be saved there.
#[test]
#[cfg(all(feature = "tch", feature = "flex"))]
fn an_adapter_beside_a_layer_in_a_type_that_its_device_lacks_is_saved() {
    use burn::module::Module;
    use burn::nn::Linear;
    use lora_core::{AdapterInfo, LoraLinear, load_adapter, save_adapter};
    let on = |name| device_by_name(name).unwrap();
    let layer = LinearConfig::new(4, 3).with_bias(false).init(&on("flex"));
    let layer = Linear { weight: layer.weight.map(|w| w.cast(DType::F16)), bias: None };
    let lora = LoraLinear::wrap(layer.clone(), 2, 4.0).unwrap();
    let a = lora.adapter().lora_a.val().into_data();
    let temp = tempfile::tempdir().unwrap();
    let folder = temp.path().join("adapter");
    let moved = AdaptableLinear::from(lora).to_device(&on("tch:cpu"));
    save_adapter(&vec![moved], &folder, &AdapterInfo::default()).unwrap();
    let (back, _) = load_adapter(vec![AdaptableLinear::from(layer)], &folder).unwrap();
    assert_eq!(back[0].as_lora().unwrap().adapter().lora_a.val().into_data(), a);
}

/// WGSL has no bf16, but a tensor of it can be there.
#[test]
#[cfg(feature = "wgpu")]
fn a_folder_for_a_layer_in_a_type_without_kernels_is_refused() {
    use burn::module::Param;
    use burn::nn::Linear;
    use burn::tensor::TensorData;
    use lora_core::{AdapterInfo, LoraLinear, load_adapter, save_adapter};
    let device = device_from_env().unwrap();
    if !lora_core::compiles_kernels(&device) || supports_dtype(&device, DType::BF16) {
        return;
    }
    let layer = LinearConfig::new(4, 3).with_bias(false).init(&device);
    let temp = tempfile::tempdir().unwrap();
    let folder = temp.path().join("adapter");
    let lora = AdaptableLinear::from(LoraLinear::wrap(layer, 2, 4.0).unwrap());
    save_adapter(&vec![lora], &folder, &AdapterInfo::default()).unwrap();
    let ones = TensorData::ones::<f32, _>([4, 3]).convert_dtype(DType::BF16);
    let weight = Param::from_tensor(Tensor::from_data(ones, (&device, DType::BF16)));
    let model = vec![AdaptableLinear::from(Linear { weight, bias: None })];
    let error = load_adapter(model, &folder).unwrap_err().to_string();
    assert!(error.starts_with("device wgpu") && error.contains("found bf16 for 0; "), "{error}");
}

/// As the same table says: an error of the program that a device sees, or a loss that nobody takes for one.
#[test]
fn a_target_that_is_no_class_is_seen() {
    let device = device_from_env().unwrap();
    for targets in [[0, 3], [-1, 1]] {
        let losses = || {
            let logits = Tensor::<2>::zeros([2, 3], &device);
            let targets = Tensor::<1, Int>::from_data(targets, &device);
            lora_models::cross_entropy(logits, targets)
                .into_data()
                .iter::<f32>()
                .collect::<Vec<_>>()
        };
        match row_of(&device_name_from_env())[6].as_str() {
            "NaN" => {
                let losses = losses();
                let is_class = |target: &i32| (0..3).contains(target);
                for (loss, target) in losses.iter().zip(&targets) {
                    assert_eq!(loss.is_finite(), is_class(target), "{losses:?} of {targets:?}");
                }
            }
            "panics" => {
                assert!(std::panic::catch_unwind(AssertUnwindSafe(losses)).is_err(), "{targets:?}")
            }
            other => panic!("expected panics or NaN, found {other}"),
        }
    }
}

fn devices(arguments: &[&str], variable: &str) -> Output {
    example("devices", arguments, variable)
}

fn example(name: &str, arguments: &[&str], variable: &str) -> Output {
    let test = env::current_exe().unwrap();
    let profile = test.parent().and_then(Path::parent).unwrap();
    let program = profile.join("examples").join(name);
    Command::new(program).args(arguments).env("LORA_DEVICE", variable).output().unwrap()
}

#[test]
fn a_wrong_name_in_the_variable_is_told_with_the_variable() {
    for program in ["own_model", "finetune"] {
        let output = example(program, &[], "gpu");
        assert_eq!(output.status.code(), Some(2));
        let error = String::from_utf8(output.stderr).unwrap();
        let expected = "error: device 'gpu' of the variable LORA_DEVICE: expected ";
        assert!(error.starts_with(expected), "{program}: {error}");
    }
}

#[test]
fn the_example_lists_devices_and_says_how_the_others_are_got() {
    let output = devices(&[], "");
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    for backend in BackendName::ALL {
        match backend.is_compiled() {
            true => assert!(text.contains(backend.as_str()), "{text}"),
            false => assert!(text.contains(&format!("--features {backend}")), "{text}"),
        }
    }
    let output = devices(&["--device", "gpu"], "");
    assert_eq!(output.status.code(), Some(2));
    let error = String::from_utf8(output.stderr).unwrap();
    assert!(error.starts_with("error: device 'gpu': ") && error.lines().count() == 1, "{error}");
    let output = devices(&["--device", default_device_name()], "");
    assert_eq!(output.status.code(), Some(0));
}
