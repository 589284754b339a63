"""Curvature beside PyHessian, curvlinops and scipy, in one process: cost, accuracy, memory.

    python experiments/benchmarks/curvature.py [--problems mlp-3k mlp-50k resnet20 squeezenext] [--seeds 3]

Prints one Markdown table. Times are process CPU seconds with one thread (`torch.set_num_threads(1)`), medians over
seeds. Every problem is trained for 50 SGD steps on noisy class templates first. References are Lanczos runs to an
estimated error of 1e-4, for the small MLP the dense spectrum in float64. Peers that cannot be imported are skipped.
"""

import argparse
import copy
import importlib
import resource
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
from problems import Problem, classification, dense_hessian, mlp, train

import hessianflow as hf

PROBLEMS = ("mlp-3k", "mlp-50k", "resnet20", "squeezenext")
Row = tuple[str, str, str, str]


def problem_of(name: str) -> Problem:
    torch.manual_seed(0)
    if name.startswith("mlp"):
        widths = (20, 40, 40, 10) if name == "mlp-3k" else (128, 192, 128, 10)
        made = classification(mlp(widths, dtype=torch.float32), (widths[0],), 256)
        train(made, 50)
        return made
    full, batch = ("resnet20", 128) if name == "resnet20" else ("squeezenext-1.0-23", 64)
    model = hf.models.create(full, num_classes=10, input_size=32, variant="cifar")
    made = classification(model, (3, 32, 32), batch)
    train(made, 50, batch_size=32)
    with torch.no_grad():  # let the running statistics settle at the final weights
        for _ in range(25):
            model(made.inputs)
    return made


def timed(function: Callable[[], Any]) -> tuple[Any, float]:
    start = time.process_time()
    answer = function()
    return answer, time.process_time() - start


class Peers:
    """The other libraries, each on its own copy of the model in evaluation mode."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem

    def pyhessian(self) -> Any:
        """Its object, graph built."""
        from pyhessian import hessian

        model = copy.deepcopy(self.problem.model).eval()
        return hessian(model, self.problem.loss_fn, data=self.problem.pair, cuda=False)

    def curvlinops(self) -> Any:
        """Its operator, without the costly checks of its constructor."""
        from curvlinops import HessianLinearOperator

        model = copy.deepcopy(self.problem.model).eval()
        return HessianLinearOperator(
            model, nn.CrossEntropyLoss(), list(model.parameters()), [self.problem.pair], check_deterministic=False
        )


def importable(name: str) -> bool:
    try:
        __import__(name)
    except ImportError:
        return False
    return True


def product_cost(name: str, problem: Problem, rounds: int) -> list[Row]:
    """Paired: gradient and one product of each library in every round."""
    model, targets = copy.deepcopy(problem.model).eval(), problem.targets
    params = list(model.parameters())
    operator = hf.curvature.HessianOperator(model, problem.loss_fn, problem.pair)
    vector = torch.randn(operator.size, generator=torch.Generator().manual_seed(0))
    routes: dict[str, Callable[[], Any]] = {"ours, kept graph": lambda: operator @ vector}
    half = hf.curvature.HessianOperator(model, problem.loss_fn, problem.pair, microbatch_size=len(problem.targets) // 2)
    routes["ours, two microbatches"] = lambda: half @ vector
    if importable("pyhessian"):
        from pyhessian.utils import hessian_vector_product

        peer = Peers(problem).pyhessian()
        pieces = [torch.randn_like(p) for p in peer.params]
        routes["PyHessian"] = lambda: hessian_vector_product(peer.gradsH, peer.params, pieces)
    if importable("curvlinops"):
        other = Peers(problem).curvlinops()
        routes["curvlinops"] = lambda: other @ vector
    for route in routes.values():
        route()
    ratios: dict[str, list[float]] = {key: [] for key in routes}
    for _ in range(rounds):
        gradient = timed(lambda: torch.autograd.grad(problem.loss_fn(model(problem.inputs), targets), params))[1]
        for key, route in routes.items():
            ratios[key].append(timed(route)[1] / gradient)
    return [(name, "one product, gradients", key, f"{statistics.median(r):.2f}") for key, r in ratios.items()]


def eigen_routes(problem: Problem, k: int) -> dict[str, Callable[[int], tuple[list[float], int]]]:
    """Each maps a seed to (eigenvalues, products), set-up included."""

    def ours(seed: int) -> tuple[list[float], int]:
        operator = hf.curvature.HessianOperator(problem.model, problem.loss_fn, problem.pair)
        result = hf.curvature.top_eigenpairs(operator, k, seed=seed)
        return result.values.tolist(), result.matvecs

    def pyhessian(seed: int) -> tuple[list[float], int]:
        module = importlib.import_module("pyhessian.hessian")
        torch.manual_seed(seed)
        count, original = 0, module.hessian_vector_product

        def counted(*args: Any) -> Any:
            nonlocal count
            count += 1
            return original(*args)

        module.hessian_vector_product = counted
        try:
            peer = Peers(problem).pyhessian()
            values = peer.eigenvalues(maxIter=100, tol=1e-3, top_n=k)[0]
        finally:
            module.hessian_vector_product = original
        for parameter in peer.model.parameters():
            parameter.grad = None
        return values, count

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
        return eigsh_on(Peers(problem).curvlinops().to_scipy(), seed)

    routes = {"ours": ours, "eigsh on ours": eigsh_ours}
    if importable("pyhessian"):
        routes["PyHessian"] = pyhessian
    if importable("curvlinops"):
        routes["eigsh on curvlinops"] = eigsh_curvlinops
    return routes


def eigenvalues(name: str, problem: Problem, k: int, seeds: int, reference: list[float]) -> list[Row]:
    rows = []
    for key, route in eigen_routes(problem, k).items():
        products, seconds, errors = [], [], []
        for seed in range(seeds if "eigsh" not in key or name.startswith("mlp") else 1):
            (values, count), spent = timed(lambda seed=seed, route=route: route(seed))
            products.append(count)
            seconds.append(spent)
            errors.append(max(abs(v - r) / abs(r) for v, r in zip(values, reference, strict=True)))
        value = (
            f"{statistics.median(products):g} products, {statistics.median(seconds):.3g} s, "
            f"error {statistics.median(errors):.1e} / {max(errors):.1e}"
        )
        rows.append((name, f"top-{k}", key, value))
    return rows


def warm(name: str, problem: Problem, seeds: int, probes: int = 3) -> list[Row]:
    """Probes 20 SGD steps apart, warm against cold at the same weights."""
    twin = Problem(copy.deepcopy(problem.model), problem.loss_fn, problem.inputs, problem.targets)
    probe = hf.curvature.CurvatureProbe(twin.model, twin.loss_fn, twin.pair)
    probe()
    warm_counts, cold_counts, worst, excess = [], [], 0.0, -99.0
    for step in range(probes):
        train(twin, 20, lr=0.05 if step % 2 == 0 else 0.005, batch_size=min(32, len(twin.targets)), seed=10 + step)
        reading = probe()
        operator = hf.curvature.HessianOperator(twin.model, twin.loss_fn, twin.pair)
        runs = [hf.curvature.top_eigenpairs(operator, tol=1e-2, seed=s) for s in range(seeds)]
        truth = float(hf.curvature.top_eigenpairs(operator, tol=1e-4, max_matvecs=40, seed=99).values[0])
        cold = statistics.median(r.matvecs for r in runs)
        warm_counts.append(reading.matvecs)
        cold_counts.append(cold)
        excess = max(excess, reading.matvecs - cold)
        worst = max(worst, abs(reading.eigenvalue - truth) / abs(truth))
    share = sum(warm_counts) / sum(cold_counts)
    text = f"{warm_counts} of {cold_counts}: {share:.0%}, at most {excess:+g}, worst error {worst:.1e}"
    return [(name, "warm, 20 steps later", "ours", text)]


def traces(name: str, problem: Problem, truth: float | None, seeds: int) -> list[Row]:
    operator = hf.curvature.HessianOperator(problem.model, problem.loss_fn, problem.pair)
    if truth is None:
        best = hf.curvature.trace(operator, num_matvecs=90, seed=1234)
        truth, note = best.value, f" (reference {best.value:.5g} +- {best.stderr:.2g})"
    else:
        note = " (exact reference)"
    rows = []
    for method in ("hutchinson", "hutchpp"):
        runs = [hf.curvature.trace(operator, num_matvecs=18, method=method, seed=s) for s in range(seeds)]
        rms = statistics.mean(((r.value - truth) / truth) ** 2 for r in runs) ** 0.5
        covered = sum(abs(r.value - truth) <= 2 * r.stderr for r in runs)
        text = f"rms error {rms:.1e}, within 2 standard errors {covered}/{seeds}{note}"
        rows.append((name, "trace, 18 products", f"ours, {method}", text))
    return rows


def density(name: str, problem: Problem, spectrum: np.ndarray, seeds: int) -> list[Row]:
    from scipy.stats import wasserstein_distance

    operator = hf.curvature.HessianOperator(problem.model, problem.loss_fn, problem.pair)
    distances, seconds = [], []
    for seed in range(seeds):
        found, spent = timed(lambda s=seed: hf.curvature.spectral_density(operator, num_probes=1, steps=40, seed=s))
        distances.append(wasserstein_distance(found.nodes[0], spectrum, found.weights[0]))
        seconds.append(spent)
    text = f"{statistics.median(distances):.1e} (max {max(distances):.1e}), {statistics.median(seconds):.3g} s"
    return [(name, "density, 40 steps, W1 to exact", "ours", text)]


def peak_memory(name: str, route: str) -> float:
    """MiB of resident memory above a warmed-up gradient, four products, in this (fresh) process."""
    problem = problem_of(name)
    model = problem.model.eval()
    for _ in range(2):
        torch.autograd.grad(problem.loss_fn(model(problem.inputs), problem.targets), list(model.parameters()))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if route == "PyHessian":
        from pyhessian.utils import hessian_vector_product

        peer = Peers(problem).pyhessian()
        for _ in range(4):
            hessian_vector_product(peer.gradsH, peer.params, [torch.randn_like(p) for p in peer.params])
    elif route == "curvlinops":
        other = Peers(problem).curvlinops()
        for _ in range(4):
            other @ torch.randn(other.shape[0])
    else:
        size = None if route == "ours, kept graph" else 32
        operator = hf.curvature.HessianOperator(model, problem.loss_fn, problem.pair, microbatch_size=size)
        for _ in range(4):
            operator @ torch.randn(operator.size)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


def memory(name: str) -> list[Row]:
    routes = ["ours, kept graph", "ours, microbatch 32"]
    routes += [peer for peer in ("PyHessian", "curvlinops") if importable(peer.lower())]
    rows = []
    for route in routes:
        command = [sys.executable, "-W", "ignore", __file__, "--peak", name, route]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        rows.append((name, "peak over a gradient, MiB", route, done.stdout.strip()))
    return rows


def repeated(probes: int = 200) -> list[Row]:
    """Growth of resident memory over many probes of a small net (first 20 are warm-up)."""
    problem = problem_of("mlp-50k")
    probe = hf.curvature.CurvatureProbe(problem.model, problem.loss_fn, problem.pair)
    page = resource.getpagesize() / 2**20
    sizes = []
    for _ in range(probes):
        probe()
        sizes.append(int(Path("/proc/self/statm").read_text().split()[1]) * page)
    return [("mlp-50k", f"{probes} probes, growth in MiB after the 20th", "ours", f"{sizes[-1] - sizes[19]:.1f}")]


def measure(name: str, seeds: int) -> Iterator[list[Row]]:
    """All rows of one problem, each group as soon as it is measured."""
    problem = problem_of(name)
    small = name.startswith("mlp")
    yield product_cost(name, problem, 41 if small else 5)
    exact = None
    if name == "mlp-3k":
        twin = copy.deepcopy(problem.model).double()
        double = Problem(twin, problem.loss_fn, problem.inputs.double(), problem.targets)
        exact = torch.linalg.eigvalsh(dense_hessian(double)).numpy()
        reference = sorted(exact.tolist(), key=abs, reverse=True)[:5]
        yield density(name, problem, exact, 10)
    else:
        operator = hf.curvature.HessianOperator(problem.model, problem.loss_fn, problem.pair)
        reference = hf.curvature.top_eigenpairs(operator, 5, tol=1e-4, max_matvecs=60, seed=77).values.tolist()
        operator.release()
    yield eigenvalues(name, problem, 1, seeds, reference[:1])
    yield eigenvalues(name, problem, 5, seeds if small else 1, reference)
    yield warm(name, problem, seeds)
    if not small:
        yield memory(name)
    yield traces(name, problem, None if exact is None else float(exact.sum()), 40 if small else 4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--problems", nargs="+", choices=PROBLEMS, default=list(PROBLEMS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--peak", nargs=2, metavar=("PROBLEM", "ROUTE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    if options.peak:
        print(f"{peak_memory(*options.peak):.0f}")
        return
    print("| problem | quantity | library | measured |\n|---|---|---|---|")
    for name in options.problems:
        for rows in measure(name, options.seeds):
            for row in rows:
                print("| " + " | ".join(row) + " |", flush=True)
    for row in repeated():
        print("| " + " | ".join(row) + " |")


if __name__ == "__main__":
    main()
