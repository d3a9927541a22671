//! llama.cpp's tensor names and the Hugging Face names of the same tensors.

/// A tensor's name on the other side and the order of its rows in the GGUF file.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Naming {
    /// Such as `model.layers.0.self_attn.q_proj.weight`.
    pub(super) name: String,
    pub(super) rows: Rows,
}

/// Whose rows these are; llama.cpp reorders the rows of q and k of some models.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Rows {
    /// Rows of query heads.
    Query,
    /// Rows of key heads.
    Key,
    /// Any others; never reordered.
    Other,
}

/// Outside the blocks.
const MODEL: [(&str, &str); 3] =
    [("token_embd", "model.embed_tokens"), ("output_norm", "model.norm"), ("output", "lm_head")];

/// After `blk.N.` and `model.layers.N.`.
const BLOCK: [(&str, &str, Rows); 11] = [
    ("attn_norm", "input_layernorm", Rows::Other),
    ("attn_q", "self_attn.q_proj", Rows::Query),
    ("attn_k", "self_attn.k_proj", Rows::Key),
    ("attn_v", "self_attn.v_proj", Rows::Other),
    ("attn_output", "self_attn.o_proj", Rows::Other),
    ("attn_q_norm", "self_attn.q_norm", Rows::Other),
    ("attn_k_norm", "self_attn.k_norm", Rows::Other),
    ("ffn_norm", "post_attention_layernorm", Rows::Other),
    ("ffn_gate", "mlp.gate_proj", Rows::Other),
    ("ffn_up", "mlp.up_proj", Rows::Other),
    ("ffn_down", "mlp.down_proj", Rows::Other),
];

/// The Hugging Face name of llama.cpp's tensor `name`, or `None` for a tensor not in the tables.
pub(super) fn hugging_face(name: &str) -> Option<Naming> {
    let (module, kind) = name.rsplit_once('.')?;
    if !matches!(kind, "weight" | "bias") {
        return None;
    }
    if let Some((_, hf)) = MODEL.iter().find(|(gguf, _)| *gguf == module) {
        return Some(Naming { name: format!("{hf}.{kind}"), rows: Rows::Other });
    }
    let (number, module) = module.strip_prefix("blk.")?.split_once('.')?;
    let block: u32 = number.parse().ok()?;
    // 'blk.07' and 'blk.7' must not become the same name.
    if block.to_string() != number {
        return None;
    }
    let (_, hf, rows) = BLOCK.iter().find(|(gguf, ..)| *gguf == module)?;
    Some(Naming { name: format!("model.layers.{block}.{hf}.{kind}"), rows: *rows })
}

/// llama.cpp's name of the Hugging Face tensor `name`, or `None` for a tensor not in the tables.
pub(super) fn llama_cpp(name: &str) -> Option<Naming> {
    let (module, kind) = name.rsplit_once('.')?;
    if let Some((gguf, _)) = MODEL.iter().find(|(_, hf)| *hf == module) {
        return Some(Naming { name: format!("{gguf}.{kind}"), rows: Rows::Other });
    }
    let (number, module) = module.strip_prefix("model.layers.")?.split_once('.')?;
    let block: u32 = number.parse().ok()?;
    let (gguf, _, rows) = BLOCK.iter().find(|(_, hf, _)| *hf == module)?;
    Some(Naming { name: format!("blk.{block}.{gguf}.{kind}"), rows: *rows })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_llama_tensor_has_its_hugging_face_name() {
        let pairs = [
            ("token_embd.weight", "model.embed_tokens.weight"),
            ("output_norm.weight", "model.norm.weight"),
            ("output.weight", "lm_head.weight"),
            ("blk.0.attn_norm.weight", "model.layers.0.input_layernorm.weight"),
            ("blk.12.attn_q.weight", "model.layers.12.self_attn.q_proj.weight"),
            ("blk.12.attn_k.bias", "model.layers.12.self_attn.k_proj.bias"),
            ("blk.12.attn_v.weight", "model.layers.12.self_attn.v_proj.weight"),
            ("blk.12.attn_output.weight", "model.layers.12.self_attn.o_proj.weight"),
            ("blk.3.ffn_norm.weight", "model.layers.3.post_attention_layernorm.weight"),
            ("blk.3.ffn_gate.weight", "model.layers.3.mlp.gate_proj.weight"),
            ("blk.3.ffn_up.weight", "model.layers.3.mlp.up_proj.weight"),
            ("blk.3.ffn_down.bias", "model.layers.3.mlp.down_proj.bias"),
        ];
        for (gguf, hf) in pairs {
            assert_eq!(hugging_face(gguf).map(|naming| naming.name).as_deref(), Some(hf), "{gguf}");
            let back = llama_cpp(hf).unwrap();
            assert_eq!((back.name.as_str(), back.rows), (gguf, hugging_face(gguf).unwrap().rows));
        }
    }

    #[test]
    fn only_q_and_k_have_head_rows() {
        let rows = |name: &str| hugging_face(name).unwrap().rows;
        assert_eq!(rows("blk.0.attn_q.weight"), Rows::Query);
        assert_eq!(rows("blk.0.attn_k.bias"), Rows::Key);
        assert_eq!(rows("blk.0.attn_v.weight"), Rows::Other);
        assert_eq!(rows("output.weight"), Rows::Other);
    }

    #[test]
    fn other_names_have_none() {
        for name in [
            "",
            "weight",
            "rope_freqs.weight",
            "token_embd",
            "token_embd.scale",
            "blk.attn_q.weight",
            "blk.07.attn_q.weight",
            "blk.+7.attn_q.weight",
            "blk.99999999999.attn_q.weight",
            "blk.0.attn_q.lora_a.weight",
            "blk.0.ffn_gate_exps.weight",
            "v.blk.0.attn_q.weight",
        ] {
            assert_eq!(hugging_face(name), None, "{name}");
        }
    }
}
