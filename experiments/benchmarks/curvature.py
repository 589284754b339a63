"""Curvature beside PyHessian, curvlinops and scipy, in one process: cost, accuracy, memory.

    python experiments/benchmarks/curvature.py [--problems mlp-3k mlp-50k resnet20 squeezenext]
    [--parts ...]

Prints one Markdown table. Times are process CPU seconds with one thread
(`torch.set_num_threads(1)`), which other processes on the machine disturb little. The libraries
take turns in every round; given are medians and, of three or more rounds, [lower..upper quartile].
Every problem is trained for 50 SGD steps on noisy class templates first. References are Lanczos
runs to an estimated error of 1e-4, for the small MLP the dense spectrum in float64. Peers that
cannot be imported are skipped.
"""

import argparse
import copy
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
from curvature_peers import (
    TIGHTER,
    Peers,
    Route,
    eigen_routes,
    importable,
    pyhessian_route,
    replaced,
    symmetric_eig,
)
from problems import Problem, classification, dense_hessian, mlp, train

import hessianflow as hf

PARTS = ("product", "density", "top1", "top5", "warm", "trace", "memory", "repeated")
PROBLEMS = ("mlp-3k", "mlp-50k", "resnet20", "squeezenext")
Row = tuple[str, str, str, str]
GOAL = 1e-3  # true relative error of an eigenvalue


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


def spread(values: list[float], digits: str = ".3g") -> str:
    """Median and, of three or more, quartiles."""
    middle = f"{statistics.median(values):{digits}}"
    if len(values) < 3:
        return middle
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return f"{middle} [{low:{digits}}..{high:{digits}}]"


def product_cost(name: str, problem: Problem, rounds: int) -> list[Row]:
    """Paired: gradient and one product of each library in every round."""
    model, targets = copy.deepcopy(problem.model).eval(), problem.targets
    params = list(model.parameters())
    operator = hf.curvature.HessianOperator(model, problem.loss_fn, problem.pair)
    vector = torch.randn(operator.size, generator=torch.Generator().manual_seed(0))
    routes: dict[str, Callable[[], Any]] = {"ours, kept graph": lambda: operator @ vector}
    half = hf.curvature.HessianOperator(
        model, problem.loss_fn, problem.pair, microbatch_size=len(problem.targets) // 2
    )
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
        gradient = timed(
            lambda: torch.autograd.grad(problem.loss_fn(model(problem.inputs), targets), params)
        )[1]
        for key, route in routes.items():
            ratios[key].append(timed(route)[1] / gradient)
    return [(name, "one product, gradients", key, spread(r)) for key, r in ratios.items()]


def eigenvalues(
    name: str, problem: Problem, k: int, seeds: int, reference: list[float]
) -> list[Row]:
    """Each seed is a round in which all libraries take their turn, PyHessian twice if it has missed
    GOAL."""
    routes = eigen_routes(problem, k)
    tighter = [pyhessian_route(problem, k, tol) for tol in TIGHTER] if "PyHessian" in routes else []
    runs: dict[str, list[Run]] = {key: [] for key in routes}
    for seed in range(seeds):
        for key, route in routes.items():
            runs[key].append(measured(route, seed, reference))
        if tighter:
            first = runs["PyHessian"][-1]
            runs.setdefault(f"PyHessian to {GOAL:g}", []).append(
                until_accurate(first, tighter, seed, reference)
            )
    rows = []
    for key, made in runs.items():
        ratio = spread(
            [run.seconds / own.seconds for own, run in zip(runs["ours"], made, strict=True)]
        )
        errors = [run.error for run in made]
        text = (
            f"{spread([run.products for run in made])} products,"
            f" {spread([run.seconds for run in made])} s, "
        )
        text += (
            f"{ratio} x ours, error {statistics.median(errors):.1e}, worst {max(errors):.1e} of"
            f" {seeds}"
        )
        rows.append((name, f"top-{k}", key, text))
    return rows


class Run(NamedTuple):
    """One search for eigenvalues: what it spent, and the largest relative error of a value."""

    products: float
    seconds: float
    error: float


def measured(route: Route, seed: int, reference: list[float]) -> Run:
    (values, count), spent = timed(lambda: route(seed))
    return Run(
        count, spent, max(abs(v - r) / abs(r) for v, r in zip(values, reference, strict=True))
    )


def until_accurate(run: Run, tighter: list[Route], seed: int, reference: list[float]) -> Run:
    """The first run that reaches GOAL, the last if none does; those before it count for nothing.

    The reference chooses the tolerance, which no user could: it is the best that the library can do
    for this seed.
    """
    for route in tighter:
        if run.error <= GOAL:
            return run
        run = measured(route, seed, reference)
    return run


def warm(name: str, problem: Problem, seeds: int, probes: int = 3) -> list[Row]:
    """Probes 20 SGD steps apart, warm against cold at the same weights."""
    twin = Problem(copy.deepcopy(problem.model), problem.loss_fn, problem.inputs, problem.targets)
    probe = hf.curvature.CurvatureProbe(twin.model, twin.loss_fn, twin.pair)
    probe()
    warm_counts, cold_counts, worst, excess = [], [], 0.0, -99.0
    for step in range(probes):
        train(
            twin,
            20,
            lr=0.05 if step % 2 == 0 else 0.005,
            batch_size=min(32, len(twin.targets)),
            seed=10 + step,
        )
        reading = probe()
        operator = hf.curvature.HessianOperator(twin.model, twin.loss_fn, twin.pair)
        runs = [hf.curvature.top_eigenpairs(operator, tol=1e-2, seed=s) for s in range(seeds)]
        truth = float(
            hf.curvature.top_eigenpairs(operator, tol=1e-4, max_matvecs=40, seed=99).values[0]
        )
        cold = statistics.median(r.matvecs for r in runs)
        warm_counts.append(reading.matvecs)
        cold_counts.append(cold)
        excess = max(excess, reading.matvecs - cold)
        worst = max(worst, abs(reading.eigenvalue - truth) / abs(truth))
    share = sum(warm_counts) / sum(cold_counts)
    text = (
        f"{warm_counts} of {cold_counts}: {share:.0%}, at most {excess:+g}, worst error {worst:.1e}"
    )
    return [(name, "warm, 20 steps later", "ours", text)]


def traces(name: str, problem: Problem, truth: float | None, seeds: int) -> list[Row]:
    operator = hf.curvature.HessianOperator(problem.model, problem.loss_fn, problem.pair)
    if truth is None:
        best = hf.curvature.trace(operator, num_matvecs=90, seed=1234)
        truth, note = best.value, f" (reference {best.value:.5g} +- {best.stderr:.2g})"
    else:
        note = " (exact reference)"
    rows = []
    for method in ("hutchinson", "hutchpp", "krylov"):
        runs = [
            hf.curvature.trace(operator, num_matvecs=18, method=method, seed=s)
            for s in range(seeds)
        ]
        rms = statistics.mean(((r.value - truth) / truth) ** 2 for r in runs) ** 0.5
        covered = sum(abs(r.value - truth) <= 2 * r.stderr for r in runs)
        text = f"rms error {rms:.1e}, within 2 standard errors {covered}/{seeds}{note}"
        rows.append((name, "trace, 18 products", f"ours, {method}", text))
    return rows


def density(name: str, problem: Problem, spectrum: np.ndarray, seeds: int) -> list[Row]:
    """One probe of 40 steps each; PyHessian with a stand-in for the `torch.eig` that torch has
    removed."""
    from scipy.stats import wasserstein_distance

    operator = hf.curvature.HessianOperator(problem.model, problem.loss_fn, problem.pair)

    def ours(seed: int) -> tuple[Any, Any]:
        found = hf.curvature.spectral_density(operator, num_probes=1, steps=40, seed=seed)
        return found.nodes[0], found.weights[0]

    def pyhessian(seed: int) -> tuple[Any, Any]:
        torch.manual_seed(seed)
        peer = Peers(problem).pyhessian()
        nodes, weights = peer.density(iter=40, n_v=1)
        for parameter in peer.model.parameters():
            parameter.grad = None
        return np.real(nodes[0]), np.real(weights[0])

    routes = {"ours": ours} | ({"PyHessian": pyhessian} if importable("pyhessian") else {})
    distances: dict[str, list[float]] = {key: [] for key in routes}
    seconds: dict[str, list[float]] = {key: [] for key in routes}
    with replaced(torch, "eig", symmetric_eig):
        for seed in range(seeds):
            for key, route in routes.items():
                (nodes, weights), spent = timed(lambda seed=seed, route=route: route(seed))
                distances[key].append(wasserstein_distance(nodes, spectrum, weights))
                seconds[key].append(spent)
    return [
        (
            name,
            "density, 40 steps, W1 to exact",
            key,
            f"{spread(distances[key], '.1e')}, {spread(seconds[key])} s",
        )
        for key in routes
    ]


def high_water() -> float:
    """MiB of resident memory at its highest in this process (`ru_maxrss` would start at that of the
    parent)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


def peak_memory(path: str, route: str) -> float:
    """MiB of resident memory above a warmed-up gradient, four products, in this (fresh) process."""
    # A file that this script has just written for its own child process: a whole model, not data
    # from elsewhere.
    problem = Problem(*torch.load(path, weights_only=False))
    model = problem.model.eval()
    for _ in range(2):
        torch.autograd.grad(
            problem.loss_fn(model(problem.inputs), problem.targets), list(model.parameters())
        )
    before = high_water()
    if route == "PyHessian":
        from pyhessian.utils import hessian_vector_product

        peer = Peers(problem).pyhessian()
        for _ in range(4):
            hessian_vector_product(
                peer.gradsH, peer.params, [torch.randn_like(p) for p in peer.params]
            )
    elif route == "curvlinops":
        other = Peers(problem).curvlinops()
        for _ in range(4):
            other @ torch.randn(other.shape[0])
    else:
        size = None if route == "ours, kept graph" else 32
        operator = hf.curvature.HessianOperator(
            model, problem.loss_fn, problem.pair, microbatch_size=size
        )
        for _ in range(4):
            operator @ torch.randn(operator.size)
    return high_water() - before


def memory(name: str, problem: Problem) -> list[Row]:
    routes = ["ours, kept graph", "ours, microbatch 32"]
    routes += [peer for peer in ("PyHessian", "curvlinops") if importable(peer.lower())]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "problem.pt")
        torch.save((problem.model, problem.loss_fn, problem.inputs, problem.targets), path)
        for route in routes:
            command = [sys.executable, "-W", "ignore", __file__, "--peak", path, route]
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
    return [
        (
            "mlp-50k",
            f"{probes} probes, growth in MiB after the 20th",
            "ours",
            f"{sizes[-1] - sizes[19]:.1f}",
        )
    ]


def references(name: str, problem: Problem) -> tuple[list[float], np.ndarray | None]:
    """The five leading eigenvalues, and the whole spectrum where it is small enough."""
    if name == "mlp-3k":
        twin = copy.deepcopy(problem.model).double()
        double = Problem(twin, problem.loss_fn, problem.inputs.double(), problem.targets)
        exact = torch.linalg.eigvalsh(dense_hessian(double)).numpy()
        return sorted(exact.tolist(), key=abs, reverse=True)[:5], exact
    operator = hf.curvature.HessianOperator(problem.model, problem.loss_fn, problem.pair)
    return (
        hf.curvature.top_eigenpairs(operator, 5, tol=1e-4, max_matvecs=60, seed=77).values.tolist(),
        None,
    )


def measure(name: str, seeds: int, parts: list[str]) -> Iterator[list[Row]]:
    """All rows of one problem, each group as soon as it is measured."""
    problem = problem_of(name)
    small = name.startswith("mlp")
    needs_truth = (
        {"density", "top1", "top5", "trace"} & set(parts)
        if small
        else {"top1", "top5"} & set(parts)
    )
    values, exact = references(name, problem) if needs_truth else ([], None)
    if "product" in parts:
        yield product_cost(name, problem, 41 if small else 5)
    if "density" in parts and exact is not None:
        yield density(name, problem, exact, 10)
    if "top1" in parts:
        yield eigenvalues(name, problem, 1, seeds, values[:1])
    if "top5" in parts:
        yield eigenvalues(name, problem, 5, seeds, values)
    if "warm" in parts:
        yield warm(name, problem, seeds, 12 if small else 3)
    if "trace" in parts:
        yield traces(
            name, problem, None if exact is None else float(exact.sum()), 40 if small else 6
        )
    if "memory" in parts and not small:
        yield memory(name, problem)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--problems", nargs="+", choices=PROBLEMS, default=list(PROBLEMS))
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--peak", nargs=2, metavar=("FILE", "ROUTE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    if options.peak:
        print(f"{peak_memory(*options.peak):.0f}")
        return
    print("| problem | quantity | library | measured |\n|---|---|---|---|")
    for name in options.problems:
        for rows in measure(name, options.seeds, options.parts):
            for row in rows:
                print("| " + " | ".join(row) + " |", flush=True)
    for row in repeated() if "repeated" in options.parts else []:
        print("| " + " | ".join(row) + " |")


if __name__ == "__main__":
    main()
