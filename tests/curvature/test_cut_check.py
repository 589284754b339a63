"""A batch is cut only where a row of the outputs is that of its example; the oracle is the batch in
one pass."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from hessianflow.curvature import FisherOperator, GGNOperator, HessianOperator
from hessianflow.interfaces import HessianFlowError

ROWS, WIDTH, CLASSES = 6, 4, 3
KINDS = [HessianOperator, GGNOperator, FisherOperator]


class Reads(nn.Module):
    """A linear head over what a function makes of the inputs."""

    def __init__(self, function):
        super().__init__()
        self.function = function
        self.embed = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, inputs):
        return self.head(self.function(self, inputs))


def with_positions(net, inputs):
    """As many positions as there are examples."""
    return (net.embed(inputs["x"][:, None]) * inputs["shared"]).tanh().mean(1)


def with_prototypes(net, inputs):
    return torch.softmax(net.embed(inputs["x"]) @ inputs["shared"].T, dim=1) @ inputs["shared"]


def with_a_graph(net, inputs):
    return net.embed(inputs["graph"] @ inputs["x"]).tanh()


def centred(net, inputs):
    """Normalises by the batch, in no layer that torch has."""
    hidden = net.embed(inputs["x"]).tanh()
    return hidden - hidden.mean(0)


def data():
    source = torch.Generator().manual_seed(0)
    inputs = {
        "x": torch.randn(ROWS, WIDTH, generator=source),
        "shared": torch.randn(ROWS, WIDTH, generator=source),
        "graph": torch.randn(ROWS, ROWS, generator=source),
    }
    return inputs, torch.arange(ROWS) % CLASSES


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("microbatch_size", [1, 2, 5])
@pytest.mark.parametrize("function", [with_positions, with_prototypes, with_a_graph, centred])
def test_what_is_shared_is_not_cut_in_silence(kind, function, microbatch_size):
    torch.manual_seed(0)
    net = Reads(function)
    operator = kind(net, F.cross_entropy, data(), microbatch_size=microbatch_size)
    with pytest.raises(HessianFlowError, match="keep the batch in one pass") as refused:
        operator.matvec(torch.ones(operator.size))
    assert "\n" not in str(refused.value)
    kind(net, F.cross_entropy, data()).matvec(torch.ones(operator.size))  # one way out


@pytest.mark.parametrize("microbatch_size", [1, 2, 5])
@pytest.mark.parametrize("function", [with_positions, with_prototypes])
def test_a_first_dimension_of_one_is_the_other_way_out(function, microbatch_size):
    torch.manual_seed(0)
    inputs, targets = data()
    inputs["shared"] = inputs["shared"][None]
    net = Reads(
        lambda net, inputs: function(net, {**inputs, "shared": inputs["shared"].squeeze(0)})
    )
    parts = HessianOperator(
        net, F.cross_entropy, (inputs, targets), microbatch_size=microbatch_size
    )
    whole = HessianOperator(net, F.cross_entropy, (inputs, targets))
    v = torch.ones(whole.size)
    torch.testing.assert_close(parts @ v, whole @ v, rtol=1e-4, atol=1e-6)


class Counting(nn.Module):
    """Counts the examples it is run on."""

    def __init__(self, noise=0.0, single=None):
        super().__init__()
        self.head, self.noise, self.single = nn.Linear(WIDTH, CLASSES), noise, single
        self.rows = []
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x):
        self.rows.append(len(x))
        self.seen += len(x)
        if self.single:
            x = x.view(self.single, WIDTH)
        return self.head(x) + self.noise * torch.randn(len(x), CLASSES)


def test_it_is_made_once_on_a_few_examples_and_leaves_no_trace():
    torch.manual_seed(0)
    net, state = Counting(), torch.get_rng_state()
    batch = torch.randn(12, WIDTH), torch.arange(12) % CLASSES
    state = torch.get_rng_state()
    operator = HessianOperator(
        net, F.cross_entropy, batch, microbatch_size=6, check_deterministic=False
    )
    for _ in range(2):
        operator.matvec(torch.ones(operator.size))
    operator.mean_loss()
    assert net.rows == [3, 2, *[6] * 6]
    assert float(net.seen) == 0
    assert torch.equal(torch.get_rng_state(), state)
    whole = Counting()
    operator = HessianOperator(
        whole, F.cross_entropy, batch, microbatch_size=12, check_deterministic=False
    )
    operator.matvec(torch.ones(operator.size))
    assert whole.rows == [12]  # nothing is cut


def test_random_models_are_left_to_the_check_of_repeats():
    torch.manual_seed(0)
    batch = torch.randn(12, WIDTH), torch.arange(12) % CLASSES
    operator = HessianOperator(Counting(noise=1.0), F.cross_entropy, batch, microbatch_size=6)
    with pytest.raises(HessianFlowError, match="switch off dropout"):
        operator.matvec(torch.ones(operator.size))


def test_a_model_for_one_number_of_rows_only_is_not_refused():
    batch = torch.randn(12, WIDTH), torch.arange(12) % CLASSES
    operator = HessianOperator(Counting(single=6), F.cross_entropy, batch, microbatch_size=6)
    assert operator.matvec(torch.ones(operator.size)).isfinite().all()


class Sequences(nn.Module):
    """Pads its outputs to the longest sequence of the batch, as recurrent models do."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, inputs):
        longest = int(inputs["length"].max())
        outputs = self.head(inputs["x"][:, :longest])
        return outputs.masked_fill(
            (torch.arange(longest) >= inputs["length"][:, None])[..., None], 0
        )


def test_outputs_as_long_as_the_longest_of_a_part_are_no_fault():
    torch.manual_seed(0)
    inputs = {"x": torch.randn(ROWS, 9, WIDTH), "length": torch.tensor([4, 5, 8, 3, 9, 6])}
    operator = HessianOperator(
        Sequences(),
        lambda o, t: o.square().sum((1, 2)).mean(),
        (inputs, torch.zeros(ROWS)),
        microbatch_size=2,
    )
    assert operator.matvec(torch.ones(operator.size)).isfinite().all()
