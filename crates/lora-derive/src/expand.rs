//! From a type's definition to its `impl VisitLora`.

use proc_macro2::{Span, TokenStream};
use quote::{ToTokens, format_ident, quote, quote_spanned};
use syn::ext::IdentExt;
use syn::spanned::Spanned;
use syn::{
    Data, DeriveInput, Error, Fields, GenericArgument, Ident, Index, LitStr, Member, Path,
    PathArguments, Result, Type, WherePredicate, parse_quote,
};

use crate::attributes::{FieldAttributes, TypeAttributes};

pub(crate) fn expand(input: &DeriveInput) -> Result<TokenStream> {
    let attributes = TypeAttributes::read(&input.attrs)?;
    let krate = attributes.krate.clone().unwrap_or_else(|| parse_quote!(::lora_core));
    let (parts, bodies) = match &input.data {
        Data::Struct(data) => of_struct(&data.fields, &attributes, &krate)?,
        Data::Enum(data) => {
            if let Some(path) = attributes.output.as_ref().or(attributes.tied.as_ref()) {
                return Err(Error::new(
                    path.span(),
                    "an enum's output layer is that of its variant; put the attribute on the struct \
                     in the variant",
                ));
            }
            if data.variants.is_empty() {
                return Err(Error::new(
                    input.ident.span(),
                    "an enum without variants holds no model",
                ));
            }
            of_enum(data.variants.iter(), &krate)?
        }
        Data::Union(data) => {
            return Err(Error::new(
                data.union_token.span(),
                "VisitLora is for structs and enums, as Burn's Module is",
            ));
        }
    };

    let name = &input.ident;
    let mut generics = input.generics.clone();
    let parameters: Vec<&Ident> = input.generics.type_params().map(|param| &param.ident).collect();
    let mut bounded = Vec::new();
    parts.iter().for_each(|part| find_bounded(part, &parameters, &mut bounded));
    if !bounded.is_empty() {
        let bounds =
            bounded.iter().map(|ty| -> WherePredicate { parse_quote!(#ty: #krate::VisitLora) });
        generics.make_where_clause().predicates.extend(bounds);
    }
    let (impl_generics, _, where_clause) = generics.split_for_impl();
    let (_, type_generics, _) = input.generics.split_for_impl();
    let Bodies { shared, mutable, output } = bodies;
    Ok(quote! {
        #[automatically_derived]
        #[allow(unused_variables)]
        impl #impl_generics #krate::VisitLora for #name #type_generics #where_clause {
            fn visit_lora<'lora>(
                &'lora self,
                path: &str,
                visit: &mut #krate::VisitLayer<'_, 'lora>,
            ) {
                #shared
            }

            fn visit_lora_mut(&mut self, path: &str, visit: &mut #krate::VisitLayerMut<'_>) {
                #mutable
            }

            #output
        }
    })
}

/// The bodies of the trait's methods; `output` is the whole of those about the output layer.
struct Bodies {
    shared: TokenStream,
    mutable: TokenStream,
    output: TokenStream,
}

/// The types of the visited fields, and the methods.
fn of_struct<'a>(
    fields: &'a Fields,
    attributes: &TypeAttributes,
    krate: &Path,
) -> Result<(Vec<&'a Type>, Bodies)> {
    let mut types = Vec::new();
    let mut names: Vec<String> = Vec::new();
    let mut skipped: Vec<String> = Vec::new();
    let mut bodies = Bodies::empty();
    let TypeAttributes { output, tied, .. } = attributes;
    for (index, field) in fields.iter().enumerate() {
        let attributes = FieldAttributes::read(&field.attrs)?;
        let own_name = match &field.ident {
            Some(ident) => ident.unraw().to_string(),
            None => index.to_string(),
        };
        if attributes.skip {
            skipped.push(own_name);
            continue;
        }
        let name = attributes.rename.as_ref().map_or(own_name, LitStr::value);
        if names.contains(&name) {
            let span = attributes.rename.as_ref().map_or_else(|| field.span(), LitStr::span);
            return Err(Error::new(
                span,
                format!("two fields stand under the path `{name}`; `rename` one of them"),
            ));
        }

        let member = match &field.ident {
            Some(ident) => Member::Named(ident.clone()),
            None => Member::Unnamed(Index::from(index)),
        };
        let [visit, visit_mut] = methods(&field.ty, krate);
        bodies.shared.extend(quote! {
            #visit(&self.#member, &#krate::join_path(path, #name), visit);
        });
        bodies.mutable.extend(quote! {
            #visit_mut(&mut self.#member, &#krate::join_path(path, #name), visit);
        });
        types.push(&field.ty);
        names.push(name);
    }
    for (method, layer) in [("output_layer", output), ("tied_embedding", tied)] {
        let Some(layer) = layer else { continue };
        check_path(layer, &names, &skipped)?;
        let method = format_ident!("{method}");
        bodies.output.extend(quote! {
            fn #method(&self) -> ::core::option::Option<&str> {
                ::core::option::Option::Some(#layer)
            }
        });
    }
    Ok((types, bodies))
}

fn of_enum<'a>(
    variants: impl Iterator<Item = &'a syn::Variant>,
    krate: &Path,
) -> Result<(Vec<&'a Type>, Bodies)> {
    let mut types = Vec::new();
    let [mut shared, mut mutable, mut output, mut tied] = [(); 4].map(|()| TokenStream::new());
    for variant in variants {
        if let Some(attribute) = variant.attrs.iter().find(|attr| attr.path().is_ident("lora")) {
            return Err(Error::new(
                attribute.span(),
                "a variant takes no attributes; `#[lora(skip)]` goes on the field in it",
            ));
        }
        let ident = &variant.ident;
        let nothing = quote!(Self::#ident { .. } => {});
        let field = match &variant.fields {
            Fields::Unit => None,
            Fields::Unnamed(fields) if fields.unnamed.len() == 1 => fields.unnamed.first(),
            _ => {
                return Err(Error::new(
                    ident.span(),
                    "a variant holds one unnamed module, as Burn's Module asks, or nothing; put the \
                     fields of this one into a struct of their own",
                ));
            }
        };
        let attributes = match field {
            Some(field) => FieldAttributes::read(&field.attrs)?,
            None => FieldAttributes::default(),
        };
        if let Some(rename) = attributes.rename {
            return Err(Error::new(
                rename.span(),
                "a variant's module stands under the enum's own path and has no name; remove `rename`",
            ));
        }
        let Some(field) = field.filter(|_| !attributes.skip) else {
            shared.extend(nothing.clone());
            mutable.extend(nothing);
            let none = quote!(Self::#ident { .. } => ::core::option::Option::None,);
            output.extend(none.clone());
            tied.extend(none);
            continue;
        };
        let [visit, visit_mut] = methods(&field.ty, krate);
        let ty = &field.ty;
        shared.extend(quote!(Self::#ident(part) => #visit(part, path, visit),));
        mutable.extend(quote!(Self::#ident(part) => #visit_mut(part, path, visit),));
        output
            .extend(quote!(Self::#ident(part) => <#ty as #krate::VisitLora>::output_layer(part),));
        tied.extend(
            quote!(Self::#ident(part) => <#ty as #krate::VisitLora>::tied_embedding(part),),
        );
        types.push(ty);
    }
    let bodies = Bodies {
        shared: quote!(match self { #shared }),
        mutable: quote!(match self { #mutable }),
        output: quote! {
            fn output_layer(&self) -> ::core::option::Option<&str> {
                match self { #output }
            }

            fn tied_embedding(&self) -> ::core::option::Option<&str> {
                match self { #tied }
            }
        },
    };
    Ok((types, bodies))
}

impl Bodies {
    fn empty() -> Self {
        let nothing = TokenStream::new();
        Self { shared: nothing.clone(), mutable: nothing.clone(), output: nothing }
    }
}

/// `visit_lora` and `visit_lora_mut` of a field's type, so placed that the compiler points at the
/// field when its type has none.
fn methods(ty: &Type, krate: &Path) -> [TokenStream; 2] {
    let span = Span::call_site().located_at(ty.span());
    ["visit_lora", "visit_lora_mut"].map(|method| {
        let method = format_ident!("{method}", span = span);
        quote_spanned!(span=> <#ty as #krate::VisitLora>::#method)
    })
}

/// Whether the first component of a path is a visited field; the rest belongs to other types.
fn check_path(path: &LitStr, names: &[String], skipped: &[String]) -> Result<()> {
    let value = path.value();
    let first = value.split('.').next().unwrap_or_default();
    if names.iter().any(|name| name == first) {
        return Ok(());
    }
    let message = if skipped.iter().any(|name| name == first) {
        format!("`{first}` is skipped and so never adapted; remove the path or `skip`")
    } else {
        let names: Vec<String> = names.iter().map(|name| format!("`{name}`")).collect();
        format!("no visited field has the path `{first}`; there are: {}", names.join(", "))
    };
    Err(Error::new(path.span(), message))
}

/// Adds what must implement `VisitLora` so that `ty` does: the type parameters in it, and types
/// named through them such as `T::Layer`. As in serde, a bound on the parameters and not on `ty`
/// itself, which could be the type that is being derived for.
fn find_bounded(ty: &Type, parameters: &[&Ident], bounded: &mut Vec<Type>) {
    let mut add = |ty: &Type| {
        let text = ty.to_token_stream().to_string();
        if bounded.iter().all(|known| known.to_token_stream().to_string() != text) {
            bounded.push(ty.clone());
        }
    };
    let inner: Vec<&Type> = match ty {
        Type::Path(path) => {
            let segments = &path.path.segments;
            let is_parameter = path.qself.is_none()
                && segments.first().is_some_and(|first| parameters.contains(&&first.ident));
            if is_parameter {
                return add(ty);
            }
            if path.qself.is_some() {
                if mentions(ty.to_token_stream(), parameters) {
                    add(ty);
                }
                return;
            }
            match segments.last() {
                Some(last) if last.ident != "PhantomData" => types_in(&last.arguments),
                _ => return,
            }
        }
        Type::Array(array) => vec![&array.elem],
        Type::Paren(paren) => vec![&paren.elem],
        Type::Group(group) => vec![&group.elem],
        Type::Tuple(tuple) => tuple.elems.iter().collect(),
        _ => return,
    };
    inner.into_iter().for_each(|ty| find_bounded(ty, parameters, bounded));
}

fn types_in(arguments: &PathArguments) -> Vec<&Type> {
    match arguments {
        PathArguments::None => Vec::new(),
        PathArguments::AngleBracketed(arguments) => arguments
            .args
            .iter()
            .filter_map(|argument| match argument {
                GenericArgument::Type(ty) => Some(ty),
                _ => None,
            })
            .collect(),
        PathArguments::Parenthesized(_) => Vec::new(),
    }
}

fn mentions(tokens: TokenStream, parameters: &[&Ident]) -> bool {
    tokens.into_iter().any(|token| match token {
        proc_macro2::TokenTree::Ident(ident) => parameters.contains(&&ident),
        proc_macro2::TokenTree::Group(group) => mentions(group.stream(), parameters),
        _ => false,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn expanded(source: &str) -> String {
        expand(&syn::parse_str(source).unwrap()).unwrap().to_string()
    }

    fn error(source: &str) -> String {
        expand(&syn::parse_str(source).unwrap()).unwrap_err().to_string()
    }

    #[test]
    fn bounds_are_for_the_parameters_of_visited_fields_only() {
        let source = "struct Net<A, B: Clone, C, D: Has, const N: usize> {
            a: Vec<[A; N]>,
            again: Option<A>,
            b: PhantomData<B>,
            #[lora(skip)]
            c: C,
            d: (D::Layer, usize),
        }";
        let expanded = expanded(source);
        let header = expanded.split_once("for Net").unwrap().1.split_once('{').unwrap().0;
        assert_eq!(
            header.replace(' ', ""),
            "<A,B,C,D,N>whereA:::lora_core::VisitLora,D::Layer:::lora_core::VisitLora"
        );
    }

    #[test]
    fn the_crate_can_have_another_name() {
        let expanded = expanded("#[lora(crate = \"adapters::core\")] struct Net { a: Layer }");
        assert!(expanded.contains("adapters :: core :: VisitLora"), "{expanded}");
        assert!(!expanded.contains("lora_core"), "{expanded}");
    }

    #[test]
    fn what_cannot_be_is_refused_with_what_can() {
        for (source, message) in [
            ("#[lora(outptu = \"a\")] struct Net { a: L }", "a type takes `output"),
            ("#[lora(skip)] struct Net { a: L }", "`skip` and `rename` go on a field"),
            ("struct Net { #[lora(skpi)] a: L }", "a field takes `skip`"),
            ("struct Net { #[lora(skip, skip)] a: L }", "given twice"),
            ("struct Net { #[lora(skip, rename = \"b\")] a: L }", "remove `rename` or `skip`"),
            ("struct Net { #[lora(rename = \"a.b\")] a: L }", "without dots"),
            ("struct Net { #[lora(rename = \"b\")] a: L, b: L }", "the path `b`"),
            ("struct Net(L, #[lora(rename = \"0\")] L);", "the path `0`"),
            ("#[lora(output = \"c\")] struct Net { a: L, b: L }", "there are: `a`, `b`"),
            (
                "#[lora(output = \"a\")] struct Net { #[lora(rename = \"b\")] a: L }",
                "there are: `b`",
            ),
            ("#[lora(output = \"a\")] struct Net { #[lora(skip)] a: L }", "`a` is skipped"),
            ("#[lora(tied = \"c\")] struct Net { a: L, b: L }", "there are: `a`, `b`"),
            ("#[lora(tied = \"A\")] enum Net { A(L) }", "that of its variant"),
            ("#[lora(output = \"A\")] enum Net { A(L) }", "that of its variant"),
            ("enum Net { A(L, L) }", "one unnamed module"),
            ("enum Net { A { layer: L } }", "one unnamed module"),
            ("enum Net { #[lora(skip)] A(L) }", "goes on the field in it"),
            ("enum Net { A(#[lora(rename = \"b\")] L) }", "has no name"),
            ("enum Net {}", "without variants"),
            ("union Net { a: L }", "structs and enums"),
        ] {
            let found = error(source);
            assert!(found.contains(message), "{source}: {found}");
        }
    }
}
