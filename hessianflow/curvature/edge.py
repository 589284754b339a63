"""What a probe measures for the optimizer that trains: how near its steps are to their edge."""

from typing import Protocol

from torch import nn
from torch.optim.optimizer import Optimizer

from hessianflow.curvature.critical_rate import UpdateOperator, critical_rate_on
from hessianflow.curvature.geometry import OptimizerGeometry, optimizer_geometry
from hessianflow.curvature.preconditioned import PreconditionedOperator
from hessianflow.curvature.selection import Selection, select_parameters
from hessianflow.interfaces import HESSIAN, HessianFlowError, LinearOperator

PRECONDITIONED = "preconditioned Hessian"


class ProbeOperator(LinearOperator, Protocol):
    """The operator that a probe measures, made again for each reading."""

    def release(self) -> None:
        """Free what is kept between products."""
        ...


class Edge:
    """The geometry of an optimizer at one moment, and the share of its threshold in use.

    Args:
        model: the measured model, unwrapped.
        optimizer: trains it; None: nothing is known of its steps.
        params: the selection of the probe.
        operator: the Hessian of the selected parameters.

    Attributes:
        seen: the matrix whose top eigenvalue decides: the preconditioned Hessian, or the Hessian
            itself where there is no preconditioner, as for SGD.
        matrix: its name.
        note: what the optimizer's geometry leaves out.
        matvecs: products spent besides those of the top eigenvalue.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | None,
        params: Selection,
        operator: LinearOperator,
    ) -> None:
        self._model = model
        self._optimizer = optimizer
        self._operator = operator
        self._geometry: OptimizerGeometry | None = None
        self.note = ""
        self.matvecs = 0
        self.seen = operator
        self.matrix = HESSIAN
        self._decay = 0.0
        if optimizer is None:
            return
        self._geometry = optimizer_geometry(optimizer)
        self.note = self._geometry.note
        if self._geometry.linear:
            _, parameters = select_parameters(model, params)
            seen = PreconditionedOperator(operator, self._geometry, parameters)
            if seen.shift is None:
                self.seen = seen
                self.matrix = PRECONDITIONED
            else:
                self._decay = seen.shift

    def figures(self, leading: float) -> dict[str, float]:
        """Return sharpness, threshold and the share of it in use.

        Args:
            leading: the top eigenvalue of `seen`.

        Returns:
            Nothing if the optimizer is not known, or has no preconditioner and cannot be stepped on
            a copy.
        """
        if self._geometry is None or self._optimizer is None:
            return {}
        sharpness = leading + self._decay
        if not self._geometry.linear:
            if not isinstance(self._operator, UpdateOperator):
                return {}
            try:
                found = critical_rate_on(self._operator, self._model, self._optimizer)
            except HessianFlowError as error:
                self.note = str(error)
                return {}
            self.matvecs += found.products
            sharpness = found.sharpness
        return {
            "sharpness": sharpness,
            "threshold": self._geometry.threshold,
            "edge_share": self._geometry.edge_share(sharpness),
        }
