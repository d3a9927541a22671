//! The adapters of a whole model as one value.

use std::collections::{BTreeSet, HashMap};

use burn::module::Module;

use crate::adapter::LoraAdapter;
use crate::error::{Error, Result};
use crate::inject::{InjectReport, check_bare, check_unmerged, frozen_beside_adapters};
use crate::layer::Adaptation;
use crate::visit::VisitLora;

/// What adapts each layer of a model, by the layer's path: handles to tensors, so that a clone copies
/// nothing.
///
/// ```
/// # #[cfg(feature = "flex")] {
/// use burn::nn::LinearConfig;
/// use lora_core::{AdaptableLinear, AdapterSet, LoraConfig, inject};
///
/// let device = burn::tensor::Device::flex().autodiff();
/// let model: Vec<AdaptableLinear> = vec![LinearConfig::new(8, 4).init(&device).into()];
/// let (mut model, _) = inject(model, &LoraConfig::new(2, 4.0))?;
///
/// let set = AdapterSet::detach(&mut model);
/// assert_eq!(set.paths().collect::<Vec<_>>(), ["0"]);
/// let (_model, report) = set.attach(model)?;
/// assert_eq!(report.adapted.len(), 1);
/// # }
/// # Ok::<(), lora_core::Error>(())
/// ```
#[derive(Debug, Clone, Default)]
pub struct AdapterSet {
    entries: Vec<(String, Adaptation)>,
    /// Where each path is first in `entries`: mixtures of experts have tens of thousands.
    places: HashMap<String, usize>,
}

impl AdapterSet {
    /// Adapters by the paths of their layers, such as a file holds; [`attach`](Self::attach) checks
    /// whether they fit a model.
    pub fn from_adapters(adapters: impl IntoIterator<Item = (String, LoraAdapter)>) -> Self {
        let entry = |(path, adapter)| (path, Adaptation::LowRank(adapter));
        Self::from_entries(adapters.into_iter().map(entry).collect())
    }

    pub(crate) fn from_entries(entries: Vec<(String, Adaptation)>) -> Self {
        let mut places = HashMap::with_capacity(entries.len());
        for (place, (path, _)) in entries.iter().enumerate() {
            places.entry(path.clone()).or_insert(place);
        }
        Self { entries, places }
    }

    /// What adapts the model's layers at the moment.
    pub fn of<M: VisitLora>(model: &M) -> Self {
        let mut entries = Vec::new();
        model.visit_lora("", &mut |path, layer| {
            entries.extend(layer.adaptation().map(|adaptation| (path.to_owned(), adaptation)));
        });
        Self::from_entries(entries)
    }

    /// Takes off what adapts the model's layers. The model stays frozen; a merged one is its base again.
    pub fn detach<M: VisitLora>(model: &mut M) -> Self {
        let mut entries = Vec::new();
        model.visit_lora_mut("", &mut |path, layer| {
            entries.extend(layer.detach().map(|adaptation| (path.to_owned(), adaptation)));
        });
        Self::from_entries(entries)
    }

    /// Freezes the model and puts this set on its layers.
    ///
    /// # Errors
    /// When a path is no layer of the model or stands twice, a layer has an adapter already, shapes do not fit,
    /// a layer or its adapter is in a type that the device does not compute in, or a layer of the model is
    /// merged. All of it is checked before anything is attached.
    pub fn attach<M: Module + VisitLora>(self, model: M) -> Result<(M, InjectReport)> {
        check_unmerged(&model)?;
        self.check(&model)?;
        let mut model = frozen_beside_adapters(model);
        self.put_on(&mut model)?;
        let report = InjectReport::of(&model);
        Ok((model, report))
    }

    /// Puts the set on a model for which [`check`](Self::check) has passed.
    pub(crate) fn put_on<M: VisitLora>(self, model: &mut M) -> Result<()> {
        let Self { entries, places } = self;
        let mut entries: Vec<_> =
            entries.into_iter().map(|(_, adaptation)| Some(adaptation)).collect();
        let mut failure = None;
        model.visit_lora_mut("", &mut |path, layer| {
            let place = places.get(path).copied();
            let Some(adaptation) = place.and_then(|place| entries[place].take()) else { return };
            let autodiff = layer.weight().device().is_autodiff();
            if let Err(error) = layer.attach(adaptation.with_autodiff(autodiff)) {
                failure.get_or_insert_with(|| error.at(path));
            }
        });
        failure.map_or(Ok(()), Err)
    }

    pub(crate) fn check<M: VisitLora>(&self, model: &M) -> Result<()> {
        check_bare(model, |path| self.get(path).is_some())?;
        self.check_layers(model)
    }

    /// Whether it fits the model's layers, whatever adapts them at the moment.
    pub(crate) fn check_layers<M: VisitLora>(&self, model: &M) -> Result<()> {
        let mut fits = vec![false; self.entries.len()];
        let mut failure = None;
        if let Some(twice) = self.twice() {
            let found = format!("two at {twice}");
            return Err(Error::setting("adapter", "one adapter for each layer", found));
        }
        model.visit_lora("", &mut |path, layer| {
            let Some(place) = self.places.get(path).copied() else { return };
            let (_, adaptation) = &self.entries[place];
            fits[place] = true;
            if let Err(error) = layer.check(adaptation) {
                failure.get_or_insert_with(|| error.at(path));
            }
        });
        let left = fits.iter().position(|fits| !fits).map(|place| &self.entries[place].0);
        match (failure, left) {
            (Some(error), _) => Err(error),
            (None, Some(path)) => {
                Err(Error::setting("adapter", "paths of this model's layers only", path))
            }
            (None, None) => Ok(()),
        }
    }

    /// A path that stands more than once.
    fn twice(&self) -> Option<&str> {
        let mut seen = BTreeSet::new();
        self.paths().find(|path| !seen.insert(*path))
    }

    /// The paths of the adapted layers, in the model's order or in that in which they were given.
    pub fn paths(&self) -> impl Iterator<Item = &str> {
        self.entries.iter().map(|(path, _)| path.as_str())
    }

    /// What adapts the layer at `path`.
    pub fn get(&self, path: &str) -> Option<&Adaptation> {
        self.places.get(path).map(|place| &self.entries[*place].1)
    }

    pub(crate) fn get_mut(&mut self, path: &str) -> Option<&mut Adaptation> {
        self.places.get(path).map(|place| &mut self.entries[*place].1)
    }

    pub(crate) fn iter_mut(&mut self) -> impl Iterator<Item = &mut Adaptation> {
        self.entries.iter_mut().map(|(_, adaptation)| adaptation)
    }

    /// Paths and what adapts them, in the order of [`paths`](Self::paths).
    pub fn iter(&self) -> impl Iterator<Item = (&str, &Adaptation)> {
        self.entries.iter().map(|(path, adaptation)| (path.as_str(), adaptation))
    }

    /// Whether it adapts nothing.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Values that train.
    pub fn num_parameters(&self) -> usize {
        self.entries.iter().map(|(_, adaptation)| adaptation.num_parameters()).sum()
    }
}
