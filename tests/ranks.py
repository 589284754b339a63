"""What the tests run as ranks: plain loops, and the same loops as one process."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hessianflow.distributed import GroupReducer, LocalReducer
from hessianflow.distributed.synchronize import GradientSynchronizer
from hessianflow.interfaces import Hits, StepResult

# 75 = 4 batches of 16 and a tail of 11: ragged over microbatches and ranks
EXAMPLES, BATCH, MICROBATCH = 75, 16, 3


def network(seed: int = 0) -> nn.Sequential:
    """No batch statistics, float64: the same numbers for every split of a batch."""
    model = nn.Sequential(
        nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 4)
    ).double()
    source = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(
                0.4 * torch.randn(parameter.shape, generator=source, dtype=torch.float64)
            )
    return model


def data() -> tuple[Tensor, Tensor]:
    source = torch.Generator().manual_seed(1)
    inputs = torch.randn(EXAMPLES, 6, generator=source, dtype=torch.float64)
    return inputs, torch.randint(0, 4, (EXAMPLES,), generator=source)


def batches(steps: int) -> Iterator[tuple[int, int]]:
    start = 0
    for _ in range(steps):
        stop = min(start + BATCH, EXAMPLES)
        yield start, stop
        start = stop % EXAMPLES


def share(start: int, stop: int, reducer: GroupReducer) -> tuple[int, int]:
    size = stop - start
    first, last = (size * r // reducer.world_size for r in (reducer.rank, reducer.rank + 1))
    return start + first, start + last


def train(
    reducer: GroupReducer, steps: int, microbatch: int = MICROBATCH, bucket_bytes: int = 600
) -> dict:
    """SGD with momentum over microbatches; returns weights, losses and hits of every step."""
    model, (inputs, targets) = network(), data()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9, weight_decay=1e-3)
    sync = GradientSynchronizer(model.parameters(), reducer, bucket_bytes=bucket_bytes)
    losses, hits, sizes = [], [], []
    for start, stop in batches(steps):
        first, last = share(start, stop, reducer)
        sync.begin(last - first)
        optimizer.zero_grad()
        loss_sum, correct = None, None
        for low in range(first, last, microbatch):
            high = min(low + microbatch, last)
            weight = (high - low) / (last - first)
            outputs = model(inputs[low:high])
            loss = F.cross_entropy(outputs, targets[low:high])
            if high == last:
                with sync.last_backward():
                    (loss * weight).backward()
            else:
                (loss * weight).backward()
            part = loss.detach() * weight
            loss_sum = part if loss_sum is None else loss_sum + part
            right = (outputs.argmax(dim=1) == targets[low:high]).sum()
            correct = right if correct is None else correct + right
        own = None
        if loss_sum is not None and correct is not None:
            rows = last - first
            own = StepResult(loss_sum * rows, rows, Hits(correct, rows), rows)
        totals, _ = sync.finish(own)
        optimizer.step()
        losses.append(float(totals.loss))
        hits.append(int(totals.hits.correct))
        sizes.append(totals.examples)
    weights = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    return {"weights": weights, "losses": losses, "hits": hits, "sizes": sizes}


def train_alone(steps: int) -> dict:
    """The oracle: whole batches in one backward pass, nothing of ours involved."""
    model, (inputs, targets) = network(), data()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9, weight_decay=1e-3)
    losses, hits, sizes = [], [], []
    for start, stop in batches(steps):
        optimizer.zero_grad()
        outputs = model(inputs[start:stop])
        loss = F.cross_entropy(outputs, targets[start:stop])
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        hits.append(int((outputs.argmax(dim=1) == targets[start:stop]).sum()))
        sizes.append(stop - start)
    weights = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    return {"weights": weights, "losses": losses, "hits": hits, "sizes": sizes}


LOCAL = LocalReducer()
