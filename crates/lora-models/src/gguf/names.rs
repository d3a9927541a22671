//! llama.cpp's tensor names and the Hugging Face names of the same tensors.

use crate::family::ExpertNames;

/// A tensor's name on the other side and the order of its rows in the GGUF file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Naming {
    /// Such as `model.layers.0.self_attn.q_proj.weight`.
    pub(super) name: String,
    pub(super) rows: Rows,
    pub(super) expert: Expert,
}

/// A GGUF file has one tensor for the same projection of all experts of a block, outermost first
/// `[experts, d_output, d_input]`; a Hugging Face checkpoint has one for each.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Expert {
    /// Not a projection of an expert.
    None,
    /// Of this one.
    One(usize),
    /// Of all of them: in the name, [`NUMBER`] stands for an expert's.
    All,
}

/// Where an expert's number goes.
const NUMBER: &str = "{expert}";

impl Naming {
    /// A tensor that is not of experts.
    pub(super) fn of_any(name: String, rows: Rows) -> Self {
        Self { name, rows, expert: Expert::None }
    }

    /// The name of one expert's tensor.
    pub(super) fn of_expert(&self, number: usize) -> String {
        self.name.replace(NUMBER, &number.to_string())
    }
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

/// The router, whose Hugging Face name begins with the family's name for the part.
const ROUTER: (&str, &str) = ("ffn_gate_inp", "gate");
/// All experts' projections, in the order of [`ExpertNames::projections`].
const EXPERTS: [&str; 3] = ["ffn_gate_exps", "ffn_up_exps", "ffn_down_exps"];

/// The Hugging Face name of llama.cpp's tensor `name`, or `None` for a tensor not in the tables. `experts`:
/// how a model's family writes its experts, where it has some.
pub(super) fn hugging_face(name: &str, experts: Option<ExpertNames>) -> Option<Naming> {
    let (module, kind) = name.rsplit_once('.')?;
    if !matches!(kind, "weight" | "bias") {
        return None;
    }
    if let Some((_, hf)) = MODEL.iter().find(|(gguf, _)| *gguf == module) {
        return Some(Naming::of_any(format!("{hf}.{kind}"), Rows::Other));
    }
    let (number, module) = module.strip_prefix("blk.")?.split_once('.')?;
    let block: u32 = number.parse().ok()?;
    // 'blk.07' and 'blk.7' must not become the same name.
    if block.to_string() != number {
        return None;
    }
    let block = format!("model.layers.{block}");
    if let Some((_, hf, rows)) = BLOCK.iter().find(|(gguf, ..)| *gguf == module) {
        return Some(Naming::of_any(format!("{block}.{hf}.{kind}"), *rows));
    }
    let ExpertNames { part, projections, .. } = experts?;
    if module == ROUTER.0 {
        return Some(Naming::of_any(format!("{block}.{part}.{}.{kind}", ROUTER.1), Rows::Other));
    }
    let projection = projections[EXPERTS.iter().position(|gguf| *gguf == module)?];
    let name = format!("{block}.{part}.experts.{NUMBER}.{projection}.{kind}");
    Some(Naming { name, rows: Rows::Other, expert: Expert::All })
}

/// llama.cpp's name of the Hugging Face tensor `name`, or `None` for a tensor not in the tables.
pub(super) fn llama_cpp(name: &str, experts: Option<ExpertNames>) -> Option<Naming> {
    let (module, kind) = name.rsplit_once('.')?;
    if let Some((gguf, _)) = MODEL.iter().find(|(_, hf)| *hf == module) {
        return Some(Naming::of_any(format!("{gguf}.{kind}"), Rows::Other));
    }
    let (number, module) = module.strip_prefix("model.layers.")?.split_once('.')?;
    let block: u32 = number.parse().ok()?;
    if let Some((gguf, _, rows)) = BLOCK.iter().find(|(_, hf, _)| *hf == module) {
        return Some(Naming::of_any(format!("blk.{block}.{gguf}.{kind}"), *rows));
    }
    let ExpertNames { part, projections, .. } = experts?;
    let module = module.strip_prefix(part)?.strip_prefix('.')?;
    if module == ROUTER.1 {
        return Some(Naming::of_any(format!("blk.{block}.{}.{kind}", ROUTER.0), Rows::Other));
    }
    let (number, projection) = module.strip_prefix("experts.")?.split_once('.')?;
    let gguf = EXPERTS[projections.iter().position(|hf| *hf == projection)?];
    let expert = Expert::One(number.parse().ok()?);
    Some(Naming { name: format!("blk.{block}.{gguf}.{kind}"), rows: Rows::Other, expert })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::family::Family;

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
            let naming = hugging_face(gguf, None).unwrap();
            assert_eq!((naming.name.as_str(), naming.expert), (hf, Expert::None), "{gguf}");
            let back = llama_cpp(hf, None).unwrap();
            assert_eq!((back.name.as_str(), back.rows), (gguf, naming.rows));
        }
    }

    #[test]
    fn experts_have_the_names_of_their_family() {
        let experts = |name| Family::named(name).unwrap().experts;
        let mixtral = "model.layers.3.block_sparse_moe";
        let qwen = "model.layers.3.mlp";
        for (family, gguf, hf) in [
            ("mixtral", "ffn_gate_inp", format!("{mixtral}.gate.weight")),
            ("mixtral", "ffn_gate_exps", format!("{mixtral}.experts.7.w1.weight")),
            ("mixtral", "ffn_up_exps", format!("{mixtral}.experts.7.w3.weight")),
            ("mixtral", "ffn_down_exps", format!("{mixtral}.experts.7.w2.weight")),
            ("qwen3_moe", "ffn_gate_inp", format!("{qwen}.gate.weight")),
            ("qwen3_moe", "ffn_gate_exps", format!("{qwen}.experts.7.gate_proj.weight")),
            ("qwen3_moe", "ffn_up_exps", format!("{qwen}.experts.7.up_proj.weight")),
            ("qwen3_moe", "ffn_down_exps", format!("{qwen}.experts.7.down_proj.weight")),
        ] {
            let gguf = format!("blk.3.{gguf}.weight");
            let naming = hugging_face(&gguf, experts(family)).unwrap();
            let is_stack = naming.expert == Expert::All;
            assert_eq!(is_stack, gguf.contains("exps"), "{gguf}");
            assert_eq!(naming.of_expert(7), hf);
            let back = llama_cpp(&hf, experts(family)).unwrap();
            let expert = if is_stack { Expert::One(7) } else { Expert::None };
            assert_eq!((back.name, back.expert), (gguf.clone(), expert));
            // A family without experts has none of these.
            assert_eq!((hugging_face(&gguf, None), llama_cpp(&hf, None)), (None, None), "{hf}");
        }
        for name in
            ["block_sparse_moe.experts.w1", "block_sparse_moe.experts.0.w4", "mlp.experts.0.w1"]
        {
            let name = format!("model.layers.3.{name}.weight");
            assert_eq!(llama_cpp(&name, experts("mixtral")), None, "{name}");
        }
    }

    #[test]
    fn only_q_and_k_have_head_rows() {
        let rows = |name: &str| hugging_face(name, None).unwrap().rows;
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
            assert_eq!(hugging_face(name, None), None, "{name}");
        }
    }
}
