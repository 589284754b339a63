"""Whatever can be wrong with model, data or loss is said in one line that names the way out."""

import re

import pytest
import torch
from problems import classification, conv_net, mlp
from torch import nn
from torch.nn import functional

from hessianflow.curvature import CallableOperator, HessianOperator, NonFiniteError, top_eigenpairs
from hessianflow.interfaces import HessianFlowError


def small():
    return classification(mlp((5, 6, 4)), (5,), 30, 4)


def product(model, loss_fn, data, **options):
    operator = HessianOperator(model, loss_fn, data, **options)
    v = torch.ones(operator.size, dtype=operator.dtype)
    operator @ v
    return operator @ v


def refused(message, kind=HessianFlowError):
    return pytest.raises(kind, match=message)


def test_nothing_trainable():
    problem = small()
    with refused(
        "params: no trainable parameter matches 'head.*'; names are like 0.weight, 0.bias, 2.weight"
    ):
        HessianOperator(problem.model, problem.loss_fn, problem.pair, params="head.*")
    problem.model.requires_grad_(False)
    with refused(
        re.escape("Sequential has no trainable parameter; set requires_grad_(True) on some")
    ):
        HessianOperator(problem.model, problem.loss_fn, problem.pair)


def test_complex_parameters():
    model = nn.Linear(2, 2, dtype=torch.complex64)
    with refused("parameters must be real, got a complex one"):
        HessianOperator(model, functional.mse_loss, (torch.ones(1, 2), torch.ones(1, 2)))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "data is empty: it must hold at least one batch"),
        (
            iter([1]),
            (
                "data must be one pair or a re-iterable of pairs, got a list_iterator that ends"
                " after one pass"
            ),
        ),
        (torch.ones(3), "data must be a pair .* or an iterable of pairs, got a Tensor"),
        (3, "data must be a pair .* or a re-iterable of pairs, got an int"),
        ([torch.ones(3, 5)], r"a batch must be a pair \(inputs, targets\), got a list of 1"),
        (
            [(torch.ones(3, 5), 1, 2)],
            r"each batch must be a pair .* or a dict, got a tuple of 3; more than one input",
        ),
        ([3], r"each batch must be a pair \(inputs, targets\) or a dict, got an int"),
        ([{1, 2}], r"each batch must be a pair \(inputs, targets\) or a dict, got a set"),
        (
            torch.utils.data.TensorDataset(torch.ones(3, 5)),
            "got a TensorDataset: batch a data set by torch.utils.data.DataLoader",
        ),
    ],
)
def test_data_of_the_wrong_shape(data, message):
    problem = small()
    with refused(message):
        product(problem.model, problem.loss_fn, data)


def test_options_out_of_range():
    problem = small()
    with refused("norm_mode must be one of eval, batch, got 'train'"):
        HessianOperator(problem.model, problem.loss_fn, problem.pair, norm_mode="train")
    with refused("microbatch_size must be at least 1 or None, got 0"):
        HessianOperator(problem.model, problem.loss_fn, problem.pair, microbatch_size=0)
    with refused("norm_mode='batch' needs each batch in one pass, got microbatch_size=4"):
        HessianOperator(
            conv_net(), problem.loss_fn, problem.pair, norm_mode="batch", microbatch_size=4
        )


@pytest.mark.parametrize("microbatch_size", [None, 7])
def test_weights_or_loss_that_are_not_finite(microbatch_size):
    problem = small()
    with refused("the loss is not finite", NonFiniteError):
        product(
            problem.model, lambda o, t: functional.cross_entropy(o, t) * float("inf"), problem.pair
        )
    with torch.no_grad():
        problem.model[0].weight[0, 0] = float("nan")
    with refused("the loss is not finite", NonFiniteError):
        product(problem.model, problem.loss_fn, problem.pair, microbatch_size=microbatch_size)


def test_a_second_derivative_that_is_not_finite():
    """x^1.5 at 0: loss and gradient are finite, the second derivative is not."""
    model = nn.Linear(1, 1, bias=False).double()
    nn.init.zeros_(model.weight)
    operator = HessianOperator(
        model, lambda o, t: (o.abs() ** 1.5).mean(), (torch.ones(2, 1).double(), torch.ones(2))
    )
    message = (
        "a product with the operator is not finite .* an operation without a second derivative"
        " there"
    )
    with refused(message, NonFiniteError):
        top_eigenpairs(operator, seed=0)
    one = torch.ones(1).double()
    for multiply in (
        lambda: operator @ one,
        operator.dense,
        lambda: (2.0 * operator + operator.shifted(3.0)) @ one,
        lambda: operator.to_scipy().matvec(one.numpy()),
    ):
        with refused(message, NonFiniteError):
            multiply()
    with refused("the vector is not finite", NonFiniteError):
        HessianOperator(
            model, functional.mse_loss, (torch.ones(2, 1).double(), torch.ones(2, 1).double())
        ) @ (one / 0)


def test_a_large_product_is_no_infinite_one():
    """Its square overflows, none of its entries does."""
    huge = torch.full((3,), 3e38)
    operator = CallableOperator(lambda v: huge * v, 3)
    assert torch.equal(operator @ torch.ones(3), huge)
    assert torch.equal(operator.dense(), torch.diag(huge))


def test_a_loss_that_does_not_depend_on_the_weights():
    problem = small()
    with refused("the loss does not depend on the selected parameters; is it detached?"):
        product(problem.model, lambda o, t: functional.cross_entropy(o.detach(), t), problem.pair)


class OnceOnly(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**2

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        return 2 * ctx.saved_tensors[0] * grad


@pytest.mark.parametrize("microbatch_size", [None, 7])
def test_an_operation_without_second_derivative_is_named(microbatch_size):
    problem = small()
    with refused("the loss has no second derivative: OnceOnly is once_differentiable"):
        product(
            problem.model,
            lambda o, t: OnceOnly.apply(o).mean(),
            problem.pair,
            microbatch_size=microbatch_size,
        )


def test_a_built_in_operation_without_second_derivative_is_named():
    class Fused(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1, 1, 4, 4))

        def forward(self, x):
            x = x * self.weight
            return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(x, x, x)[0]

    data = (torch.ones(1, 1, 4, 4), torch.zeros(1))
    with refused(
        "the loss has no second derivative: '_scaled_dot_product_flash_attention_for_cpu_backward'"
        " has none"
    ):
        product(Fused(), lambda o, t: (o**2).mean(), data)


def test_dropout_that_stays_on_is_noticed():
    class Random(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = mlp((5, 6, 4))

        def forward(self, x):
            return self.body(functional.dropout(x, 0.5))  # training=True whatever the mode

    problem, message = (
        small(),
        "the loss changed from .* between two products at the same weights; switch off dropout",
    )
    for microbatch_size in (None, 7):
        with refused(message):
            product(Random(), problem.loss_fn, problem.pair, microbatch_size=microbatch_size)
    product(nn.Sequential(nn.Dropout(0.5), problem.model).train(), problem.loss_fn, problem.pair)


def test_data_that_change_between_passes_are_noticed():
    problem = small()

    class Augmented:
        def __iter__(self):
            yield problem.inputs + torch.randn_like(problem.inputs), problem.targets

    with refused("the loss changed from"):
        product(problem.model, problem.loss_fn, Augmented())


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate"),
    ],
)
def test_out_of_memory_says_what_to_try(error):
    problem = small()

    def loss(outputs, targets):
        raise error

    with refused("out of memory with 30 examples in one pass; try microbatch_size=15"):
        product(problem.model, loss, problem.pair)
    with refused("out of memory with 10 examples in one pass; try microbatch_size=5"):
        product(problem.model, loss, problem.pair, microbatch_size=10)


def test_other_errors_pass_unchanged_and_the_model_is_as_found():
    problem = small()
    problem.model.train()

    def loss(outputs, targets):
        raise RuntimeError("the user's own")

    with refused("the user's own", RuntimeError):
        product(problem.model, loss, problem.pair)
    assert all(m.training for m in problem.model.modules())
