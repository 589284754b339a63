"""Protocols of the parts of a trainer: data, losses, adversaries, observers and optimizers."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn

from hessianflow.interfaces.control import Progress, Stateful

Batch = tuple[Any, Any]
"""A pair (inputs, targets). Each is a tensor or a mapping, dataclass, list or tuple of them, see
:mod:`hessianflow.batches`. A loss that runs the model accepts other batches as well."""
LossFn = Callable[[Any, Any], Any]
"""A function loss_fn(outputs, targets) that returns a mean as a scalar tensor, the pair (sum,
count), or, if its `reduction` attribute says so, a sum or one value per example. For a batch that
is a mapping or a dataclass, and always if it is an `hf.ModelLoss`, it is called as
loss_fn(model, batch). It may then return an object that holds such a `loss`, and `logits`.
:mod:`hessianflow.losses` describes how the divisor of a mean is found, and
:mod:`hessianflow.losses.batch_loss` describes the two forms of the call."""
Pending = Callable[[], Tensor]
"""An attack under way. Calling it waits for the adversarial inputs."""


@runtime_checkable
class InputAttack(Stateful, Protocol):
    """An attack on a share of a batch with the present weights, by input gradients only."""

    def perturb(
        self,
        model: nn.Module,
        inputs: Tensor,
        targets: Tensor,
        share: float,
        microbatch_size: int | None = None,
    ) -> Tensor:
        """Return a copy of the inputs in which about `share` of the rows are perturbed."""


@dataclass(frozen=True)
class Exposure:
    """The examples of one optimizer step.

    With N rows drawn from the data and M twins the gradient is that of

        (sum of the losses of all N + M rows) / N,   or / (N + M) with `average`,

    which for M = N is the sum of two means, or their average.

    Attributes:
        batch: Inputs and targets of the N rows; some inputs may be perturbed.
        twins: Adversarial inputs and targets of M more rows, in separate forward passes.
        twin_mode: Context of each of those passes (another set of normalisation statistics).
        average: Whether to divide by all rows.
        on_input_gradient: Function that receives the gradient of the step's loss with respect to
            the N inputs, shaped like them, up to a positive factor per row. With None it is not
            computed.
    """

    batch: Batch
    twins: Batch | None = None
    twin_mode: Callable[[], AbstractContextManager[Any]] = nullcontext
    average: bool = False
    on_input_gradient: Callable[[Tensor], None] | None = None


class Adversary(Stateful, Protocol):
    """A method that chooses the training examples in place of a clean batch.

    For the batch of step t the trainer calls :meth:`attack` with the weights of step t -
    `staleness`, and :meth:`expose` at step t. Both receive the share in force, which is `share`
    times the `attack_factor` of the decision under which the batch was drawn. Batches whose share
    is 0 are trained on as they are.
    """

    @property
    def share(self) -> float:
        """Return the share of each batch to attack, in [0, 1], before a controller's factor."""

    @property
    def staleness(self) -> int:
        """Return the steps between attack and use, the number of batches that are drawn ahead."""

    @property
    def attacks_late(self) -> bool:
        """Return whether a batch that was not attacked ahead is attacked when it is used."""

    def attack(
        self,
        model: nn.Module,
        inputs: Tensor,
        targets: Tensor,
        share: float,
        microbatch_size: int | None = None,
    ) -> Pending:
        """Start the attack on a batch with the present weights."""

    def expose(
        self, model: nn.Module, inputs: Tensor, targets: Tensor, adversarial: Tensor, share: float
    ) -> Exposure:
        """Return the training examples, given the batch and the result of its attack."""


class BatchTransform(Protocol):
    """A function of a whole batch before its training step (progressive resolution, mixing)."""

    def __call__(self, inputs: Tensor, targets: Tensor, progress: Progress) -> Batch: ...


class GradientObserver(Stateful, Protocol):
    """An observer of the gradient of every microbatch and of every step, which changes neither.

    Tensors are on the device. An observer keeps them there and waits for the device only in
    :meth:`signals`. Each rank sees its own microbatches. An observer for several ranks also
    :class:`JoinsRanks`, and sums the results of its microbatches over ranks in `on_step`, which all
    ranks call together. When the ranks change, it forgets the microbatches of the step that was
    interrupted.

    An observer that must know the parameters of the gradients :class:`BindsParameters`. Without
    that, freezing or unfreezing layers while it observes is an error. If an optimizer asks for
    several gradients per step (SAM), the observer sees only the first.
    """

    def on_microbatch(self, gradients: Sequence[Tensor], examples: int) -> None:
        """Take the gradients of the mean loss over a microbatch, one per trainable parameter."""

    def on_step(self, gradients: Sequence[Tensor], examples: int) -> None:
        """Take the gradients of the mean loss over the whole optimization batch."""

    def signals(self) -> Mapping[str, float]:
        """Return named figures for a controller, such as {"noise_scale": 812.0}."""


@runtime_checkable
class ResizableBatches(Stateful, Protocol):
    """Training data as a resumable stream of batches whose size may change between any two.

    Iterating yields the rest of the current epoch and then starts the next one. An epoch may end
    before it has yielded `num_examples`. If the data have the attributes `epoch` (completed) and
    `cursor` (examples yielded in the current epoch), and both in the state, a trainer returns to
    its place after others have read from the stream. The order of examples and their augmentation
    depend only on (seed, epoch), never on the batch size or on interruptions of the run.
    """

    @property
    def num_examples(self) -> int: ...

    @property
    def batch_size(self) -> int: ...

    def set_batch_size(self, batch_size: int) -> None:
        """Set the batch size from the very next batch on."""

    def __iter__(self) -> Iterator[Batch]: ...


class EpochMeasurement(Stateful, Protocol):
    """A measurement of the model after each epoch that leaves no trace on the model."""

    @property
    def kind(self) -> str:
        """Return the kind of the records."""

    def __call__(self) -> tuple[Mapping[str, float], str]:
        """Return named figures for the record, and a warning or an empty string."""


class RecordSink(Protocol):
    """A receiver of every record of a run when it is made, as history.jsonl gets them."""

    def write(self, record: Mapping[str, Any]) -> None: ...

    def close(self) -> None: ...


@runtime_checkable
class TakesConfig(Protocol):
    """A sink that also receives the settings of the run, before the first record."""

    def configure(self, config: Mapping[str, Any]) -> None:
        """Take the content of config.json."""


@runtime_checkable
class BindsParameters(Protocol):
    """An observer that must know the parameters of the gradients."""

    def bind(self, parameters: Sequence[nn.Parameter]) -> None:
        """Expect gradients of `parameters`, in this order, from now on.

        The order need not be that of an optimizer's groups. The trainer calls this before training,
        and again before the first step after layers were frozen or unfrozen.
        """


@runtime_checkable
class ChecksRows(Protocol):
    """Training data that know beforehand whether their batches can be split by rows."""

    def check_rows(self) -> None:
        """Refuse batches with an entry that does not have one row for each example."""


@runtime_checkable
class TellsPlace(Protocol):
    """Training data that tell their place, and move to the place of a loaded state."""

    @property
    def epoch(self) -> int: ...

    @property
    def cursor(self) -> int: ...


@runtime_checkable
class Rewindable(Protocol):
    """Data that can return to their first example."""

    def rewind(self) -> None:
        """Return to the first example of the current epoch."""


@runtime_checkable
class WantsClosure(Protocol):
    """An optimizer that tells whether a closure must compute all its gradients."""

    wants_closure: bool


@runtime_checkable
class SecondOrder(Protocol):
    """An optimizer that tells, as those of timm do, whether it differentiates the gradients."""

    is_second_order: bool
