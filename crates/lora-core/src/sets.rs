//! Several named adapters for one model, beside the model.

use std::collections::{HashSet, VecDeque};
use std::ops::Deref;

use burn::module::{Module, ModuleMapper, ModuleVisitor, Param, ParamId};
use burn::tensor::{Int, Tensor, TensorData};

use crate::adapter::{LoraAdapter, full_of, in_dtype, in_full, on};
use crate::combination::{Share, low_rank_parts, no_sum, sum};
use crate::combine::{cat, column_parts};
use crate::error::{Error, ErrorKind, Result};
use crate::frozen::frozen;
use crate::inject::check_unmerged;
use crate::layer::{AdaptableLayer, Adaptation};
use crate::samples::Samples;
use crate::scaling::Scaling;
use crate::set::AdapterSet;
use crate::target::most_similar;
use crate::visit::VisitLora;

/// Named [`AdapterSet`]s for one model, kept beside it: which of them acts is a matter of handles, and no
/// weight is copied or changed.
///
/// A layer holds what acts and nothing else. The registry knows its own adapters in a model by their
/// parameters' ids, which optimisers keep: every method that changes the model stores what trained there
/// back into its set first, so that no step of an optimiser is lost. A copy without autodiff
/// ([`Module::valid`]) is not stored over a set that trains; a clone with autodiff is, since nothing tells
/// it from the model: give the registry one of them only. A set need not have all layers that another
/// has.
///
/// # Example
/// ```
/// # #[cfg(feature = "flex")] {
/// use burn::nn::LinearConfig;
/// use burn::tensor::{Device, Tensor};
/// use lora_core::{AdaptableLinear, AdapterSet, AdapterSets, LoraConfig, inject};
///
/// let device = Device::flex().autodiff();
/// let model: Vec<AdaptableLinear> = vec![LinearConfig::new(8, 4).init(&device).into()];
/// let mut sets = AdapterSets::new();
///
/// let (mut model, _) = inject(model, &LoraConfig::new(2, 4.0))?;
/// sets.insert("poet", AdapterSet::of(&model))?; // acts from here on
/// // .. training ..
/// sets.deactivate(&mut model)?; // the poet has what trained
/// let (mut model, _) = inject(model, &LoraConfig::new(3, 3.0))?;
/// sets.insert("critic", AdapterSet::of(&model))?;
///
/// sets.activate(&mut model, "poet")?;
/// assert_eq!(sets.active(&model)?, ["poet"]);
/// sets.activate_all(&mut model, &["poet", "critic"])?; // the sum of both, for inference
///
/// // A batch whose samples have adapters of their own; the second has the base.
/// let batch = Tensor::<3>::ones([3, 5, 8], &device);
/// let mixed = sets.mixed(&mut model, &[Some("poet"), None, Some("critic")])?;
/// assert_eq!(mixed[0].forward(batch).dims(), [3, 5, 4]);
/// # }
/// # Ok::<(), lora_core::Error>(())
/// ```
#[derive(Debug, Default)]
pub struct AdapterSets {
    sets: Vec<(String, AdapterSet)>,
    sums: VecDeque<Sum>, // the last ones that were put on a model, the latest first
}

/// Sums that are known again on a model that has one: it may be a copy that has kept an earlier one.
const KNOWN_SUMS: usize = 64;

/// A sum that was put on a model.
#[derive(Debug)]
struct Sum {
    names: Vec<String>,
    ids: HashSet<ParamId>, // of its adaptations
}

/// What a layer of a model has.
struct Live {
    path: String,
    owner: Owner,
    adaptation: Adaptation,
}

#[derive(Clone, Copy, PartialEq)]
enum Owner {
    /// The set of this place.
    Set(usize),
    /// The sum of this place.
    Sum(usize),
}

impl AdapterSets {
    /// A registry without sets.
    pub fn new() -> Self {
        Self::default()
    }

    /// Takes up a set under a name. No model changes: a set that is [of](AdapterSet::of) a model acts
    /// there on, and is active from now on; any other waits to be activated.
    ///
    /// What shares parameters with a set that is here, a clone of it for instance, becomes the new set's
    /// own: with the values of now and new ids. On a model the other set has it.
    ///
    /// # Errors
    /// When the name is taken.
    pub fn insert(&mut self, name: impl Into<String>, mut set: AdapterSet) -> Result<()> {
        let name = name.into();
        self.check_new(&name)?;
        let others = self.sets.iter().flat_map(|(_, other)| other.iter());
        let taken: Vec<ParamId> = others.flat_map(|(_, adaptation)| ids(adaptation)).collect();
        let is_taken =
            |adaptation: &Adaptation| ids(adaptation).iter().any(|id| taken.contains(id));
        for adaptation in set.iter_mut().filter(|adaptation| is_taken(adaptation)) {
            *adaptation = with_new_ids(adaptation.clone());
        }
        self.sets.push((name, set));
        Ok(())
    }

    /// The names, in the order in which the sets came.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.sets.iter().map(|(name, _)| name.as_str())
    }

    /// The set of this name, as it was when it was inserted or stored last; [`store`](Self::store) it
    /// first, where it trains.
    ///
    /// # Errors
    /// When there is none, with the most similar names.
    pub fn get(&self, name: &str) -> Result<&AdapterSet> {
        self.place(name).map(|place| &self.sets[place].1)
    }

    /// Another name for a set. If the set is active, it stays so, under the new name.
    ///
    /// # Errors
    /// When there is no set `from`, or `to` is another one's name.
    pub fn rename(&mut self, from: &str, to: impl Into<String>) -> Result<()> {
        let to = to.into();
        let place = self.place(from)?;
        if to != from {
            self.check_new(&to)?;
        }
        let names = self.sums.iter_mut().flat_map(|sum| &mut sum.names);
        names.filter(|name| *name == from).for_each(|name| name.clone_from(&to));
        self.sets[place].0 = to;
        Ok(())
    }

    /// Takes a set out of the registry, with what trained, and off the model where it is active there; of
    /// a sum the rest stays, switched off where it was.
    ///
    /// # Errors
    /// When there is no such set, the model is merged, or is adapted by something that is in no set;
    /// then nothing has changed. When what is left of a sum cannot be put on, as [`activate`](Self::activate).
    pub fn remove<M: Module + VisitLora>(
        &mut self,
        model: &mut M,
        name: &str,
    ) -> Result<AdapterSet> {
        let place = self.place(name)?;
        let live = self.unmerged(model)?;
        let rest = self.rest_of_sum(&live, name);
        self.take_up(live);
        if let Some(rest) = rest {
            let mut enabled = Vec::new();
            model.visit_lora("", &mut |_, layer| {
                enabled.push(layer.adaptation().map(|_| layer.is_enabled()));
            });
            self.activate_all(model, &rest)?;
            let mut enabled = enabled.into_iter();
            model.visit_lora_mut("", &mut |_, layer| {
                if let Some(before) = enabled.next().flatten() {
                    layer.set_enabled(before);
                }
            });
        } else {
            let set = &self.sets[place].1;
            model.visit_lora_mut("", &mut |path, layer| {
                let is_ours =
                    |live: Adaptation| set.get(path).is_some_and(|ours| key(ours) == key(&live));
                if layer.adaptation().is_some_and(is_ours) {
                    layer.exchange(None);
                }
            });
        }
        self.sums.iter_mut().for_each(|sum| sum.names.retain(|other| other != name));
        Ok(self.sets.remove(place).1)
    }

    /// The names of the sets that act on the model, in the registry's order; those of a sum in the order
    /// in which they were given. What is disabled or merged counts too.
    ///
    /// # Errors
    /// When something adapts the model that is in no set.
    pub fn active<M: VisitLora>(&self, model: &M) -> Result<Vec<&str>> {
        let live = self.live(model)?;
        let is_live = |owner: Owner| live.iter().any(|layer| layer.owner == owner);
        let sets = self.sets.iter().enumerate();
        let mut names: Vec<&str> = sets
            .filter(|(place, _)| is_live(Owner::Set(*place)))
            .map(|(_, (name, _))| name.as_str())
            .collect();
        for (place, sum) in self.sums.iter().enumerate() {
            if is_live(Owner::Sum(place)) {
                names.extend(sum.names.iter().map(String::as_str));
            }
        }
        Ok(names)
    }

    /// Takes what trained in the model up into its set, without any other change. All methods that change
    /// the model do so first.
    ///
    /// # Errors
    /// When something adapts the model that is in no set; then nothing has changed.
    pub fn store<M: VisitLora>(&mut self, model: &M) -> Result<()> {
        let live = self.live(model)?;
        self.take_up(live);
        Ok(())
    }

    /// Lets one set act, in place of whatever did, enabled; it trains as it did before.
    ///
    /// A model that nothing adapts is frozen first, as [`inject`](crate::inject) does. On a model without
    /// autodiff ([`Module::valid`]) the set acts without it.
    ///
    /// # Errors
    /// When there is no such set, it does not fit the model (as [`AdapterSet::attach`]), the model is merged, or
    /// is adapted by something that is in no set; then nothing has changed.
    pub fn activate<M: Module + VisitLora>(&mut self, model: &mut M, name: &str) -> Result<()> {
        let place = self.place(name)?;
        self.sets[place].1.check_layers(model)?;
        let live = self.unmerged(model)?;
        if live.is_empty() {
            *model = frozen(model.clone());
        }
        self.take_up(live);
        put_on(model, &self.sets[place].1);
        Ok(())
    }

    /// Lets several sets act at once, in place of whatever did: every layer's update is the sum of theirs.
    ///
    /// ```text
    /// y = x W + b + Σ s_i (x A_i) B_i + Σ s_i c_i        s_i: scaling, c_i: bias of the up matrix
    /// ```
    ///
    /// It is computed with one pair of factors of all the ranks together, A = `[A_1 .. A_n]` and
    /// B = `[s_1 B_1; ..; s_n B_n]`, a copy for inference that does not train; the sets stay as they are.
    /// Values in place of a layer's own, and DoRA's magnitudes, act where one set alone has the layer.
    /// [`combine`](crate::combine) makes a sum that trains.
    ///
    /// # Errors
    /// As [`activate`](Self::activate); when a name stands twice; when layers have no sum:
    /// [`ErrorKind::NotCombinable`] names all of them. Then the model is as it was, and so are the sets but
    /// for what trained since they were put on, which they have now.
    pub fn activate_all<M: Module + VisitLora>(
        &mut self,
        model: &mut M,
        names: &[impl AsRef<str>],
    ) -> Result<()> {
        let names: Vec<&str> = names.iter().map(AsRef::as_ref).collect();
        if let Some(twice) = (1..names.len()).find(|place| names[..*place].contains(&names[*place]))
        {
            let found = format!("'{}' twice", names[twice]);
            return Err(Error::setting("names", "each name once", found));
        }
        let live = self.prepared(model, &names)?;
        // What trained must be in the sum; on a failure it is stored and nothing else has changed.
        let is_bare = live.is_empty();
        self.take_up(live);

        let sets = self.named(&names);
        let layers = shared_layers(model, &sets);
        let obstacle = |(path, shares): &(String, Vec<Share>)| {
            Some(format!("{path}: {}", no_sum(shares)?)) //
        };
        let problems: Vec<String> = layers.iter().filter_map(obstacle).collect();
        if !problems.is_empty() {
            return Err(ErrorKind::NotCombinable { problems }.into());
        }
        let mut entries = Vec::new();
        for (path, shares) in layers {
            let adaptation = sum(&shares).map_err(|error| error.at(&path))?;
            entries.push((path, with_new_ids(adaptation).no_grad()));
        }
        let set = AdapterSet::from_entries(entries);
        self.sums.truncate(KNOWN_SUMS - 1);
        self.sums.push_front(Sum {
            names: names.into_iter().map(str::to_owned).collect(),
            ids: set.iter().filter_map(|(_, adaptation)| key(adaptation)).collect(),
        });
        if is_bare {
            *model = frozen(model.clone());
        }
        put_on(model, &set);
        Ok(())
    }

    /// Takes what acts off the model, which is its base then, and stays frozen.
    ///
    /// # Errors
    /// When the model is merged, or is adapted by something that is in no set; then nothing has changed.
    pub fn deactivate<M: VisitLora>(&mut self, model: &mut M) -> Result<()> {
        let live = self.unmerged(model)?;
        self.take_up(live);
        put_on(model, &AdapterSet::default());
        Ok(())
    }

    /// The model for one kind of batch: its sample i runs with the set `samples[i]`, or the base for
    /// `None`. For inference; when the guard is dropped, what was active is active again, disabled where
    /// it was. A model that nothing adapts is frozen first, and stays so.
    ///
    /// ```text
    /// y_i = x_i W + b + ((x_i A) ∘ m_i) B        A = [A_1 .. A_n]   B = [s_1 B_1; ..; s_n B_n]
    /// ```
    ///
    /// m_i is 1 for the ranks of sample i's set and 0 for the others', so that the frozen product, which
    /// is nearly all of the work, is one for the whole batch. Biases and DoRA's factors on the columns
    /// are taken for each sample too. A sample's values must be finite with every set of the batch: 0
    /// times infinity is NaN.
    ///
    /// # Shapes
    /// - the input of every adapted layer `[batch, ...]`: linear `[batch, ..., d_input]`, embedding
    ///   `[batch, length]`, convolution `[batch, channels, ...]`. Any other leading axis, such as that of
    ///   a fold `[batch · length, d_input]`, is a panic in the layer's forward.
    ///
    /// # Errors
    /// As [`activate`](Self::activate); when there is no sample; [`ErrorKind::NotCombinable`] names the
    /// layers of which a set has the weight or token rows in full.
    ///
    /// Source: the masks are PEFT's `adapter_names`, as one product; LoRAX and
    /// "Punica" ([arXiv:2310.18547](https://arxiv.org/abs/2310.18547)) serve such batches.
    pub fn mixed<'m, M: Module + VisitLora>(
        &mut self,
        model: &'m mut M,
        samples: &[Option<&str>],
    ) -> Result<Mixed<'m, M>> {
        if samples.is_empty() {
            return Err(Error::setting("samples", "at least one sample", 0));
        }
        let mut names: Vec<&str> = Vec::new();
        for name in samples.iter().flatten() {
            if !names.contains(name) {
                names.push(name);
            }
        }
        let live = self.prepared(model, &names)?;
        let is_bare = live.is_empty();
        self.take_up(live);

        let sets = self.named(&names);
        let place = |name: &str| names.iter().position(|other| *other == name);
        let samples: Vec<Option<usize>> = samples.iter().map(|name| place((*name)?)).collect();
        let layers = shared_layers(model, &sets);
        let mut problems = Vec::new();
        for (path, shares) in &layers {
            problems.extend(shares.iter().filter_map(|share| {
                let what = share.replaced()?.what();
                Some(format!("{path}: {what} in {}, in place of the layer's own", share.name))
            }));
        }
        if !problems.is_empty() {
            return Err(ErrorKind::NotCombinable { problems }.into());
        }

        let mut parts = Vec::new();
        let mut failure = None;
        let mut layers = layers.iter().peekable(); // in the model's order
        model.visit_lora("", &mut |path, layer| {
            let Some((_, shares)) = layers.next_if(|(other, _)| other == path) else {
                return parts.push(None);
            };
            match mix(layer, shares, &samples) {
                Ok(part) => parts.push(Some(part)),
                Err(error) => failure = Some(error.at(path)),
            }
        });
        if let Some(error) = failure {
            return Err(error);
        }
        if is_bare {
            *model = frozen(model.clone());
        }
        let mut parts = parts.into_iter();
        let mut before = Vec::new();
        model.visit_lora_mut("", &mut |_, layer| {
            before.push((layer.adaptation(), layer.is_enabled()));
            let (adapter, samples) = parts.next().flatten().unzip();
            layer.exchange(adapter.map(Adaptation::LowRank));
            layer.set_samples(samples);
        });
        Ok(Mixed { model, before })
    }

    fn place(&self, name: &str) -> Result<usize> {
        self.sets.iter().position(|(other, _)| other == name).ok_or_else(|| {
            let names = most_similar(name, self.names().map(str::to_owned).collect());
            ErrorKind::UnknownSet { name: name.to_owned(), names }.into()
        })
    }

    fn check_new(&self, name: &str) -> Result<()> {
        match self.names().any(|other| other == name) {
            true => Err(ErrorKind::NameTaken { name: name.to_owned() }.into()),
            false => Ok(()),
        }
    }

    /// What the model has, and whose it is.
    fn live<M: VisitLora>(&self, model: &M) -> Result<Vec<Live>> {
        let mut live = Vec::new();
        let mut foreign = None;
        model.visit_lora("", &mut |path, layer| {
            let Some(adaptation) = layer.adaptation() else { return };
            let id = key(&adaptation);
            let is_owner =
                |(_, set): &(String, AdapterSet)| set.get(path).is_some_and(|ours| key(ours) == id);
            let in_set = self.sets.iter().position(is_owner).map(Owner::Set);
            let has_it = |sum: &Sum| id.is_some_and(|id| sum.ids.contains(&id));
            let in_sum = || self.sums.iter().position(has_it).map(Owner::Sum);
            match in_set.or_else(in_sum) {
                Some(owner) => live.push(Live { path: path.to_owned(), owner, adaptation }),
                None => {
                    foreign.get_or_insert_with(|| path.to_owned());
                }
            }
        });
        match foreign {
            Some(path) => Err(ErrorKind::ForeignAdapter { path }.into()),
            None => Ok(live),
        }
    }

    /// The same for a model that is to change, and so must not be merged.
    fn unmerged<M: VisitLora>(&self, model: &M) -> Result<Vec<Live>> {
        check_unmerged(model)?;
        self.live(model)
    }

    /// The same, where all of the named sets fit the model.
    fn prepared<M: VisitLora>(&self, model: &M, names: &[&str]) -> Result<Vec<Live>> {
        for name in names {
            self.get(name)?.check_layers(model)?;
        }
        self.unmerged(model)
    }

    fn take_up(&mut self, live: Vec<Live>) {
        for Live { path, owner, adaptation } in live {
            let Owner::Set(place) = owner else { continue };
            let has_autodiff =
                |adaptation: &Adaptation| adaptation.device().is_some_and(|on| on.is_autodiff());
            // A copy for evaluation is as old as the day it was made, and cannot have trained.
            if let Some(stored) = self.sets[place].1.get_mut(&path)
                && has_autodiff(&adaptation) >= has_autodiff(stored)
            {
                *stored = adaptation;
            }
        }
    }

    /// The other sets of the sum that acts, where the set of this name is in it.
    fn rest_of_sum(&self, live: &[Live], name: &str) -> Option<Vec<String>> {
        let place = live.iter().find_map(|layer| match layer.owner {
            Owner::Sum(place) => Some(place),
            Owner::Set(_) => None,
        })?;
        let names = &self.sums[place].names;
        let rest = || names.iter().filter(|other| *other != name).cloned().collect();
        names.iter().any(|other| other == name).then(rest)
    }

    fn named<'s>(&'s self, names: &[&'s str]) -> Vec<(&'s str, &'s AdapterSet)> {
        let set = |name: &&'s str| {
            let (_, set) = self.sets.iter().find(|(other, _)| other == name)?;
            Some((*name, set))
        };
        names.iter().filter_map(set).collect()
    }
}

/// A model for batches whose samples have adapters of their own; see [`AdapterSets::mixed`].
#[derive(Debug)]
#[must_use = "what was active before acts again as soon as this is dropped"]
pub struct Mixed<'m, M: VisitLora> {
    model: &'m mut M,
    before: Vec<(Option<Adaptation>, bool)>, // in the model's order, and whether it was enabled
}

impl<M: VisitLora> Deref for Mixed<'_, M> {
    type Target = M;

    fn deref(&self) -> &M {
        self.model
    }
}

impl<M: VisitLora> Drop for Mixed<'_, M> {
    fn drop(&mut self) {
        let mut before = std::mem::take(&mut self.before).into_iter();
        self.model.visit_lora_mut("", &mut |_, layer| {
            if let Some((adaptation, enabled)) = before.next() {
                layer.exchange(adaptation);
                layer.set_enabled(enabled);
            }
        });
    }
}

/// One adapter of all the shares' ranks, and which of it each sample of the batch has.
fn mix(
    layer: &dyn AdaptableLayer,
    shares: &[Share],
    samples: &[Option<usize>],
) -> Result<(LoraAdapter, Samples)> {
    let weight = layer.weight();
    let (device, dtype) = (weight.device(), full_of([weight.dtype()]));
    let parts = low_rank_parts(shares);
    let low_rank: Vec<&Share> =
        shares.iter().filter(|share| matches!(share.adaptation, Adaptation::LowRank(_))).collect();
    let (a, b) = if parts.is_empty() { nothing(layer) } else { cat(&parts)? };
    let rank = a.dims()[1];
    let alpha = rank as f64; // scaling 1
    let (a, b) = (on(a, &device), on(b, &device));
    let adapter = LoraAdapter::unchecked(a, b, alpha, Scaling::AlphaOverRank).no_grad();

    let columns: Vec<usize> =
        column_parts(&parts).into_iter().map(|part| low_rank[part].place).collect();
    let mut ranks = vec![0f32; samples.len() * rank];
    for (row, sample) in ranks.chunks_mut(rank).zip(samples) {
        for (value, place) in row.iter_mut().zip(&columns) {
            *value = f32::from(*sample == Some(*place));
        }
    }
    let ranks = TensorData::new(ranks, [samples.len(), rank]);
    let ranks = Tensor::from_data(ranks, (&device, dtype));

    // For each sample the values of its share, or the base's.
    let [_, d_output] = layer.dims();
    let each = |values: Vec<Option<Tensor<1>>>, base: Tensor<1>| {
        let (dtype, base) = (base.dtype(), base.without_autodiff());
        let rows = samples.iter().map(|sample| {
            let share = shares.iter().position(|share| Some(share.place) == *sample);
            let own = share.and_then(|share| values[share].clone());
            own.map_or_else(|| base.clone(), |own| in_dtype(own.without_autodiff(), dtype))
        });
        on(Tensor::stack::<2>(rows.collect(), 0), &device)
    };
    let squares = (shares.iter())
        .any(|share| share.adapter().is_some_and(|adapter| adapter.magnitude.is_some()))
        .then(|| layer.frozen_squares());
    let scale = squares.map(|squares| {
        let scale = |share: &Share| share.adapter()?.column_scale(&weight, &squares);
        let ones = Tensor::ones([d_output], (&device, dtype));
        each(shares.iter().map(scale).collect(), ones)
    });
    let biases: Vec<Option<Tensor<1>>> =
        shares.iter().map(|share| share.output_bias(layer.bias(), dtype)).collect();
    let bias = shares.iter().any(Share::has_bias).then(|| {
        let zeros = || Tensor::zeros([d_output], (&device, dtype));
        each(biases, layer.bias().map_or_else(zeros, in_full))
    });
    Ok((adapter, Samples { ranks, scale, bias }))
}

/// Factors of a product that is zero, for a layer of which only biases differ.
fn nothing(layer: &dyn AdaptableLayer) -> (Tensor<2>, Tensor<2>) {
    let (weight, groups) = (layer.weight().without_autodiff(), layer.groups());
    let ([group_input, d_output], device) = (weight.dims(), weight.device());
    let options = (&device, weight.dtype());
    (Tensor::zeros([group_input * groups, groups], options), Tensor::zeros([1, d_output], options))
}

/// What the sets have for each layer of the model, in the model's order; layers of no set are left out.
fn shared_layers<'s, M: VisitLora>(
    model: &M,
    sets: &[(&'s str, &'s AdapterSet)],
) -> Vec<(String, Vec<Share<'s>>)> {
    let mut layers = Vec::new();
    model.visit_lora("", &mut |path, _| {
        let share = |(place, (name, set)): (usize, &(&str, &'s AdapterSet))| {
            let (name, adaptation) = (format!("'{name}'"), set.get(path)?);
            Some(Share { place, name, adaptation, weight: 1.0 })
        };
        let shares: Vec<Share> = sets.iter().enumerate().filter_map(share).collect();
        if !shares.is_empty() {
            layers.push((path.to_owned(), shares));
        }
    });
    layers
}

/// Puts a set that fits on the model, in place of whatever was there.
fn put_on<M: VisitLora>(model: &mut M, set: &AdapterSet) {
    model.visit_lora_mut("", &mut |path, layer| {
        let autodiff = layer.weight().device().is_autodiff();
        let adaptation = set.get(path).cloned();
        layer.exchange(adaptation.map(|adaptation| adaptation.with_autodiff(autodiff)));
    });
}

/// What an adaptation is known by: the id of its first parameter.
fn key(adaptation: &Adaptation) -> Option<ParamId> {
    ids(adaptation).first().copied()
}

fn ids(adaptation: &Adaptation) -> Vec<ParamId> {
    let mut ids = Ids::default();
    adaptation.visit(&mut ids);
    ids.0
}

#[derive(Default)]
struct Ids(Vec<ParamId>);

impl ModuleVisitor for Ids {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        self.0.push(param.id);
    }
}

pub(crate) fn with_new_ids(adaptation: Adaptation) -> Adaptation {
    adaptation.map(&mut NewIds)
}

struct NewIds;

impl ModuleMapper for NewIds {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        let (_, value, mapper) = param.consume();
        Param::from_mapped_value(ParamId::new(), value, mapper)
    }

    fn map_int<const D: usize>(&mut self, param: Param<Tensor<D, Int>>) -> Param<Tensor<D, Int>> {
        let (_, value, mapper) = param.consume();
        Param::from_mapped_value(ParamId::new(), value, mapper)
    }
}
