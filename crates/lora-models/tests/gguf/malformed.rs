//! Damaged and hostile files, one test for each way, with the sentence that a user reads.

use std::fmt::Debug;

use lora_models::{Error, ErrorKind, GgufFile, WeightSource};

use crate::writer::{Field, Writer};
use crate::{open, open_bytes, small};

const F32: u32 = 0;

/// The answer is an error that reads, after the file's path, like this.
#[track_caller]
fn says<T: Debug>(answer: Result<T, Error>, sentence: &str) {
    let error = answer.unwrap_err();
    let kind = error.kind();
    assert!(matches!(kind, ErrorKind::Malformed { .. } | ErrorKind::Unsupported { .. }), "{error}");
    let text = error.to_string();
    let (_path, found) = text.split_once(": ").unwrap();
    assert_eq!(found, sentence);
}

/// The bytes of a value, without its type.
fn payload(value: &impl Field) -> Vec<u8> {
    let mut bytes = Vec::new();
    value.write(&mut bytes);
    bytes
}

/// A key of any type, with these bytes for its value.
fn raw_key(kind: u32, parts: &[&[u8]]) -> Writer {
    Writer::new().raw_key("k", kind, &parts.concat())
}

/// A good file whose bytes from `place` on are replaced by `bytes`.
fn patched(place: usize, bytes: &[u8]) -> Result<GgufFile, Error> {
    let mut file = small().finish();
    file[place..place + bytes.len()].copy_from_slice(bytes);
    open_bytes(&file)
}

// The head: magic, version, counts.

#[test]
fn an_empty_file() {
    let sentence = "magic: expected 4 more bytes at byte 0 (is the file complete?), found 0 until the end of the file";
    says(open_bytes(b""), sentence);
}

#[test]
fn a_wrong_magic() {
    says(patched(0, b"GGML"), "magic: expected 'GGUF' (is this a GGUF file?), found 'GGML'");
    says(
        patched(0, b"PK\x03\x04"),
        "magic: expected 'GGUF' (is this a GGUF file?), found 'PK\\x03\\x04'",
    );
}

#[test]
fn an_unknown_version() {
    for version in [0_u8, 1, 4] {
        let sentence = "is not supported; supported: 2 and 3, little endian";
        says(patched(4, &[version]), &format!("GGUF version '{version}' {sentence}"));
    }
}

#[test]
fn a_big_endian_file() {
    let sentence =
        "GGUF version '3, big endian' is not supported; supported: 2 and 3, little endian";
    says(patched(4, &3_u32.to_be_bytes()), sentence);
}

#[test]
fn a_huge_number_of_tensors_or_keys() {
    let huge = u64::MAX.to_le_bytes();
    says(
        patched(8, &huge),
        "tensor count: expected at most 65536 tensors, found 18446744073709551615",
    );
    says(patched(16, &huge), "key count: expected at most 65536 keys, found 18446744073709551615");
}

#[test]
fn a_negative_number_of_tensors_or_keys_is_a_huge_one() {
    let negative = (-2_i64).to_le_bytes();
    says(
        patched(8, &negative),
        "tensor count: expected at most 65536 tensors, found 18446744073709551614",
    );
    says(
        patched(16, &negative),
        "key count: expected at most 65536 keys, found 18446744073709551614",
    );
}

#[test]
fn more_tensors_or_keys_than_the_file_can_hold() {
    let many = 60_000_u64.to_le_bytes();
    let end = small().finish().len();
    let left = |from: usize| {
        format!("(is the file complete?), found {} until the end of the file", end - from)
    };
    says(
        patched(8, &many),
        &format!("tensor count: expected 1920000 more bytes at byte 16 {}", left(16)),
    );
    says(
        patched(16, &many),
        &format!("key count: expected 780000 more bytes at byte 24 {}", left(24)),
    );
}

#[test]
fn a_count_other_than_the_truth_runs_into_what_follows() {
    // The first tensor's entry as a key, and then a tensor's entry from its middle on.
    let sentence = "tensor '': expected 1 to 4 dimensions, found 0";
    says(patched(16, &2_u64.to_le_bytes()), sentence);
    // The key as a tensor.
    let sentence = "tensor 'general.architecture': expected 1 to 4 dimensions, found 8";
    says(patched(16, &0_u64.to_le_bytes()), sentence);
}

// Keys.

#[test]
fn a_string_longer_than_the_file() {
    let sentence = "key 'k': expected 1000 more bytes at byte 45 (is the file complete?), \
                    found 19 until the end of the file";
    says(open(raw_key(8, &[&payload(&1000_u64)])), sentence);
}

#[test]
fn a_string_longer_than_the_limit() {
    let sentence =
        "key 'k': expected a string of at most 67108864 bytes, found 18446744073709551615";
    says(open(raw_key(8, &[&payload(&-1_i64)])), sentence);
}

#[test]
fn a_name_longer_than_the_limit() {
    let long = "k".repeat((1 << 16) + 1);
    let sentence = "name of key 0: expected a string of at most 65536 bytes, found 65537";
    says(open(Writer::new().key(&long, 1_u8)), sentence);
    let sentence = "name of tensor 0: expected a string of at most 65536 bytes, found 65537";
    says(open(Writer::new().f32s(&long, &[1], &[0.0])), sentence);
}

#[test]
fn a_string_that_is_not_utf8() {
    let sentence = "key 'k': expected UTF-8 text, found an invalid byte at 1";
    says(open(raw_key(8, &[&payload(&2_u64), b"a\xff"])), sentence);
    let mut file = Writer::new().key("k", 1_u8).finish();
    file[32] = 0xff;
    says(open_bytes(&file), "name of key 0: expected UTF-8 text, found an invalid byte at 0");
    let mut file = Writer::new().f32s("t", &[1], &[0.0]).finish();
    file[32] = 0xff;
    says(open_bytes(&file), "name of tensor 0: expected UTF-8 text, found an invalid byte at 0");
}

#[test]
fn an_unknown_value_type() {
    let sentence = "key 'k': expected a value type from 0 to 12, found 13";
    says(open(raw_key(13, &[&[0; 8]])), sentence);
    let sentence = "key 'k': expected a value type from 0 to 12, found 4294967295";
    says(open(raw_key(u32::MAX, &[&[0; 8]])), sentence);
}

#[test]
fn a_bool_that_is_neither() {
    says(open(raw_key(7, &[&[2]])), "key 'k': expected 0 or 1 for a bool, found 2");
    let array = raw_key(9, &[&payload(&7_u32), &payload(&2_u64), &[1, 3]]);
    says(open(array), "key 'k': expected 0 or 1 for a bool, found 3");
}

#[test]
fn a_key_twice() {
    let writer = Writer::new().key("k", 1_u8).key("k", 1_u8);
    says(open(writer), "key 'k': expected each key once, found a second one");
}

#[test]
fn an_unknown_element_type() {
    let sentence = "key 'k': expected an element type from 0 to 12, found 99";
    says(open(raw_key(9, &[&payload(&99_u32), &payload(&0_u64)])), sentence);
}

#[test]
fn an_array_longer_than_the_file() {
    let array = |length: i64| raw_key(9, &[&payload(&12_u32), &payload(&length)]);
    let sentence = "key 'k': expected 8000000 more bytes at byte 49 (is the file complete?), \
                    found 15 until the end of the file";
    says(open(array(1_000_000)), sentence);
    let sentence =
        "key 'k': expected at most 4194304 more array elements, found 18446744073709551615";
    says(open(array(-1)), sentence);
}

#[test]
fn arrays_nested_too_deep() {
    // Each level is an array of one array: what an array that holds itself would be, written out.
    let level = [payload(&9_u32), payload(&1_u64)].concat();
    for levels in [5, 10_000] {
        let sentence = "key 'k': expected at most 4 arrays inside each other, found one more";
        says(open(raw_key(9, &[&level.repeat(levels)])), sentence);
    }
}

#[test]
fn arrays_with_too_many_elements_together() {
    // 2,000 arrays of 2,100 elements, in a file of about as many bytes.
    let row = [&payload(&0_u32)[..], &payload(&2_100_u64), &[0; 2_100]].concat();
    let rows = raw_key(9, &[&payload(&9_u32), &payload(&2_000_u64), &row.repeat(2_000)]);
    let left = (4 << 20) - 2_000 - 1_996 * 2_100;
    let sentence = format!("key 'k': expected at most {left} more array elements, found 2100");
    says(open(rows), &sentence);
}

#[test]
fn an_alignment_that_is_no_power_of_two() {
    let place = "key 'general.alignment': expected a power of two of at most 1048576";
    for alignment in [0_i64, 24, 1 << 30, -32] {
        let sentence = format!("{place}, found {alignment}");
        says(open(small().key("general.alignment", alignment)), &sentence);
    }
    let sentence = format!("{place}, found the string '32'");
    says(open(small().key("general.alignment", "32")), &sentence);
}

// Tensors.

#[test]
fn a_tensor_twice() {
    let writer = Writer::new().f32s("t", &[1], &[0.0]).f32s("t", &[1], &[0.0]);
    says(open(writer), "tensor 't': expected each tensor once, found a second one");
}

#[test]
fn too_many_or_no_dimensions() {
    let place = "tensor 't': expected 1 to 4 dimensions";
    says(open(Writer::new().f32s("t", &[1; 5], &[0.0])), &format!("{place}, found 5"));
    // The entry is shorter than any tensor's, so the file ends with some bytes of data.
    says(open(Writer::new().f32s("t", &[], &[0.0])), &format!("{place}, found 0"));
    let mut file = Writer::new().f32s("t", &[1], &[0.0]).finish();
    file[33..37].copy_from_slice(&(-1_i32).to_le_bytes());
    says(open_bytes(&file), &format!("{place}, found 4294967295"));
}

#[test]
fn a_size_of_zero() {
    let sentence = "tensor 't': expected sizes above 0, found [2, 0]";
    says(open(Writer::new().f32s("t", &[2, 0], &[])), sentence);
}

#[test]
fn sizes_that_do_not_fit_in_memory() {
    let place = "tensor 't': expected sizes that fit in memory";
    let negative = [(-1_i64).cast_unsigned()];
    let sentence = format!("{place}, found [18446744073709551615]");
    says(open(Writer::new().raw_tensor("t", F32, &negative, 0)), &sentence);
    let sentence = format!("{place}, found [4294967296, 4294967296]");
    says(open(Writer::new().raw_tensor("t", F32, &[1 << 32; 2], 0)), &sentence);
    // Packed as Q2_K they would fit, as f32 they would not.
    let sentence = format!("{place}, found [18014398509481984, 256]");
    says(open(Writer::new().raw_tensor("t", 10, &[1 << 54, 256], 0)), &sentence);
}

#[test]
fn a_row_that_is_no_whole_number_of_blocks() {
    let place = "tensor 't': expected a last size that is a multiple of";
    let sentence = format!("{place} 32, for Q4_1, found [32, 33]");
    says(open(Writer::new().tensor("t", 3, &[32, 33], &[0; 2000])), &sentence);
    let sentence = format!("{place} 256, for Q4_K, found [256, 32]");
    says(open(Writer::new().tensor("t", 12, &[256, 32], &[0; 8000])), &sentence);
}

const READABLE: &str = "is not supported; supported: F32, F16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q2_K, Q3_K, \
                        Q4_K, Q5_K, Q6_K, BF16";

#[test]
fn an_unknown_tensor_type() {
    // One that ggml had once (Q4_2), and two that it never had.
    for kind in [4, 99, u32::MAX] {
        let sentence = format!("tensor 't' of the type '{kind}' {READABLE}");
        says(open(Writer::new().tensor("t", kind, &[1], &[0; 4])), &sentence);
    }
}

#[test]
fn a_tensor_type_that_cannot_be_read() {
    let file = open(Writer::new().tensor("output.weight", 23, &[1, 256], &[0; 136])).unwrap();
    let sentence = format!("tensor 'output.weight' of the type 'IQ4_XS' {READABLE}");
    says(file.read("lm_head.weight"), &sentence);
}

#[test]
fn an_offset_that_is_not_aligned() {
    let data = || Writer::new().f32s("u", &[32], &[0.0; 32]);
    let place = "tensor 't': expected an offset that is a multiple of";
    says(open(data().raw_tensor("t", F32, &[1], 4)), &format!("{place} 32, found 4"));
    let aligned = data().key("general.alignment", 64_u32);
    says(open(aligned.raw_tensor("t", F32, &[1], 96)), &format!("{place} 64, found 96"));
}

#[test]
fn an_offset_past_the_end() {
    let place = "tensor 't': expected 4 bytes of data within the file's 64 (is the file complete?)";
    for offset in [1 << 40, u64::MAX - 31] {
        let sentence = format!("{place}, found offset {offset} after byte 64");
        says(open(Writer::new().raw_tensor("t", F32, &[1], offset)), &sentence);
    }
}

#[test]
fn data_of_two_tensors_in_one_place() {
    let t = |size: usize| Writer::new().f32s("t", &[size as u64], &vec![0.0; size]);
    let place = "tensor 'u': expected data after that of 't', which ends at byte";
    let sentence = format!("{place} 128, found data from byte 96");
    says(open(t(8).raw_tensor("u", F32, &[8], 0)), &sentence);
    // One begins inside the other.
    let sentence = format!("{place} 160, found data from byte 128");
    says(open(t(16).raw_tensor("u", F32, &[8], 32)), &sentence);
}

/// What a file says that ends inside each of its parts.
#[test]
fn a_file_cut_in_each_part() {
    let more = |place: &str, n: usize, at: usize, end: usize| {
        let left = end - at;
        let complete = "(is the file complete?)";
        format!(
            "{place}: expected {n} more bytes at byte {at} {complete}, found {left} until the end of the file"
        )
    };
    // A name of 20 bytes from byte 32 on, the value's type, and the value in byte 56.
    let key = Writer::new().key("general.architecture", 1_u8).finish();
    let name = "key 'general.architecture'";
    for (end, place, n, at) in [
        (3, "magic", 4, 0),
        (7, "version", 4, 4),
        (15, "tensor count", 8, 8),
        (23, "key count", 8, 16),
        (36, "key count", 13, 24), // no key is shorter
        (51, "name of key 0", 20, 32),
        (55, name, 4, 52),
        (56, name, 1, 56),
    ] {
        says(open_bytes(&key[..end]), &more(place, n, at, end));
    }

    // An array of one string from byte 39 on, and a tensor's entry from byte 61 to 94.
    let tensor = Writer::new().key("key", ["ab"]).f32s("t", &[3], &[1.0, 2.0, 3.0]).finish();
    for (end, place, n, at) in [
        (47, "tensor count", 32, 16), // no tensor's entry is shorter
        (50, "key 'key'", 8, 43),
        (58, "key 'key'", 8, 51),
        (60, "key 'key'", 2, 59),
        (68, "name of tensor 0", 8, 61),
        (69, "name of tensor 0", 1, 69),
        (73, "tensor 't'", 4, 70),
        (81, "tensor 't'", 8, 74),
        (85, "tensor 't'", 4, 82),
        (93, "tensor 't'", 8, 86),
    ] {
        says(open_bytes(&tensor[..end]), &more(place, n, at, end));
    }
    // In the padding before the data, and in the data.
    for end in [95, 107] {
        let place = "tensor 't': expected 12 bytes of data within the file's";
        let sentence =
            format!("{place} {end} (is the file complete?), found offset 0 after byte 96");
        says(open_bytes(&tensor[..end]), &sentence);
    }
    assert_eq!(tensor.len(), 108);
    assert!(open_bytes(&tensor).is_ok());
}

// Models.

#[test]
fn an_unknown_architecture() {
    let config = |writer: Writer| open(writer).unwrap().config();
    let error = config(Writer::new().key("general.architecture", "mamba")).unwrap_err().to_string();
    let sentence = "general.architecture 'mamba' is not supported; supported: llama";
    assert!(error.contains(sentence), "{error}");
    let sentence = "key 'general.architecture': expected this key, found none";
    says(config(Writer::new()), sentence);
    let sentence = "key 'general.architecture': expected a string, found 7";
    says(config(Writer::new().key("general.architecture", 7_u32)), sentence);
}

// Tokenizers. Each test changes one of these keys.

const TOKENS: [&str; 5] = ["<s>", "a", "b", "ab", "?"];
const TYPES: [i32; 5] = [3, 1, 1, 1, 2];

fn byte_level(merges: &[&str]) -> Writer {
    let keys = Writer::new().key("tokenizer.ggml.model", "gpt2").key("tokenizer.ggml.pre", "qwen2");
    keys.key("tokenizer.ggml.merges", merges.to_vec())
}

fn sentence_piece(scores: &[f32]) -> Writer {
    let keys = Writer::new().key("tokenizer.ggml.model", "llama");
    keys.key("tokenizer.ggml.scores", scores.to_vec())
}

fn tokens(writer: Writer) -> Writer {
    writer.key("tokenizer.ggml.tokens", TOKENS).key("tokenizer.ggml.token_type", TYPES)
}

#[track_caller]
fn tokenizer_says(writer: Writer, sentence: &str) {
    says(open(writer).unwrap().tokenizer_parts(), sentence);
}

#[test]
fn the_tokenizers_that_are_damaged_below_are_good_otherwise() {
    for writer in [byte_level(&["a b"]), sentence_piece(&[0.0; 5])] {
        let parts = open(tokens(writer)).unwrap().tokenizer_parts().unwrap();
        assert_eq!(parts.tokenizer.get_vocab_size(true), 5);
    }
}

#[test]
fn an_unknown_kind_of_tokenizer() {
    let writer = Writer::new().key("tokenizer.ggml.model", "t5");
    let sentence = "tokenizer.ggml.model 't5' is not supported; supported: gpt2, llama";
    tokenizer_says(writer, sentence);
    let writer =
        Writer::new().key("tokenizer.ggml.model", "gpt2").key("tokenizer.ggml.pre", "viking");
    let sentence = "tokenizer.ggml.pre 'viking' is not supported; supported: llama-bpe (llama3, \
                    llama-v3), qwen2, smollm, gpt-2, default";
    tokenizer_says(writer, sentence);
}

#[test]
fn a_missing_part_of_a_tokenizer() {
    tokenizer_says(Writer::new(), "key 'tokenizer.ggml.model': expected this key, found none");
    let writer = byte_level(&[]);
    tokenizer_says(writer, "key 'tokenizer.ggml.tokens': expected this key, found none");
    let writer = byte_level(&[]).key("tokenizer.ggml.tokens", TOKENS);
    tokenizer_says(writer, "key 'tokenizer.ggml.token_type': expected this key, found none");
    let writer = tokens(Writer::new().key("tokenizer.ggml.model", "llama"));
    tokenizer_says(writer, "key 'tokenizer.ggml.scores': expected this key, found none");
}

#[test]
fn tokens_that_are_no_texts_or_come_twice() {
    let place = "key 'tokenizer.ggml.tokens'";
    let writer = byte_level(&[]).key("tokenizer.ggml.tokens", [1_u32, 2]);
    tokenizer_says(writer, &format!("{place}: expected an array of strings, found an array of 2"));
    let writer = byte_level(&[]).key("tokenizer.ggml.tokens", "ab");
    tokenizer_says(
        writer,
        &format!("{place}: expected an array of strings, found the string 'ab'"),
    );
    let writer = byte_level(&[]).key("tokenizer.ggml.tokens", ["a", "b", "a"]);
    let writer = writer.key("tokenizer.ggml.token_type", [1_i32; 3]);
    tokenizer_says(writer, &format!("{place}: expected each token once, found 'a' at 0 and at 2"));
}

#[test]
fn token_types_of_another_length_or_out_of_range() {
    let typed = |types: &[i32]| {
        let writer = byte_level(&[]).key("tokenizer.ggml.tokens", TOKENS);
        writer.key("tokenizer.ggml.token_type", types.to_vec())
    };
    let place = "key 'tokenizer.ggml.token_type'";
    let sentence = format!("{place}: expected one type for each of 5 tokens, found 4");
    tokenizer_says(typed(&[1; 4]), &sentence);
    let sentence = format!("{place}: expected types from 0 to 6, found 7 for token 2");
    tokenizer_says(typed(&[1, 1, 7, 1, 1]), &sentence);
    let sentence =
        format!("{place}: expected an array of integers from 0 to 4294967295, found an array of 5");
    tokenizer_says(typed(&[1, 1, -1, 1, 1]), &sentence);
}

#[test]
fn merges_that_are_none_or_out_of_the_vocabulary() {
    let place = "key 'tokenizer.ggml.merges': expected two tokens that make a third, with a space between them";
    for (merge, found) in [
        ("ab", "'ab'"),
        ("a b ab", "'a b ab'"),
        ("a c", "'a c', but no token 'c'"),
        ("b a", "'b a', but no token 'ba'"),
        (" b", "' b', but no token ''"),
    ] {
        tokenizer_says(tokens(byte_level(&["a b", merge])), &format!("{place}, found {found}"));
    }
    let listed = sentence_piece(&[0.0; 5]).key("tokenizer.ggml.merges", ["b a"]);
    tokenizer_says(tokens(listed), &format!("{place}, found 'b a', but no token 'ba'"));
}

#[test]
fn scores_of_another_length_or_kind() {
    let place = "key 'tokenizer.ggml.scores'";
    let sentence = format!("{place}: expected one score for each of 5 tokens, found 6");
    tokenizer_says(tokens(sentence_piece(&[0.0; 6])), &sentence);
    let sentence = format!("{place}: expected finite scores, found NaN for token 1");
    tokenizer_says(tokens(sentence_piece(&[0.0, f32::NAN, 0.0, 0.0, 0.0])), &sentence);
    let writer = Writer::new().key("tokenizer.ggml.model", "llama");
    let writer = tokens(writer.key("tokenizer.ggml.scores", [0_i32; 5]));
    let expected = "expected an array of 32-bit floating point numbers";
    tokenizer_says(writer, &format!("{place}: {expected}, found an array of 5"));
}

#[test]
fn a_vocabulary_that_lacks_bytes_and_an_unknown_token() {
    let writer = sentence_piece(&[0.0]).key("tokenizer.ggml.tokens", ["a"]);
    let sentence = "key 'tokenizer.ggml.tokens': expected a token for every byte, or an unknown \
                    token, found no '<0x00>', none unknown";
    tokenizer_says(writer.key("tokenizer.ggml.token_type", [1_i32]), sentence);
}

#[test]
fn named_tokens_out_of_the_vocabulary() {
    for name in ["bos", "eos"] {
        let key = format!("tokenizer.ggml.{name}_token_id");
        let writer = || tokens(byte_level(&["a b"]));
        let sentence = format!("key '{key}': expected one of 5 tokens, found 5");
        tokenizer_says(writer().key(&key, 5_u32), &sentence);
        let range = "an integer from 0 to 4294967295";
        let sentence = format!("key '{key}': expected {range}, found -1");
        tokenizer_says(writer().key(&key, -1_i32), &sentence);
        let add = format!("tokenizer.ggml.add_{name}_token");
        let sentence = format!("key '{key}': expected a token, since {add} is true, found none");
        tokenizer_says(writer().key(&add, true), &sentence);
        let sentence = format!("key '{add}': expected true or false, found 1");
        tokenizer_says(writer().key(&key, 0_u32).key(&add, 1_u8), &sentence);
    }
}

#[test]
fn a_template_that_is_no_text() {
    let writer = tokens(byte_level(&["a b"])).key("tokenizer.chat_template", ["a"]);
    let sentence = "key 'tokenizer.chat_template': expected a string, found an array of 1";
    tokenizer_says(writer, sentence);
}
