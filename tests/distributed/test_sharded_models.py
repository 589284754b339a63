"""Models whose weights are in shards are refused by name; replicated ones are measured, wherever
the wrapper is.

The oracle is the same model unwrapped.
"""

import pytest
import torch
import torch.nn.functional as F
from ranks import data, network
from torch import nn

from hessianflow.curvature import CurvatureProbe, FisherOperator, GGNOperator, HessianOperator
from hessianflow.distributed.launch import run_local
from hessianflow.interfaces import HessianFlowError

EXAMPLES = 24


def batch():
    inputs, targets = data()
    return inputs[:EXAMPLES], targets[:EXAMPLES]


def fully_sharded(use_orig_params):
    from torch.distributed.fsdp import FullyShardedDataParallel

    return FullyShardedDataParallel(
        network(), device_id=torch.device("cpu"), use_orig_params=use_orig_params
    )


def fully_sharded_within():
    from torch.distributed.fsdp import FullyShardedDataParallel

    model = network()
    model[2] = FullyShardedDataParallel(
        model[2], device_id=torch.device("cpu"), use_orig_params=True
    )
    return model


def each_layer(world_size):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh, model = init_device_mesh("cpu", (world_size,)), network()
    for layer in (model[0], model[2], model[4], model):
        fully_shard(layer, mesh=mesh)
    return model


def root_only(world_size):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    return fully_shard(network(), mesh=init_device_mesh("cpu", (world_size,)))


def gathered(world_size):
    model = each_layer(world_size)
    for module in (model[0], model[2], model[4], model):
        module.unshard()
    return model


def tensor_parallel(world_size):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        parallelize_module,
    )

    mesh = init_device_mesh("cpu", (world_size,))
    return parallelize_module(network(), mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})


def distributed_buffer(world_size):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, distribute_tensor

    model = network()
    table = distribute_tensor(torch.ones(4), init_device_mesh("cpu", (world_size,)), [Replicate()])
    model[0].register_buffer("table", table)
    return model


def refusals(reducer):
    size, messages = reducer.world_size, {}
    makers = {
        "FSDP, original parameters": lambda: fully_sharded(True),
        "FSDP, flat parameters": lambda: fully_sharded(False),
        "FSDP of a layer": fully_sharded_within,
        "fully_shard, each layer": lambda: each_layer(size),
        "fully_shard, root only": lambda: root_only(size),
        "fully_shard, gathered": lambda: gathered(size),
        "tensor parallel": lambda: tensor_parallel(size),
        "DTensor": lambda: distributed_buffer(size),
    }
    for name, make in makers.items():
        model = make()
        for kind in (HessianOperator, GGNOperator, FisherOperator, CurvatureProbe):
            try:
                kind(model, F.cross_entropy, batch())
            except HessianFlowError as error:
                messages[name, kind.__name__] = str(error)
            else:
                messages[name, kind.__name__] = "accepted"
    return messages


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("world_size", [1, 2])
def test_shards_are_refused_by_name_when_the_operator_is_made(world_size):
    expected = {
        "FSDP, original parameters": "the model is sharded by FullyShardedDataParallel",
        "FSDP, flat parameters": "the model is sharded by FullyShardedDataParallel",
        "FSDP of a layer": "2 is sharded by FullyShardedDataParallel",
        "fully_shard, each layer": "the model is sharded by fully_shard",
        "fully_shard, root only": "the model is sharded by fully_shard",
        "fully_shard, gathered": "the model is sharded by fully_shard",
        "tensor parallel": "0.weight is a DTensor, of which this process holds a piece",
        "DTensor": "0.table is a DTensor, of which this process holds a piece",
    }
    for messages in run_local(refusals, world_size, timeout_seconds=120):
        assert len(messages) == 4 * len(expected)
        for (name, kind), message in messages.items():
            assert message.startswith(expected[name]), (name, kind, message)
            assert "load the full state dict into a plain model" in message


class Outer(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner, self.head = inner, nn.Linear(4, 4).double()
        nn.init.eye_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, x):
        return self.head(self.inner(x))


def replicated(reducer):
    """Eigenvalues of the model in DistributedDataParallel, inside and outside, with hooks and a
    backward in between."""
    found = []
    for make in (
        lambda: Outer(network()),
        lambda: nn.parallel.DistributedDataParallel(Outer(network())),
        lambda: Outer(nn.parallel.DistributedDataParallel(network())),
        lambda: Outer(nn.parallel.DistributedDataParallel(network(), find_unused_parameters=True)),
    ):
        model = make()
        probe = CurvatureProbe(model, F.cross_entropy, batch(), tol=1e-8)
        values = [probe().eigenvalue]
        for _ in range(2):  # training goes on, and the group still reduces gradients
            F.cross_entropy(model(batch()[0]), batch()[1]).backward()
            values.append(probe().eigenvalue)
        gradients = [p.grad.norm().item() for p in model.parameters()]
        found.append((values, gradients))
    return found


def test_replicated_models_are_measured_wherever_the_wrapper_is():
    for found in run_local(replicated, 2, timeout_seconds=120):
        (plain, gradients), *wrapped = found
        for values, others in wrapped:
            assert values == pytest.approx(plain, rel=1e-8)
            assert others == pytest.approx(gradients, rel=1e-8)


def batch_statistics(reducer):
    from hessianflow.distributed.curvature import sharded

    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(6, 5), nn.BatchNorm1d(5, track_running_stats=False), nn.Tanh(), nn.Linear(5, 4)
    )
    probe = CurvatureProbe(
        model.double(), F.cross_entropy, batch(), tol=1e-8, operator=sharded(reducer)
    )
    alone = CurvatureProbe(model, F.cross_entropy, batch(), tol=1e-8)
    return probe().eigenvalue, alone().eigenvalue


def test_a_batch_that_is_normalised_by_itself_is_not_shared_out():
    for shared, alone in run_local(batch_statistics, 2, timeout_seconds=120):
        assert shared == pytest.approx(alone, rel=1e-8)
