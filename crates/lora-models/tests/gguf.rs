//! GGUF files as a user meets them: written by ggml's own package, made by hand, and damaged.

use std::path::Path;

use lora_models::{Error, ErrorKind, GgufFile, Value, WeightSource};

#[path = "../src/gguf/writer.rs"]
#[allow(dead_code, reason = "the unit tests use the other part")]
mod writer;
use writer::{Writer, on_disk};

#[path = "gguf/malformed.rs"]
mod malformed;
#[path = "gguf/tokenizers.rs"]
mod tokenizers;

fn open(writer: Writer) -> Result<GgufFile, Error> {
    open_bytes(&writer.finish())
}

fn open_bytes(bytes: &[u8]) -> Result<GgufFile, Error> {
    GgufFile::open(on_disk(bytes).path())
}

/// One key and two tensors.
fn small() -> Writer {
    Writer::new()
        .key("general.architecture", "llama")
        .f32s("output_norm.weight", &[2], &[1.0, 2.0])
        .tensor("token_embd.weight", 8, &[2, 32], &[1; 68])
}

#[track_caller]
fn unsupported<T: std::fmt::Debug>(answer: Result<T, Error>, parts: &[&str]) {
    let error = answer.unwrap_err();
    assert!(matches!(error.kind(), ErrorKind::Unsupported { .. }), "{error}");
    for part in parts {
        assert!(error.to_string().contains(part), "'{part}' in: {error}");
    }
}

// Good files.

/// Against ggml's Python package: tests/gguf_golden.py wrote both files. Its arithmetic is plain f32, a
/// rounding for each multiplication and each sum as here, so that the values are equal bit by bit.
#[test]
fn blocks_unpack_as_in_ggml() {
    let data = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data");
    let file = GgufFile::open(data.join("blocks.gguf")).unwrap();
    let bytes = std::fs::read(data.join("blocks.f32")).unwrap();
    let expected: Vec<f32> = bytes.as_chunks().0.iter().copied().map(f32::from_le_bytes).collect();

    let packed = ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"];
    let random = ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"];
    let tensors = packed.map(|name| (name, [6, 64])).into_iter();
    let tensors: Vec<_> = tensors.chain(random.map(|name| (name, [5, 256]))).collect();
    assert_eq!(file.names().len(), tensors.len());
    let mut rest = &expected[..];
    for (name, shape) in tensors {
        let tensor = file.read(name).unwrap();
        assert_eq!(tensor.shape, shape, "{name}");
        let values = tensor.values.to_f32();
        let (expected, others) = rest.split_at(shape.iter().product());
        rest = others;
        let difference = values.iter().zip(expected).map(|(a, b)| (a - b).abs());
        let largest = difference.fold(0.0, f32::max);
        let bits = |values: &[f32]| values.iter().map(|value| value.to_bits()).collect::<Vec<_>>();
        assert!(bits(&values) == bits(expected), "{name}: largest difference {largest}");
    }
    assert!(rest.is_empty());
    assert_eq!(file.strings("test.words").unwrap(), Some(vec!["a", "b c"]));
    assert_eq!(file.metadata()["test.float"], Value::F32(1e-5));
}

#[test]
fn tensors_have_hugging_face_names_and_shapes() {
    let file =
        open(small().f32s("blk.0.attn_v.weight", &[3, 2], &[0., 1., 2., 3., 4., 5.])).unwrap();
    let names = [
        "model.embed_tokens.weight",
        "model.layers.0.self_attn.v_proj.weight",
        "model.norm.weight",
    ];
    assert_eq!(file.names(), names);
    assert_eq!(file.shape(names[0]), Some(vec![2, 32]));
    assert_eq!(file.shape("token_embd.weight"), None);
    let v = file.read(names[1]).unwrap();
    assert_eq!((v.shape, v.values.to_f32()), (vec![3, 2], vec![0., 1., 2., 3., 4., 5.]));
    // 0x0101 is 1.5317e-5 as f16; each byte of the block is 1.
    assert_eq!(
        file.read(names[0]).unwrap().values.to_f32(),
        [half::f16::from_bits(0x0101).to_f32(); 64]
    );
}

#[test]
fn an_unknown_tensor_keeps_its_name() {
    let file = open(Writer::new().f32s("blk.0.extra.weight", &[1], &[4.0])).unwrap();
    assert_eq!(file.names(), ["blk.0.extra.weight"]);
    assert_eq!(file.read("blk.0.extra.weight").unwrap().values.to_f32(), [4.0]);
}

#[test]
fn version_two_reads_as_version_three() {
    let mut bytes = small().finish();
    bytes[4] = 2;
    let file = open_bytes(&bytes).unwrap();
    assert_eq!(file.version(), 2);
    assert_eq!(file.read("model.norm.weight").unwrap().values.to_f32(), [1.0, 2.0]);
}

#[test]
fn alignment_moves_the_data() {
    // The writer aligns to 32; an alignment of 8 only makes the data begin sooner.
    let bytes = Writer::new().key("general.alignment", 8_u32).f32s("t", &[2], &[1.0, 2.0]).finish();
    let header = 24 + (8 + 17 + 4 + 4) + (8 + 1 + 4 + 8 + 4 + 8); // head, key, tensor: 90 bytes
    let mut packed = bytes[..96].to_vec();
    packed.extend(&bytes[96..][..8]);
    assert_eq!((header, bytes.len()), (90, 104));
    assert_eq!(open_bytes(&packed).unwrap().read("t").unwrap().values.to_f32(), [1.0, 2.0]);

    let mut moved = bytes[..90].to_vec();
    moved[24 + 8 + 17 + 4] = 64; // the value of general.alignment
    moved.resize(128, 0);
    moved.extend(&bytes[96..][..8]);
    assert_eq!(open_bytes(&moved).unwrap().read("t").unwrap().values.to_f32(), [1.0, 2.0]);
}

/// Rows as llama.cpp's convert_hf_to_gguf.py lays them: `reshape(heads, 2, head_dim/2, ..)`,
/// `swapaxes(1, 2)`.
fn permuted(rows: &[[f32; 2]], heads: usize) -> Vec<[f32; 2]> {
    let half = rows.len() / heads / 2;
    let mut permuted = Vec::new();
    for head in 0..heads {
        for i in 0..half {
            for j in 0..2 {
                permuted.push(rows[(head * 2 + j) * half + i]);
            }
        }
    }
    permuted
}

fn attention(architecture: &str) -> (GgufFile, Vec<[f32; 2]>, Vec<[f32; 2]>) {
    let rows = |n: u8| (0..n).map(|i| [f32::from(i), f32::from(i) + 0.5]).collect::<Vec<_>>();
    let (q, k) = (rows(24), rows(12)); // 6 heads over 3, heads of 4
    let (q_bias, k_bias): (Vec<f32>, Vec<f32>) = (
        permuted(&q, 6).iter().map(|r| r[0]).collect(),
        permuted(&k, 3).iter().map(|r| r[0]).collect(),
    );
    let file = open(
        Writer::new()
            .key("general.architecture", architecture)
            .key("llama.attention.head_count", 6_u32)
            .key("llama.attention.head_count_kv", 3_u32)
            .f32s("blk.0.attn_q.weight", &[24, 2], permuted(&q, 6).as_flattened())
            .f32s("blk.0.attn_k.weight", &[12, 2], permuted(&k, 3).as_flattened())
            .f32s("blk.0.attn_v.weight", &[12, 2], k.as_flattened())
            .f32s("blk.0.attn_q.bias", &[24], &q_bias)
            .f32s("blk.0.attn_k.bias", &[12], &k_bias),
    )
    .unwrap();
    (file, q, k)
}

#[test]
fn rows_of_q_and_k_come_back_from_llama_cpps_order() {
    let (file, q, k) = attention("llama");
    let read = |name: &str| {
        file.read(&format!("model.layers.0.self_attn.{name}")).unwrap().values.to_f32()
    };
    assert_eq!(read("q_proj.weight"), q.as_flattened());
    assert_eq!(read("k_proj.weight"), k.as_flattened());
    assert_eq!(read("v_proj.weight"), k.as_flattened());
    assert_eq!(read("q_proj.bias"), q.iter().map(|row| row[0]).collect::<Vec<_>>());
    assert_eq!(read("k_proj.bias"), k.iter().map(|row| row[0]).collect::<Vec<_>>());
}

#[test]
fn other_architectures_keep_their_rows() {
    let (file, q, _) = attention("qwen2");
    let read = file.read("model.layers.0.self_attn.q_proj.weight").unwrap().values.to_f32();
    assert_eq!(read, permuted(&q, 6).as_flattened());
}

/// Two experts' matrices of one row of a Q8_0 block each: the scale 1, then the values.
#[test]
fn each_expert_of_a_packed_stack_is_read_alone() {
    let block = |value: u8| [[0x00, 0x3c].as_slice(), &[value; 32]].concat();
    let file = |architecture: &str, count: u32| {
        Writer::new()
            .key("general.architecture", architecture)
            .key(&format!("{architecture}.expert_count"), count)
            .tensor("blk.3.ffn_down_exps.weight", 8, &[2, 1, 32], &[block(3), block(7)].concat())
    };
    for (architecture, layer) in
        [("llama", "block_sparse_moe.experts.X.w2"), ("qwen3moe", "mlp.experts.X.down_proj")]
    {
        let file = open(file(architecture, 2)).unwrap();
        let name = |number: &str| format!("model.layers.3.{}.weight", layer.replace('X', number));
        assert_eq!(file.names(), [name("0"), name("1")]);
        for (number, value) in [("0", 3.0), ("1", 7.0)] {
            let tensor = file.read(&name(number)).unwrap();
            assert_eq!((tensor.shape, tensor.values.to_f32()), (vec![1, 32], vec![value; 32]));
        }
    }
    // A file that opens all the same; its config says what is wrong.
    assert_eq!(open(file("llama", 3)).unwrap().names(), ["blk.3.ffn_down_exps.weight"]);
}

/// A small file can name as many experts as a number can: a byte for each, or none on a disk with holes.
#[test]
fn experts_without_end_stay_one_tensor() {
    let count = 3 * (1 << 16) + 1;
    let file = open(
        Writer::new()
            .key("general.architecture", "llama")
            .key("llama.expert_count", count as u32)
            .tensor("blk.0.ffn_up_exps.weight", 24, &[count as u64, 1, 1], &vec![0; count]),
    )
    .unwrap();
    assert_eq!(file.names(), ["blk.0.ffn_up_exps.weight"]);
}

// Files and tensors that cannot be read.

#[test]
fn an_absent_file_says_which() {
    let error = GgufFile::open("no/such/file.gguf").unwrap_err();
    assert!(matches!(error.kind(), ErrorKind::Io { .. }), "{error}");
    assert!(error.to_string().contains("no/such/file.gguf"), "{error}");
}

#[test]
fn an_absent_tensor_is_named() {
    let error = open(small()).unwrap().read("model.layers.9.mlp.up_proj.weight").unwrap_err();
    assert!(error.to_string().contains("model.layers.9.mlp.up_proj.weight"), "{error}");
}

#[test]
fn a_type_without_a_decoder_is_named_with_its_tensor() {
    let file = open(Writer::new().tensor("output.weight", 23, &[1, 256], &[0; 136])).unwrap();
    let parts = ["tensor 'output.weight'", "'IQ4_XS'", "supported: F32, F16, Q4_0, Q4_1, Q5_0"];
    unsupported(file.read("lm_head.weight"), &parts);
}

#[test]
fn rows_that_do_not_divide_among_the_heads() {
    let file = open(
        Writer::new()
            .key("general.architecture", "llama")
            .key("llama.attention.head_count", 4_u32)
            .f32s("blk.0.attn_q.weight", &[12, 1], &[0.0; 12]),
    )
    .unwrap();
    let error = file.read("model.layers.0.self_attn.q_proj.weight").unwrap_err().to_string();
    assert!(error.contains("blk.0.attn_q.weight") && error.contains("4 heads"), "{error}");
}

// The property: damage of any kind is answered, never a panic, whatever is then asked for.

/// Every key of a small Llama but its tokenizer's, and tensors.
fn llama() -> Writer {
    Writer::new()
        .key("general.architecture", "llama")
        .key("general.alignment", 32_u32)
        .key("llama.embedding_length", 4_u32)
        .key("llama.feed_forward_length", 2_u32)
        .key("llama.block_count", 1_u32)
        .key("llama.attention.head_count", 2_u32)
        .key("llama.attention.layer_norm_rms_epsilon", 1e-5_f32)
        .key("llama.context_length", 8_u32)
        .f32s("token_embd.weight", &[4, 4], &[0.5; 16])
        .f32s("rope_freqs.weight", &[1], &[1.0])
        .f32s("blk.0.attn_q.weight", &[4, 4], &[0.5; 16])
        .tensor("blk.0.ffn_up.weight", 8, &[1, 32], &[0; 34])
}

fn ask_everything(bytes: &[u8]) -> Result<(), Error> {
    let file = open_bytes(bytes)?;
    for name in file.names() {
        if let Ok(tensor) = file.read(&name) {
            assert_eq!(tensor.shape.iter().product::<usize>(), tensor.values.len());
        }
    }
    let (config, parts) = (file.config(), file.tokenizer_parts());
    if let Ok(parts) = &parts {
        let ids = parts.tokenizer.encode("ab é 12<e>", true);
        let _ = ids.map(|encoding| parts.tokenizer.decode(encoding.get_ids(), false));
    }
    config.and(parts.map(|_| ()))
}

#[track_caller]
fn damage(writer: Writer) {
    let bytes = writer.finish();
    ask_everything(&bytes).unwrap();
    for position in 0..bytes.len() {
        for flip in [0x01, 0x80, 0xff] {
            let mut damaged = bytes.clone();
            damaged[position] ^= flip;
            let _ = ask_everything(&damaged);
        }
        assert!(ask_everything(&bytes[..position]).is_err(), "cut at {position}");
    }
}

#[test]
fn every_flipped_byte_and_every_cut_is_answered_without_panic() {
    damage(
        llama()
            .key("tokenizer.ggml.model", "gpt2")
            .key("tokenizer.ggml.pre", "smollm")
            .key("tokenizer.ggml.tokens", ["<e>", "a", "b", "ab"])
            .key("tokenizer.ggml.token_type", [3_i32, 1, 1, 1])
            .key("tokenizer.ggml.merges", ["a b"])
            .key("tokenizer.ggml.eos_token_id", 0_u32),
    );
}

#[test]
fn the_same_with_a_tokenizer_of_sentence_piece() {
    damage(
        llama()
            .key("tokenizer.ggml.model", "llama")
            .key("tokenizer.ggml.tokens", ["?", "<e>", "b", "\u{2581}b"])
            .key("tokenizer.ggml.token_type", [2_i32, 3, 1, 1])
            .key("tokenizer.ggml.scores", [0_f32, 0.0, -2.0, -1.0])
            .key("tokenizer.ggml.bos_token_id", 1_u32),
    );
}
