#![doc = include_str!("../README.md")]

mod attributes;
mod expand;

use proc_macro::TokenStream;

/// Implements `VisitLora` for a struct or enum by visiting every field that is not skipped.
///
/// Attributes: `#[lora(skip)]` and `#[lora(rename = "name")]` on a field, `#[lora(output = "path")]`,
/// `#[lora(tied = "path")]` and `#[lora(crate = "path")]` on the type. The trait has the details and
/// an example.
#[proc_macro_derive(VisitLora, attributes(lora))]
pub fn derive_visit_lora(input: TokenStream) -> TokenStream {
    let input = syn::parse_macro_input!(input as syn::DeriveInput);
    expand::expand(&input).unwrap_or_else(|error| error.to_compile_error()).into()
}
