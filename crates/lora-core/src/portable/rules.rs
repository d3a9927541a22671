//! What each reader cannot read, as data: one rule a value, so that all that are broken are told.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use crate::adapter::LoraAdapter;
use crate::config::{LoraConfig, TrainedBias};
use crate::error::{ErrorKind, Result};
use crate::frozen::LayerKind;
use crate::layer::Adaptation;
use crate::peft::check_unmixed;
use crate::scaling::Scaling;
use crate::target::TargetModules;
use crate::visit::VisitLora;

/// A program that serves adapters.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Reader {
    /// vLLM, which reads PEFT's folders.
    Vllm,
    /// llama.cpp, which reads GGUF files; its `convert_lora_to_gguf.py` makes them from PEFT's folders.
    LlamaCpp,
    /// mlx-lm, which reads a format of its own.
    Mlx,
    /// mistral.rs, which reads PEFT's folders.
    MistralRs,
}

impl Reader {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Vllm, Self::LlamaCpp, Self::Mlx, Self::MistralRs];

    /// Its name in messages.
    pub fn name(self) -> &'static str {
        match self {
            Self::Vllm => "vLLM",
            Self::LlamaCpp => "llama.cpp",
            Self::Mlx => "mlx-lm",
            Self::MistralRs => "mistral.rs",
        }
    }
}

/// What vLLM may be started with as `--max-lora-rank`; an adapter's own rank may be any up to it.
pub(super) const VLLM_RANKS: [usize; 9] = [1, 8, 16, 32, 64, 128, 256, 320, 512];
/// vLLM's limit where none is given.
const VLLM_DEFAULT_RANK: usize = 16;

/// The smallest `--max-lora-rank` that takes this rank.
pub(super) fn vllm_rank(rank: usize) -> Option<usize> {
    VLLM_RANKS.into_iter().find(|allowed| *allowed >= rank)
}

/// What a reader asks of an adapter.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum PortabilityRule {
    /// No DoRA. Every reader.
    Dora,
    /// No bias of the up matrix. Every reader.
    LoraBias,
    /// No trained biases of layers. Every reader.
    TrainedBias,
    /// No layers that train as a whole. Every reader.
    ModulesToSave,
    /// No trained rows of an embedding. Every reader.
    TrainableTokens,
    /// No adapter on a convolution. Every reader.
    Convolution,
    /// No adapter on an embedding. vLLM reads one for some models and versions, mistral.rs never;
    /// llama.cpp and mlx-lm give its update to a head that is tied to it, which PEFT and this library
    /// do not.
    Embedding,
    /// No adapter on a single expert of a mixture. mlx-lm, whose models have a projection of all experts
    /// of a block in one layer.
    Expert,
    /// Adapters on all projections of all experts of a block, or on none of them. vLLM and llama.cpp's converter,
    /// which stack them; `save_gguf_adapter` of `lora-models` needs no converter.
    AllExperts,
    /// One rank of all experts of a block. llama.cpp's converter. [`save_portable`](crate::save_portable) pads the
    /// others.
    OneExpertRank,
    /// No adapter on the head. mistral.rs.
    Head,
    /// One rank and one alpha: vLLM takes `lora_alpha` and `r` for every layer.
    /// [`save_portable`](crate::save_portable) folds the rest away.
    OneScaling,
    /// One alpha: llama.cpp's converter takes `lora_alpha` for every layer (and the layer's own rank).
    /// [`save_portable`](crate::save_portable) folds the rest away.
    OneAlpha,
    /// The factor alpha / rank: llama.cpp knows no other. [`save_portable`](crate::save_portable) folds
    /// another into B.
    AlphaOverRank,
    /// A rank of at most 512. vLLM.
    LargestRank,
    /// A rank of at most 16, or a server that is started with a higher `--max-lora-rank`. vLLM.
    ServerRank,
}

/// One rule that an adapter, or what a configuration would make of one, breaks. Prints as a sentence.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct PortabilityProblem {
    /// Who asks for it.
    pub reader: Reader,
    /// The rule.
    pub rule: PortabilityRule,
    /// What there is instead.
    pub found: String,
    /// Where: paths of layers, or fields of the configuration.
    pub places: Vec<String>,
}

impl PortabilityProblem {
    /// Whether [`save_portable`](crate::save_portable) writes a file that does not break it.
    pub fn is_folded(&self) -> bool {
        use PortabilityRule::{AlphaOverRank, OneAlpha, OneExpertRank, OneScaling};
        matches!(self.rule, OneScaling | OneAlpha | AlphaOverRank | OneExpertRank)
    }

    /// Whether the reader can be made to take the adapter as it is.
    fn is_servers(&self) -> bool {
        self.rule == PortabilityRule::ServerRank
    }

    fn expected(&self) -> &'static str {
        use PortabilityRule as Rule;
        match (self.rule, self.reader) {
            (Rule::Dora, _) => "no DoRA",
            (Rule::LoraBias, _) => "no bias of the up matrix (lora_bias)",
            (Rule::TrainedBias, _) => "no trained biases (bias = none)",
            (Rule::ModulesToSave, _) => "no layer that trains as a whole (modules_to_save)",
            (Rule::TrainableTokens, _) => "no trained token rows (trainable_tokens)",
            (Rule::Convolution, _) => "no adapter on a convolution",
            (Rule::Embedding, Reader::Vllm) => {
                "no adapter on an embedding (it reads one for some models and versions only)"
            }
            (Rule::Embedding, Reader::MistralRs) => "no adapter on an embedding",
            (Rule::Embedding, _) => {
                "no adapter on an embedding that is the head too (it gives the head the same update, \
                 which it did not have in training)"
            }
            (Rule::Expert, _) => {
                "no adapter on a single expert (it has all experts of a block in one layer)"
            }
            (Rule::AllExperts, _) => {
                "adapters on all projections of all experts of a block, or on none"
            }
            (Rule::OneExpertRank, _) => "one rank of all experts of a block (its converter)",
            (Rule::Head, _) => "no adapter on lm_head",
            (Rule::OneScaling, _) => {
                "one rank and one alpha (it ignores rank_pattern and alpha_pattern in the scaling)"
            }
            (Rule::OneAlpha, _) => "one alpha (its converter ignores alpha_pattern)",
            (Rule::AlphaOverRank, _) => "the scaling alpha / rank",
            (Rule::LargestRank, _) => "a rank of at most 512",
            (Rule::ServerRank, _) => "a rank of at most 16, its --max-lora-rank unless set",
        }
    }

    fn advice(&self) -> String {
        use PortabilityRule as Rule;
        match self.rule {
            Rule::Dora => "train without DoRA, or merge and serve the whole model".to_owned(),
            Rule::LoraBias => {
                "train without lora_bias, or merge and serve the whole model".to_owned()
            }
            Rule::TrainedBias => {
                "train with bias = none, or merge and serve the whole model".to_owned()
            }
            Rule::ModulesToSave => {
                "adapt these layers instead, or merge and serve the whole model".to_owned()
            }
            Rule::TrainableTokens => {
                "train without trainable_tokens, or merge and serve the whole model".to_owned()
            }
            Rule::Convolution | Rule::Embedding | Rule::Expert | Rule::Head => {
                "leave it out of target_modules, or merge and serve the whole model".to_owned()
            }
            Rule::AllExperts if self.reader == Reader::LlamaCpp => {
                "adapt all of them, or write its own file with save_gguf_adapter".to_owned()
            }
            Rule::AllExperts => "adapt all of them, or merge and serve the whole model".to_owned(),
            Rule::OneExpertRank => "save with save_portable, which pads the others".to_owned(),
            Rule::OneScaling | Rule::OneAlpha | Rule::AlphaOverRank => {
                "save with save_portable, which folds the scaling into B".to_owned()
            }
            Rule::LargestRank => "train with a lower rank".to_owned(),
            Rule::ServerRank => {
                let rank = self.found.rsplit(' ').next().and_then(|rank| rank.parse().ok());
                let rank = rank.and_then(vllm_rank).unwrap_or(512);
                format!("start it with --max-lora-rank {rank}, or train with a lower rank")
            }
        }
    }
}

impl fmt::Display for PortabilityProblem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const SHOWN: usize = 3;
        let (reader, expected, found) = (self.reader.name(), self.expected(), &self.found);
        write!(f, "{reader}: expected {expected}, found {found}")?;
        if !self.places.is_empty() {
            let shown = self.places.len().min(SHOWN);
            write!(f, " at {}", self.places[..shown].join(", "))?;
            if self.places.len() > shown {
                write!(f, " and {} more", self.places.len() - shown)?;
            }
        }
        write!(f, "; {}", self.advice())
    }
}

/// One problem is its sentence; several are numbered.
pub(crate) fn sentences(problems: &[PortabilityProblem]) -> String {
    if let [problem] = problems {
        return problem.to_string();
    }
    let numbered = problems.iter().enumerate();
    let all: Vec<String> =
        numbered.map(|(index, problem)| format!("({}) {problem}", index + 1)).collect();
    format!("{} problems with the readers of this adapter: {}", problems.len(), all.join("; "))
}

/// Whether what `config` trains can be served by all of `readers`, as far as that shows without a
/// model. [`check_model_for`] sees the rest as soon as [`inject`](crate::inject) has put the adapters
/// on, before the first step.
///
/// An adapter with an offset ([`Init::Pissa`](crate::Init::Pissa), [`Init::Olora`](crate::Init::Olora))
/// counts with twice its rank, with which it is saved.
///
/// ```
/// use lora_core::{LoraConfig, Reader, Scaling, check_config_for};
///
/// let mut config = LoraConfig::new(16, 32.0);
/// check_config_for(&config, &Reader::ALL)?;
/// config.dora = true;
/// config.scaling = Scaling::AlphaOverSqrtRank;
/// let error = check_config_for(&config, &[Reader::LlamaCpp]).unwrap_err().to_string();
/// assert!(error.contains("llama.cpp: expected no DoRA, found true at dora; train without"));
/// assert!(error.contains("save with save_portable"));
/// # Ok::<(), lora_core::Error>(())
/// ```
///
/// # Errors
/// [`ErrorKind::NotPortable`] with every rule that is broken.
pub fn check_config_for(config: &LoraConfig, readers: &[Reader]) -> Result<()> {
    answer(readers.iter().flat_map(|reader| config_problems(config, *reader)).collect())
}

/// Whether the model's adapters, as [`save_adapter`](crate::save_adapter) would write them, can be
/// served by all of `readers`.
///
/// # Errors
/// [`ErrorKind::NotPortable`] with every rule that is broken; when the model is that of a mixed batch.
/// Rules that [`PortabilityProblem::is_folded`] tells apart are no hindrance to
/// [`save_portable`](crate::save_portable).
pub fn check_model_for<M: VisitLora>(model: &M, readers: &[Reader]) -> Result<()> {
    check_unmixed(model)?;
    answer(model_problems(model, readers))
}

/// Whether the model's adapters can be served by all of `readers` at all, in files that fold what can
/// be folded into B and by servers that are told their rank: what [`save_portable`](crate::save_portable)
/// asks for.
///
/// # Errors
/// [`ErrorKind::NotPortable`] with every rule that is broken; when the model is that of a mixed batch.
pub fn check_written_for<M: VisitLora>(model: &M, readers: &[Reader]) -> Result<()> {
    check_unmixed(model)?;
    let problems = model_problems(model, readers).into_iter();
    answer(problems.filter(|problem| !problem.is_folded() && !problem.is_servers()).collect())
}

fn answer(problems: Vec<PortabilityProblem>) -> Result<()> {
    match problems.is_empty() {
        true => Ok(()),
        false => Err(ErrorKind::NotPortable { problems }.into()),
    }
}

fn config_problems(config: &LoraConfig, reader: Reader) -> Vec<PortabilityProblem> {
    use PortabilityRule as Rule;
    let mut problems = Vec::new();
    let mut add = |broken: bool, rule, found: String, field: &str| {
        if broken {
            problems.push(PortabilityProblem {
                reader,
                rule,
                found,
                places: vec![field.to_owned()],
            });
        }
    };
    let yes = || "true".to_owned();
    add(config.dora, Rule::Dora, yes(), "dora");
    add(config.lora_bias, Rule::LoraBias, yes(), "lora_bias");
    let bias = if config.bias == TrainedBias::All { "all" } else { "lora_only" };
    add(config.bias != TrainedBias::None, Rule::TrainedBias, bias.to_owned(), "bias");
    let saved = config.modules_to_save.join(", ");
    add(!saved.is_empty(), Rule::ModulesToSave, saved, "modules_to_save");
    let tokens: usize = config.trainable_tokens.iter().map(|(_, ids)| ids.len()).sum();
    let found = format!("{tokens} tokens");
    add(!config.trainable_tokens.is_empty(), Rule::TrainableTokens, found, "trainable_tokens");
    let doubled = if config.init.starts_from_weight() { 2 } else { 1 };
    let ranks = config.rank_pattern.iter().map(|(_, rank)| *rank).chain([config.rank]);
    let rank = ranks.max().unwrap_or_default().saturating_mul(doubled);
    match reader {
        Reader::Vllm => {
            let ranks = !config.rank_pattern.is_empty();
            let field = if ranks { "rank_pattern" } else { "alpha_pattern" };
            let patterns = ranks || !config.alpha_pattern.is_empty();
            add(patterns, Rule::OneScaling, "several".to_owned(), field);
            let found = format!("rank {rank}");
            if vllm_rank(rank).is_none() {
                add(true, Rule::LargestRank, found, "rank");
            } else {
                add(rank > VLLM_DEFAULT_RANK, Rule::ServerRank, found, "rank");
            }
        }
        Reader::LlamaCpp => {
            let several = !config.alpha_pattern.is_empty();
            add(several, Rule::OneAlpha, "several".to_owned(), "alpha_pattern");
            let other = config.scaling != Scaling::AlphaOverRank;
            add(other, Rule::AlphaOverRank, "alpha / sqrt(rank)".to_owned(), "scaling");
        }
        Reader::MistralRs => {
            let head = match &config.target_modules {
                TargetModules::Names(names) => names.iter().find(|name| is_head(name)),
                _ => None,
            };
            let found = head.cloned().unwrap_or_default();
            add(head.is_some(), Rule::Head, found, "target_modules");
        }
        Reader::Mlx => {}
    }
    problems
}

fn is_head(path: &str) -> bool {
    path == "lm_head" || path.ends_with(".lm_head")
}

/// Where the list of experts is that the path leads through: `mlp.experts` for `mlp.experts.3.up_proj`.
fn experts(path: &str) -> Option<&str> {
    path.match_indices("experts.").find_map(|(place, name)| {
        let is_whole = place == 0 || path[..place].ends_with('.');
        let (number, _) = path[place + name.len()..].split_once('.')?;
        let is_number = !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit());
        (is_whole && is_number).then(|| &path[..place + name.len() - 1])
    })
}

/// An adapted layer, as far as the rules look at it.
struct Adapted {
    path: String,
    kind: LayerKind,
    adaptation: Adaptation,
}

fn model_problems<M: VisitLora>(model: &M, readers: &[Reader]) -> Vec<PortabilityProblem> {
    let (mut layers, mut has_output, mut bare_experts) = (Vec::new(), false, Vec::new());
    model.visit_lora("", &mut |path, layer| {
        has_output |= model.output_layer() == Some(path);
        let Some(adaptation) = layer.adaptation() else {
            bare_experts.extend(experts(path).map(|_| path.to_owned()));
            return;
        };
        let adaptation = match adaptation {
            Adaptation::LowRank(adapter) => Adaptation::LowRank(adapter.into_plain()),
            other => other,
        };
        layers.push(Adapted { path: path.to_owned(), kind: layer.kind(), adaptation });
    });
    // A model that names an output layer and does not have it makes its output with the embedding.
    let names_a_tie = model.output_layer().is_some() || model.tied_embedding().is_some();
    let tied = names_a_tie && !has_output;
    let is_tied_head = |path: &str| tied && model.tied_embedding().is_none_or(|own| own == path);
    // Beside others of the same block that are adapted.
    let adapted: BTreeSet<&str> = layers.iter().filter_map(|layer| experts(&layer.path)).collect();
    bare_experts.retain(|path| experts(path).is_some_and(|list| adapted.contains(list)));
    let of = |reader: &Reader| layer_problems(&layers, is_tied_head, &bare_experts, *reader);
    readers.iter().flat_map(of).collect()
}

/// `is_tied_head` says of an embedding whether it is the head too; `bare_experts` are those without an adapter
/// beside others that have one.
fn layer_problems(
    layers: &[Adapted],
    is_tied_head: impl Fn(&str) -> bool,
    bare_experts: &[String],
    reader: Reader,
) -> Vec<PortabilityProblem> {
    use PortabilityRule as Rule;
    let low_rank = |layer: &&Adapted| matches!(layer.adaptation, Adaptation::LowRank(_));
    let adapter = |layer: &Adapted| match &layer.adaptation {
        Adaptation::LowRank(adapter) => Some(adapter.clone()),
        Adaptation::Replacement(_) => None,
    };
    let mut problems = Vec::new();
    let mut add = |rule, found: &str, broken: &dyn Fn(&Adapted) -> bool| {
        let places = layers.iter().filter(|layer| broken(layer));
        let places: Vec<String> = places.map(|layer| layer.path.clone()).collect();
        if !places.is_empty() {
            problems.push(PortabilityProblem { reader, rule, found: found.to_owned(), places });
        }
    };
    let has = |part: fn(&LoraAdapter) -> bool| move |layer: &Adapted| matches!(&layer.adaptation, Adaptation::LowRank(adapter) if part(adapter));
    add(Rule::Dora, "magnitudes", &has(|adapter| adapter.magnitude.is_some()));
    add(Rule::LoraBias, "one", &has(|adapter| adapter.lora_bias.is_some()));
    add(Rule::TrainedBias, "some", &|layer| match &layer.adaptation {
        Adaptation::LowRank(adapter) => adapter.base_bias.is_some(),
        Adaptation::Replacement(part) => part.bias.is_some() && part.weight.is_none(),
    });
    let replaced = |whole: bool| {
        move |layer: &Adapted| match &layer.adaptation {
            Adaptation::Replacement(part) if whole => part.weight.is_some(),
            Adaptation::Replacement(part) => part.tokens.is_some(),
            Adaptation::LowRank(_) => false,
        }
    };
    add(Rule::ModulesToSave, "whole layers", &replaced(true));
    add(Rule::TrainableTokens, "trained rows", &replaced(false));
    add(Rule::Convolution, "some", &|layer| {
        low_rank(&layer) && matches!(layer.kind, LayerKind::Conv1d | LayerKind::Conv2d)
    });
    let reads_none = matches!(reader, Reader::Vllm | Reader::MistralRs);
    add(Rule::Embedding, "one", &|layer| {
        let is_refused = reads_none || is_tied_head(&layer.path);
        low_rank(&layer) && layer.kind == LayerKind::Embedding && is_refused
    });
    let adapters: Vec<(&Adapted, LoraAdapter)> =
        layers.iter().filter_map(|layer| Some((layer, adapter(layer)?))).collect();
    let Some((_, first)) = adapters.first() else { return problems };
    match reader {
        Reader::Vllm => {
            let same = |other: &LoraAdapter| {
                (other.rank(), other.alpha()) == (first.rank(), first.alpha())
            };
            let others =
                format!("other ranks or alphas than {} and {}", first.rank(), first.alpha());
            add(Rule::OneScaling, &others, &|layer| {
                adapter(layer).is_some_and(|adapter| !same(&adapter))
            });
            let rank = adapters.iter().map(|(_, adapter)| adapter.rank()).max().unwrap_or_default();
            let found = format!("rank {rank}");
            let widest = |layer: &Adapted| adapter(layer).is_some_and(|a| a.rank() == rank);
            if vllm_rank(rank).is_none() {
                add(Rule::LargestRank, &found, &widest);
            } else if rank > VLLM_DEFAULT_RANK {
                add(Rule::ServerRank, &found, &widest);
            }
        }
        Reader::LlamaCpp => {
            let others = format!("other alphas than {}", first.alpha());
            add(Rule::OneAlpha, &others, &|layer| {
                adapter(layer).is_some_and(|adapter| adapter.alpha() != first.alpha())
            });
            add(Rule::AlphaOverRank, "alpha / sqrt(rank)", &|layer| {
                adapter(layer).is_some_and(|a| a.scaling_rule() != Scaling::AlphaOverRank)
            });
            // Of the first expert of each block that has one.
            let mut ranks = BTreeMap::new();
            for (layer, adapter) in &adapters {
                if let Some(list) = experts(&layer.path) {
                    ranks.entry(list).or_insert(adapter.rank());
                }
            }
            add(Rule::OneExpertRank, "others than the first's", &|layer| {
                let first = experts(&layer.path).and_then(|list| ranks.get(list));
                first.is_some_and(|rank| adapter(layer).is_some_and(|own| own.rank() != *rank))
            });
        }
        Reader::MistralRs => {
            add(Rule::Head, "one", &|layer| low_rank(&layer) && is_head(&layer.path))
        }
        Reader::Mlx => {
            add(Rule::Expert, "some", &|layer| low_rank(&layer) && experts(&layer.path).is_some())
        }
    }
    if matches!(reader, Reader::Vllm | Reader::LlamaCpp) && !bare_experts.is_empty() {
        problems.push(PortabilityProblem {
            reader,
            rule: Rule::AllExperts,
            found: "none".to_owned(),
            places: bare_experts.to_vec(),
        });
    }
    problems
}
