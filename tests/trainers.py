"""Trainers that the tests run as ranks: no batch statistics, float64, so that any world has one
answer."""

import os
import signal
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from ranks import network
from torch import Tensor, nn

from hessianflow import AdaptiveBatchTrainer
from hessianflow.adversarial import FGSM, ConcurrentAdversary
from hessianflow.control import ABS, AdaBatch, FixedBatch
from hessianflow.curvature import CurvatureProbe, HessianOperator
from hessianflow.data import DeviceBatches
from hessianflow.distributed import GroupReducer, GroupWorld, LocalReducer, sharded
from hessianflow.interfaces import Exposure, HessianFlowError, Progress
from hessianflow.losses import ModelLoss
from hessianflow.optim import CLARS, GradientMoments
from hessianflow.training import Divergence, Passes, Reporting, evaluate
from hessianflow.training.accumulate import GradientAccumulator
from hessianflow.training.checks import must_pair

# 20 steps: batches of 16, and tails of 11 that make 5 + 6 on two ranks
EXAMPLES, BATCH, EPOCHS = 75, 16, 4


def pixels(batch_size: int = BATCH, examples: int = EXAMPLES) -> DeviceBatches:
    source = torch.Generator().manual_seed(1)
    images = torch.randn(examples, 1, 2, 3, generator=source, dtype=torch.float64)
    targets = torch.randint(0, 4, (examples,), generator=source)
    return DeviceBatches(images, targets, batch_size, dtype=torch.float64)


def plain(_: nn.Module, __: GroupWorld | None) -> dict[str, Any]:
    return {}


def accumulating(_: nn.Module, __: GroupWorld | None) -> dict[str, Any]:
    return {"passes": Passes(microbatch_size=3)}


def clipped(_: nn.Module, __: GroupWorld | None) -> dict[str, Any]:
    return {"passes": Passes(max_grad_norm=0.05)}


def growing(model: nn.Module, world: GroupWorld | None) -> dict[str, Any]:
    """ABSA, which grows on the eigenvalue and on patience; 31 examples to probe are 15 + 16 on two
    ranks."""
    operator = HessianOperator if world is None else sharded(world)
    probe = CurvatureProbe(
        model, F.cross_entropy, pixels().sample(31), tol=1e-10, operator=operator
    )
    controller = ABS(BATCH, 64, decay_factor=1.05, patience=2)
    held_out = pixels(7).examples(torch.arange(20))
    return {"probe": probe, "controller": controller, "eval_data": held_out, "epochs": 6}


def tiny(_: nn.Module, __: GroupWorld | None) -> dict[str, Any]:
    """Batches of one example: one of two ranks has none."""
    return {"train_data": pixels(1, 11)}


def skewed(_: nn.Module, __: GroupWorld | None) -> dict[str, Any]:
    """Class weights and an ignored class: ranks count for other numbers than their examples."""
    classes = torch.tensor([1.0, 0.2, 3.0, 1.0], dtype=torch.float64)
    return {"loss_fn": nn.CrossEntropyLoss(weight=classes, ignore_index=3)}


def own_loss(_: nn.Module, __: GroupWorld | None) -> dict[str, Any]:
    """The same in a function of the user's own, in microbatches: only the call tells what its mean
    divides by."""
    classes = torch.tensor([1.0, 0.2, 3.0, 1.0], dtype=torch.float64)

    def loss_fn(outputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs, targets, weight=classes, ignore_index=3) * 0.5

    return {"loss_fn": loss_fn, "passes": Passes(microbatch_size=3)}


def of_model_and_batch(_: nn.Module, __: GroupWorld | None) -> dict[str, Any]:
    """A loss that runs the model, in microbatches and over targets of which some do not count."""

    def loss_fn(model: nn.Module, batch: Any) -> Any:
        outputs = model(batch[0])
        loss = F.cross_entropy(outputs, batch[1], ignore_index=3)
        return {"loss": loss, "logits": outputs}

    return {
        "loss_fn": ModelLoss(loss_fn),
        "passes": Passes(microbatch_size=3),
        "eval_data": [pixels(7).examples(torch.arange(n, n + 7)) for n in (0, 7, 14)],
    }


def contrastive(_: nn.Module, __: GroupWorld | None) -> dict[str, Any]:
    """A loss that compares the rows of a batch, which no rank may cut."""

    def loss_fn(outputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs @ outputs.T, torch.arange(len(targets)))

    return {"loss_fn": loss_fn}


def freezing(model: nn.Module, _: GroupWorld | None) -> dict[str, Any]:
    """A layer is frozen in the second epoch."""
    first = next(model.parameters())

    def freeze(inputs: Tensor, targets: Tensor, progress: Progress) -> tuple[Tensor, Tensor]:
        first.requires_grad_(progress.epoch < 1)
        return inputs, targets

    return {"transform": freeze, "passes": Passes(microbatch_size=3)}


def masked(model: nn.Module, _: GroupWorld | None) -> dict[str, Any]:
    """A hook on every gradient that is accumulated, registered after the trainer's own."""

    def halve(parameter: Tensor) -> None:
        assert parameter.grad is not None
        parameter.grad *= 0.5

    def hooking(inputs: Tensor, targets: Tensor, progress: Progress) -> tuple[Tensor, Tensor]:
        if progress.updates == 0:
            for parameter in model.parameters():
                parameter.register_post_accumulate_grad_hook(halve)
        return inputs, targets

    return {"transform": hooking, "passes": Passes(microbatch_size=3)}


Options = Callable[[nn.Module, GroupWorld | None], dict[str, Any]]


def ended(reducer: GroupReducer, options: Options) -> str:
    """What the run ends with on this rank."""
    try:
        build(GroupWorld(reducer), options).fit()
    except HessianFlowError as error:
        return str(error)
    return "trained"


def build(
    world: GroupWorld | None, options: Options = plain, **further: Any
) -> AdaptiveBatchTrainer:
    """SGD with momentum; a rank above 0 starts with weights of its own, to see that they are
    replaced."""
    torch.set_num_threads(1)
    model = nn.Sequential(nn.Flatten(), network(seed=0 if world is None else world.rank))
    settings: dict[str, Any] = {
        "train_data": pixels(),
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9, weight_decay=1e-3),
        "loss_fn": F.cross_entropy,
        "epochs": EPOCHS,
        "reporting": Reporting(show_progress=False),
        "world": world,
    }
    return AdaptiveBatchTrainer(model, **{**settings, **options(model, world), **further})


def weights(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def untimed(rows: Any) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if "second" not in k} for row in rows]


def run(
    reducer: GroupReducer | None, options: Options, *, resume: bool = False, **further: Any
) -> dict[str, Any]:
    """Train to the end; reducer None: one process without a world."""
    made = build(None if reducer is None else GroupWorld(reducer), options, **further)
    history = made.resume(further["run_dir"]) if resume else made.fit()
    return {
        "weights": weights(made.model),
        "rows": untimed(history.records),
        "summary": dict(history.summary),
    }


def stopping(options: Options, update: int, rank: int) -> Options:
    """As a signal does: asks the trainer of one rank to stop, in the midst of a step."""

    def stop(model: nn.Module, world: GroupWorld | None) -> dict[str, Any]:
        def watch(inputs: Tensor, targets: Tensor, progress: Progress) -> tuple[Tensor, Tensor]:
            if progress.updates == update - 1 and world is not None and world.rank == rank:
                os.kill(os.getpid(), signal.SIGTERM)
            return inputs, targets

        return {**options(model, world), "transform": watch}

    return stop


def preempted(reducer: GroupReducer, run_dir: str, update: int, rank: int) -> dict[str, Any]:
    """Trains until a SIGTERM reaches one rank."""
    made = build(GroupWorld(reducer), stopping(growing, update, rank), run_dir=run_dir)
    signal.signal(signal.SIGTERM, lambda *_: made.request_stop())
    return dict(made.fit().summary)


def resumed(reducer: GroupReducer | None, run_dir: str) -> dict[str, Any]:
    return run(reducer, growing, resume=True, run_dir=run_dir)


def unfrozen(reducer: GroupReducer) -> str:
    """Unfreezes a layer in the middle of a run; what is said."""
    world = GroupWorld(reducer)

    def unfreeze(inputs: Tensor, targets: Tensor, progress: Progress) -> tuple[Tensor, Tensor]:
        first.requires_grad_(progress.epoch >= 1)
        return inputs, targets

    def options(model: nn.Module, _: GroupWorld | None) -> dict[str, Any]:
        nonlocal first
        first = next(model.parameters()).requires_grad_(False)
        return {"transform": unfreeze}

    first: Any = None
    try:
        build(world, options).fit()
    except HessianFlowError as error:
        return str(error)
    return ""


def poisoned(reducer: GroupReducer, where: str, run_dir: str | None) -> tuple[str, int]:
    """A number that is not finite on rank 1 alone, in its batch or in a buffer of its."""
    world = GroupWorld(reducer)

    def poison(inputs: Tensor, targets: Tensor, progress: Progress) -> tuple[Tensor, Tensor]:
        if world.rank == 1 and progress.updates == 7:
            if where == "buffer":
                made.model.mean.fill_(torch.nan)
            else:
                inputs = inputs * torch.nan
        return inputs, targets

    rollback = {} if run_dir is None else {"divergence": Divergence("rollback"), "run_dir": run_dir}
    made = build(world, transform=poison, **rollback)
    made.model.register_buffer("mean", torch.zeros(2))
    try:
        made.fit()
    except HessianFlowError as error:
        return str(error), made.progress.updates
    return "", made.progress.updates


class Alone:
    """An observer that knows nothing of ranks."""

    def on_microbatch(self, gradients: Any, examples: int) -> None: ...

    def on_step(self, gradients: Any, examples: int) -> None: ...

    def signals(self) -> dict[str, float]:
        return {}

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Any) -> None: ...


def refused(reducer: GroupReducer, what: str) -> str:
    """What is said on this rank about something that cannot be trained on several."""
    world = GroupWorld(reducer)
    try:
        if what == "observer":
            build(world, observers=[Alone()])
        elif what == "staleness":
            ahead = ConcurrentAdversary(FGSM(0.1, value_range=None), staleness=2)
            build(world, adversary=ahead, controller=FixedBatch(BATCH))
        elif what == "wrapped":
            world.attach(nn.parallel.DistributedDataParallel(nn.Linear(2, 2)), [])
        elif what == "data":
            world.shard([1, 2])
        elif what in ("cpu", "cut"):
            model = nn.Sequential(nn.SyncBatchNorm(2), nn.Linear(2, 2))
            must_pair(model, world, 8 if what == "cut" else None)
        elif what == "late":
            growing_world = GroupWorld(LocalReducer())
            made = build(growing_world)
            made.model.add_module("late", nn.SyncBatchNorm(4))
            made.model.to("meta")
            growing_world.rejoin(reducer)
            made.rejoin()
        elif what == "settings":
            build(world, epochs=2 + world.rank).fit()
        elif what == "disk":
            build(world, run_dir="/proc/nowhere").fit()
    except HessianFlowError as error:
        return str(error)
    return ""


def measured(reducer: GroupReducer | None, sizes: tuple[int, ...]) -> dict[str, float]:
    """The moments of microbatch gradients over two steps; `sizes`: microbatch on each rank."""
    moments = GradientMoments(accumulate=True)
    world = None if reducer is None else GroupWorld(reducer)
    size = sizes[0 if world is None else world.rank]
    made = build(world, observers=[moments], passes=Passes(microbatch_size=size), epochs=1)
    made.world.meet({})
    made.run_until(2)
    return dict(moments.signals())


def compared(reducer: GroupReducer | None) -> Tensor:
    """CLARS, whose rates come from the norms of microbatch gradients."""

    def clars(model: nn.Module, _: GroupWorld | None) -> dict[str, Any]:
        optimizer = CLARS(model.parameters(), 0.1, momentum=0.9)
        return {
            "optimizer": optimizer,
            "observers": [optimizer.norms],
            "passes": Passes(microbatch_size=4),
        }

    return run(reducer, clars, train_data=pixels(16, 64))["weights"]


def normalised(reducer: GroupReducer) -> tuple[Tensor, Tensor, list[float]]:
    """Batch normalisation: each rank gathers statistics of its own; saved and evaluated are those
    of all."""
    world = GroupWorld(reducer)
    model = nn.Sequential(
        nn.Flatten(), nn.BatchNorm1d(6), nn.Linear(6, 4), nn.Dropout(0.5)
    ).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    evaluation = pixels(10).sample(30)
    made = AdaptiveBatchTrainer(
        model,
        pixels(),
        [evaluation],
        optimizer=optimizer,
        loss_fn=F.cross_entropy,
        epochs=1,
        world=world,
    )
    noise = []
    model[3].register_forward_hook(
        lambda module, inputs, output: noise.append((output == 0).double().flatten())
    )
    row = made.fit().epochs[-1]
    losses = [evaluate(model, evaluation, F.cross_entropy).loss, row["eval_loss"]]
    return torch.cat([b.double().reshape(-1) for b in model.buffers()]), noise[0], losses


def unsettled(reducer: GroupReducer | None) -> tuple[Tensor, float, list[str | None]]:
    """Running statistics that say nothing yet, after one update: measured anew on the parts of that
    batch."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    world = None if reducer is None else GroupWorld(reducer)
    model = nn.Sequential(
        nn.Flatten(), nn.Linear(6, 4, bias=False), nn.BatchNorm1d(4), nn.Linear(4, 4)
    ).double()
    with torch.no_grad():
        model[1].weight.mul_(100)
        model[3].weight.mul_(10)
    data = pixels(48)
    history = AdaptiveBatchTrainer(
        model,
        data,
        [data.sample(30)],
        optimizer=torch.optim.SGD(model.parameters(), lr=0.01),
        loss_fn=F.cross_entropy,
        epochs=1,
        passes=Passes(norm_batch_size=0),
        reporting=Reporting(show_progress=False),
        world=world,
    ).fit()
    [row] = history.epochs
    statistics = torch.cat([model[2].running_mean, model[2].running_var])
    return statistics, row["eval_loss"], [row.get("statistics")]


def rolled_back(reducer: GroupReducer | None, run_dir: str) -> dict[str, Any]:
    """The batch doubles every epoch; one of more than 16 explodes, and is undone."""

    def grow(_: nn.Module, world: GroupWorld | None) -> dict[str, Any]:
        def poison(inputs: Tensor, targets: Tensor, progress: Progress) -> tuple[Tensor, Tensor]:
            limit = 16 if world is None else 16 // world.world_size
            return (inputs * torch.nan if len(inputs) > limit else inputs), targets

        controller = AdaBatch(8, 64, every_epochs=1, lr_decay=1)
        return {
            "controller": controller,
            "transform": poison,
            "train_data": pixels(8, 64),
            "epochs": 4,
        }

    return run(reducer, grow, run_dir=run_dir, divergence=Divergence("rollback"))


class Centred(nn.Module):
    """Subtracts the mean over the rows of all ranks: stands for SyncBatchNorm, which needs a
    GPU."""

    def __init__(self, world: GroupWorld) -> None:
        super().__init__()
        self.world, self.passes = world, 0

    def forward(self, inputs: Tensor) -> Tensor:
        self.passes += 1
        sums = self.world.sum(
            torch.cat([inputs.detach().sum(0), torch.tensor([float(len(inputs))])])
        )
        return inputs - sums[:-1] / sums[-1]


def paired(reducer: GroupReducer) -> tuple[int, Tensor, str]:
    """Rank 0 holds no row, rank 1 three."""
    world = GroupWorld(reducer)
    model = nn.Sequential(Centred(world), nn.Linear(2, 1, bias=False))
    nn.init.ones_(model[1].weight)
    rows = 3 * reducer.rank
    batch = (torch.arange(2.0 * rows).view(rows, 2) ** 2, torch.zeros(rows, 1))
    parameters = list(model.parameters())
    world.attach(model, parameters)
    accumulate = GradientAccumulator(model, nn.MSELoss(), parameters, world=world, paired=True)
    world.begin(rows)
    accumulate.reduce_over_ranks(accumulate(batch))
    gradient = parameters[0].grad.clone()
    try:
        accumulate.expose(Exposure(batch, twins=batch))
    except HessianFlowError as error:
        return model[0].passes, gradient, str(error)
    return model[0].passes, gradient, ""
