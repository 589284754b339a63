"""The parameter server and a worker as Ray actors, each in a process of its own."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from hessianflow.dual_batch.server import ParameterServer, Receipt, Weights
from hessianflow.dual_batch.simulated_server import LocalEpoch, figures_of


class ServerActor:
    """A parameter server in a process of its own."""

    def __init__(
        self, make_server: Callable[[], ParameterServer], state: Mapping[str, Any] | None
    ) -> None:
        self._make = make_server
        self._state = state

    def members(self) -> tuple[int, tuple[int, ...], tuple[int, ...]]:
        """Build the server, before all else; return its commits, all workers, those that wait."""
        # In a constructor, Ray would hide the error of a server that cannot be built.
        self._server = self._make()
        if self._state is not None:
            self._server.load_state_dict(self._state)
            self._state = None
        return self._server.commits, self._server.workers, self._server.waiting

    def pull(self, worker: int) -> Weights:
        """Return a copy of the weights from which `worker` trains."""
        return self._server.pull(worker)

    def push(self, worker: int, weights: Weights) -> Receipt:
        """Take the weights that `worker` has trained since its pull."""
        return self._server.push(worker, weights)

    def replace(self, worker: int) -> tuple[int, ...]:
        """Remove a worker and add it again with its factor; return the workers it releases."""
        factor = self._server.factors[worker]
        released = self._server.remove(worker)
        self._server.add(worker, factor)
        return released

    def weights(self) -> Weights:
        """Return the current weights."""
        return self._server.weights

    def state(self) -> dict[str, Any]:
        """Return the state of the server for a snapshot."""
        return self._server.state_dict()


class WorkerActor:
    """The local training of one worker in a process of its own."""

    def __init__(self, make_worker: Callable[[int], LocalEpoch], number: int) -> None:
        self._make = partial(make_worker, number)
        self._local_epoch: LocalEpoch | None = None

    def ready(self) -> bool:
        """Build the worker, and return True once that is done."""
        self._built()
        return True

    def train(self, weights: Weights, epoch: int) -> tuple[dict[str, float], Weights]:
        """Return the figures and the weights after one local epoch.

        Ray stores the two apart: the figures show success without fetching the weights.
        """
        local_epoch = self._built()
        trained = local_epoch(weights.copy(), epoch)  # arrays from the object store are read-only
        return figures_of(local_epoch), trained

    def _built(self) -> LocalEpoch:
        self._local_epoch = self._local_epoch or self._make()
        return self._local_epoch
