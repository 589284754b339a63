"""Curvature: Hessian, Gauss-Newton and Fisher products, and what can be estimated from products alone."""

from hessianflow.curvature.eigenpairs import top_eigenpairs
from hessianflow.curvature.hessian import HessianOperator
from hessianflow.curvature.operator import CallableOperator, NonFiniteError, Operator
from hessianflow.curvature.probe import CurvatureProbe
from hessianflow.curvature.results import DiagonalResult, EigenResult, TraceResult

__all__ = [
    "CallableOperator",
    "CurvatureProbe",
    "DiagonalResult",
    "EigenResult",
    "HessianOperator",
    "NonFiniteError",
    "Operator",
    "TraceResult",
    "top_eigenpairs",
]
