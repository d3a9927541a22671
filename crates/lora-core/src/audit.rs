//! Whether everything that should train does.

use burn::module::Param;
use burn::tensor::{Gradients, Tensor};

use crate::error::{ErrorKind, Result};
use crate::layer::Adaptation;
use crate::visit::VisitLora;

/// Checks, after a backward pass, that every tensor that adapts the model received a finite gradient
/// that is not zero as a whole. Call it at the first step: an adapter that its loss does not reach trains
/// nothing for hours, and nothing else says so.
///
/// What may be zero is known: while A is zero, B's gradient scaling (x A)ᵀ g is, and the other way
/// round; rows of tokens that are not in the batch have none.
///
/// # Errors
/// With every module that got no gradient, one that is zero, or NaN or infinity. A model that nothing
/// adapts has nothing to name.
///
/// # Example
/// ```
/// # #[cfg(feature = "flex")] {
/// use burn::nn::LinearConfig;
/// use burn::tensor::{Device, Tensor};
/// use lora_core::{AdaptableLinear, LoraConfig, audit_gradients, inject};
///
/// let device = Device::flex().autodiff();
/// let layer = || AdaptableLinear::from(LinearConfig::new(4, 4).init(&device));
/// let (model, _) = inject(vec![layer(), layer()], &LoraConfig::new(2, 4.0))?;
///
/// let x = Tensor::<2>::ones([3, 4], &device);
/// let gradients = model[1].forward(model[0].forward(x.clone())).sum().backward();
/// audit_gradients(&model, &gradients)?;
///
/// let gradients = model[1].forward(x).sum().backward(); // the first layer was left out
/// let error = audit_gradients(&model, &gradients).unwrap_err();
/// assert!(error.to_string().contains("0.lora_b got no gradient"), "{error}");
/// # }
/// # Ok::<(), lora_core::Error>(())
/// ```
pub fn audit_gradients<M: VisitLora>(model: &M, gradients: &Gradients) -> Result<()> {
    let mut problems = Vec::new();
    model.visit_lora("", &mut |path, layer| {
        if layer.is_merged() || !layer.is_enabled() {
            if layer.adaptation().is_some() {
                let why = if layer.is_merged() { "merged" } else { "disabled" };
                problems.push(format!("{path} is {why}, and does not train"));
            }
            return;
        }
        let mut audit = Audit { path, gradients, problems: &mut problems };
        match layer.adaptation() {
            None => {}
            Some(Adaptation::LowRank(adapter)) => {
                let (a, b) = (is_zero(&adapter.lora_a), is_zero(&adapter.lora_b));
                audit.check("lora_a", &adapter.lora_a, b && !a);
                audit.check("lora_b", &adapter.lora_b, a && !b);
                for (name, vector) in [
                    ("lora_bias", &adapter.lora_bias),
                    ("magnitude", &adapter.magnitude),
                    ("bias", &adapter.base_bias),
                ] {
                    vector.iter().for_each(|vector| audit.check(name, vector, false));
                }
            }
            Some(Adaptation::Replacement(part)) => {
                part.weight.iter().for_each(|weight| audit.check("weight", weight, false));
                part.bias.iter().for_each(|bias| audit.check("bias", bias, false));
                if let Some(tokens) = &part.tokens {
                    audit.check("tokens", &tokens.rows, true);
                }
            }
        }
    });
    if problems.is_empty() { Ok(()) } else { Err(ErrorKind::NoGradient { problems }.into()) }
}

struct Audit<'a> {
    path: &'a str,
    gradients: &'a Gradients,
    problems: &'a mut Vec<String>,
}

impl Audit<'_> {
    fn check<const D: usize>(&mut self, name: &str, param: &Param<Tensor<D>>, may_be_zero: bool) {
        let problem = match param.val().grad(self.gradients) {
            None => "got no gradient",
            Some(gradient) if !gradient.clone().is_finite().all().into_scalar::<bool>() => {
                "got a gradient with NaN or infinity"
            }
            Some(gradient) if !may_be_zero && is_all_zero(gradient.clone()) => {
                "got a gradient of zeros"
            }
            Some(_) => return,
        };
        self.problems.push(format!("{}.{name} {problem}", self.path));
    }
}

fn is_zero(param: &Param<Tensor<2>>) -> bool {
    is_all_zero(param.val().without_autodiff())
}

fn is_all_zero<const D: usize>(tensor: Tensor<D>) -> bool {
    tensor.equal_elem(0.0).all().into_scalar::<bool>()
}
