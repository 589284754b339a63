"""A report on the spectrum of one set of weights, as `hessianflow spectrum` shows it."""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn

from hessianflow.curvature.density import SpectralDensity, spectral_density
from hessianflow.curvature.eigenpairs import top_eigenpairs
from hessianflow.curvature.hessian import HessianOperator
from hessianflow.curvature.landscape import gradient_overlap
from hessianflow.curvature.operator import CallableOperator
from hessianflow.curvature.results import EigenResult, TraceResult
from hessianflow.curvature.selection import matches
from hessianflow.curvature.trace import trace as estimate_trace
from hessianflow.interfaces import HessianFlowError, LossFn, NormMode
from hessianflow.measuring import unwrap

Progress = Callable[[str, int], None]
"""progress(stage, products): called after every product with the current stage and the number of
products in it so far."""

# Numbers of products, probes and steps; our choices.
TRACE_MATVECS = 60
LAYER_TRACE_MATVECS = 15
DENSITY_PROBES = 3
DENSITY_STEPS = 40


@dataclass(frozen=True)
class LayerSpectrum:
    """Curvature of one module's own parameters, with all others constant.

    Attributes:
        name: name of the module.
        size: number of its weights.
        eigenvalue, residual, converged: leading eigenvalue of its diagonal block.
        trace, trace_stderr: trace of the block and its standard error.
    """

    name: str
    size: int
    eigenvalue: float
    residual: float
    converged: bool
    trace: float
    trace_stderr: float


@dataclass(frozen=True)
class SpectrumReport:
    """Curvature of the mean loss over some data at one set of weights.

    Attributes:
        size: number of weights.
        num_examples: examples the loss is averaged over.
        norm_mode: batch-normalisation statistics used.
        loss: the mean loss.
        eigen: the leading eigenpairs.
        gradient_overlap: share of the squared gradient along each eigenvector, shape [k].
        trace, density: the trace and the spectral density; None if not asked for.
        layers: one entry for each module that matched.
        matvecs: products with the matrix of all parameters.
    """

    size: int
    num_examples: int
    norm_mode: NormMode
    loss: float
    eigen: EigenResult
    gradient_overlap: Tensor
    trace: TraceResult | None
    density: SpectralDensity | None
    layers: tuple[LayerSpectrum, ...]
    matvecs: int

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON, without the eigenvectors."""
        trace = density = None
        if self.trace is not None:
            trace = {"value": self.trace.value, "stderr": self.trace.stderr}
        if self.density is not None:
            density = _density_dict(self.density)
        return {
            "size": self.size,
            "num_examples": self.num_examples,
            "norm_mode": self.norm_mode,
            "loss": self.loss,
            "eigenvalues": self.eigen.values.tolist(),
            "residuals": self.eigen.residuals.tolist(),
            "error_bounds": self.eigen.error_bounds.tolist(),
            "converged": self.eigen.converged,
            "gradient_overlap": self.gradient_overlap.tolist(),
            "trace": trace,
            "density": density,
            "layers": [vars(layer) for layer in self.layers],
            "matvecs": self.matvecs,
        }


def spectrum_report(
    model: nn.Module,
    loss_fn: LossFn,
    data: Any,
    *,
    k: int = 5,
    density: bool = False,
    trace: bool = False,
    layers: str | None = None,
    tol: float = 1e-3,
    microbatch_size: int | None = None,
    norm_mode: NormMode = "eval",
    seed: int = 0,
    check_product: bool = True,
    progress: Progress | None = None,
) -> SpectrumReport:
    """Measure leading eigenvalues, and on request trace, density and single layers.

    The model is left unchanged. Arguments that are not named here are those of HessianOperator.

    Args:
        k: number of leading eigenpairs (largest magnitude), at most the number of weights.
        density: also measure a spectral density (3 probes of 40 steps) with the shares by sign.
        trace: also measure the trace (60 products).
        layers: pattern of module names ("layer1.*", "*"): also measure the leading eigenvalue and
            trace of each matching module with weights of its own.
        tol: allowed relative error of the eigenvalues.
        seed: seed of all random starts.
        progress: called after every product.

    Raises:
        HessianFlowError: as HessianOperator, or no module matches `layers`.
    """
    modules = []
    if layers is not None:
        modules = _matching_modules(model, layers)
    operator_of = partial(HessianOperator, model, loss_fn, data, norm_mode=norm_mode)
    operator_of = partial(operator_of, microbatch_size=microbatch_size)
    operator = operator_of(check_product=check_product)
    eigen = top_eigenpairs(
        _reporting(operator, "eigenvalues", progress), min(k, operator.size), tol=tol, seed=seed
    )
    matvecs = eigen.matvecs
    traced = measured = None
    if trace:
        reporting = _reporting(operator, "trace", progress)
        traced = estimate_trace(reporting, num_matvecs=TRACE_MATVECS, seed=seed)
        matvecs += traced.matvecs
    if density:
        reporting = _reporting(operator, "density", progress)
        measured = spectral_density(
            reporting, num_probes=DENSITY_PROBES, steps=DENSITY_STEPS, seed=seed
        )
        matvecs += measured.matvecs
    operator.release()
    return SpectrumReport(
        size=operator.size,
        num_examples=operator.num_examples,
        norm_mode=norm_mode,
        loss=operator.mean_loss(),
        eigen=eigen,
        gradient_overlap=gradient_overlap(operator, eigen.vectors),
        trace=traced,
        density=measured,
        layers=tuple(_layers(modules, operator_of, tol, seed, progress)),
        matvecs=matvecs,
    )


def _reporting(
    operator: HessianOperator, stage: str, progress: Progress | None
) -> CallableOperator:
    """Return the operator, with a call of `progress` after every product."""
    done = 0

    def product(vector: Tensor) -> Tensor:
        nonlocal done
        result = operator.matvec(vector)
        done += 1
        if progress is not None:
            progress(stage, done)
        return result

    return CallableOperator(product, operator.size, operator.dtype, operator.device)


def _matching_modules(model: nn.Module, pattern: str) -> list[tuple[str, nn.Module]]:
    """Return the modules with trainable weights of their own whose names match a pattern."""
    owners = [
        (name, module)
        for name, module in unwrap(model).named_modules()
        if any(p.requires_grad for p in module.parameters(recurse=False))
    ]
    matching = [(name, module) for name, module in owners if matches(name, pattern)]
    if not matching:
        names = ", ".join(name for name, _ in owners[:3])
        raise HessianFlowError(
            f"layers: no module with trainable weights matches {pattern!r}; names are like {names}"
        )
    return matching


def _layers(
    modules: list[tuple[str, nn.Module]],
    operator_of: Callable[..., HessianOperator],
    tol: float,
    seed: int,
    progress: Progress | None,
) -> Iterator[LayerSpectrum]:
    for name, module in modules:
        block = operator_of(params=list(module.parameters(recurse=False)), check_product=False)
        reporting = _reporting(block, name, progress)
        leading = top_eigenpairs(reporting, 1, tol=tol, seed=seed)
        products = LAYER_TRACE_MATVECS
        # For few rows the exact trace costs little more, and an estimate would not know its error.
        if block.size <= 2 * products:
            products = max(products, block.size)
        traced = estimate_trace(reporting, num_matvecs=products, seed=seed)
        block.release()
        yield LayerSpectrum(
            name=name,
            size=block.size,
            eigenvalue=float(leading.values[0]),
            residual=float(leading.residuals[0]),
            converged=leading.converged,
            trace=traced.value,
            trace_stderr=traced.stderr,
        )


def _density_dict(density: SpectralDensity) -> dict[str, Any]:
    negative = density.mass_below(0.0)
    shares = density.shares()
    return {
        "nodes": density.nodes.tolist(),
        "weights": density.weights.tolist(),
        "shares": {
            sign: asdict(getattr(shares, sign)) for sign in ("negative", "zero", "positive")
        },
        "zero_zone": list(shares.zone),
        "negative_mass": negative.value,
        "negative_mass_stderr": negative.stderr,
    }
