"""How often is a converged answer wrong where eigenvalues lie close together?

    OMP_NUM_THREADS=1 python experiments/benchmarks/hard_spectra.py [--trials 600] [--seed 0]

Each trial draws one of 16 spectra of 300 values, an end of it (LM, LA, SA), k (1 or 5), a tolerance
and a random start, and searches the diagonal matrix in float64. Prints two Markdown tables; seconds
and hardware play no part. Counted are searches where

    wrong       it converged, and some value is further than the tolerance from the one asked
                for, or (k = 1) the negative one of an exact tie
    between     it converged, and some value is further than the tolerance from every eigenvalue
    bound       some value is further from every eigenvalue than its error bound, converged or not

The second table has k = 1 and two leading values a given gap apart, over 298 uniform ones from -0.1
to 0.5.
"""

import argparse
import statistics
from collections.abc import Callable
from itertools import product
from typing import NamedTuple, get_args

import numpy as np
import numpy.typing as npt
import torch

import hessianflow as hf
from hessianflow.curvature.results import EigenResult, Which

Array = npt.NDArray[np.float64]

SIZE, COUNTS, TOLERANCES = 300, (1, 5), (1e-2, 1e-3, 1e-6)
MOST_PRODUCTS = 5_000
PAIR_TOLERANCES = (1e-2, 1e-3, 1e-4, 1e-6)
GAPS = (0.001, 0.003, 0.005, 0.01, 0.02, 0.03, 0.05)
RESNET = (3310.0, 1004.0, 377.0, 248.6, 192.2, 171.6, 101.0, -82.9, 73.8, -70.2)
"""The ten leading values of a trained ResNet-20."""
EDGES = ((1 - 0.5**0.5) ** 2, (1 + 0.5**0.5) ** 2)
"""Ends of the Marchenko-Pastur law for half as many variables as samples."""


def spectra(random: np.random.Generator) -> dict[str, Array]:
    """The 16 spectra by name; those with a bulk draw it."""
    steps = np.arange(1, SIZE + 1)
    signs = np.where(steps % 3 == 0, -1.0, 1.0)
    return {
        "pair 1 % apart": over_bulk(random, [1, 0.99]),
        "pair 0.1 % apart": over_bulk(random, [1, 0.999]),
        "pair 3 % apart, wide bulk": over_bulk(random, [1, 0.97], -0.5),
        "five within 1 %": over_bulk(random, 1 - 0.0025 * np.arange(5)),
        "five within 0.1 %": over_bulk(random, 1 - 0.00025 * np.arange(5)),
        "tie of signs": over_bulk(random, [1, -1], -0.5),
        "tie of signs but for 0.1 %": over_bulk(random, [-1, 0.999], -0.5),
        "power law 0.5": signs * steps**-0.5,
        "power law 1": signs * steps**-1.0,
        "power law 2": signs * steps**-2.0,
        "semicircle": quantiles(lambda x: np.sqrt(1 - x**2), -1.0, 1.0),
        "Marchenko-Pastur": quantiles(marchenko_pastur, *EDGES),
        "uniform": np.linspace(-1, 1, SIZE),
        "double outliers": over_bulk(random, [3, 3, 2, 2, 1.5, 1.5]),
        "negative leader": over_bulk(random, [-1, 0.93, 0.9, -0.4], -0.2, 0.3),
        "like a net's": np.concatenate([RESNET, 50 * np.linspace(-0.5, 1, SIZE - 10) ** 3]),
    }


def over_bulk(
    random: np.random.Generator, lead: npt.ArrayLike, low: float = -0.1, high: float = 0.5
) -> Array:
    """Leading values over uniform ones."""
    first = np.asarray(lead, dtype=np.float64)
    return np.concatenate([first, random.uniform(low, high, SIZE - len(first))])


def marchenko_pastur(x: Array) -> Array:
    """The density between EDGES, up to a factor."""
    density: Array = np.sqrt((x - EDGES[0]) * (EDGES[1] - x)) / x
    return density


def quantiles(density: Callable[[Array], Array], low: float, high: float) -> Array:
    """As many values as the density, up to a factor, puts at equal shares between its ends."""
    middles = low + (np.arange(20_000) + 0.5) * (high - low) / 20_000
    cumulated = np.cumsum(density(middles))
    shares = (np.arange(SIZE) + 0.5) / SIZE
    values: Array = np.interp(shares, cumulated / cumulated[-1], middles)
    return values


class Outcome(NamedTuple):
    """One search beside the truth."""

    products: int
    converged: bool
    wrong: bool
    between: bool
    bound: bool


def outcome(values: Array, k: int, which: Which, tol: float, seed: int) -> Outcome:
    """Search the diagonal matrix of these values."""
    diagonal = torch.from_numpy(values)
    operator = hf.curvature.CallableOperator(lambda v: diagonal * v, SIZE, torch.float64)
    asked = {"tol": tol, "max_matvecs": MOST_PRODUCTS, "seed": seed}
    result = hf.curvature.top_eigenpairs(operator, k, which=which, **asked)  # type: ignore[arg-type]
    found = result.values.numpy()
    distances = np.abs(found[:, None] - values[None, :]).min(axis=1)
    return Outcome(
        result.matvecs,
        result.converged,
        result.converged and is_wrong(result, values, which, tol),
        result.converged and bool((distances > tol * np.abs(found)).any()),
        bool((distances > result.error_bounds.numpy()).any()),
    )


def is_wrong(result: EigenResult, values: Array, which: Which, tol: float) -> bool:
    """Whether some value is not the one that was asked for."""
    found, k = result.values.numpy(), len(result.values)
    if which != "LM":
        truth = np.sort(values if which == "SA" else -values)[:k]
        return bool((np.abs(np.abs(found) - np.abs(truth)) > tol * np.abs(truth)).any())
    truth = np.sort(-np.abs(values))[:k]  # the order of a tie is looked at apart
    is_off = bool((np.abs(np.sort(-np.abs(found)) - truth) > tol * np.abs(truth)).any())
    has_positive = bool(np.isclose(values, -truth[0], rtol=tol / 1e3, atol=0).any())
    return is_off or (k == 1 and has_positive and found[0] < 0)


def drawn(trials: int, seed: int) -> dict[tuple[int, float], list[tuple[str, Outcome]]]:
    """Outcomes with the name of their spectrum, by k and tolerance."""
    random = np.random.default_rng(seed)
    cells = [(k, tol) for k in COUNTS for tol in TOLERANCES]
    found: dict[tuple[int, float], list[tuple[str, Outcome]]] = {cell: [] for cell in cells}
    for trial in range(trials):
        made = spectra(random)
        name = list(made)[random.integers(len(made))]
        which: Which = get_args(Which)[random.integers(3)]
        k, tol = COUNTS[random.integers(2)], TOLERANCES[random.integers(3)]
        found[k, tol].append((name, outcome(made[name], k, which, tol, seed * trials + trial)))
    return found


def row(label: str, outcomes: list[Outcome]) -> str:
    """One line of either table."""
    count = len(outcomes)
    counts = [sum(getattr(one, name) for one in outcomes) for name in Outcome._fields[1:]]
    products = statistics.mean(one.products for one in outcomes)
    return f"| {label} | {count} | {' | '.join(map(str, counts))} | {products:.1f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=600)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--starts", type=int, default=100, help="of each cell of the second table; 0: none"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    names = "| searches | converged | wrong | between | bound | products |\n" + "|---" * 7 + "|"
    print(f"| k, tolerance {names}")
    found = drawn(options.trials, options.seed)
    wrong: list[str] = []
    for (k, tol), pairs in found.items():
        if pairs:
            print(row(f"{k}, {tol:g}", [one for _, one in pairs]), flush=True)
        wrong += [f"{name} (k = {k}, {tol:g})" for name, one in pairs if one.wrong]
    print(f"\nwrong: {', '.join(wrong) or 'none'}")
    if options.starts:
        print(f"\n| gap, tolerance {names}")
    for gap, tol in product(GAPS if options.starts else (), PAIR_TOLERANCES):
        random = np.random.default_rng(options.seed)
        bulks = [over_bulk(random, [1, 1 - gap]) for _ in range(options.starts)]
        found_all = [outcome(values, 1, "LM", tol, start) for start, values in enumerate(bulks)]
        print(row(f"{gap:g}, {tol:g}", found_all), flush=True)


if __name__ == "__main__":
    main()
