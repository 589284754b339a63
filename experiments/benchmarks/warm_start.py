"""What a warm start saves and what it misses, by how it weighs the remembered Ritz vectors.

    python experiments/benchmarks/warm_start.py [--seeds 10] [--rules ...]

Prints one Markdown table; seconds and hardware play no part. Matrices of 400 rows with the spectra of SPECTRA, whose
eigenvectors turn by about a quarter (radian) between calls; the first call is cold, two follow warm, and the fourth
counts:

    products    drift only: products of the warm call by the median of three cold ones
    jumps       the second or third value, at 20 or 96 % of the leading one so far, is now 5 or 30 % above it: how often
                the warm call gives an answer more than its tolerance of 1e-2 away and calls it converged
    swaps       no drift; of 1,000 values one at 96 or 90 % of the leading one comes to lie 3, 8 or 20 % above it
"""

import argparse
import statistics
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from hessianflow.curvature import CallableOperator, top_eigenpairs
from hessianflow.curvature.probe import DIRECTION_WEIGHT, RUNNER_UP_WEIGHT, SPARE_VECTORS
from hessianflow.curvature.results import EigenResult

Array = npt.NDArray[np.float64]
Rule = Callable[[Array], Array]  # values of the runners-up by the leading one, [m], to their weights
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
JUMPS = [(which, level, above) for which in (1, 2) for level in (0.2, 0.96) for above in (0.05, 0.3)]
SWAPS = [(rival, gap) for rival in (1, 2) for gap in (0.03, 0.08, 0.2)]
RULES: dict[str, Rule] = {
    "by value (the probe's)": lambda nearness: RUNNER_UP_WEIGHT * nearness,
    "equal, 0.4 (until 2026-11-27)": lambda nearness: np.full_like(nearness, 0.4),
    "equal, 0.2": lambda nearness: np.full_like(nearness, 0.2),
    "by value, 0.4": lambda nearness: 0.4 * nearness,
    "by value, 0.6": lambda nearness: 0.6 * nearness,
    "by its square, 0.6": lambda nearness: 0.6 * nearness**2,
    "leading vector alone": lambda nearness: np.zeros_like(nearness),
}


def turned(vectors: Array, random: np.random.Generator) -> Array:
    """The orthonormal columns after a random rotation that turns each by about TURN (Cayley's form)."""
    skew = random.standard_normal((SIZE, SIZE))
    skew -= skew.T
    skew *= TURN / np.linalg.norm(skew[:, 0])
    rotated: Array = vectors @ np.linalg.solve(np.eye(SIZE) - skew / 2, np.eye(SIZE) + skew / 2)
    return rotated


def started(result: EigenResult, rule: Rule) -> Tensor:
    """The start vector that remembers `result`."""
    assert result.direction is not None
    values = result.values.double().abs().numpy()
    weights = torch.from_numpy(np.concatenate([[1.0], rule(values[1:] / values[0])]))
    start: Tensor = result.vectors @ weights.to(result.vectors)
    return start + DIRECTION_WEIGHT * functional.normalize(result.direction, dim=0)


def searched(matrix: Tensor, seed: int, start: Tensor | None = None) -> EigenResult:
    operator = CallableOperator(lambda v: matrix @ v, len(matrix), dtype=matrix.dtype)
    return top_eigenpairs(operator, tol=TOL, v0=start, seed=seed, extra=SPARE_VECTORS, warm=start is not None)


def is_wrong(result: EigenResult, truth: float) -> bool:
    return result.converged and abs(float(result.values[0]) - truth) > TOL * truth


def fourth_call(values: Array, after: Array, rule: Rule, seed: int) -> tuple[EigenResult, Tensor]:
    """A cold and two warm calls at `values`, then a warm one at `after`; its result and its matrix."""
    random = np.random.default_rng(seed)
    vectors = np.linalg.qr(random.standard_normal((SIZE, SIZE)))[0]
    result, matrix = None, torch.empty(0)
    for call, spectrum in enumerate((values, values, values, after)):
        if call:
            vectors = turned(vectors, random)
        matrix = torch.from_numpy((vectors * spectrum) @ vectors.T).float()
        result = searched(matrix, 1000 * seed + call, None if result is None else started(result, rule))
    assert result is not None
    return result, matrix


def drifted(values: Array, rule: Rule, seed: int) -> tuple[int, float]:
    """Products of a warm call and of a cold one."""
    result, matrix = fourth_call(values, values, rule, seed)
    return result.matvecs, statistics.median(searched(matrix, -seed - 1 - cold).matvecs for cold in range(3))


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
    first = searched(torch.diag(before), seed)
    missed = 0
    for rival, gap in SWAPS:
        after = before.clone()
        after[rival] = 1 + gap
        missed += is_wrong(searched(torch.diag(after), seed, started(first, rule)), 1 + gap)
    return missed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--rules", nargs="+", choices=list(RULES), default=list(RULES))
    options = parser.parse_args()
    torch.set_num_threads(1)
    seeds = range(options.seeds)
    print(f"| weights of the runners-up | {' | '.join(SPECTRA)} | mean | jumps missed | swaps missed |")
    print("|---" * (len(SPECTRA) + 4) + "|")
    for name in options.rules:
        rule, shares, jumps = RULES[name], [], 0
        for values in SPECTRA.values():
            pairs = [drifted(values, rule, seed) for seed in seeds]
            shares.append(sum(warm for warm, _ in pairs) / sum(cold for _, cold in pairs))
            jumps += sum(missed_jumps(values, rule, seed) for seed in seeds)
        swaps = sum(missed_swaps(rule, seed) for seed in seeds)
        cells = [f"{share:.0%}" for share in [*shares, statistics.mean(shares)]]
        of_jumps, of_swaps = (len(seeds) * count for count in (len(SPECTRA) * len(JUMPS), len(SWAPS)))
        print(f"| {name} | {' | '.join(cells)} | {jumps} of {of_jumps} | {swaps} of {of_swaps} |", flush=True)


if __name__ == "__main__":
    main()
