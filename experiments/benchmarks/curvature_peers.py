"""The other curvature libraries, driven as their documentation does, with the products they spend
counted."""

import copy
import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from problems import Problem
from torch import nn

import hessianflow as hf


class Peers:
    """The other libraries, on a copy of the model in evaluation mode."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.model = copy.deepcopy(problem.model).eval()

    def pyhessian(self) -> Any:
        """Its object, graph built."""
        from pyhessian import hessian

        return hessian(self.model, self.problem.loss_fn, data=self.problem.pair, cuda=False)

    def curvlinops(self) -> Any:
        """Its operator, without the costly checks of its constructor."""
        from curvlinops import HessianLinearOperator

        parameters, data = list(self.model.parameters()), [self.problem.pair]
        return HessianLinearOperator(
            self.model, nn.CrossEntropyLoss(), parameters, data, check_deterministic=False
        )


def importable(name: str) -> bool:
    try:
        __import__(name)
    except ImportError:
        return False
    return True


Route = Callable[[int], tuple[list[float], int]]
"""Maps a seed to (eigenvalues, products), set-up included."""

DEFAULT_TOLERANCE, TIGHTER = 1e-3, (3e-4, 1e-4, 3e-5, 1e-5)
"""PyHessian stops when a value changes by less than this share, which bounds no error: it may need
a tighter one."""


def pyhessian_route(problem: Problem, k: int, tol: float = DEFAULT_TOLERANCE) -> Route:
    """Its power iteration with deflation; with a tighter tolerance also more iterations than the
    100 of its default."""
    peers, iterations = Peers(problem), 100 if tol == DEFAULT_TOLERANCE else 2000

    def route(seed: int) -> tuple[list[float], int]:
        module = importlib.import_module("pyhessian.hessian")
        torch.manual_seed(seed)
        count, original = 0, module.hessian_vector_product

        def counted(*args: Any) -> Any:
            nonlocal count
            count += 1
            return original(*args)

        with replaced(module, "hessian_vector_product", counted):
            values = peers.pyhessian().eigenvalues(maxIter=iterations, tol=tol, top_n=k)[0]
        for parameter in peers.model.parameters():
            parameter.grad = None
        return sorted(values, key=abs, reverse=True), count

    return route


def eigen_routes(problem: Problem, k: int) -> dict[str, Route]:
    """Ours, the peers at their defaults, and scipy on ours and on theirs."""
    peers = Peers(problem)

    def ours(seed: int) -> tuple[list[float], int]:
        operator = hf.curvature.HessianOperator(problem.model, problem.loss_fn, problem.pair)
        result = hf.curvature.top_eigenpairs(operator, k, seed=seed)
        return result.values.tolist(), result.matvecs

    def eigsh_on(operator: Any, seed: int) -> tuple[list[float], int]:
        from scipy.sparse.linalg import LinearOperator, eigsh

        count = 0

        def product(v: Any) -> Any:
            nonlocal count
            count += 1
            return operator.matvec(v)

        counted = LinearOperator(operator.shape, matvec=product, dtype=np.float32)
        start = np.random.default_rng(seed).standard_normal(operator.shape[0]).astype(np.float32)
        values = eigsh(counted, k=k, which="LM", tol=1e-3, v0=start, return_eigenvectors=False)
        return sorted(values.tolist(), key=abs, reverse=True), count

    def eigsh_ours(seed: int) -> tuple[list[float], int]:
        operator = hf.curvature.HessianOperator(problem.model, problem.loss_fn, problem.pair)
        return eigsh_on(operator.to_scipy(), seed)

    def eigsh_curvlinops(seed: int) -> tuple[list[float], int]:
        return eigsh_on(peers.curvlinops().to_scipy(), seed)

    routes: dict[str, Callable[[int], tuple[list[float], int]]] = {
        "ours": ours,
        "eigsh on ours": eigsh_ours,
    }
    if importable("pyhessian"):
        routes["PyHessian"] = pyhessian_route(problem, k)
    if importable("curvlinops"):
        routes["eigsh on curvlinops"] = eigsh_curvlinops
    return routes


def symmetric_eig(matrix: Any, eigenvectors: bool = True) -> tuple[Any, Any]:  # noqa: ARG001
    """What `torch.eig` gave for a symmetric matrix: values as (real, imaginary), and vectors."""
    values, vectors = torch.linalg.eigh(matrix)
    return torch.stack([values, torch.zeros_like(values)], dim=1), vectors


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """An attribute of another library, for the duration."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)
