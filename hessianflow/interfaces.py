"""Records and protocols shared by every room of the toolkit.

This module and :mod:`hessianflow.batches` are the only ones that every room may import. Records are
frozen: a measurement or a decision, once made, never changes. Protocols are small: the trainer
knows nothing else about the methods it runs.

Units: `batch_size` counts examples per optimizer step over all ranks, `microbatch_size` examples
per forward pass on one device, progress counts examples. A learning rate is stated at a reference
batch size.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

Batch = tuple[Any, Any]
"""One pair (inputs, targets); each a tensor, or a mapping, dataclass, list or tuple; see
:mod:`hessianflow.batches`."""

LossFn = Callable[[Any, Any], Tensor | tuple[Tensor, int | float | Tensor]]
"""loss_fn(outputs, targets): a mean, a scalar tensor; or, with a `reduction` attribute that says
so, a sum or one value per example; or the pair (sum, count). :mod:`hessianflow.losses` says how it
is found what a mean divides by."""

NormMode = Literal["eval", "batch"]
"""Statistics that batch normalisation uses in a measurement: "eval" the running ones, "batch" those
of the batch measured (the running ones stay untouched)."""

NO_SIGNALS: Mapping[str, float] = MappingProxyType({})


class HessianFlowError(ValueError):
    """An input or a state that the user can put right; the message says how. The command prints it
    on one line."""


class AgreedError(HessianFlowError):
    """Raised on every rank alike: it is enough if rank 0 says it."""


@dataclass(frozen=True)
class Progress:
    """How far a run has come.

    Attributes:
        epoch: epochs completed.
        examples: training examples used so far, over all ranks.
        updates: optimizer steps taken so far.
        examples_per_epoch: size of the training set.
        total_epochs: epochs the run is planned for.
    """

    epoch: int
    examples: int
    updates: int
    examples_per_epoch: int
    total_epochs: int


@dataclass(frozen=True)
class CurvatureReading:
    """One measurement of the loss curvature; `float("nan")` where nothing finite was found.

    Attributes:
        eigenvalue: the leading eigenvalue (largest in magnitude unless the probe was told
            otherwise), with its sign.
        residual: ||H v - eigenvalue v|| for the unit vector v found; a true eigenvalue lies no
            farther away.
        matvecs: products spent.
        converged: whether the residual met the probe's tolerance.
        reliable: whether the loss under running statistics of batch normalisation is near that
            under the batch's own. Where it is not, they have not settled, and the eigenvalues say
            nothing of the loss that is trained; `details` then hold both losses, of up to 32
            examples ("running_loss", "own_loss"). It is judged by the loss alone: True does not
            prove that the curvature is the same.
        eigenvalues: all pairs tracked, leading first, when more than one is.
        norm_mode: the batch-normalisation statistics the value belongs to.
        num_examples: examples the loss was averaged over.
        seconds: wall time of the measurement.
        details: further named figures (trace, smoothed value, ...).
    """

    eigenvalue: float
    residual: float
    matvecs: int
    converged: bool
    eigenvalues: tuple[float, ...] = ()
    norm_mode: NormMode = "eval"
    num_examples: int = 0
    seconds: float = 0.0
    details: Mapping[str, float] = field(default_factory=dict)
    reliable: bool = True


@dataclass(frozen=True)
class Decision:
    """What a controller wants from now on. Every field is an absolute setting, so applying it twice
    changes nothing.

    Attributes:
        batch_size: examples per optimizer step, from the very next batch on.
        lr_factor: multiplier of the scheduled learning rate (1: the rate as stated at the reference
            batch size).
        adversarial_share: share of each batch made adversarial, in [0, 1].
        reason: why, in words; empty when nothing changed.
    """

    batch_size: int
    lr_factor: float = 1.0
    adversarial_share: float = 0.0
    reason: str = ""

    @property
    def setting(self) -> tuple[int, float, float]:
        """What is set, without the reason: two decisions with equal settings ask for the same."""
        return self.batch_size, self.lr_factor, self.adversarial_share


@runtime_checkable
class Stateful(Protocol):
    """Whatever a checkpoint must carry: plain numbers, strings, lists, dicts and tensors only."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


class CurvatureProbe(Stateful, Protocol):
    """Measures the curvature of the model it was built for and leaves no trace on it."""

    def __call__(self) -> CurvatureReading: ...


class BatchController(Stateful, Protocol):
    """A deterministic state machine: measurements in, a :class:`Decision` out; no model, optimizer
    or clock inside.

    `needs` names the signals it wants at the next update ("eigenvalue" for a curvature reading;
    other names are keys of `signals`), so that nothing unneeded is measured. It may change with the
    state.
    """

    @property
    def needs(self) -> frozenset[str]: ...

    @property
    def decision(self) -> Decision:
        """The setting in force (before any update: the one to start with)."""
        ...

    def is_due(self, progress: Progress) -> bool: ...

    def update(
        self,
        progress: Progress,
        reading: CurvatureReading | None = None,
        signals: Mapping[str, float] = NO_SIGNALS,
    ) -> Decision: ...


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
    `staleness`, :meth:`expose` at step t, and :meth:`after_step` after each step. Batches whose
    share is 0 are trained as they are.
    """

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
    ) -> Callable[[], Tensor]:
        """Start the attack on a batch with the weights of now; what is returned waits for the
        adversarial inputs."""
        ...

    def expose(
        self, model: nn.Module, inputs: Tensor, targets: Tensor, adversarial: Tensor, share: float
    ) -> Exposure:
        """Return what to train on, given the batch and what its attack made of it."""
        ...

    def after_step(self, model: nn.Module) -> None:
        """Called once the optimizer has stepped."""
        ...


class BatchTransform(Protocol):
    """Maps a whole batch before it is trained on (progressive resolution, mixing)."""

    def __call__(self, inputs: Tensor, targets: Tensor, progress: Progress) -> Batch: ...


class GradientObserver(Stateful, Protocol):
    """Sees the gradient of every microbatch, and the whole gradient before each step; changes
    neither.

    Tensors are on the device; an observer keeps them there and synchronises only in
    :meth:`signals`. Each rank sees its own microbatches; one that is to be used on several ranks
    has a `join(reducer: Reducer)`, and in `on_step`, which all ranks call together, adds up over
    them what its microbatches gave. `join` is called before training, and again where the ranks
    have changed; the microbatches of a step that this interrupted are then to be forgotten.

    One that must know whose gradients these are has a `watch(parameters: Sequence[nn.Parameter])`,
    called before training, and again before the first step after layers were frozen or unfrozen:
    gradients come in the order of `parameters`, which need not be that of any optimizer's groups.
    Without it such a change is an error.

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


class Reducer(Protocol):
    """How ranks agree: sums weighted by the caller, and one rank's word for all. One process: both
    do nothing."""

    @property
    def rank(self) -> int: ...

    @property
    def world_size(self) -> int: ...

    def sum(self, tensor: Tensor) -> Tensor:
        """Return the sum over all ranks, in place where possible."""
        ...

    def broadcast(self, value: Any) -> Any:
        """Rank 0's plain value, on every rank."""
        ...


class EpochMeasurement(Stateful, Protocol):
    """Measures something of the model after each epoch, and leaves no trace on it."""

    @property
    def kind(self) -> str:
        """What its records are called."""
        ...

    def __call__(self) -> tuple[Mapping[str, float], str]:
        """Named figures for the record, and a warning; empty where there is nothing to warn of."""
        ...


class Hits(NamedTuple):
    """How many targets were hit.

    Attributes:
        correct: targets whose class had the largest score, an int64 scalar on the device.
        counted: targets that count; those that the loss ignores do not.
    """

    correct: Tensor
    counted: int | float | Tensor


@dataclass(frozen=True)
class StepResult:
    """What the loss gave over one optimization batch, or over any part of it.

    Results add up: those of microbatches to that of a rank's share, those of ranks to that of the
    batch, those of batches to that of an epoch. Tensors stay on the device.

    Attributes:
        total: the sum of the losses, which is the mean loss times `weight`; 0 where nothing counts.
        weight: what the mean loss divides by: the number of rows, or what the loss counts instead
            of them (:mod:`hessianflow.losses`).
        hits: of the rows; None where they are not counted, and without rows.
        rows: the number of rows trained.
        examples: the number of examples drawn from the data; a transform may have made another
            number of rows of them.
        divisor: what the mean divides by whose gradient `.grad` holds. It differs from `weight`
            where rows and twins are averaged together.
        twins: the result of the adversarial twins; None where there are none.
        failure: why the loss cannot be cut into parts, if it cannot.
    """

    total: Tensor
    weight: float | Tensor
    hits: Hits | None = None
    rows: int = 0
    examples: int = 0
    divisor: float | Tensor = 0
    twins: "StepResult | None" = None
    failure: HessianFlowError | None = None

    @property
    def loss(self) -> Tensor:
        """The mean loss, a scalar on the device; 0 where nothing counts."""
        if isinstance(self.weight, Tensor):
            return torch.where(self.weight > 0, self.total / self.weight, 0.0)
        return self.total / (self.weight or 1)

    def __add__(self, other: "StepResult") -> "StepResult":
        """Return the result of both batches, or parts, taken together."""
        return StepResult(
            self.total + other.total,
            self.weight + other.weight,
            self._hits_with(other),
            self.rows + other.rows,
            self.examples + other.examples,
            self.divisor + other.divisor,
            self._twins_with(other),
            self.failure or other.failure,
        )

    def _hits_with(self, other: "StepResult") -> Hits | None:
        """Return the hits of both; None where those of any row are not counted."""
        if self.rows == 0 or other.rows == 0:
            return self.hits or other.hits
        if self.hits is None or other.hits is None:
            return None
        return Hits(self.hits.correct + other.hits.correct, self.hits.counted + other.hits.counted)

    def _twins_with(self, other: "StepResult") -> "StepResult | None":
        if self.twins is None or other.twins is None:
            return self.twins or other.twins
        return self.twins + other.twins


class Wishes(NamedTuple):
    """What a rank may wish for at the end of a step; each comes true if any rank wishes it.

    Attributes:
        stop: to save a checkpoint and stop.
        save: to save a checkpoint.
        show: to read the figures from the device and show them.
    """

    stop: bool = False
    save: bool = False
    show: bool = False


class World(Reducer, Protocol):
    """The ranks that train one model together, as a trainer sees them. One process: a world that
    does nothing.

    For each gradient: `begin`; backward passes that leave in `.grad` that of a mean over this
    rank's own examples, the last of them within `last_backward`; `finish`, after which `.grad` is
    that of the mean over all. Every rank takes part, also one without examples; every method but
    `attach`, `shard`, `post`, `begin` and `last_backward` must be called by all ranks together.
    Plain values are nested dicts, lists and tuples of numbers, strings and tensors.
    """

    @property
    def agreed(self) -> Wishes:
        """What any rank wished for when the ranks last met in `finish`."""
        ...

    def post(self, wishes: Callable[[], Wishes]) -> None:
        """Ask `wishes` for those of this rank whenever the ranks meet in `finish` from now on.

        They travel with the figures of the step, and cost no exchange of their own.
        """
        ...

    def attach(self, model: nn.Module, parameters: Sequence[nn.Parameter]) -> None:
        """Take over the gradients of `parameters`, those of the model and others; no rank is met
        yet."""
        ...

    def meet(self, settings: Mapping[str, Any]) -> None:
        """Refuse ranks that differ in their settings, then give all ranks rank 0's weights."""
        ...

    def shard(self, data: Any) -> None:
        """Let a rank's training data hand out this rank's part of every batch."""
        ...

    def begin(self, examples: int) -> None:
        """Announce this rank's share of the next batch."""
        ...

    def last_backward(self, weight: float | Tensor) -> AbstractContextManager[None]:
        """Within it every gradient is final as soon as it is computed; may be entered again if the
        pass failed.

        Args:
            weight: what the mean that this rank differentiates divides by; it counts for that among
                the ranks.
        """
        ...

    def finish(self, own: StepResult) -> StepResult:
        """Wait until all gradients are those of the whole batch.

        Args:
            own: the result of this rank's share.

        Returns:
            The result of the whole batch, the same on every rank. Where a rank's loss cannot be
            cut into parts, it says so on all of them.
        """
        ...

    def average_buffers(self) -> None:
        """Give all ranks the same buffers: running statistics averaged, others as on rank 0."""
        ...

    def gather(self, value: Any) -> list[Any]:
        """Return every rank's plain value, in the order of ranks, on every rank."""
        ...


class RecordSink(Protocol):
    """Receives every record of a run as it is made (the same objects that history.jsonl gets)."""

    def write(self, record: Mapping[str, Any]) -> None: ...

    def close(self) -> None: ...


@runtime_checkable
class LinearOperator(Protocol):
    """All that curvature algorithms see of a symmetric matrix."""

    @property
    def size(self) -> int: ...

    @property
    def device(self) -> torch.device: ...

    @property
    def dtype(self) -> torch.dtype: ...

    def matvec(self, vector: Tensor) -> Tensor: ...
