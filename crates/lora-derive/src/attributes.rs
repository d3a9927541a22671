//! What `#[lora(...)]` says, read and checked.

use syn::meta::ParseNestedMeta;
use syn::spanned::Spanned;
use syn::{Attribute, Error, LitStr, Path, Result};

/// The attributes of the type.
#[derive(Default)]
pub(crate) struct TypeAttributes {
    /// The path of the layer that makes the output.
    pub(crate) output: Option<LitStr>,
    /// The path of the embedding that makes the output where that layer is not there.
    pub(crate) tied: Option<LitStr>,
    /// Where lora-core is.
    pub(crate) krate: Option<Path>,
}

impl TypeAttributes {
    pub(crate) fn read(attributes: &[Attribute]) -> Result<Self> {
        let mut read = Self::default();
        each_lora(attributes, |meta| {
            if meta.path.is_ident("output") {
                once(&mut read.output, meta.value()?.parse()?, &meta)
            } else if meta.path.is_ident("tied") {
                once(&mut read.tied, meta.value()?.parse()?, &meta)
            } else if meta.path.is_ident("crate") {
                let path: LitStr = meta.value()?.parse()?;
                once(&mut read.krate, path.parse_with(Path::parse_mod_style)?, &meta)
            } else {
                Err(meta.error(
                    "unknown attribute: a type takes `output = \"path.of.layer\"`, \
                     `tied = \"path.of.embedding\"` and `crate = \"path\"`; `skip` and `rename` go on \
                     a field",
                ))
            }
        })?;
        Ok(read)
    }
}

/// The attributes of a field.
#[derive(Default)]
pub(crate) struct FieldAttributes {
    /// Whether the field is left out.
    pub(crate) skip: bool,
    /// Its component of the path, if not its own name.
    pub(crate) rename: Option<LitStr>,
}

impl FieldAttributes {
    pub(crate) fn read(attributes: &[Attribute]) -> Result<Self> {
        let mut skip = None;
        let mut rename: Option<LitStr> = None;
        each_lora(attributes, |meta| {
            if meta.path.is_ident("skip") {
                once(&mut skip, meta.path.span(), &meta)
            } else if meta.path.is_ident("rename") {
                once(&mut rename, meta.value()?.parse()?, &meta)
            } else {
                Err(meta.error(
                    "unknown attribute: a field takes `skip` and `rename = \"name\"`; `output`, \
                     `tied` and `crate` go on the type",
                ))
            }
        })?;
        if let Some(name) = &rename {
            let value = name.value();
            if value.is_empty() || value.contains('.') {
                return Err(Error::new(
                    name.span(),
                    "a name is one component of a path: not empty and without dots",
                ));
            }
            if skip.is_some() {
                return Err(Error::new(
                    name.span(),
                    "a skipped field stands in no path; remove `rename` or `skip`",
                ));
            }
        }
        Ok(Self { skip: skip.is_some() || is_skipped_by_burn(attributes), rename })
    }
}

fn each_lora(
    attributes: &[Attribute],
    mut read: impl FnMut(ParseNestedMeta) -> Result<()>,
) -> Result<()> {
    for attribute in attributes.iter().filter(|attribute| attribute.path().is_ident("lora")) {
        attribute.parse_nested_meta(&mut read)?;
    }
    Ok(())
}

fn once<T>(slot: &mut Option<T>, value: T, meta: &ParseNestedMeta) -> Result<()> {
    match slot.replace(value) {
        Some(_) => Err(meta.error("given twice; remove one")),
        None => Ok(()),
    }
}

/// `#[module(skip)]`: what Burn does not treat as a part of the model holds no layer.
fn is_skipped_by_burn(attributes: &[Attribute]) -> bool {
    let mut skip = false;
    for attribute in attributes.iter().filter(|attribute| attribute.path().is_ident("module")) {
        // A mistake in it is for Burn's derive to report.
        let _ = attribute.parse_nested_meta(|meta| {
            skip |= meta.path.is_ident("skip");
            Ok(())
        });
    }
    skip
}
