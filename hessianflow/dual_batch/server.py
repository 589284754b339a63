"""A parameter server as one deterministic object: whole weights are pushed, mixed and pulled.

References: Lu, Hong, Liu, Wu, dual batch size learning on a parameter server (COMPSAC 2022), and
its continuation with cyclic progressive learning (arXiv 2509.26092; "the journal"). Each worker
pulls the weights, trains one local epoch, and pushes the result. The server has no clock, no
network and no threads; a transport (:mod:`~hessianflow.dual_batch.simulated_server`,
:mod:`~hessianflow.dual_batch.ray_server`) calls it for every push.

With the update factor f of a worker (1 for a full shard of the data, d_S / d_L for a smaller one),
weights w_s on the server and w_w from the worker:

    asynchronous (ASP), COMPSAC   w_s <- ((2 - f) w_s + f w_w) / 2
    asynchronous (ASP), journal   w_s <- (w_s + f w_w) / (1 + f)
    synchronous (BSP)             w_s <- sum_i f_i w_i / sum_i f_i   once all workers have pushed
    bounded (SSP)                 ASP, until a push would put a worker more than `staleness`
                                  commits ahead of another

Deviations: for the square-root variant of the published code, pass sqrt(f) as factor. SSP: the push
that would break the bound is not mixed but opens a synchronous round, which ends when every other
worker has pushed once more; then all counters start again (the publications do not say what happens
to that push). The server does not wait for a worker that has left, but keeps its contribution to an
open round.
"""

from collections.abc import Mapping
from dataclasses import astuple, dataclass, field
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from hessianflow.checks import check_choice
from hessianflow.interfaces import HessianFlowError

Weights = npt.NDArray[Any]
"""All weights of a model, including statistics of normalisation, as one flat array of floats."""

Synchrony = Literal["asp", "bsp", "ssp"]
Mixing = Literal["compsac", "journal"]


@dataclass(frozen=True)
class Receipt:
    """The outcome of a push.

    Attributes:
        released: Workers that may pull and continue, in ascending order. If the pushing one is not
            among them, it must wait.
        mixed: Whether the server's weights changed.
        staleness: Commits of other workers since this one last pulled.
    """

    released: tuple[int, ...]
    mixed: bool
    staleness: int


@dataclass
class _Worker:
    factor: float
    commits: int = 0
    """Pushes since the counters last started again (SSP)."""
    pulled_at: int = 0


@dataclass
class ParameterServer:
    """The weights that all workers share.

    Args:
        weights: Weights at the start, which are copied.
        factors: Update factor f of each worker, by its number; positive.
        synchrony: "asp" (the default of both papers), "bsp" or "ssp".
        mixing: Asynchronous rule, that of the "compsac" or the "journal" paper.
        staleness: With "ssp", the number of commits that a worker may be ahead of another. The
            default is that of the papers' settings file.

    Attributes:
        commits: Pushes received since the start; an epoch has as many as there are workers.

    Raises:
        HessianFlowError: There is no worker, a factor is not positive, or a rule is unknown. A push
            raises it for an unknown worker, one that must wait, or weights that do not fit.
    """

    weights: Weights
    factors: Mapping[int, float]
    synchrony: Synchrony = "asp"
    mixing: Mixing = "journal"
    staleness: int = 3
    commits: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        check_choice("synchrony", self.synchrony, get_args(Synchrony))
        check_choice("mixing", self.mixing, get_args(Mixing))
        if self.staleness < 0:
            raise HessianFlowError(f"staleness must be at least 0, got {self.staleness}")
        if not self.factors:
            raise HessianFlowError("a parameter server needs at least one worker, got none")
        self.weights = np.array(self.weights)
        self._workers: dict[int, _Worker] = {}
        self._round: dict[int, tuple[float, Weights]] = {}
        self._in_round = self.synchrony == "bsp"
        for worker, factor in self.factors.items():
            self.add(worker, factor)

    @property
    def workers(self) -> tuple[int, ...]:
        """Return the workers that take part, in ascending order."""
        return tuple(sorted(self._workers))

    @property
    def waiting(self) -> tuple[int, ...]:
        """Return the workers that have pushed into the open round."""
        return tuple(sorted(set(self._round) & set(self._workers)))

    def add(self, worker: int, factor: float) -> None:
        """Add a new or restarted worker, with the count of the worker that is furthest behind.

        Raises:
            HessianFlowError: The worker takes part already, or `factor` is not positive.
        """
        if worker in self._workers:
            raise HessianFlowError(f"worker {worker} takes part already: remove it first")
        if not factor > 0:
            raise HessianFlowError(f"the factor of worker {worker} must be positive, got {factor}")
        behind = min((other.commits for other in self._workers.values()), default=0)
        self._workers[worker] = _Worker(factor, behind, self.commits)

    def remove(self, worker: int) -> tuple[int, ...]:
        """Remove a worker that died; return the workers that this releases from an open round."""
        self._known(worker)
        del self._workers[worker]
        return self._close_round()

    def pull(self, worker: int) -> Weights:
        """Return a copy of the weights from which `worker` trains."""
        self._known(worker).pulled_at = self.commits
        weights: Weights = self.weights.copy()
        return weights

    def push(self, worker: int, weights: Weights) -> Receipt:
        """Take the weights that `worker` has trained since its pull."""
        member = self._known(worker)
        if worker in self._round:
            raise HessianFlowError(
                f"worker {worker} has pushed into this round: it must wait for the others"
            )
        if weights.shape != self.weights.shape:
            raise HessianFlowError(
                f"weights must have shape {list(self.weights.shape)}, got {list(weights.shape)}"
                f" from worker {worker}"
            )
        staleness = self.commits - member.pulled_at
        self.commits += 1
        member.commits += 1
        if self._in_round or self._too_far_ahead(member):
            self._in_round = True
            self._round[worker] = (member.factor, np.array(weights))
            released = self._close_round()
            return Receipt(released, bool(released), staleness)
        self._mix(member.factor, weights)
        return Receipt((worker,), True, staleness)

    def state_dict(self) -> dict[str, Any]:
        """Return weights, counters and the open round, from which an equal server continues."""
        return {
            "weights": self.weights.copy(),
            "commits": self.commits,
            "workers": {number: astuple(worker) for number, worker in self._workers.items()},
            "round": {n: (factor, w.copy()) for n, (factor, w) in self._round.items()},
            "in_round": self._in_round,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from the state of a server with the same rules.

        Raises:
            HessianFlowError: The weights are those of another model.
        """
        if state["weights"].shape != self.weights.shape:
            raise HessianFlowError(
                f"the saved server has weights of shape {list(state['weights'].shape)}, "
                f"this one {list(self.weights.shape)}: it is of another model"
            )
        self.weights = np.array(state["weights"])
        self.commits = state["commits"]
        self._in_round = state["in_round"]
        self._workers = {number: _Worker(*values) for number, values in state["workers"].items()}
        self._round = {n: (factor, np.array(w)) for n, (factor, w) in state["round"].items()}

    def _known(self, worker: int) -> _Worker:
        if worker not in self._workers:
            raise HessianFlowError(
                f"worker {worker} does not take part; those that do: {list(self.workers)}"
            )
        return self._workers[worker]

    def _too_far_ahead(self, member: _Worker) -> bool:
        last = min(other.commits for other in self._workers.values())
        return self.synchrony == "ssp" and member.commits - last > self.staleness

    def _mix(self, factor: float, pushed: Weights) -> None:
        # The operations have the order of the published formulas and the type of the weights.
        if self.mixing == "compsac":
            self.weights = ((2 - factor) * self.weights + factor * pushed) / 2
        else:
            self.weights = (self.weights + factor * pushed) / (1 + factor)

    def _close_round(self) -> tuple[int, ...]:
        """End the open round if no worker is missing: mix, and return the workers that waited."""
        if not self._round or set(self._workers) - set(self._round):
            return ()
        pushed = [self._round[number] for number in sorted(self._round)]
        total = pushed[0][0] * pushed[0][1]
        for factor, weights in pushed[1:]:
            total = total + factor * weights
        self.weights = total / sum(factor for factor, _ in pushed)
        released = self.waiting
        self._round = {}
        self._in_round = self.synchrony == "bsp"
        for member in self._workers.values():
            member.commits = 0
        return released
