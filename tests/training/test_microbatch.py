"""The search for a size and the survival of out-of-memory errors; time and memory are simulated."""

import pytest
import torch
from problems import bright_or_dark
from torch import nn
from torch.nn import functional as F

from hessianflow import AdaptiveBatchTrainer, Decision, HessianFlowError
from hessianflow.adversarial import PGD, ConcurrentAdversary, WorkerProcess
from hessianflow.control import FixedBatch
from hessianflow.training import Passes, microbatch
from hessianflow.training.microbatch import MicrobatchSize

CPU = torch.device("cpu")


class Clock:
    """A device on which a step takes `seconds(microbatch, batch)`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, seconds) -> None:
        self.now, self.seconds = 0.0, seconds
        monkeypatch.setattr(microbatch.time, "perf_counter", lambda: self.now)

    def step(self, sizes: MicrobatchSize, batch: int) -> int:
        size = sizes.begin(batch)
        self.now += self.seconds(size, batch)
        sizes.end(batch)
        return size


def test_climbs_while_larger_is_faster(monkeypatch: pytest.MonkeyPatch):
    """A fixed cost per pass: the largest that the batch allows wins, and stays."""
    clock = Clock(monkeypatch, lambda size, batch: 0.01 * batch / size + 1e-5 * batch)
    sizes = MicrobatchSize("auto", 128, CPU)
    assert [clock.step(sizes, 128) for _ in range(5)] == [128] * 5
    used = [clock.step(sizes, 1024) for _ in range(20)]
    assert used[:9] == [128] * 3 + [256] * 3 + [512] * 3
    assert used[-1] == 1024
    assert sizes.size == 1024


def test_stops_where_larger_is_slower(monkeypatch: pytest.MonkeyPatch):
    """As measured on a processor: 512 slower than 128; one look at 256, then 128 for good."""
    clock = Clock(monkeypatch, lambda size, batch: batch * (1e-3 if size <= 128 else 1.3e-3))
    sizes = MicrobatchSize("auto", 128, CPU)
    used = [clock.step(sizes, 4096) for _ in range(20)]
    assert used == [128] * 3 + [256] * 3 + [128] * 14
    again = MicrobatchSize("auto", 128, CPU)
    again.load_state_dict(sizes.state_dict())
    assert [clock.step(again, 4096) for _ in range(5)] == [128] * 5


def test_out_of_memory_halves_for_good():
    sizes = MicrobatchSize(96, 96, CPU)
    sizes.begin(200)
    sizes.out_of_memory(200)
    assert sizes.size == 48
    sizes.begin(10)
    sizes.out_of_memory(10)
    assert sizes.size == 5
    for _ in range(2):
        sizes.out_of_memory(200)
    with pytest.raises(HessianFlowError, match="out of memory with one example"):
        sizes.out_of_memory(200)


def test_auto_never_climbs_beyond_what_failed(monkeypatch: pytest.MonkeyPatch):
    sizes = MicrobatchSize("auto", 128, CPU)
    clock = Clock(monkeypatch, lambda size, batch: 0.01 * batch / size)
    for _ in range(3):
        clock.step(sizes, 4096)
    assert sizes.begin(4096) == 256
    sizes.out_of_memory(4096)
    assert [clock.step(sizes, 4096) for _ in range(10)] == [128] * 10


def test_bad_size():
    with pytest.raises(HessianFlowError, match="microbatch_size must be a whole number >= 1"):
        MicrobatchSize(0, 1, CPU)


class Limited(nn.Module):
    """A network that runs out of memory above a number of examples, after its batch norm has seen
    them."""

    def __init__(self, limit: int | None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.drop, self.head = nn.BatchNorm1d(16), nn.Dropout(0.5), nn.Linear(16, 2)
        self.limit, self.failures = limit, 0

    def forward(self, x):
        x = self.drop(self.norm(x.flatten(1)))
        if self.limit is not None and self.training and len(x) > self.limit:
            self.failures += 1
            raise torch.OutOfMemoryError("CUDA out of memory (simulated)")
        return self.head(x)


def test_an_out_of_memory_step_is_repeated_as_if_it_had_not_been_tried():
    """Equal, bit for bit, to a run with the smaller microbatch from the start: statistics, dropout
    and attack too."""
    weights = []
    for limit, size in ((None, 8), (8, 16)):
        model = Limited(limit)
        batches = bright_or_dark(64, 16)

        class Fixed:
            needs, decision = frozenset(), Decision(16)

            def is_due(self, progress):
                return False

            def state_dict(self):
                return {}

        torch.manual_seed(5)
        AdaptiveBatchTrainer(
            model,
            batches,
            optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
            loss_fn=F.cross_entropy,
            controller=Fixed(),
            adversary=PGD(0.1, share=0.5, value_range=(0.0, 1.0), steps=2),
            epochs=2,
            passes=Passes(microbatch_size=size),
        ).fit()
        assert model.failures == (1 if limit else 0)
        weights.append(torch.cat([v.flatten().double() for v in model.state_dict().values()]))
    assert torch.equal(weights[0], weights[1])


class Growing(FixedBatch):
    """Doubles the batch after two steps."""

    decision = Decision(8)

    def __init__(self) -> None:
        super().__init__(8)

    def update(self, progress, reading=None, signals=None):
        self.decision = Decision(16) if progress.examples >= 16 else Growing.decision
        return self.decision

    def is_due(self, progress):
        return True


@pytest.mark.slow
@pytest.mark.parametrize("staleness", [1, 2])
def test_out_of_memory_with_attacks_under_way_in_another_process(staleness: int):
    """The random starts of the step repeated, and of all after it, are those of attacks made at
    once."""
    weights, worker = [], WorkerProcess(threads=1)
    for runner in (None, worker):
        model, attack = Limited(8), PGD(0.1, value_range=(0.0, 1.0), steps=2, relative_step=0.2)
        torch.manual_seed(5)
        AdaptiveBatchTrainer(
            model,
            bright_or_dark(64),
            optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
            loss_fn=F.cross_entropy,
            controller=Growing(),
            adversary=ConcurrentAdversary(attack, staleness=staleness, runner=runner),
            epochs=2,
            passes=Passes(microbatch_size=16),
        ).fit()
        assert model.failures == 1
        weights.append(torch.cat([v.flatten().double() for v in model.state_dict().values()]))
    worker.close()
    assert torch.equal(weights[0], weights[1])
