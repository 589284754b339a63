"""A runner with a second process, which attacks while the first one trains on other cores.

The weights go through shared memory. :meth:`WorkerProcess.submit` waits for the previous attack,
copies weights, buffers and the batch into memory that both processes see, and returns; the worker
attacks from there. Only one attack is under way at a time, so the copy is never written while it is
read. The state of the attack (its random starts) comes back with each result, so a checkpoint is
the same as if the attack had run in this process.

It is for models on a CPU; a GPU has a second stream instead (:class:`runners.SecondStream`). The
process is spawned, not forked, so a script that uses it must run its code under
`if __name__ == "__main__":`.
"""

import copy
import pickle
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

import torch
from torch import Tensor, multiprocessing, nn

from hessianflow.adversarial.runners import TwinAttack, copy_weights
from hessianflow.checks import check_count
from hessianflow.interfaces import HessianFlowError
from hessianflow.measuring import unwrap
from hessianflow.memory import keep_freed_memory

GOODBYE_SECONDS = 5.0
"""Seconds that a worker may take to end before it is killed. This default is our choice."""
_ENDED = (
    "the process that attacks has ended: was it killed for memory? After close() another is started"
)


class WorkerProcess:
    """Run attacks in a second process, which the first attack starts.

    Args:
        threads: Threads of torch in the second process; null stands for as many as in this one.
    """

    def __init__(self, *, threads: int | None = None) -> None:
        check_count("threads", threads, none="as many as this process has")
        self._threads = threads
        self._replica: nn.Module | None = None
        self._line: Connection | None = None
        self._pending: _Answer | None = None

    def submit(self, model: nn.Module, attack: TwinAttack) -> Callable[[], Tensor]:
        """Copy the weights, start the attack, and return a callable that waits for the twins.

        Raises:
            HessianFlowError: The model is not on a CPU or cannot be sent to another process, or the
                process has ended. An error in the attack is raised by every call of the callable.
        """
        inner = unwrap(model)
        device = next(inner.parameters()).device
        if device.type != "cpu":
            raise HessianFlowError(
                f"WorkerProcess needs a model on a processor, got {device}: use SecondStream()"
            )
        if self._pending is not None:
            # It reads the replica, and this attack continues from its state.
            self._pending.settle()
            self._pending = None
        line = self._line or self._start(inner)
        assert self._replica is not None
        copy_weights(self._replica, inner)
        batch = replace(attack, inputs=_shared(attack.inputs), targets=_shared(attack.targets))
        autocast = (torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu"))
        modes = [module.training for module in inner.modules()]
        with _telling_why_not_sent():
            line.send((batch, modes, autocast))
        self._pending = _Answer(line, attack)
        return self._pending

    def close(self) -> None:
        """End the process. A later attack starts another."""
        if self._line is not None:
            self._end()
        self._line = self._replica = self._pending = None

    def _start(self, model: nn.Module) -> Connection:
        replica = copy.deepcopy(model).share_memory()
        # A fork would copy locks that other threads hold.
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        threads = self._threads or torch.get_num_threads()
        process = context.Process(target=_serve, args=(theirs, replica, threads), daemon=True)
        try:
            with _telling_why_not_sent():
                process.start()
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
        self._end = weakref.finalize(self, _end, process, ours)
        self._replica = replica
        self._line = ours
        return ours


class _Answer:
    """A callable that waits once for a result and takes over the attack's state with it."""

    def __init__(self, line: Connection, attack: TwinAttack) -> None:
        self._line = line
        self._adversary = attack.adversary
        self._twins: Tensor | None = None
        self._failure: str | None = None

    def __call__(self) -> Tensor:
        self.settle()
        if self._twins is None:
            raise HessianFlowError(str(self._failure))
        return self._twins

    def settle(self) -> None:
        """Wait for the result, and keep a failure for the calls that ask for the twins."""
        if self._twins is not None or self._failure is not None:
            return
        try:
            twins, outcome = self._line.recv()
        except (EOFError, ConnectionResetError):
            self._failure = _ENDED
            return
        if twins is None:
            self._failure = f"the attack failed in its process: {outcome}"
            return
        self._twins = twins
        self._adversary.load_state_dict(outcome)


def _serve(line: Connection, replica: nn.Module, threads: int) -> None:
    """Attack until the line is closed."""
    torch.set_num_threads(threads)
    keep_freed_memory()
    while True:
        try:
            attack, modes, (enabled, dtype) = line.recv()
        except (EOFError, ConnectionResetError):
            return
        for module, training in zip(replica.modules(), modes, strict=True):
            module.training = training
        answer: tuple[Tensor | None, Any]
        try:
            with torch.autocast("cpu", dtype=dtype, enabled=enabled):
                answer = _shared(attack(replica)), attack.adversary.state_dict()
        except Exception as error:
            answer = None, f"{type(error).__name__}: {error}"
        line.send(answer)


@contextmanager
def _telling_why_not_sent() -> Iterator[None]:
    try:
        yield
    except (BrokenPipeError, ConnectionResetError):
        raise HessianFlowError(_ENDED) from None
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise HessianFlowError(
            f"the model or the attack cannot be sent to another process ({error}): define its"
            " classes and functions at the top of a module, or use Interleaved()"
        ) from None


def _shared(tensor: Tensor) -> Tensor:
    """Return the tensor in shared memory, without the larger one that it may be a slice of."""
    if tensor.untyped_storage().nbytes() != tensor.numel() * tensor.element_size():
        tensor = tensor.clone()
    shared: Tensor = tensor.share_memory_()  # type: ignore[no-untyped-call]
    return shared


def _end(process: BaseProcess, line: Connection) -> None:
    line.close()
    process.join(GOODBYE_SECONDS)
    if process.is_alive():
        process.kill()
