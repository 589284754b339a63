"""What a trainer works with: data, losses, adversaries, observers, and what it is told of them."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn

from hessianflow.interfaces.control import Progress, Stateful

Batch = tuple[Any, Any]
"""One pair (inputs, targets); each a tensor, or a mapping, dataclass, list or tuple; see
:mod:`hessianflow.batches`."""

LossFn = Callable[[Any, Any], Tensor | tuple[Tensor, int | float | Tensor]]
"""loss_fn(outputs, targets): a mean, a scalar tensor; or, with a `reduction` attribute that says
so, a sum or one value per example; or the pair (sum, count). :mod:`hessianflow.losses` says how it
is found what a mean divides by."""

Pending = Callable[[], Tensor]
"""An attack that was started; calling it waits for the adversarial inputs."""


@runtime_checkable
class InputAttack(Stateful, Protocol):
    """Perturbs a share of a batch with the weights of the moment; gradients flow through the input
    only."""

    def perturb(
        self,
        model: nn.Module,
        inputs: Tensor,
        targets: Tensor,
        share: float,
        microbatch_size: int | None = None,
    ) -> Tensor:
        """Return the inputs with about `share` of the rows perturbed; the given tensor is not
        changed."""
        ...


@dataclass(frozen=True)
class Exposure:
    """What one optimizer step trains on.

    With N rows drawn from the data and M twins the gradient is that of

        (sum of the losses of all N + M rows) / N,   or / (N + M) with `average`:

    for M = N the sum of two means, or their average.

    Attributes:
        batch: (inputs, targets) of the N rows; some inputs may be perturbed.
        twins: adversarial (inputs, targets) of M rows that are trained besides, in forward passes
            of their own.
        twin_mode: entered around each of those passes (another set of normalisation statistics).
        average: divide by all rows.
        on_input_gradient: given the gradient of the step's loss with respect to the N inputs, up to
            a positive factor per row, shaped like them; None: it is not computed.
    """

    batch: Batch
    twins: Batch | None = None
    twin_mode: Callable[[], AbstractContextManager[Any]] = nullcontext
    average: bool = False
    on_input_gradient: Callable[[Tensor], None] | None = None


class Adversary(Stateful, Protocol):
    """Decides what is trained on in place of a clean batch.

    For the batch of step t the trainer calls :meth:`attack` with the weights of step t -
    `staleness`, and :meth:`expose` at step t, both with the share in force: `share` times the
    `attack_factor` of the decision that the batch was drawn under. Batches whose share is 0 are
    trained as they are.
    """

    @property
    def share(self) -> float:
        """Share of each batch that is attacked, in [0, 1], before a controller's factor."""
        ...

    @property
    def staleness(self) -> int:
        """Steps between attack and use: so many batches are drawn ahead."""
        ...

    @property
    def attacks_late(self) -> bool:
        """Whether a batch that was not attacked ahead is attacked at its use; if not, it is trained
        as it is."""
        ...

    def attack(
        self,
        model: nn.Module,
        inputs: Tensor,
        targets: Tensor,
        share: float,
        microbatch_size: int | None = None,
    ) -> Pending:
        """Start the attack on a batch with the weights of now."""
        ...

    def expose(
        self, model: nn.Module, inputs: Tensor, targets: Tensor, adversarial: Tensor, share: float
    ) -> Exposure:
        """Return what to train on, given the batch and what its attack made of it."""
        ...


class BatchTransform(Protocol):
    """Maps a whole batch before it is trained on (progressive resolution, mixing)."""

    def __call__(self, inputs: Tensor, targets: Tensor, progress: Progress) -> Batch: ...


class GradientObserver(Stateful, Protocol):
    """Sees the gradient of every microbatch, and the whole gradient before each step; changes
    neither.

    Tensors are on the device; an observer keeps them there and synchronises only in
    :meth:`signals`. Each rank sees its own microbatches; one that is to be used on several ranks
    also :class:`JoinsRanks`, and in `on_step`, which all ranks call together, adds up over them
    what its microbatches gave. Where the ranks have changed, the microbatches of a step that this
    interrupted are to be forgotten.

    One that must know whose gradients these are :class:`BindsParameters`. Without that it is an
    error to freeze or unfreeze layers while it observes.

    Of an optimizer that asks for several gradients a step (SAM) only the first is shown.
    """

    def on_microbatch(self, gradients: Sequence[Tensor], examples: int) -> None:
        """`gradients`: of the mean loss over this microbatch of `examples`, one tensor a trainable
        parameter."""
        ...

    def on_step(self, gradients: Sequence[Tensor], examples: int) -> None:
        """`gradients`: of the mean loss over the whole optimization batch."""
        ...

    def signals(self) -> Mapping[str, float]:
        """Named figures for a controller, e.g. {"noise_scale": 812.0}."""
        ...


@runtime_checkable
class ResizableBatches(Stateful, Protocol):
    """Training data as a resumable stream of batches whose size may change between any two of them.

    Iterating yields what is left of the current epoch, then moves on to the next epoch; an epoch
    that ends before `num_examples` were handed out is over all the same. Where there are attributes
    `epoch` (completed) and `cursor` (examples handed out of the epoch under way), and both in the
    state, a trainer puts back what others read from the stream. The order of examples and their
    augmentation depend on (seed, epoch) only, never on the batch size or on how often the run was
    interrupted.
    """

    @property
    def num_examples(self) -> int: ...

    @property
    def batch_size(self) -> int: ...

    def set_batch_size(self, batch_size: int) -> None:
        """Takes effect on the very next batch."""
        ...

    def __iter__(self) -> Iterator[Batch]: ...


class EpochMeasurement(Stateful, Protocol):
    """Measures something of the model after each epoch, and leaves no trace on it."""

    @property
    def kind(self) -> str:
        """What its records are called."""
        ...

    def __call__(self) -> tuple[Mapping[str, float], str]:
        """Named figures for the record, and a warning; empty where there is nothing to warn of."""
        ...


class RecordSink(Protocol):
    """Receives every record of a run as it is made (the same objects that history.jsonl gets)."""

    def write(self, record: Mapping[str, Any]) -> None: ...

    def close(self) -> None: ...


@runtime_checkable
class BindsParameters(Protocol):
    """An observer that must know whose gradients it is shown."""

    def bind(self, parameters: Sequence[nn.Parameter]) -> None:
        """Take the gradients shown from now on as those of `parameters`, in that order, which need
        not be that of any optimizer's groups.

        Called before training, and again before the first step after layers were frozen or
        unfrozen.
        """
        ...


@runtime_checkable
class ChecksRows(Protocol):
    """Training data that know beforehand whether their batches can be cut."""

    def check_rows(self) -> None:
        """Refuse batches with an entry that does not have one row for each example."""
        ...


@runtime_checkable
class TellsPlace(Protocol):
    """Training data that tell where they stand, and go where their state says."""

    @property
    def epoch(self) -> int: ...

    @property
    def cursor(self) -> int: ...


@runtime_checkable
class Rewindable(Protocol):
    """Data that go back to their first example for whoever wants all of them."""

    def rewind(self) -> None:
        """Go to the first example of the epoch under way."""
        ...


@runtime_checkable
class WantsClosure(Protocol):
    """An optimizer that says whether all its gradients are to come from a closure."""

    wants_closure: bool


@runtime_checkable
class SecondOrder(Protocol):
    """An optimizer that says, as timm's do, whether it differentiates the gradients again."""

    is_second_order: bool
