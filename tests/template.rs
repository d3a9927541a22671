//! The example that shows conversations as a model meets them, started as a user starts it.

use std::env;
use std::io::Write;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use serde_json::{Value, json};

fn example(arguments: &[&str], input: &str) -> Output {
    let test = env::current_exe().unwrap();
    let profile = test.parent().and_then(Path::parent).unwrap();
    let mut child = Command::new(profile.join("examples/template"))
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
    child.wait_with_output().unwrap()
}

#[test]
fn conversations_are_rendered_with_the_models_template() {
    let question = json!({"role": "user", "content": "Hello!"});
    let lines = [
        json!([question]).to_string(),
        json!({"messages": [question], "add_generation_prompt": true}).to_string(),
    ];
    let output = example(&["-"], &lines.join("\n"));
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert_eq!(text.matches("Hello!").count(), 2, "{text}");
    assert!(text.trim_end().ends_with("assistant"), "{text}");
}

#[test]
fn a_template_alone_answers_in_json() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("own.jinja");
    let template =
        "{{ bos_token }}{% generation %}{{ messages[0].content + x }}{% endgeneration %}";
    std::fs::write(&path, template).unwrap();
    let message = json!({"role": "assistant", "content": "é"});
    let lines = [
        json!({"messages": [message], "marked": true, "variables": {"x": "!"}}).to_string(),
        json!([message]).to_string(),
        "{}".to_owned(),
    ];
    let arguments = ["--json", "--model", path.to_str().unwrap(), "--token", "bos_token=<s>", "-"];
    let output = example(&arguments, &lines.join("\n"));
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let text = String::from_utf8(output.stdout).unwrap();
    let answers: Vec<Value> =
        text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(answers[0], json!({"text": "<s>é!", "answers": [[3, 6]]}));
    let error = |answer: &Value| answer["error"].as_str().unwrap().to_owned();
    assert!(error(&answers[1]).starts_with("line 2: "), "{}", answers[1]);
    assert!(error(&answers[1]).contains("own.jinja: chat template \"default\": line 1: "));
    assert!(error(&answers[2]).contains("line 3: missing field `messages`"), "{}", answers[2]);
}

#[test]
fn a_refusal_ends_the_program_without_json() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("own.jinja");
    std::fs::write(&path, "{{ raise_exception('never') }}").unwrap();
    let output = example(&["--model", path.to_str().unwrap(), "-"], r#"[{"role": "user"}]"#);
    assert_eq!(output.status.code(), Some(2));
    let message = String::from_utf8(output.stderr).unwrap();
    assert_eq!(message, "error: line 1: the chat template refuses this conversation: never\n");
}
