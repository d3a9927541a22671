//! The examples that talk with a model and that write it merged, started as a user starts them.

use std::env;
use std::io::Write;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use burn::module::Param;
use burn::tensor::{DType, Distribution, Tensor};
use lora_core::{AdapterInfo, LoraConfig, VisitLora, inject, save_adapter};
use lora_models::Checkpoint;
use tempfile::TempDir;

fn example(name: &str, arguments: &[&str], input: &str) -> Output {
    example_with(name, arguments, input.as_bytes())
}

fn example_with(name: &str, arguments: &[&str], input: &[u8]) -> Output {
    let test = env::current_exe().unwrap();
    let profile = test.parent().and_then(Path::parent).unwrap();
    let mut child = Command::new(profile.join("examples").join(name))
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    // A program that has refused its arguments does not read.
    let _ = child.stdin.take().unwrap().write_all(input);
    child.wait_with_output().unwrap()
}

/// What the program wrote, which must have ended well.
#[track_caller]
fn told(name: &str, arguments: &[&str], input: &str) -> String {
    let output = example(name, arguments, input);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

#[track_caller]
fn refused(name: &str, arguments: &[&str], part: &str) {
    let output = example(name, arguments, "Hello\n");
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(2), "{text}");
    assert!(text.contains(part), "'{part}' in: {text}");
}

/// An adapter that turns the small model's answers into something else.
fn adapter() -> TempDir {
    let device = lora_core::device_from_env().unwrap();
    let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/tiny_world");
    let decoder = Checkpoint::open(model).unwrap().decoder(&device).unwrap();
    let (mut decoder, _) = inject(decoder, &LoraConfig::new(4, 8.0)).unwrap();
    device.seed(1);
    decoder.visit_lora_mut("", &mut |_, layer| {
        if let Some(adapter) = layer.adapter_mut() {
            let a = adapter.lora_a.val();
            let noise = Tensor::random(a.dims(), Distribution::Normal(0.0, 0.3), &device);
            adapter.lora_a = Param::from_tensor(noise);
        }
    });
    let folder = tempfile::tempdir().unwrap();
    save_adapter(&decoder, folder.path().join("adapter"), &AdapterInfo::default()).unwrap();
    folder
}

#[test]
fn a_talk_goes_on_and_the_adapter_is_switched() {
    let plain = told("chat", &[], "Where does the owl live?\n");
    assert_eq!(plain.trim(), "The owl lives in the hollow oak.");

    let folder = adapter();
    let path = folder.path().join("adapter");
    let arguments = ["--adapter", path.to_str().unwrap(), "--max-new-tokens", "20"];
    let question = "Where does the owl live?";
    let input = format!(
        "{question}\n/adapter off\n/reset\n\n{question}\n/adapter on\n/reset\n{question}\n/nothing\n/exit\nunread\n"
    );
    let text = told("chat", &arguments, &input);
    let lines: Vec<&str> = text.lines().collect();
    let at = |line: &str| lines.iter().position(|found| *found == line).expect(line);
    let (off, on) = (at("the model without its adapter"), at("the model with its adapter"));
    assert_eq!(lines[off + 1..on], ["a new conversation", plain.trim()]);
    let (first, again) = (&lines[..off], &lines[on + 2..lines.len() - 1]);
    assert_eq!(first, again, "{text}");
    assert_ne!(first.join("\n"), plain.trim());
    assert!(lines[lines.len() - 1].contains("'/nothing' is no command"), "{text}");
}

#[test]
fn a_model_written_with_its_adapter_merged_answers_as_with_it() {
    let folder = adapter();
    let (path, output) = (folder.path().join("adapter"), folder.path().join("merged"));
    let (path, output) = (path.to_str().unwrap(), output.to_str().unwrap());
    let arguments = ["--adapter", path, "--output", output, "--dtype", "f32", "--max-shard", "1"];
    let text = told("merge", &arguments, "");
    assert!(text.contains("merged 28 layers") && text.contains("written"), "{text}");

    let ask = |arguments: &[&str]| told("chat", arguments, "Where does the fox live?\n");
    let beside = ask(&["--adapter", path, "--max-new-tokens", "16"]);
    assert_eq!(ask(&["--model", output, "--max-new-tokens", "16"]), beside);
    refused("merge", &arguments, "exists");
}

#[test]
fn a_script_hears_of_messages_without_an_answer() {
    let output = example("chat", &["--max-new-tokens", "4"], "/system\n\u{e9}\n/exit\n");
    assert!(output.status.success());
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(text.contains("a new conversation, without a system message"), "{text}");

    // A message longer than the model's longest text.
    let output = example("chat", &[], &format!("{}\n", "owl ".repeat(400)));
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(1), "{text}");
    assert!(text.contains("1 of the messages had no answer"), "{text}");
}

#[test]
fn a_line_of_other_bytes_does_not_end_a_talk() {
    let mut input = b"Where \xff does\n".to_vec();
    input.extend(b"Where does the owl live?\n");
    let output = example_with("chat", &[], &input);
    let told = String::from_utf8_lossy(&output.stdout).into_owned();
    assert_eq!(told.trim(), "The owl lives in the hollow oak.");
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(text.contains("expected a line of UTF-8 text"), "{text}");
}

/// In bf16 the two roundings give other logits, and eager's are those of transformers.
#[test]
fn logits_are_compared_in_other_types() {
    let case = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/families/qwen2");
    let (model, input) = (case.to_str().unwrap(), case.join("golden.safetensors"));
    let compare = |more: &[&str]| {
        let arguments = [&["--model", model, "--input", input.to_str().unwrap()], more].concat();
        told("logits", &arguments, "")
    };
    if lora_core::supports_dtype(&lora_core::device_from_env().unwrap(), DType::BF16) {
        let [plain, eager] =
            [&["--dtype", "bf16"][..], &["--dtype", "bf16", "--eager"]].map(compare);
        assert!(plain.contains("largest relative difference") && plain != eager, "{plain}{eager}");
    }
    assert_eq!(compare(&[]), compare(&["--eager"]));
}

#[test]
fn what_cannot_be_used_is_refused_in_a_sentence() {
    refused("chat", &["--adapter", "no/such/adapter"], "adapter_config.json");
    refused("chat", &["--model", "no/such/model"], "no/such/model");
    refused("chat", &["--temperature", "-1"], "temperature");
    refused("chat", &["--dtype", "q4"], "expected f32, f16 or bf16");
    let folder = tempfile::tempdir().unwrap();
    let output = folder.path().join("x");
    let output = output.to_str().unwrap();
    refused("merge", &["--model", "no/such/model", "--output", output], "no/such/model");
}
