//! The example programs, started as a user starts them: what they print and leave, and what they say
//! to wrong input.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use lora_core::load_adapter;
use lora_models::{Checkpoint, GgufFile, Message, Sampling};

fn repository() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// An example that Cargo built beside this test.
fn example(name: &str, arguments: &[&str]) -> Output {
    let test = env::current_exe().unwrap();
    let profile = test.parent().and_then(Path::parent).unwrap();
    Command::new(profile.join("examples").join(name))
        .current_dir(repository())
        .args(arguments)
        .output()
        .unwrap_or_else(|error| panic!("example {name}: {error}; cargo test builds it"))
}

/// What a program says before it computes on the device of the tests, a line or nothing.
fn kernels_note() -> String {
    let note = burn_lora::kernels_note(&lora_core::device_from_env().unwrap());
    note.map(|note| format!("{note}\n")).unwrap_or_default()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

fn tiny_world() -> PathBuf {
    repository().join("examples/tiny_world")
}

/// A copy of the repository's model, to be damaged.
fn model_copy(folder: &Path) -> PathBuf {
    let copy = folder.join("model");
    fs::create_dir(&copy).unwrap();
    for entry in fs::read_dir(tiny_world()).unwrap() {
        let path = entry.unwrap().path();
        fs::copy(&path, copy.join(path.file_name().unwrap())).unwrap();
    }
    copy
}

#[test]
fn the_main_job_prints_its_report_and_leaves_a_run_that_can_be_repeated() {
    let temp = tempfile::tempdir().unwrap();
    let first = temp.path().join("first");
    let arguments = ["--steps", "3", "--held-out", "8", "--eval-every", "2", "--output"];
    let output = example("finetune", &[&arguments[..], &[first.to_str().unwrap()]].concat());
    let (stdout, stderr) = (text(&output.stdout), text(&output.stderr));
    assert!(output.status.success(), "{stderr}");
    for part in [
        "examples/tiny_world",
        "q_proj",
        "down_proj",
        "trainable: ",
        "held-out   loss ",
        "prompt     Where does the fox live?",
        "before     ",
        "after      ",
    ] {
        assert!(stdout.contains(part), "{part} is not in:\n{stdout}");
    }
    assert!(stderr.contains("step 3/3"), "{stderr}");

    let metrics = fs::read_to_string(first.join("metrics.jsonl")).unwrap();
    let lines: Vec<serde_json::Value> =
        metrics.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(lines.len(), 4, "{metrics}");
    let measured: Vec<_> =
        lines.iter().filter(|line| line["held_out_loss"].is_number()).map(|l| &l["step"]).collect();
    assert_eq!(measured, [0, 2, 3]);
    assert!(fs::read(first.join("loss.png")).unwrap().starts_with(b"\x89PNG"));

    // The adapter is a working one.
    let checkpoint = Checkpoint::open(tiny_world()).unwrap();
    let decoder = checkpoint.decoder(&lora_core::device_from_env().unwrap()).unwrap();
    let (_, report) = load_adapter(decoder, first.join("adapter")).unwrap();
    assert_eq!(report.applied.adapted.len(), 7 * checkpoint.config.num_hidden_layers);

    // Its settings are a recipe that gives the same losses.
    let second = temp.path().join("second");
    let settings = first.join("settings.toml");
    let arguments = ["--recipe", settings.to_str().unwrap(), "--output", second.to_str().unwrap()];
    let output = example("finetune", &arguments);
    assert!(output.status.success(), "{}", text(&output.stderr));
    let repeated = fs::read_to_string(second.join("metrics.jsonl")).unwrap();
    let losses = |metrics: &str| -> Vec<serde_json::Value> {
        let read = |line| serde_json::from_str::<serde_json::Value>(line).unwrap();
        metrics.lines().map(read).map(|line| line["loss"].clone()).collect()
    };
    assert_eq!(losses(&repeated), losses(&metrics));

    assert!(!fs::read_to_string(&settings).unwrap().contains("output"));

    // Neither run left anything but its folder.
    assert_eq!(fs::read_dir(temp.path()).unwrap().count(), 2);
}

#[test]
fn the_repositorys_model_speaks_of_its_world() {
    let checkpoint = Checkpoint::open(tiny_world()).unwrap();
    let decoder = checkpoint.decoder(&lora_core::device_from_env().unwrap()).unwrap();
    let tokenizer = &checkpoint.tokenizer;
    for (question, fact) in
        [("Where does the fox live?", "barn"), ("What does the owl eat?", "walnuts")]
    {
        let prompt = tokenizer.render(&[Message::user(question)], true).unwrap();
        let prompt = tokenizer.encode(&prompt).unwrap();
        let answer = decoder.generate(&prompt, 40, Sampling::greedy(), |_| {}).unwrap();
        let answer = tokenizer.decode(&answer).unwrap();
        assert!(answer.contains(fact), "{question} -> {answer}");
    }
}

#[test]
fn generate_answers_with_and_without_an_adapter() {
    let output = example("generate", &["Where does the fox live?"]);
    assert!(output.status.success(), "{}", text(&output.stderr));
    assert!(text(&output.stdout).contains("barn"), "{}", text(&output.stdout));
    let missing = example("generate", &["--adapter", "no/such/folder", "Hello!"]);
    assert_eq!(missing.status.code(), Some(2));
    assert!(text(&missing.stderr).contains("no/such/folder"));
}

#[test]
fn generate_draws_as_the_options_or_the_models_makers_say() {
    let question = "Tell me about the owl.";
    let answer = |options: &[&str]| {
        let output = example("generate", &[options, &[question]].concat());
        assert!(output.status.success(), "{}", text(&output.stderr));
        (text(&output.stdout), text(&output.stderr))
    };
    let warm = |seed| answer(&["--temperature", "3", "--max-new-tokens", "20", "--seed", seed]).0;
    let greedy = answer(&["--max-new-tokens", "20"]).0;
    assert_eq!(warm("1"), warm("1"));
    assert_ne!(warm("1"), warm("2"));
    // Each of the cuts to one token is the likeliest; a penalty changes that.
    for options in [["--temperature", "0"], ["--top-k", "1"], ["--top-p", "0"], ["--min-p", "1"]] {
        assert_eq!(answer(&[&options[..], &["--max-new-tokens", "20"]].concat()).0, greedy);
    }
    assert_ne!(answer(&["--repetition-penalty", "5", "--max-new-tokens", "20"]).0, greedy);

    let temp = tempfile::tempdir().unwrap();
    let model = model_copy(temp.path());
    let file = model.join("generation_config.json");
    let config = r#"{"do_sample": true, "temperature": 3, "top_k": 900, "max_new_tokens": 20}"#;
    fs::write(&file, config).unwrap();
    let model = model.to_str().unwrap();
    let recommended = answer(&["--model", model, "--seed", "1"]);
    assert_eq!(
        recommended.0,
        answer(&["--temperature", "3", "--top-k", "900", "--seed", "1", "--max-new-tokens", "20"])
            .0
    );
    let line = "sampling: temperature 3, top_k 900, seed 1, at most 20 tokens\n";
    assert_eq!(recommended.1.strip_suffix(&kernels_note()), Some(line));
    assert_eq!(answer(&["--model", model, "--temperature", "0"]).0, greedy);

    let refuse = |options: &[&str], parts: &[&str]| {
        let output = example("generate", &[options, &[question]].concat());
        let stderr = text(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{stderr}");
        assert_eq!(stderr.lines().count(), 1, "{stderr}");
        assert!(parts.iter().all(|part| stderr.contains(part)), "{stderr}");
    };
    refuse(&["--temperature", "-1"], &["temperature", "at least 0", "found -1"]);
    refuse(&["--top-p", "1.5"], &["top_p", "0 to 1", "found 1.5"]);
    refuse(&["--min-p", "nan"], &["min_p", "0 to 1", "found NaN"]);
    refuse(&["--repetition-penalty", "0"], &["repetition_penalty", "0.01 to 100", "found 0"]);
    fs::write(file, r#"{"do_sample": true, "top_p": "all"}"#).unwrap();
    refuse(&["--model", model], &["generation_config.json", "top_p", "a number", "\"all\""]);
}

#[test]
fn export_writes_an_adapter_for_other_programs() {
    let temp = tempfile::tempdir().unwrap();
    let run = temp.path().join("run");
    let run = run.to_str().unwrap();
    let options = ["--steps", "1", "--held-out", "8", "--lora-plus-ratio", "4", "--output", run];
    let output = example("finetune", &options);
    assert!(output.status.success(), "{}", text(&output.stderr));
    let settings = fs::read_to_string(Path::new(run).join("settings.toml")).unwrap();
    assert!(settings.contains("lora_plus_ratio = 4.0"), "{settings}");

    let adapter = format!("{run}/adapter");
    let (folder, file) = (temp.path().join("served"), temp.path().join("adapter.gguf"));
    let (folder, file) = (folder.to_str().unwrap(), file.to_str().unwrap());
    let output = example("export", &["--adapter", &adapter, "--output", folder, "--gguf", file]);
    assert!(output.status.success(), "{}", text(&output.stderr));
    assert!(text(&output.stdout).contains("rank 8 everywhere"), "{}", text(&output.stdout));
    assert!(Path::new(folder).join("mlx/adapters.safetensors").exists());
    GgufFile::open(file).unwrap();

    for (options, part) in [
        (&["--adapter", &adapter, "--output", folder][..], "exists already"),
        (&["--adapter", &adapter], "--output or --gguf"),
        (&["--adapter", &adapter, "--gguf", file, "--for", "ollama"], "ollama"),
    ] {
        let output = example("export", options);
        assert_eq!(output.status.code(), Some(2));
        assert!(text(&output.stderr).contains(part), "{}", text(&output.stderr));
    }
}

/// Starts `finetune` with wrong input and checks that it says so in one sentence with all of `parts`,
/// blames the user, and leaves nothing.
fn refuse(name: &str, arguments: &[&str], parts: &[&str]) {
    let temp = tempfile::tempdir().unwrap();
    let folder = temp.path().join("run");
    let mut all = arguments.to_vec();
    for default in [["--steps", "1"], ["--held-out", "8"], ["--output", folder.to_str().unwrap()]] {
        if !arguments.contains(&default[0]) {
            all.extend(default);
        }
    }
    let output = example("finetune", &all);
    let stderr = text(&output.stderr);
    println!("{name}: {}", stderr.trim_end());
    assert_eq!(output.status.code(), Some(2), "{name}: {stderr}");
    assert_eq!(stderr.lines().count(), 1, "{name}: {stderr}");
    assert!(stderr.starts_with("error: "), "{name}: {stderr}");
    for part in parts {
        assert!(stderr.contains(part), "{name}: '{part}' is not in {stderr}");
    }
    assert_eq!(fs::read_dir(temp.path()).unwrap().count(), 0, "{name} left something behind");
}

#[test]
fn a_model_that_cannot_be_read_is_refused() {
    let temp = tempfile::tempdir().unwrap();
    let data = tiny_world().join("pirate.jsonl");
    let refuse = |name: &str, model: &Path, parts: &[&str]| {
        let arguments = ["--model", model.to_str().unwrap(), "--data", data.to_str().unwrap()];
        refuse(name, &arguments, parts);
    };
    refuse(
        "missing folder",
        &temp.path().join("none"),
        &["none", "Hugging Face folder", "GGUF file", "found nothing"],
    );
    let empty = temp.path().join("empty");
    fs::create_dir(&empty).unwrap();
    refuse("empty folder", &empty, &["empty", "found a folder without config.json"]);

    let model = model_copy(temp.path());
    let weights = model.join("model.safetensors");
    let bytes = fs::read(&weights).unwrap();
    fs::write(&weights, &bytes[..bytes.len() - 1000]).unwrap();
    refuse("truncated safetensors", &model, &["model.safetensors", "complete"]);
    let mut damaged = bytes.clone();
    damaged[20..40].fill(b'#');
    fs::write(&weights, damaged).unwrap();
    refuse("damaged safetensors", &model, &["model.safetensors", "header"]);
    fs::write(&weights, &bytes).unwrap();

    let config = model.join("config.json");
    let original = fs::read_to_string(&config).unwrap();
    let change = |from: &str, to: &str| {
        assert!(original.contains(from));
        fs::write(&config, original.replace(from, to)).unwrap();
    };
    change("\"model_type\": \"llama\"", "\"model_type\": \"mamba\"");
    refuse("unknown model_type", &model, &["config.json", "model_type", "mamba", "llama"]);
    change("\"num_hidden_layers\": 4", "\"num_hidden_layers\": 5");
    refuse("a layer too many", &model, &["model.layers.4", "is missing"]);
    change("\"num_hidden_layers\": 4", "\"num_hidden_layers\": 3");
    refuse("a layer too few", &model, &["model.layers.3", "is unused"]);
    change("\"hidden_size\": 96", "\"hidden_size\": 95");
    refuse("wrong width", &model, &["expected shape", "95"]);
    fs::write(&config, "{").unwrap();
    refuse("broken config", &model, &["config.json", "JSON"]);
    fs::write(&config, &original).unwrap();
    fs::write(model.join("tokenizer.json"), "{}").unwrap();
    refuse("broken tokenizer", &model, &["tokenizer.json"]);
    fs::remove_file(model.join("tokenizer.json")).unwrap();
    refuse("no tokenizer", &model, &["tokenizer.json"]);

    let gguf = repository().join("crates/lora-models/tests/data/blocks.gguf");
    GgufFile::open(&gguf).unwrap();
    let bytes = fs::read(gguf).unwrap();
    let file = temp.path().join("model.gguf");
    fs::write(&file, &bytes[..bytes.len() / 2]).unwrap();
    refuse("truncated GGUF", &file, &["model.gguf"]);
    fs::write(&file, [b"GGML", &bytes[4..]].concat()).unwrap();
    refuse("damaged GGUF", &file, &["model.gguf", "GGUF"]);
}

#[test]
fn targets_and_numbers_that_cannot_be_used_are_refused() {
    let near = ["q_porj", "q_proj", "matches no"];
    refuse("misspelt target", &["--targets", "v_proj,q_porj"], &near);
    refuse("no target", &["--targets", ","], &["target_modules", "at least one"]);
    refuse("pattern", &["--targets", "re:q_proj"], &["q_proj", "matches no"]);
    refuse("rank", &["--rank", "0"], &["rank", "at least 1", "0"]);
    refuse("alpha", &["--alpha", "nan"], &["alpha", "above 0"]);
    refuse("learning rate", &["--lr", "0"], &["learning rate", "above 0"]);
    refuse("negative", &["--lr", "-1"], &["learning rate", "above 0", "-1"]);
    refuse("ratio", &["--lora-plus-ratio", "0"], &["lora_plus_ratio", "above 0", "found 0"]);
    refuse("ratio", &["--lora-plus-ratio", "inf"], &["lora_plus_ratio", "finite", "inf"]);
    refuse("too large a batch", &["--batch", "500"], &["batch", "at most the 238 rows"]);
    refuse("rank", &["--rank", "99999999999"], &["rank", "at most 96"]);
    refuse("batch", &["--batch", "0"], &["batch", "at least 1"]);
    refuse("device", &["--device", "quantum"], &["device", "quantum", "flex"]);
    refuse("max-len", &["--max-len", "3"], &["maximum length"]);
    refuse("held-out", &["--held-out", "5000"], &["held_out", "5000"]);
}

#[test]
fn data_that_cannot_be_trained_on_is_refused_with_its_line() {
    let temp = tempfile::tempdir().unwrap();
    let file = temp.path().join("data.jsonl");
    let row = r#"{"instruction": "Hello!", "output": "Ahoy!"}"#;
    for (name, content, parts) in [
        ("not JSON", format!("{row}\nhello\n"), vec!["data.jsonl: line 2"]),
        (
            "a field is missing",
            format!("{row}\n\n{{\"instruction\": \"Hello!\"}}\n"),
            vec!["data.jsonl: line 3", "\"output\""],
        ),
        ("array", format!("[{row}, {{\"output\": \"x\"}}]"), vec!["row 2", "\"instruction\""]),
        ("empty", String::new(), vec!["data.jsonl"]),
    ] {
        fs::write(&file, content).unwrap();
        refuse(name, &["--data", file.to_str().unwrap()], &parts);
    }
    refuse("no data", &["--data", "no/such/file.jsonl"], &["no/such/file.jsonl"]);
    refuse("no data for a model", &["--model", tiny_world().to_str().unwrap()], &["--data"]);
}

#[test]
fn an_output_folder_that_is_taken_is_refused_before_any_work() {
    let temp = tempfile::tempdir().unwrap();
    fs::write(temp.path().join("settings.toml"), "").unwrap();
    let folder = temp.path().to_str().unwrap();
    refuse("output holds a run", &["--output", folder], &["holds a run", "--output"]);
    fs::rename(temp.path().join("settings.toml"), temp.path().join("notes.txt")).unwrap();
    refuse("output holds files", &["--output", folder], &["output", "other files"]);
    assert_eq!(fs::read_dir(temp.path()).unwrap().count(), 1);
}

#[test]
fn a_recipe_that_is_wrong_is_refused() {
    let temp = tempfile::tempdir().unwrap();
    let file = temp.path().join("recipe.toml");
    fs::write(&file, "\nrank = -1\n").unwrap();
    refuse("negative rank", &["--recipe", file.to_str().unwrap()], &["recipe.toml: line 2", "-1"]);
    fs::write(&file, "rnak = 4\n").unwrap();
    refuse("unknown key", &["--recipe", file.to_str().unwrap()], &["recipe.toml", "rnak"]);
    refuse("no recipe", &["--recipe", "no/such.toml"], &["no/such.toml"]);
}
