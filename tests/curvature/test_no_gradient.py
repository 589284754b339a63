"""No gradient is not a zero gradient: what autograd does not reach is refused, and what is unused
stays zero."""

import pytest
import torch
from problems import classification, dense_hessian, initialised, mlp
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from hessianflow.curvature import (
    CurvatureProbe,
    FisherOperator,
    GGNOperator,
    HessianOperator,
    top_eigenpairs,
)
from hessianflow.interfaces import HessianFlowError

KINDS = [HessianOperator, GGNOperator, FisherOperator]


class Checkpointed(nn.Module):
    def __init__(self, run):
        super().__init__()
        self.stem, self.block, self.head, self.run = (
            nn.Linear(4, 5),
            nn.Linear(5, 5),
            nn.Linear(5, 3),
            run,
        )

    def forward(self, x):
        return self.head(torch.tanh(self.run(self.block, self.stem(x))))


def reentrant(block, x):
    return checkpoint(block, x, use_reentrant=True)


class OwnCheckpoint(torch.autograd.Function):
    """As older libraries write it: it runs the block again in backward, behind the back of the
    graph."""

    @staticmethod
    def forward(ctx, block, x):
        ctx.block = block
        ctx.save_for_backward(x)
        with torch.no_grad():
            return block(x)

    @staticmethod
    def backward(ctx, gradient):
        x = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            outputs = ctx.block(x)
        return None, torch.autograd.grad(outputs, x, gradient)[0]


def product(kind, run, **options):
    problem = classification(initialised(Checkpointed(run).double(), 0), (4,), 12, 3)
    operator = kind(problem.model, problem.loss_fn, problem.pair, **options)
    return operator @ torch.ones(operator.size).double()


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("microbatch_size", [None, 5])
class TestReentrantCheckpoints:
    @pytest.mark.parametrize("params", [None, ["stem", "head"], ["stem", "block"]])
    def test_seen_in_the_graph(self, params, microbatch_size, kind):
        with pytest.raises(
            HessianFlowError,
            match=r"checkpointed with use_reentrant=True.*; pass use_reentrant=False",
        ):
            product(kind, reentrant, params=params, microbatch_size=microbatch_size)

    def test_behind_a_constant_input(self, microbatch_size, kind):
        """The checkpoint then leaves no trace in the graph: weights in it look unused."""
        message = (
            r"block.weight, one of 2, has no gradient, but the loss depends on it, as where it is"
            r" inside a checkpoint"
        )
        with pytest.raises(HessianFlowError, match=message):
            product(kind, reentrant, params=["block", "head"], microbatch_size=microbatch_size)

    def test_nothing_but_what_is_inside(self, microbatch_size, kind):
        with pytest.raises(HessianFlowError, match=r"depend.* on the selected parameters"):
            product(kind, reentrant, params="block", microbatch_size=microbatch_size)

    def test_weights_after_it_do_not_mind(self, microbatch_size, kind):
        found = product(kind, reentrant, params="head", microbatch_size=microbatch_size)
        expected = product(
            kind, lambda block, x: block(x), params="head", microbatch_size=microbatch_size
        )
        torch.testing.assert_close(found, expected)

    def test_a_checkpoint_of_ones_own(self, microbatch_size, kind):
        with pytest.raises(
            HessianFlowError,
            match=r"block.weight, one of 2, has no gradient, but the loss depends on it",
        ):
            product(kind, OwnCheckpoint.apply, microbatch_size=microbatch_size)


class Shown(nn.Module):
    """A wrapper that shows parameters and computes with copies, all or some of them."""

    def __init__(self, inner, copied):
        super().__init__()
        self.inner, self.copied = inner, copied

    def forward(self, x):
        weights = {
            name: p.detach().clone().requires_grad_() if name in self.copied else p
            for name, p in self.inner.named_parameters()
        }
        return torch.func.functional_call(self.inner, weights, (x,))


class TestWrappers:
    @pytest.mark.parametrize("kind", KINDS)
    def test_copies_of_all(self, kind):
        problem = classification(mlp((4, 5, 3)), (4,), 12, 3)
        names = [name for name, _ in problem.model.named_parameters()]
        wrapped = Shown(problem.model, names)
        operator = kind(wrapped, problem.loss_fn, problem.pair)
        message = (
            "depend.* on the selected parameters; is it detached, or does a wrapper compute with"
            " other tensors"
        )
        with pytest.raises(HessianFlowError, match=message):
            operator @ torch.ones(operator.size).double()
        with pytest.raises(HessianFlowError, match=message):
            operator.gradient()

    @pytest.mark.parametrize("kind", KINDS)
    def test_a_copy_of_one(self, kind):
        problem = classification(mlp((4, 5, 3)), (4,), 12, 3)
        wrapped = Shown(problem.model, ["0.weight"])
        with pytest.raises(
            HessianFlowError, match=r"inner.0.weight has no gradient, but the loss depends on it"
        ):
            top_eigenpairs(kind(wrapped, problem.loss_fn, problem.pair), seed=0)

    def test_the_probe_sees_it_too(self):
        problem = classification(mlp((4, 5, 3)), (4,), 12, 3)
        with pytest.raises(HessianFlowError, match=r"inner.0.weight has no gradient"):
            CurvatureProbe(Shown(problem.model, ["0.weight"]), problem.loss_fn, problem.pair)()


class Routed(nn.Module):
    """A part that no input reaches."""

    def __init__(self, used):
        super().__init__()
        self.used, self.spare = used, nn.Linear(2, 2).double()

    def forward(self, x):
        return self.used(x) if len(x) else self.spare(x)


@pytest.mark.parametrize("check_product", [None, True, False])
def test_unused_parameters_are_zero_rows(check_product):
    problem = classification(mlp((4, 5, 3)), (4,), 12, 3)
    model = Routed(problem.model)
    operator = HessianOperator(model, problem.loss_fn, problem.pair, check_product=check_product)
    matrix = operator.dense()
    torch.testing.assert_close(matrix[:43, :43], dense_hessian(problem))
    assert matrix[43:].abs().max() == matrix[:, 43:].abs().max() == 0


class TestWeightsThatAreNotThere:
    def refused(self, model, message, data=None):
        data = data or (torch.ones(2, 4), torch.zeros(2, dtype=torch.long))
        for kind in (*KINDS, CurvatureProbe):
            with pytest.raises(HessianFlowError, match=message):
                kind(model, F.cross_entropy, data)

    def test_lazy_layers(self):
        model = nn.Sequential(nn.Linear(4, 5), nn.LazyLinear(3))
        self.refused(
            model, "1.weight of LazyLinear has no shape yet; run the model once on a batch"
        )
        model(torch.ones(1, 4))
        HessianOperator(
            model, F.cross_entropy, (torch.ones(2, 4), torch.zeros(2, dtype=torch.long))
        ).dense()
        norm = nn.Sequential(nn.Linear(4, 3), nn.LazyBatchNorm1d(affine=False))
        self.refused(norm, "1.running_mean of LazyBatchNorm1d has no shape yet")

    def test_the_meta_device(self):
        with torch.device("meta"):
            model = nn.Linear(4, 3)
        self.refused(model, "weight is on the meta device and has no values; load them first")

    def test_two_devices(self, monkeypatch):
        """One machine here has one device, so a tensor of another is pretended."""
        model = mlp((4, 5, 3))
        monkeypatch.setattr(
            type(model[2].weight), "device", property(lambda p: torch.device("cpu", len(p)))
        )
        with pytest.raises(
            HessianFlowError,
            match="the selected parameters are on cpu:3 and cpu:5; select those of one",
        ):
            HessianOperator(
                model, F.cross_entropy, (torch.ones(2, 4), torch.zeros(2, dtype=torch.long))
            )


class TestChangesAfterConstruction:
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("microbatch_size", [None, 5])
    @pytest.mark.parametrize("built", [False, True])
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (
                lambda m: m[0].weight.requires_grad_(False),
                "0.weight was frozen after the operator was made; make a new",
            ),
            (
                lambda m: m.__setitem__(2, nn.Linear(5, 3).double()),
                "2.weight was replaced in the model after the operator",
            ),
            (
                lambda m: setattr(m[2], "bias", None),
                "2.bias was replaced in the model after the operator was made",
            ),
            (lambda m: m.pop(-1), "2.weight was replaced in the model"),
        ],
        ids=["frozen", "head", "without", "removed"],
    )
    def test_named_in_one_line(self, change, message, built, microbatch_size, kind):
        problem = classification(mlp((4, 5, 3)), (4,), 12, 3)
        operator = kind(
            problem.model, problem.loss_fn, problem.pair, microbatch_size=microbatch_size
        )
        v = torch.ones(operator.size).double()
        if built:
            operator @ v
        change(problem.model)
        with pytest.raises(HessianFlowError, match=message):
            operator @ v

    def test_what_is_not_selected_may_change(self):
        problem = classification(mlp((4, 5, 3)), (4,), 12, 3)
        operator = HessianOperator(problem.model, problem.loss_fn, problem.pair, params="0")
        v = torch.ones(operator.size).double()
        before = operator @ v
        problem.model[2].weight.requires_grad_(False)
        assert torch.equal(operator @ v, before)
        problem.model[2] = initialised(nn.Linear(5, 3).double(), 3)
        after = operator @ v
        assert not torch.allclose(after, before)
        fresh = HessianOperator(problem.model, problem.loss_fn, problem.pair, params="0")
        torch.testing.assert_close(after, fresh @ v)
