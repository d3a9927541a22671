//! `#[derive(VisitLora)]`: which layers a model shows, under which paths, in which order.
#![cfg(any(
    feature = "flex",
    feature = "ndarray",
    feature = "tch",
    feature = "wgpu",
    feature = "cuda"
))]
#![allow(clippy::large_enum_variant)]

use std::marker::PhantomData;

use burn::module::{Initializer, Module, Param};
use burn::nn::{Dropout, DropoutConfig, LayerNorm, LayerNormConfig, Linear, LinearConfig};
use burn::tensor::Tensor;
use lora_core::{AdaptableLinear, LoraConfig, TargetModules, VisitLora, inject};

fn linear() -> Linear {
    LinearConfig::new(4, 3).init(&lora_core::device_from_env().unwrap().autodiff())
}

fn adaptable() -> AdaptableLinear {
    linear().into()
}

/// The paths that a model shows; both ways of visiting must agree.
fn paths(model: &mut impl VisitLora) -> Vec<String> {
    let mut paths = Vec::new();
    model.visit_lora("", &mut |path, _| paths.push(path.to_owned()));
    let mut paths_mut = Vec::new();
    model.visit_lora_mut("", &mut |path, _| paths_mut.push(path.to_owned()));
    assert_eq!(paths, paths_mut);
    paths
}

#[derive(Module, Debug, VisitLora)]
struct Block {
    norm: LayerNorm,
    up: AdaptableLinear,
    dropout: Dropout,
    down: AdaptableLinear,
    scale: Param<Tensor<1>>,
    width: usize,
}

fn block() -> Block {
    let device = lora_core::device_from_env().unwrap();
    Block {
        norm: LayerNormConfig::new(4).init(&device),
        up: adaptable(),
        dropout: DropoutConfig::new(0.1).init(),
        down: adaptable(),
        scale: Initializer::Ones.init([4], &device),
        width: 4,
    }
}

#[derive(Debug, Clone)]
struct Settings;

#[derive(Module, Debug, VisitLora)]
#[lora(output = "head")]
struct Net {
    #[lora(skip)]
    stem: Linear,
    zeta: AdaptableLinear,
    blocks: Vec<Block>,
    first: Option<Block>,
    second: Option<AdaptableLinear>,
    sides: [AdaptableLinear; 2],
    pair: (AdaptableLinear, Block),
    #[lora(rename = "self_attn")]
    attention: AdaptableLinear,
    r#type: AdaptableLinear,
    #[module(skip)]
    settings: Settings,
    head: AdaptableLinear,
}

fn net() -> Net {
    Net {
        stem: linear(),
        zeta: adaptable(),
        blocks: vec![block(), block()],
        first: None,
        second: Some(adaptable()),
        sides: [adaptable(), adaptable()],
        pair: (adaptable(), block()),
        attention: adaptable(),
        r#type: adaptable(),
        settings: Settings,
        head: adaptable(),
    }
}

#[test]
fn every_layer_is_shown_in_the_order_of_the_fields() {
    let expected = [
        "zeta",
        "blocks.0.up",
        "blocks.0.down",
        "blocks.1.up",
        "blocks.1.down",
        "second",
        "sides.0",
        "sides.1",
        "pair.0",
        "pair.1.up",
        "pair.1.down",
        "self_attn",
        "type",
        "head",
    ];
    assert_eq!(paths(&mut net()), expected);
}

#[test]
fn a_derived_model_is_adapted_but_for_what_is_skipped_and_the_output() {
    let mut config = LoraConfig::new(2, 4.0);
    config.target_modules = TargetModules::AllLinear;
    let (net, report) = inject(net(), &config).unwrap();
    assert_eq!(net.output_layer(), Some("head"));
    assert!(net.head.as_lora().is_none());
    assert_eq!(report.adapted.len(), 13);
    assert_eq!(report.parameters.trainable, 13 * 2 * (4 + 3));
}

// Burn's `Module` is not for tuple structs, this derive is.
#[derive(VisitLora)]
#[lora(output = "1")]
#[allow(dead_code)] // the skipped field
struct Pair(AdaptableLinear, #[lora(rename = "1")] AdaptableLinear, #[lora(skip)] Linear);

#[derive(VisitLora)]
#[allow(dead_code)] // the skipped field
enum Side {
    Plain(AdaptableLinear),
    Pair(Pair),
    Frozen(#[lora(skip)] Linear),
}

#[derive(VisitLora)]
enum Maybe {
    Nothing,
    Layer(AdaptableLinear),
}

#[derive(VisitLora)]
struct Nothing;

#[test]
fn a_tuple_struct_has_positions_and_an_enum_stands_at_its_own_path() {
    let pair = || Pair(adaptable(), adaptable(), linear());
    assert_eq!(paths(&mut pair()), ["0", "1"]);

    assert_eq!(paths(&mut vec![Side::Plain(adaptable())]), ["0"]);
    assert_eq!(paths(&mut vec![Side::Pair(pair())]), ["0.0", "0.1"]);
    assert!(paths(&mut Side::Frozen(linear())).is_empty());
    assert_eq!(Side::Pair(pair()).output_layer(), Some("1"));
    assert_eq!(Some(pair()).output_layer(), Some("1"));
    assert_eq!(Side::Plain(adaptable()).output_layer(), None);

    assert!(paths(&mut Maybe::Nothing).is_empty());
    assert_eq!(paths(&mut [Maybe::Layer(adaptable())]), ["0"]);
    assert!(paths(&mut Nothing).is_empty());
}

#[derive(Module, Debug, VisitLora)]
struct Wrapped<M: Module, const N: usize> {
    inner: M,
    copies: [M; N],
}

trait Family {
    type Layer;
}

struct Linears;

impl Family for Linears {
    type Layer = AdaptableLinear;
}

struct NotVisited;

// `Marker` and `Skipped` get no bound: neither is shown.
#[derive(VisitLora)]
struct Generic<F: Family, Marker, Skipped> {
    layers: Vec<F::Layer>,
    _marker: PhantomData<Marker>,
    #[lora(skip)]
    _skipped: Skipped,
}

#[test]
fn generic_parameters_are_bound_where_they_are_visited() {
    let mut wrapped = Wrapped { inner: block(), copies: [block(), block()] };
    let expected =
        ["inner.up", "inner.down", "copies.0.up", "copies.0.down", "copies.1.up", "copies.1.down"];
    assert_eq!(paths(&mut wrapped), expected);

    let mut generic = Generic::<Linears, NotVisited, NotVisited> {
        layers: vec![adaptable(), adaptable()],
        _marker: PhantomData,
        _skipped: NotVisited,
    };
    assert_eq!(paths(&mut generic), ["layers.0", "layers.1"]);
}

mod renamed {
    pub(crate) use lora_core as adapters;
}

#[derive(VisitLora)]
#[lora(crate = "renamed::adapters")]
struct FromRenamed {
    layer: AdaptableLinear,
}

#[test]
fn the_crate_may_have_another_name() {
    assert_eq!(paths(&mut FromRenamed { layer: adaptable() }), ["layer"]);
}
