"""A process that only attacks, while the process that started it trains: ConAdv on a machine with
several cores.

The weights go through shared memory: :meth:`WorkerProcess.submit` waits for the attack before,
copies weights, buffers and the batch into memory that both processes see, and returns; the worker
attacks from there. One attack is under way at a time, so the copy is never written to while it is
read. The state of the adversary (its random starts) comes back with each result, so a checkpoint
holds what an attack in this process would have left.

For models on a processor; a GPU has a second stream for this (:class:`runners.SecondStream`). The
process is started afresh, not forked: a script that uses it needs `if __name__ == "__main__":`
around what it runs.
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

from hessianflow.adversarial.runners import TwinAttack
from hessianflow.checks import check_count
from hessianflow.interfaces import HessianFlowError
from hessianflow.measuring import unwrap
from hessianflow.memory import keep_freed_memory

GOODBYE_SECONDS = 5.0
"""How long a worker may take to end before it is killed. Ours."""

_ENDED = (
    "the process that attacks has ended: was it killed for memory? After close() another is started"
)


class WorkerProcess:
    """Runs attacks in a process of its own, started at the first one.

    Args:
        threads: of torch in that process; None: as many as this one has.

    Raises:
        HessianFlowError: threads below 1.
    """

    def __init__(self, *, threads: int | None = None) -> None:
        check_count("threads", threads, none="as many as this process has")
        self._threads = threads
        self._replica: nn.Module | None = None
        self._line: Connection | None = None
        self._pending: _Answer | None = None

    def submit(self, model: nn.Module, attack: TwinAttack) -> Callable[[], Tensor]:
        """Copy the weights, start the attack, return; the callable returned waits for the twins.

        Raises:
            HessianFlowError: the model is not on a processor, or cannot be sent to another process;
                the process has ended; an error in the attack (from the callable, each time that it
                is asked).
        """
        inner = unwrap(model)
        device = next(inner.parameters()).device
        if device.type != "cpu":
            raise HessianFlowError(
                f"WorkerProcess needs a model on a processor, got {device}: use SecondStream()"
            )
        if self._pending is not None:
            # It reads the replica, and its adversary's state is what this attack goes on from.
            self._pending.settle()
            self._pending = None
        line = self._line or self._start(inner)
        self._snapshot(inner)
        batch = replace(attack, inputs=_shared(attack.inputs), targets=_shared(attack.targets))
        autocast = (torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu"))
        modes = [module.training for module in inner.modules()]
        with _telling_why_not_sent():
            line.send((batch, modes, autocast))
        self._pending = _Answer(line, attack)
        return self._pending

    def close(self) -> None:
        """End the process; a later attack starts another."""
        if self._line is not None:
            self._end()
        self._line = self._replica = self._pending = None

    def _start(self, model: nn.Module) -> Connection:
        replica = copy.deepcopy(model).share_memory()
        # a fork would copy locks that other threads hold
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(
            target=_serve,
            args=(theirs, replica, self._threads or torch.get_num_threads()),
            daemon=True,
        )
        try:
            with _telling_why_not_sent():
                process.start()
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
        self._end = weakref.finalize(self, _end, process, ours)
        self._replica, self._line = replica, ours
        return ours

    @torch.no_grad()
    def _snapshot(self, model: nn.Module) -> None:
        assert self._replica is not None
        targets = [*self._replica.parameters(), *self._replica.buffers()]
        torch._foreach_copy_(targets, [*model.parameters(), *model.buffers()])


class _Answer:
    """Waits for one result, once, and puts the adversary where the attack left it."""

    def __init__(self, line: Connection, attack: TwinAttack) -> None:
        self._line, self._adversary = line, attack.adversary
        self._twins: Tensor | None = None
        self._failure: str | None = None

    def __call__(self) -> Tensor:
        self.settle()
        if self._twins is None:
            raise HessianFlowError(str(self._failure))
        return self._twins

    def settle(self) -> None:
        """Wait; a failure is kept for whoever asks for the twins."""
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
    """The life of the worker: attack until the line is closed."""
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
    """In memory that another process can see; a slice of something larger is copied out of it
    first."""
    whole = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    shared: Tensor = (tensor if whole else tensor.clone()).share_memory_()  # type: ignore[no-untyped-call]
    return shared


def _end(process: BaseProcess, line: Connection) -> None:
    line.close()
    process.join(GOODBYE_SECONDS)
    if process.is_alive():
        process.kill()
