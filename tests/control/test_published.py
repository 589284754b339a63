"""The published settings against the tables of the papers."""

import pytest

from hessianflow.control import PUBLISHED, stage_at


@pytest.mark.parametrize(
    ("name", "level", "extra_time", "sizes"),
    [
        ("cifar100", 0, 1.05, [130, 230, 294, 340]),
        ("cifar100", 1, 1.1, [47, 106, 153, 192]),
        ("imagenet", 0, 1.05, [156, 322, 464, 587]),
        ("imagenet", 1, 1.1, [49, 118, 178, 231]),
        ("imagenet", 2, 1.05, [67, 135, 190, 236]),
        ("compsac", 0, 1.05, [83, 154, 205, 242]),
    ],
)
def test_small_batches(name: str, level: int, extra_time: float, sizes: list[int]) -> None:
    plans = [PUBLISHED[name].plan(level, 4, small, extra_time) for small in (1, 2, 3, 4)]
    assert [plan.small and plan.small.batch_size for plan in plans] == sizes


@pytest.mark.parametrize(("name", "ratio"), [("cifar100", 0.8537), ("imagenet", 0.6421)])
def test_predicted_gain_of_the_schedule(name: str, ratio: float) -> None:
    setting, seconds = PUBLISHED[name], {}
    sides = [level.resolution for level in setting.levels]
    for schedule in (None, "cyclic"):
        stages = setting.stages(schedule)  # type: ignore[arg-type]
        assert stages[-1].end == setting.phase_ends[-1]
        seconds[schedule] = sum(
            (s.end - s.start)
            * setting.plan(sides.index(s.level.resolution), 4, 0, 1.0).base_seconds
            for s in stages
        )
    assert seconds["cyclic"] / seconds[None] == pytest.approx(ratio, abs=5e-5)


def test_rates_and_resolutions_by_epoch() -> None:
    setting = PUBLISHED["cifar100"]
    table = {
        0: (0.2, 24),
        39: (0.2, 24),
        40: (0.2, 32),
        80: (0.02, 24),
        119: (0.02, 32),
        120: (0.002, 24),
    }
    for epoch, (rate, resolution) in (table | {130: (0.002, 32), 139: (0.002, 32)}).items():
        stage = stage_at(setting.stages("cyclic"), epoch)
        assert stage.level.resolution == resolution
        assert setting.lr * setting.lr_decay**stage.phase == pytest.approx(rate)
