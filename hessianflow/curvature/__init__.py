"""Hessian, Gauss-Newton and Fisher products, estimates that need only products, and the curvature
that an optimizer meets: its geometry, the critical rate, the gradient noise scale.
"""

from hessianflow.curvature.critical_rate import CriticalRate, critical_rate
from hessianflow.curvature.density import SmoothedDensity, SpectralDensity, spectral_density
from hessianflow.curvature.eigenpairs import top_eigenpairs
from hessianflow.curvature.fisher import FisherOperator
from hessianflow.curvature.geometry import OptimizerGeometry, optimizer_geometry
from hessianflow.curvature.ggn import GGNOperator
from hessianflow.curvature.hessian import HessianOperator
from hessianflow.curvature.landscape import LandscapeSlice, gradient_overlap, loss_landscape
from hessianflow.curvature.noise_ratio import RatioEstimate
from hessianflow.curvature.noise_scale import NoiseScaleResult, noise_scale
from hessianflow.curvature.operator import CallableOperator, NonFiniteError, Operator
from hessianflow.curvature.preconditioned import PreconditionedOperator
from hessianflow.curvature.probe import CurvatureProbe
from hessianflow.curvature.results import DiagonalResult, EigenResult, TraceResult
from hessianflow.curvature.second_opinion import Comparison, SecondOpinion, second_opinion
from hessianflow.curvature.shares import Share, SignShares
from hessianflow.curvature.spectrum import LayerSpectrum, SpectrumReport, spectrum_report
from hessianflow.curvature.trace import diagonal, frobenius_norm, trace

__all__ = [
    "CallableOperator",
    "Comparison",
    "CriticalRate",
    "CurvatureProbe",
    "DiagonalResult",
    "EigenResult",
    "FisherOperator",
    "GGNOperator",
    "HessianOperator",
    "LandscapeSlice",
    "LayerSpectrum",
    "NoiseScaleResult",
    "NonFiniteError",
    "Operator",
    "OptimizerGeometry",
    "PreconditionedOperator",
    "RatioEstimate",
    "SecondOpinion",
    "Share",
    "SignShares",
    "SmoothedDensity",
    "SpectralDensity",
    "SpectrumReport",
    "TraceResult",
    "critical_rate",
    "diagonal",
    "frobenius_norm",
    "gradient_overlap",
    "loss_landscape",
    "noise_scale",
    "optimizer_geometry",
    "second_opinion",
    "spectral_density",
    "spectrum_report",
    "top_eigenpairs",
    "trace",
]
