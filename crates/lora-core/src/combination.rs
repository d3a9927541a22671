//! Several sets into one, layer by layer, with the mathematics of `combine.rs`.

use std::fmt;

use burn::module::{Module, ModuleVisitor, Param};
use burn::tensor::{DType, Tensor};

use crate::adapter::{LoraAdapter, in_dtype, in_full, on};
use crate::combine::{
    LowRank, Part, cat, check_density, dare, factorise, recompress, same_shape, ties,
};
use crate::config::path_hash;
use crate::error::{Error, ErrorKind, Result};
use crate::layer::Adaptation;
use crate::replacement::Replacement;
use crate::scaling::Scaling;
use crate::set::AdapterSet;
use crate::sets::with_new_ids;

/// How [`combine`] makes one update of several: D_i is that of set i, scaling A·B `[d_input, d_output]`
/// of one layer, and w_i its weight.
///
/// A `rank` is the largest that a layer gets; the smaller of its two sizes is always enough.
#[derive(Debug, Clone, Copy, PartialEq)]
#[non_exhaustive]
pub enum Combination {
    /// Σ w_i D_i exactly: the ranks add up.
    ///
    /// ```text
    /// A = [A_1 .. A_n]   B = [w_1 s_1 B_1; ..; w_n s_n B_n]   A·B = Σ w_i s_i A_i B_i      s: scaling
    /// ```
    ///
    /// PEFT's `"cat"`.
    Cat,
    /// The best approximation of Σ w_i D_i of this rank (Frobenius norm): [`Cat`](Self::Cat), then QR of
    /// both factors and the singular values of a small matrix; no dense update is formed. At the sum of
    /// the ranks it is exact.
    ///
    /// Not PEFT's `"linear"`, which adds the factors, (Σ √w_i A_i)(Σ √w_i B_i): that has the terms A_i B_j
    /// of different adapters in it. PEFT's `"svd"` is this one, by way of the dense update.
    Linear {
        /// The largest rank of the result.
        rank: usize,
    },
    /// The mean of what the updates agree on: of each D_i the `density` largest entries are kept, each
    /// entry's sign is that of their sum, and the mean is over the w_i D_i that kept the entry with that
    /// sign. Then the best approximation of this rank.
    ///
    /// It works on the dense updates, one layer at a time, as PEFT's `"ties_svd"` does: factors are only
    /// unique up to an invertible matrix between them, so that their single entries say nothing. It takes
    /// an exact singular value decomposition a layer.
    ///
    /// Source: "TIES-Merging", [arXiv:2306.01708](https://arxiv.org/abs/2306.01708).
    Ties {
        /// The share of entries to keep, above 0 and at most 1.
        density: f64,
        /// The largest rank of the result.
        rank: usize,
    },
    /// Σ w_i D'_i, where D'_i has each entry of D_i with probability `density`, divided by it, so that
    /// the mean over seeds is Σ w_i D_i. Then the best approximation of this rank.
    ///
    /// Dense, as [`Ties`](Self::Ties); PEFT's `"dare_linear_svd"`.
    ///
    /// Source: "Language Models are Super Mario", [arXiv:2311.03099](https://arxiv.org/abs/2311.03099).
    Dare {
        /// The probability with which an entry is kept, above 0 and at most 1.
        density: f64,
        /// Which entries: the same seed keeps the same ones.
        seed: u64,
        /// The largest rank of the result.
        rank: usize,
    },
    /// [`Dare`](Self::Dare)'s D'_i, combined as [`Ties`](Self::Ties) does with all their entries; PEFT's
    /// `"dare_ties_svd"`.
    DareTies {
        /// The probability with which an entry is kept, above 0 and at most 1.
        density: f64,
        /// Which entries: the same seed keeps the same ones.
        seed: u64,
        /// The largest rank of the result.
        rank: usize,
    },
}

impl Combination {
    fn check(self) -> Result<()> {
        match self {
            Self::Cat | Self::Linear { .. } => {}
            Self::Ties { density, .. }
            | Self::Dare { density, .. }
            | Self::DareTies { density, .. } => check_density(density)?,
        }
        match self.rank() {
            Some(0) => Err(Error::setting("rank", "at least 1", 0)),
            _ => Ok(()),
        }
    }

    fn rank(self) -> Option<usize> {
        match self {
            Self::Cat => None,
            Self::Linear { rank }
            | Self::Ties { rank, .. }
            | Self::Dare { rank, .. }
            | Self::DareTies { rank, .. } => Some(rank),
        }
    }
}

/// What [`combine`] did. Prints as one line.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct CombineReport {
    /// The combined layers, in the order in which the sets have them.
    pub layers: Vec<CombinedLayer>,
}

/// One layer of a combination.
#[derive(Debug, Clone, PartialEq)]
pub struct CombinedLayer {
    /// The layer's dotted path.
    pub path: String,
    /// Its rank now; `None` where its values are replaced in full.
    pub rank: Option<usize>,
    /// What the cut to that rank lost: |M - A·B| / |M| in the Frobenius norm, for the M that was asked
    /// for; 0 where nothing was cut.
    pub error: f64,
}

/// `30 layers; the cut to the rank lost 4.10 % of model.layers.3.mlp.up_proj at most`
impl fmt::Display for CombineReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} layers; ", self.layers.len())?;
        let worst = self.layers.iter().max_by(|x, y| x.error.total_cmp(&y.error));
        match worst.filter(|layer| layer.error > 0.0) {
            Some(CombinedLayer { path, error, .. }) => {
                write!(f, "the cut to the rank lost {:.2} % of {path} at most", 100.0 * error)
            }
            None => write!(f, "no rank was cut"),
        }
    }
}

/// One set of several, each with its weight (of any sign): a new one, which trains; the parts stay as
/// they are.
///
/// The combined factors are in f32 (f64 where a part is), with scaling 1 and without dropout. Starting
/// products that were taken out of the weight ([`Init::Pissa`](crate::Init::Pissa)) go in first, as
/// [`LoraAdapter::into_plain`] has them. A set without a layer has the update zero there. Biases of the
/// up matrix are summed by weight, which only [`Cat`](Combination::Cat) and
/// [`Linear`](Combination::Linear) have; values in place of a layer's own (its bias, or all of it) and
/// DoRA's magnitudes have no sum with anything, and are taken over as they are (with their scaling and
/// dropout) where they are a layer's only part, with weight 1.
///
/// # Errors
/// When there is no part; a weight, a value of a set or one of the result is not finite; a rank or density cannot be
/// used; a singular value decomposition does not converge. [`ErrorKind::NotCombinable`] names all the
/// layers that have no such combination: DoRA, replaced values and biases as above; any DoRA where a
/// rank is to be cut; grouped convolutions where a rank is to be cut, since their update is no product
/// of matrices.
///
/// # Example
/// ```
/// # #[cfg(feature = "flex")] {
/// use burn::nn::LinearConfig;
/// use lora_core::{AdaptableLinear, AdapterSet, Combination, LoraConfig, combine, inject};
///
/// let device = burn::tensor::Device::flex().autodiff();
/// let model: Vec<AdaptableLinear> = vec![LinearConfig::new(8, 4).init(&device).into()];
/// let (mut model, _) = inject(model, &LoraConfig::new(2, 4.0))?;
/// let one = AdapterSet::detach(&mut model);
/// let (mut model, _) = inject(model, &LoraConfig { seed: 1, ..LoraConfig::new(3, 4.0) })?;
/// let other = AdapterSet::detach(&mut model);
///
/// let (both, report) = combine(&[(&one, 0.5), (&other, -1.0)], Combination::Cat)?;
/// assert_eq!(report.layers[0].rank, Some(5));
/// let (small, report) = both.recompress(2)?;
/// println!("{report}");
/// let (_model, _) = small.attach(model)?;
/// # }
/// # Ok::<(), lora_core::Error>(())
/// ```
pub fn combine(
    parts: &[(&AdapterSet, f64)],
    how: Combination,
) -> Result<(AdapterSet, CombineReport)> {
    if parts.is_empty() {
        return Err(Error::setting("parts", "at least one set to combine", 0));
    }
    if let Some((_, weight)) = parts.iter().find(|(_, weight)| !weight.is_finite()) {
        return Err(Error::setting("weight", "a finite number", weight));
    }
    how.check()?;

    let layers = layers(parts);
    let obstacle = |(path, shares): &(&str, Vec<Share>)| {
        Some(format!("{path}: {}", how.obstacle(shares)?)) //
    };
    let problems: Vec<String> = layers.iter().filter_map(obstacle).collect();
    if !problems.is_empty() {
        return Err(ErrorKind::NotCombinable { problems }.into());
    }

    for (path, shares) in &layers {
        if !shares.iter().all(|share| is_finite(share.adaptation)) {
            return Err(ErrorKind::NonFiniteCombination { path: (*path).to_owned() }.into());
        }
    }

    let mut report = CombineReport::default();
    let mut entries = Vec::new();
    for (path, shares) in layers {
        let (adaptation, error) = how.apply(path, &shares).map_err(|error| error.at(path))?;
        if !is_finite(&adaptation) {
            return Err(ErrorKind::NonFiniteCombination { path: path.to_owned() }.into()); // beyond f32
        }
        let rank = match &adaptation {
            Adaptation::LowRank(adapter) => Some(adapter.rank()),
            Adaptation::Replacement(_) => None,
        };
        report.layers.push(CombinedLayer { path: path.to_owned(), rank, error });
        entries.push((path.to_owned(), with_new_ids(adaptation)));
    }
    Ok((AdapterSet::from_entries(entries), report))
}

fn is_finite(adaptation: &Adaptation) -> bool {
    struct Finite(bool);
    impl ModuleVisitor for Finite {
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
            let value = param.val().without_autodiff();
            self.0 = self.0 && value.is_finite().all().into_scalar::<bool>();
        }
    }
    let mut finite = Finite(true);
    adaptation.visit(&mut finite);
    finite.0
}

impl AdapterSet {
    /// The best approximation of the set with this rank at most; [`combine`] of the set alone, with
    /// [`Combination::Linear`].
    ///
    /// # Errors
    /// As [`combine`].
    pub fn recompress(&self, rank: usize) -> Result<(Self, CombineReport)> {
        combine(&[(self, 1.0)], Combination::Linear { rank })
    }
}

/// What one set has for a layer.
#[derive(Debug)]
pub(crate) struct Share<'s> {
    /// The set's place among those that are combined.
    pub(crate) place: usize,
    /// The set, in messages.
    pub(crate) name: String,
    pub(crate) adaptation: &'s Adaptation,
    pub(crate) weight: f64,
}

impl<'s> Share<'s> {
    pub(crate) fn adapter(&self) -> Option<&'s LoraAdapter> {
        match self.adaptation {
            Adaptation::LowRank(adapter) => Some(adapter),
            Adaptation::Replacement(_) => None,
        }
    }

    /// Replaced values other than a bias.
    pub(crate) fn replaced(&self) -> Option<&'s Replacement> {
        match self.adaptation {
            Adaptation::Replacement(replacement)
                if replacement.weight.is_some() || replacement.tokens.is_some() =>
            {
                Some(replacement)
            }
            _ => None,
        }
    }

    /// What stands in for the layer's bias.
    fn base_bias(&self) -> Option<&'s Param<Tensor<1>>> {
        match self.adaptation {
            Adaptation::LowRank(adapter) => adapter.base_bias.as_ref(),
            Adaptation::Replacement(replacement) => replacement.bias.as_ref(),
        }
    }

    /// The bias of the layer's output with this share, where there is one.
    pub(crate) fn output_bias(&self, base: Option<Tensor<1>>, dtype: DType) -> Option<Tensor<1>> {
        match self.adaptation {
            Adaptation::LowRank(adapter) => adapter.output_bias(base, dtype),
            Adaptation::Replacement(replacement) => {
                replacement.bias.as_ref().map(|bias| bias.val()).or(base)
            }
        }
    }

    /// Whether that is another one than the layer's own.
    pub(crate) fn has_bias(&self) -> bool {
        self.base_bias().is_some()
            || self.adapter().is_some_and(|adapter| adapter.lora_bias.is_some())
    }

    /// A, B and their factors, in f32 or f64 and without autodiff.
    fn part(&self) -> Option<Part> {
        let adapter = self.adapter()?;
        let (a, b) = adapter.factors();
        let [a, b] = [a, b].map(|factor| in_full(factor.without_autodiff()));
        Some(Part { a, b, scaling: adapter.scaling(), weight: self.weight })
    }
}

/// The low-rank parts in one dtype: f64 where one of them is in f64, else f32.
pub(crate) fn low_rank_parts(shares: &[Share]) -> Vec<Part> {
    let mut parts: Vec<Part> = shares.iter().filter_map(Share::part).collect();
    if parts.iter().any(|part| part.a.dtype() == DType::F64 || part.b.dtype() == DType::F64) {
        for part in &mut parts {
            part.a = in_dtype(part.a.clone(), DType::F64);
            part.b = in_dtype(part.b.clone(), DType::F64);
        }
    }
    parts
}

/// For each path, in the order of the sets, what they have there.
fn layers<'s>(parts: &[(&'s AdapterSet, f64)]) -> Vec<(&'s str, Vec<Share<'s>>)> {
    let mut layers: Vec<(&str, Vec<Share>)> = Vec::new();
    for (place, (set, weight)) in parts.iter().enumerate() {
        for (path, adaptation) in set.iter() {
            let name = format!("part {place}");
            let share = Share { place, name, adaptation, weight: *weight };
            match layers.iter_mut().find(|(other, _)| *other == path) {
                Some((_, shares)) => shares.push(share),
                None => layers.push((path, vec![share])),
            }
        }
    }
    layers
}

/// Why the shares of a layer have no weighted sum, where they have none.
pub(crate) fn no_sum(shares: &[Share]) -> Option<String> {
    if taken_over(shares).is_some() {
        return None;
    }
    for share in shares {
        let name = &share.name;
        if let Some(replacement) = share.replaced() {
            let what = replacement.what();
            return Some(format!("{what} in {name}, in place of the layer's own"));
        }
        if share.adapter().is_some_and(|adapter| adapter.magnitude.is_some()) {
            return Some(format!("DoRA's magnitudes in {name}, which act on the whole weight"));
        }
    }
    let mut biases = shares.iter().filter(|share| share.base_bias().is_some());
    match (biases.next(), biases.next()) {
        (Some(one), Some(other)) => Some(format!(
            "a bias in place of the layer's own both in {} and {}",
            one.name, other.name
        )),
        (Some(share), None) if share.weight != 1.0 => {
            let Share { name, weight, .. } = share;
            Some(format!("a bias in place of the layer's own in {name}, with weight {weight}"))
        }
        _ => None,
    }
}

/// What is taken over as it is, having no sum with anything.
fn taken_over(shares: &[Share]) -> Option<Adaptation> {
    let [Share { adaptation, weight: 1.0, .. }] = shares else { return None };
    match adaptation {
        Adaptation::LowRank(adapter) if adapter.magnitude.is_none() => None,
        Adaptation::LowRank(adapter) => Some(Adaptation::LowRank(adapter.clone().into_plain())),
        Adaptation::Replacement(_) => Some((*adaptation).clone()),
    }
}

/// The weighted sum, for shares of which [`no_sum`] has nothing to say.
pub(crate) fn sum(shares: &[Share]) -> Result<Adaptation> {
    match taken_over(shares) {
        Some(adaptation) => Ok(adaptation),
        None => {
            let (a, b) = cat(&low_rank_parts(shares))?;
            Ok(Adaptation::LowRank(with_biases(a, b, shares)))
        }
    }
}

/// An adapter of these factors, whose scaling is 1, with the shares' biases.
fn with_biases(a: Tensor<2>, b: Tensor<2>, shares: &[Share]) -> LoraAdapter {
    let beside = shares.iter().find_map(Share::adapter).expect("low-rank updates are combined");
    let device = beside.lora_a.val().device();
    let alpha = a.dims()[1] as f64;
    let dtype = a.dtype();
    let (a, b) = (on(a, &device), on(b, &device));
    let mut adapter = LoraAdapter::unchecked(a, b, alpha, Scaling::AlphaOverRank);
    let biases = shares.iter().filter_map(|share| {
        let adapter = share.adapter()?;
        let bias = adapter.lora_bias.as_ref()?.val().without_autodiff();
        Some(in_dtype(bias, dtype).mul_scalar(adapter.scaling() * share.weight))
    });
    let bias = biases.reduce(|sum, bias| sum + bias);
    adapter.lora_bias = bias.map(|bias| Param::from_tensor(on(bias, &device)));
    let base_bias = shares.iter().find_map(Share::base_bias);
    adapter.base_bias = base_bias.map(|bias| {
        let bias = bias.val().without_autodiff();
        Param::from_tensor(on(bias, &device))
    });
    adapter
}

impl Combination {
    /// Why this has no meaning for a layer's shares, where it has none.
    fn obstacle(self, shares: &[Share]) -> Option<String> {
        let Some(rank) = self.rank() else { return no_sum(shares) };
        let parts: Vec<Part> = shares.iter().filter_map(Share::part).collect();
        let groups = parts.iter().map(Part::groups).max().unwrap_or(1);
        let is_cut = match self {
            Self::Linear { .. } => parts.iter().map(|part| part.a.dims()[1]).sum::<usize>() > rank,
            _ => true,
        };
        if is_cut && groups > 1 {
            return Some(format!(
                "a grouped convolution ({groups} groups), whose rank cannot be cut"
            ));
        }
        let has_magnitude =
            |share: &&Share| share.adapter().is_some_and(|adapter| adapter.magnitude.is_some());
        if let Some(share) = shares.iter().find(has_magnitude).filter(|_| is_cut) {
            return Some(format!(
                "DoRA's magnitudes in {}, which act on the whole weight",
                share.name
            ));
        }
        if let Self::Linear { .. } = self {
            return no_sum(shares);
        }
        shares.iter().find_map(|Share { name, adaptation, .. }| match adaptation {
            Adaptation::Replacement(replacement) => {
                Some(format!("{} in {name}, in place of the layer's own", replacement.what()))
            }
            Adaptation::LowRank(adapter) if adapter.base_bias.is_some() => {
                Some(format!("a bias in place of the layer's own in {name}"))
            }
            Adaptation::LowRank(adapter) if adapter.lora_bias.is_some() => {
                Some(format!("a bias of the up matrix in {name}"))
            }
            Adaptation::LowRank(_) => None,
        })
    }

    /// One layer's combination and what its cut lost.
    fn apply(self, path: &str, shares: &[Share]) -> Result<(Adaptation, f64)> {
        match self {
            Self::Cat => Ok((sum(shares)?, 0.0)),
            Self::Linear { rank } => match sum(shares)? {
                Adaptation::LowRank(whole) if whole.rank() > rank => {
                    let (a, b) = whole.factors();
                    let (a, b) = (a.without_autodiff(), b.without_autodiff());
                    let dims = [a.dims()[0], b.dims()[1]];
                    let low = recompress(&a, &b, at_most(rank, dims))?;
                    Ok(from_low_rank(low, shares))
                }
                whole => Ok((whole, 0.0)),
            },
            Self::Ties { density, rank } => {
                let whole = ties(&updates(shares), density)?;
                cut(&whole, rank, shares)
            }
            Self::Dare { density, seed, rank } => {
                let dropped = dropped(path, shares, density, seed)?;
                same_shape(dropped.iter().map(|(update, _)| update.dims()))?;
                let terms = dropped.into_iter().map(|(update, weight)| update.mul_scalar(weight));
                let whole = terms.reduce(|sum, term| sum + term).expect("a layer has a share");
                cut(&whole, rank, shares)
            }
            Self::DareTies { density, seed, rank } => {
                let whole = ties(&dropped(path, shares, density, seed)?, 1.0)?;
                cut(&whole, rank, shares)
            }
        }
    }
}

/// The dense updates with their weights, in one dtype.
fn updates(shares: &[Share]) -> Vec<(Tensor<2>, f64)> {
    let dense = |part: Part| (part.a.matmul(part.b.mul_scalar(part.scaling)), part.weight);
    low_rank_parts(shares).into_iter().map(dense).collect()
}

/// The same with entries dropped, others for each layer and set.
fn dropped(path: &str, shares: &[Share], density: f64, seed: u64) -> Result<Vec<(Tensor<2>, f64)>> {
    const APART: u64 = 0x9E37_79B9_7F4A_7C15; // 2^64 over the golden ratio
    let seed = seed ^ path_hash(path);
    let updates = updates(shares).into_iter().zip(shares);
    let drop = |((update, weight), share): ((Tensor<2>, f64), &Share)| {
        let seed = seed.wrapping_add(APART.wrapping_mul(share.place as u64));
        Ok((dare(&update, density, seed)?, weight))
    };
    updates.map(drop).collect()
}

fn cut(whole: &Tensor<2>, rank: usize, shares: &[Share]) -> Result<(Adaptation, f64)> {
    let low = factorise(whole, at_most(rank, whole.dims()))?;
    Ok(from_low_rank(low, shares))
}

fn from_low_rank(low: LowRank, shares: &[Share]) -> (Adaptation, f64) {
    (Adaptation::LowRank(with_biases(low.a, low.b, shares)), low.error)
}

/// The rank, or what is enough for a layer of these sizes.
fn at_most(rank: usize, [d_input, d_output]: [usize; 2]) -> usize {
    rank.min(d_input).min(d_output)
}
