use lora_core::{AdaptableLinear, VisitLora};

#[derive(VisitLora)]
#[lora(output = "lm_head.proj")]
struct Net {
    body: AdaptableLinear,
    head: AdaptableLinear,
}

fn main() {}
