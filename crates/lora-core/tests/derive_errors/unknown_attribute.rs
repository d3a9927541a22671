use lora_core::{AdaptableLinear, VisitLora};

#[derive(VisitLora)]
struct Net {
    #[lora(ignore)]
    head: AdaptableLinear,
}

fn main() {}
