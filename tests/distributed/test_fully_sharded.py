"""Models that FSDP2 shards over two ranks are measured as far as first derivatives go.

The oracle is the same model in one process.
"""

import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from ranks import data, network
from torch import nn
from torch.optim import SGD, AdamW

import hessianflow as hf
from hessianflow.curvature import critical_rate, noise_scale
from hessianflow.curvature.noise_scale import NoiseScaleResult
from hessianflow.distributed.launch import run_local
from hessianflow.interfaces import HessianFlowError

pytestmark = pytest.mark.ranks

EXAMPLES, PARTS = 72, 6
MAKERS = {
    "SGD": lambda model: SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=0.01),
    "AdamW": lambda model: AdamW(model.parameters(), lr=0.01),
}


def batch() -> Any:
    inputs, targets = data()
    return inputs[:EXAMPLES], targets[:EXAMPLES]


def share(rank: int) -> Any:
    inputs, targets = batch()
    half = EXAMPLES // 2
    return inputs[rank * half :][:half], targets[rank * half :][:half]


def paired_parts() -> list[Any]:
    """The parts that two ranks with their shares make up together."""
    size = EXAMPLES // 2 // PARTS
    pieces = [[t.split(size) for t in share(rank)] for rank in range(2)]
    return [
        tuple(torch.cat([pieces[rank][entry][part] for rank in range(2)]) for entry in range(2))
        for part in range(PARTS)
    ]


def fully_sharded() -> nn.Sequential:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh, model = init_device_mesh("cpu", (2,)), network()
    for layer in (model[0], model[2], model):  # the root holds the weights of the last layer
        fully_shard(layer, mesh=mesh)
    return model


def trained(model: nn.Module, optimizer: Any, part: Any) -> None:
    """Two steps, so that the optimizer has a state; `.grad` is kept."""
    for _ in range(2):
        optimizer.zero_grad()
        F.cross_entropy(model(part[0]), part[1]).backward()
        optimizer.step()


def plain(number: NoiseScaleResult) -> tuple[float, ...]:
    ratio = number.simple
    return ratio.value, ratio.stderr, ratio.low, ratio.high, number.num_examples, number.num_parts


def figures(model: nn.Module, optimizer: Any, examples: Any, parts: Any, rows: int) -> Any:
    """The measured numbers; `rows` is the size of microbatches."""
    found: dict[str, Any] = {}
    for name, options in (("whole", {}), ("cut", {"microbatch_size": rows})):
        rate = critical_rate(model, F.cross_entropy, examples, optimizer, form="forward", **options)
        found[f"rate, {name}"] = rate.critical, rate.slope, rate.curvature
        assert math.isfinite(rate.critical)
    number = PARTS if isinstance(parts, tuple) else None
    scale = noise_scale(model, F.cross_entropy, parts, parts=number, form="simple")
    assert scale.matvecs == 0
    assert math.isnan(scale.with_curvature.value)
    found["noise"] = plain(scale)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        seen = hf.monitor(model, F.cross_entropy, examples, optimizer, seconds=math.inf)
    found["monitor"] = {name: seen[name] for name in hf_names(seen)}
    return found


def hf_names(seen: dict[str, float]) -> list[str]:
    return [name for name in seen if name not in ("seconds", "products", "converged")]


def state(model: nn.Module, optimizer: Any) -> list[torch.Tensor]:
    tensors = [*model.parameters(), *(p.grad for p in model.parameters())]
    tensors += [v for held in optimizer.state.values() for v in held.values()]
    own = [t.to_local() if hasattr(t, "to_local") else t for t in tensors if t is not None]
    return [t.detach().clone() for t in own] + [torch.get_rng_state()]


def sharded(reducer: Any) -> Any:
    found = {}
    for name, make in MAKERS.items():
        model = fully_sharded()
        optimizer = make(model)
        trained(model, optimizer, share(reducer.rank))
        with torch.no_grad():
            model(share(reducer.rank)[0])  # leaves the weights of the root gathered
            model.reshard()
            before = state(model, optimizer)
            model(share(reducer.rank)[0])
        own = share(reducer.rank)
        found[name, "shares"] = figures(model, optimizer, own, own, 9)
        found[name, "same batch"] = figures(model, optimizer, batch(), batch(), 18)
        assert model.training
        assert all(map(torch.equal, before, state(model, optimizer)))
        trained(model, optimizer, own)  # and training goes on
    return found


def test_shards_give_the_figures_of_one_process() -> None:
    everyone = run_local(sharded, 2, timeout_seconds=120)
    for name, make in MAKERS.items():
        model = network()
        optimizer = make(model)
        trained(model, optimizer, batch())
        for kind, parts in (("shares", paired_parts()), ("same batch", batch())):
            expected = figures(model, optimizer, batch(), parts, 18)
            for found in (ranks[name, kind] for ranks in everyone):
                for entry in ("rate, whole", "rate, cut", "noise"):
                    assert found[entry] == pytest.approx(expected[entry], rel=1e-5), (name, kind)
                seen = found["monitor"]
                for entry in ("learning_rate", "threshold"):
                    assert seen[entry] == expected["monitor"][entry]
                for entry in ("sharpness", "edge_share", "critical_batch"):
                    assert math.isnan(seen[entry])
                assert seen["critical_rate"] == pytest.approx(expected["rate, whole"][0], rel=1e-5)
                if kind == "same batch":
                    expected_noise = expected["monitor"]["noise_scale"]
                    assert seen["noise_scale"] == pytest.approx(expected_noise, rel=1e-5)


def held_gradients(reducer: Any) -> Any:
    model = fully_sharded()
    optimizer = SGD(model.parameters(), lr=0.05)
    own = share(reducer.rank)
    F.cross_entropy(model(own[0]), own[1]).backward()
    found = critical_rate(
        model, F.cross_entropy, own, optimizer, form="forward", use_grad=True, norm_mode="eval"
    )
    again = critical_rate(model, F.cross_entropy, own, optimizer, form="forward")
    return found.critical, again.critical


def test_the_gradients_of_the_loop_give_the_same_rate() -> None:
    for held, computed in run_local(held_gradients, 2, timeout_seconds=120):
        assert held == pytest.approx(computed, rel=1e-9)


def message(measure: Callable[[], object]) -> str:
    try:
        measure()
    except HessianFlowError as error:
        return str(error)
    return "accepted"


def mistakes(reducer: Any) -> dict[str, str]:
    model = fully_sharded()
    optimizer = SGD(model.parameters(), lr=0.05)
    loss, (inputs, targets) = F.cross_entropy, share(reducer.rank)
    uneven = inputs[: 8 + 4 * reducer.rank], targets[: 8 + 4 * reducer.rank]
    broken = inputs.clone()
    broken[0] = math.nan if reducer.rank else 0.0
    ignored = targets.clone()
    ignored[: 9 * reducer.rank] = -100

    def rate(*batch: Any, optimizer: Any = optimizer, **options: Any) -> Callable[[], object]:
        options = {"form": "forward", "microbatch_size": 4, **options}
        return lambda: critical_rate(model, loss, batch, optimizer, **options)

    def fails_on_one(outputs: Any, targets: Any) -> Any:
        if reducer.rank:
            raise HessianFlowError("no loss here")
        return loss(outputs, targets)

    found = {
        "uneven": message(rate(*uneven)),
        "not finite": message(rate(broken, targets)),
        "ignored": message(rate(inputs, ignored)),
        "one fails": message(
            lambda: critical_rate(model, fails_on_one, (inputs, targets), optimizer, form="forward")
        ),
        "product": message(rate(inputs, targets, form="product")),
        "noise": message(lambda: noise_scale(model, loss, (inputs, targets))),
        "parts": message(
            lambda: noise_scale(model, loss, [uneven] * (4 + reducer.rank), form="simple")
        ),
        "LARS": message(lambda: hf.optim.LARS(model.parameters(), lr=0.1)),
        "CLARS": message(lambda: hf.optim.CLARS(model.parameters(), lr=0.1)),
        "LAMB": message(lambda: hf.optim.LAMB(model.parameters(), lr=0.1)),
        "Muon": message(lambda: hf.optim.Muon(model.parameters(), lr=0.1)),
        "Adagrad": message(
            rate(inputs, targets, optimizer=torch.optim.Adagrad(model.parameters(), lr=0.1))
        ),
        "trainer": message(
            lambda: hf.AdaptiveBatchTrainer(
                model,
                hf.data.DeviceBatches(inputs, targets, 8),
                optimizer=optimizer,
                loss_fn=loss,
                epochs=1,
            )
        ),
        "again": message(rate(inputs, targets)),
    }
    partly = network()
    torch.distributed.fsdp.fully_shard(partly, ignored_params={partly[0].bias})
    own = SGD(partly.parameters(), lr=0.1)
    found["partly"] = message(
        lambda: critical_rate(partly, loss, (inputs, targets), own, form="forward")
    )
    return found


def test_what_cannot_be_measured_says_so_on_all_ranks() -> None:
    expected = {
        "uneven": "the ranks cut their examples into 2, 3 pieces",
        "not finite": "the loss is not finite",
        "ignored": "the ranks cut their examples into 9, 7 pieces",
        "product": "the model is sharded by fully_shard (FSDP), and autograd does not reach the"
        ' shards; if fully_shard shards the whole model, use form="forward"',
        "noise": "the model is sharded by fully_shard (FSDP)",
        "parts": "the ranks cut their examples into 4, 5 pieces",
        **{
            name: f"{name} needs whole parameters, but number 0 is a DTensor (FSDP"
            for name in ("LARS", "CLARS", "LAMB", "Muon")
        },
        "Adagrad": "Adagrad cannot step a shard of a DTensor (FSDP) by itself",
        "trainer": "AdaptiveBatchTrainer cannot use a model sharded by fully_shard (FSDP): pass",
        "again": "accepted",
        "partly": "0.bias is in no shard, but the model is sharded by fully_shard (DTensor)",
    }
    first, second = run_local(mistakes, 2, timeout_seconds=120)
    assert first.pop("one fails").startswith("another rank cannot measure its part")
    assert second.pop("one fails") == "no loss here"
    for found in (first, second):
        assert found.keys() == expected.keys()
        for name, start in expected.items():
            assert found[name].startswith(start), (name, found[name])


def replicated(reducer: Any) -> Any:
    """DistributedDataParallel: each process measures for itself, and one may do so alone."""
    model = nn.parallel.DistributedDataParallel(network())
    optimizer = AdamW(model.parameters(), lr=0.01)
    trained(model, optimizer, share(reducer.rank))
    before = state(model, optimizer)
    alone = None
    if reducer.rank == 0:
        alone = figures(model, optimizer, batch(), batch(), 18)
    together = figures(model, optimizer, batch(), batch(), 18)
    assert all(map(torch.equal, before, state(model, optimizer)))
    trained(model, optimizer, share(reducer.rank))
    return alone, together


def test_replicas_are_measured_by_each_process_alone() -> None:
    model = network()
    optimizer = AdamW(model.parameters(), lr=0.01)
    trained(model, optimizer, batch())
    expected = figures(model, optimizer, batch(), batch(), 18)
    (alone, first), (_, second) = run_local(replicated, 2, timeout_seconds=120)
    for found in (alone, first, second):
        for entry, values in expected.items():
            assert found[entry] == pytest.approx(values, rel=1e-5), entry


def ignoring(targets: torch.Tensor) -> torch.Tensor:
    """Targets of which few count in the second half, so that the ranks differ in weight."""
    targets = targets.clone()
    late = torch.arange(len(targets)) >= EXAMPLES // 2
    targets[late & (torch.arange(len(targets)) % 3 > 0)] = -100
    return targets


def weighted(reducer: Any) -> Any:
    model = fully_sharded()
    optimizer = AdamW(model.parameters(), lr=0.01)
    half = EXAMPLES // 2
    targets = ignoring(batch()[1])[reducer.rank * half :][:half]
    own = share(reducer.rank)[0], targets
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        seen = hf.monitor(model, F.cross_entropy, own, optimizer)
    rate = critical_rate(model, F.cross_entropy, own, optimizer, form="forward", microbatch_size=12)
    return rate, seen, [str(warning.message) for warning in told]


def test_ranks_count_by_their_targets_and_the_monitor_says_what_it_leaves_out() -> None:
    model = network()
    optimizer = AdamW(model.parameters(), lr=0.01)
    pair = batch()[0], ignoring(batch()[1])
    expected = critical_rate(model, F.cross_entropy, pair, optimizer, form="forward")
    for rate, seen, told in run_local(weighted, 2, timeout_seconds=120):
        assert (rate.critical, rate.slope, rate.curvature) == pytest.approx(
            (expected.critical, expected.slope, expected.curvature), rel=1e-5
        )
        assert seen["critical_rate"] == pytest.approx(expected.critical, rel=1e-5)
        # Before its first step AdamW has no preconditioner: its update stands in for it.
        assert seen["sharpness"] == pytest.approx(2 / expected.critical, rel=1e-5)
        assert len(told) == 1
        assert told[0].startswith("hf.monitor leaves out figures that need second derivatives")
