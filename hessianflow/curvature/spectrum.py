"""Everything about the spectrum of one set of weights in one call: what `hessianflow spectrum`
shows."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn

from hessianflow.curvature.density import SpectralDensity, spectral_density
from hessianflow.curvature.eigenpairs import top_eigenpairs
from hessianflow.curvature.hessian import HessianOperator
from hessianflow.curvature.landscape import gradient_overlap
from hessianflow.curvature.operator import CallableOperator
from hessianflow.curvature.results import EigenResult, TraceResult
from hessianflow.curvature.selection import Selection
from hessianflow.curvature.trace import trace as estimate_trace
from hessianflow.interfaces import HessianFlowError, LossFn, NormMode
from hessianflow.measuring import unwrap

Progress = Callable[[str, int], None]
"""progress(stage, products): called after every product with the stage at hand and its products so
far."""

TRACE_MATVECS, LAYER_TRACE_MATVECS = 60, 15
DENSITY_PROBES, DENSITY_STEPS = 3, 40


@dataclass(frozen=True)
class LayerSpectrum:
    """Curvature of one module's own parameters, all others constant.

    Attributes:
        name: of the module.
        size: number of its weights.
        eigenvalue: the leading one of its diagonal block.
        residual: of that eigenvalue.
        converged: whether it met the tolerance.
        trace: of the block, with its standard error.
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
        trace: or None if not asked for.
        density: or None if not asked for.
        layers: one entry a module that matched.
        matvecs: products over the whole parameter vector.
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
        """Return plain values, for JSON; eigenvectors are left out."""
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
            "trace": None
            if self.trace is None
            else {"value": self.trace.value, "stderr": self.trace.stderr},
            "density": None if self.density is None else _density_dict(self.density),
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
    """Measure leading eigenvalues, and on request trace, density and single layers; the model is
    left as found.

    Args:
        model: the model.
        loss_fn: loss_fn(outputs, targets), or loss_fn(model, batch) for dict batches.
        data: one pair or a re-iterable of pairs.
        k: leading eigenpairs (largest magnitude); capped at the number of weights.
        density: also a spectral density (3 probes of 40 steps) with the shares by sign.
        trace: also the trace (60 products).
        layers: pattern of module names ("layer1.*", "*"): the leading eigenvalue and trace of each
            that holds weights.
        tol: relative error allowed for the eigenvalues.
        microbatch_size: examples per pass; None keeps one graph when the data are a single pair.
        norm_mode: batch-normalisation statistics.
        seed: of all random starts.
        check_product: compare one product with a difference of gradients; see HessianOperator.
        progress: told of every product.

    Raises:
        HessianFlowError: as HessianOperator, or no module matches `layers`.
    """
    modules = [] if layers is None else _matching_modules(model, layers)

    def operator_of(params: Selection, check_product: bool) -> HessianOperator:
        return HessianOperator(
            model,
            loss_fn,
            data,
            params=params,
            microbatch_size=microbatch_size,
            norm_mode=norm_mode,
            check_product=check_product,
        )

    operator, watched = operator_of(None, check_product), _Watched(progress)
    eigen = top_eigenpairs(
        watched(operator, "eigenvalues"), min(k, operator.size), tol=tol, seed=seed
    )
    traced = measured = None
    if trace:
        traced = estimate_trace(watched(operator, "trace"), num_matvecs=TRACE_MATVECS, seed=seed)
    if density:
        measured = spectral_density(
            watched(operator, "density"), num_probes=DENSITY_PROBES, steps=DENSITY_STEPS, seed=seed
        )
    operator.release()
    blocks = []
    for name, module in modules:
        block = operator_of(list(module.parameters(recurse=False)), False)
        blocks.append(_layer(name, watched(block, name), tol, seed))
        block.release()
    return SpectrumReport(
        size=operator.size,
        num_examples=operator.num_examples,
        norm_mode=norm_mode,
        loss=operator.mean_loss(),
        eigen=eigen,
        gradient_overlap=gradient_overlap(operator, eigen.vectors),
        trace=traced,
        density=measured,
        layers=tuple(blocks),
        matvecs=eigen.matvecs
        + (traced.matvecs if traced else 0)
        + (measured.matvecs if measured else 0),
    )


class _Watched:
    """Wraps an operator so that every product is told to a callback."""

    def __init__(self, progress: Progress | None) -> None:
        self._progress = progress

    def __call__(self, operator: HessianOperator, stage: str) -> CallableOperator:
        done = 0

        def product(vector: Tensor) -> Tensor:
            nonlocal done
            result = operator.matvec(vector)
            done += 1
            if self._progress is not None:
                self._progress(stage, done)
            return result

        return CallableOperator(product, operator.size, operator.dtype, operator.device)


def _matching_modules(model: nn.Module, pattern: str) -> list[tuple[str, nn.Module]]:
    """Return modules with trainable parameters of their own whose name, or that of a module around
    them, matches."""
    owners = [
        (name, module)
        for name, module in unwrap(model).named_modules()
        if any(p.requires_grad for p in module.parameters(recurse=False))
    ]
    matching = [
        pair
        for pair in owners
        if fnmatchcase(pair[0], pattern) or fnmatchcase(pair[0], f"{pattern}.*")
    ]
    if not matching:
        names = ", ".join(name for name, _ in owners[:3])
        raise HessianFlowError(
            f"layers: no module with trainable weights matches {pattern!r}; names are like {names}"
        )
    return matching


def _layer(name: str, operator: CallableOperator, tol: float, seed: int) -> LayerSpectrum:
    leading = top_eigenpairs(operator, 1, tol=tol, seed=seed)
    # Of few rows the exact trace costs little more, and an estimate would not know its error.
    products = (
        operator.size
        if LAYER_TRACE_MATVECS < operator.size <= 2 * LAYER_TRACE_MATVECS
        else LAYER_TRACE_MATVECS
    )
    traced = estimate_trace(operator, num_matvecs=products, seed=seed)
    return LayerSpectrum(
        name=name,
        size=operator.size,
        eigenvalue=float(leading.values[0]),
        residual=float(leading.residuals[0]),
        converged=leading.converged,
        trace=traced.value,
        trace_stderr=traced.stderr,
    )


def _density_dict(density: SpectralDensity) -> dict[str, Any]:
    negative, shares = density.mass_below(0.0), density.shares()
    return {
        "nodes": density.nodes.tolist(),
        "weights": density.weights.tolist(),
        "shares": {
            "negative": asdict(shares.negative),
            "zero": asdict(shares.zero),
            "positive": asdict(shares.positive),
        },
        "zero_zone": list(shares.zone),
        "negative_mass": negative.value,
        "negative_mass_stderr": negative.stderr,
    }
