"""What a warm start saves and what it misses, by how it weighs the remembered Ritz vectors and when
it stops.

    python experiments/benchmarks/warm_start.py [--seeds 10] [--rules ...]

Prints one Markdown table; seconds and hardware play no part. Matrices of 400 rows with the spectra
of SPECTRA, whose eigenvectors turn by about a quarter (radian) between calls; the first call is
cold, two follow warm, and the fourth counts:

    products    drift only: products of the warm call by the median of three cold ones
    jumps       the second or third value, at 20 or 96 % of the leading one so far, is now 5 or 30 %
                above it: how often the warm call gives an answer more than its tolerance of 1e-2
                away and calls it converged
    swaps       no drift; of 1,000 values one at 96 or 90 % of the leading one comes to lie 3, 8 or
                20 % above it
    newcomers   no drift; of 20,000 values one that no remembered vector holds comes to lie 5, 20,
                50 or 100 % above the leading one: the most warm calls until it is found (5 %, then
                the others)
"""

import argparse
import statistics
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hessianflow.curvature import CallableOperator
from hessianflow.curvature.eigenpairs import RANDOM_SHARE
from hessianflow.curvature.evidence import COLD, WARM, Evidence
from hessianflow.curvature.lanczos import lanczos
from hessianflow.curvature.results import EigenResult
from hessianflow.curvature.vectors import gaussian, generator
from hessianflow.curvature.warm_start import SPARE_VECTORS, by_value, remembered
from hessianflow.interfaces import LinearOperator

Array = npt.NDArray[np.float64]


class Rule(NamedTuple):
    """Weights of remembered vectors, from their values by the leading one, [m]; and what is asked
    of a residual."""

    weights: Callable[[Tensor], Tensor]
    evidence: Evidence = WARM


SIZE, TURN, TOL = 400, 0.25, 1e-2


def _spectrum(lead: list[float], floor: float, decay: float) -> Array:
    """Leading values over a bulk that falls as a power, every fourth of it negative."""
    bulk = floor * np.arange(1, SIZE - len(lead) + 1) ** -decay
    bulk[::4] = -0.3 * bulk[::4]
    return np.concatenate([lead, bulk])


SPECTRA = {
    "second value 0.2": _spectrum([1, 0.2, 0.18, 0.15], 0.1, 0.6),
    "0.43": _spectrum([1, 0.43, 0.33, 0.26, 0.2, 0.17, 0.14], 0.12, 0.8),
    "0.6": _spectrum([1, 0.6, 0.45, 0.33, 0.27, 0.2], 0.15, 0.7),
    "0.89": _spectrum([1, 0.89, 0.78, 0.7, 0.64, 0.55, 0.5, 0.45, 0.4], 0.35, 0.5),
    "0.97": _spectrum([1, 0.97, 0.9, 0.8, 0.76, 0.7, 0.62, 0.55], 0.45, 0.5),
}
JUMPS = [
    (which, level, above) for which in (1, 2) for level in (0.2, 0.96) for above in (0.05, 0.3)
]
SWAPS = [(rival, gap) for rival in (1, 2) for gap in (0.03, 0.08, 0.2)]
NEWCOMERS = (0.05, 0.2, 0.5, 1.0)
HEADS = ([1.0, 0.3, 0.12, 0.08], [1.0, 0.96, 0.9, 0.8, 0.75, 0.7, 0.6, 0.5])
"""Leading values over the bulk that a newcomer rises from."""


RULES = {
    "by value, 0.5 (the probe's)": Rule(by_value),
    "by value, 0.4": Rule(lambda nearness: 0.4 * nearness),
    "by value, 0.6": Rule(lambda nearness: 0.6 * nearness),
    "by the square of the value, 0.6": Rule(lambda nearness: 0.6 * nearness**2),
    "equal, 0.4 (before)": Rule(lambda nearness: torch.full_like(nearness, 0.4)),
    "equal, 0.2": Rule(lambda nearness: torch.full_like(nearness, 0.2)),
    "leading vector alone": Rule(torch.zeros_like),
    "by value, residual up to 3 %": Rule(by_value, WARM._replace(cap=0.03)),
    "by value, residual up to 3 %, of the gap 10 %": Rule(
        by_value, WARM._replace(cap=0.03, angle=0.1)
    ),
    "by value, as strict as a cold start": Rule(by_value, COLD),
}


def turned(vectors: Array, random: np.random.Generator) -> Array:
    """The orthonormal columns after a random rotation that turns each by about TURN (Cayley's
    form)."""
    skew = random.standard_normal((SIZE, SIZE))
    skew -= skew.T
    skew *= TURN / np.linalg.norm(skew[:, 0])
    rotated: Array = vectors @ np.linalg.solve(np.eye(SIZE) - skew / 2, np.eye(SIZE) + skew / 2)
    return rotated


def searched(
    operator: LinearOperator, seed: int, start: Tensor | None = None, evidence: Evidence = COLD
) -> EigenResult:
    """As top_eigenpairs does it, with any evidence."""
    source = generator(seed, operator.device)
    noise = gaussian(operator, source)
    first = noise if start is None else start / start.norm() + noise * (RANDOM_SHARE / noise.norm())
    options = {"which": "LM", "tol": TOL, "max_matvecs": 100, "extra": SPARE_VECTORS}
    return lanczos(operator, 1, start=first[:, None], source=source, evidence=evidence, **options)  # type: ignore[arg-type]


def again(operator: LinearOperator, seed: int, before: EigenResult, rule: Rule) -> EigenResult:
    """A warm call."""
    return searched(operator, seed, remembered(before, rule.weights), rule.evidence)


def is_wrong(result: EigenResult, truth: float) -> bool:
    return result.converged and abs(float(result.values[0]) - truth) > TOL * truth


def operator_of(vectors: Array, values: Array) -> LinearOperator:
    matrix = torch.from_numpy((vectors * values) @ vectors.T).float()
    return CallableOperator(lambda v: matrix @ v, len(matrix))


def diagonal(values: Tensor) -> LinearOperator:
    return CallableOperator(lambda v: values * v, len(values), values.dtype)


def fourth_call(
    values: Array, after: Array, rule: Rule, seed: int
) -> tuple[EigenResult, LinearOperator]:
    """A cold and two warm calls at `values`, then a warm one at `after`; its result and its
    matrix."""
    random = np.random.default_rng(seed)
    vectors = np.linalg.qr(random.standard_normal((SIZE, SIZE)))[0]
    operator = operator_of(vectors, values)
    result = searched(operator, 1000 * seed)
    for call, spectrum in enumerate((values, values, after), 1):
        vectors = turned(vectors, random)
        operator = operator_of(vectors, spectrum)
        result = again(operator, 1000 * seed + call, result, rule)
    return result, operator


def drifted(values: Array, rule: Rule, seed: int) -> tuple[int, float]:
    """Products of a warm call and of a cold one."""
    result, operator = fourth_call(values, values, rule, seed)
    return result.matvecs, statistics.median(
        searched(operator, 1000 * seed + 500 + i).matvecs for i in range(3)
    )


def missed_jumps(values: Array, rule: Rule, seed: int) -> int:
    missed = 0
    for which, level, above in JUMPS:
        before, after = values.copy(), values.copy()
        before[which], after[which] = level, 1 + above
        missed += is_wrong(fourth_call(before, after, rule, seed)[0], 1 + above)
    return missed


def missed_swaps(rule: Rule, seed: int) -> int:
    lead = torch.tensor([1.0, 0.96, 0.9, 0.5, 0.4, 0.3, 0.2])
    before = torch.cat([lead, torch.linspace(-0.05, 0.1, 1000 - len(lead))]).double()
    first = searched(diagonal(before), seed)
    missed = 0
    for rival, gap in SWAPS:
        after = before.clone()
        after[rival] = 1 + gap
        missed += is_wrong(again(diagonal(after), seed, first, rule), 1 + gap)
    return missed


def calls_to_find(rule: Rule, above: float, seed: int, most: int = 20) -> int:
    """Warm calls until a newcomer is found, the slower of the two spectra."""
    slowest = 0
    for head in HEADS:
        values = torch.cat(
            [torch.tensor(head), torch.linspace(-0.02, 0.04, 20_000 - len(head))]
        ).double()
        result, calls = searched(diagonal(values), seed), 0
        values[100] = 1 + above
        while calls < most and abs(float(result.values[0]) - 1 - above) > TOL * (1 + above):
            calls += 1
            result = again(diagonal(values), 1000 * seed + calls, result, rule)
        slowest = max(slowest, calls)
    return slowest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--rules", nargs="+", choices=list(RULES), default=list(RULES))
    options = parser.parse_args()
    torch.set_num_threads(1)
    seeds = range(options.seeds)
    print(f"| rule | {' | '.join(SPECTRA)} | mean | jumps missed | swaps missed | newcomers |")
    print("|---" * (len(SPECTRA) + 5) + "|")
    for name in options.rules:
        rule, shares, jumps = RULES[name], [], 0
        for values in SPECTRA.values():
            pairs = [drifted(values, rule, seed) for seed in seeds]
            shares.append(sum(warm for warm, _ in pairs) / sum(cold for _, cold in pairs))
            jumps += sum(missed_jumps(values, rule, seed) for seed in seeds)
        swaps = sum(missed_swaps(rule, seed) for seed in seeds)
        small, *large = (
            max(calls_to_find(rule, above, seed) for seed in seeds) for above in NEWCOMERS
        )
        cells = [f"{share:.0%}" for share in [*shares, statistics.mean(shares)]]
        of_jumps, of_swaps = (
            len(seeds) * count for count in (len(SPECTRA) * len(JUMPS), len(SWAPS))
        )
        cells += [f"{jumps} of {of_jumps}", f"{swaps} of {of_swaps}", f"{small}, {max(large)}"]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
