"""ABSA against the worked traces of the reference; the traces were derived by hand, not by this
code."""

import math
from dataclasses import replace

import pytest

from hessianflow.control import ABS, ABSA
from hessianflow.interfaces import CurvatureReading, HessianFlowError, Progress

EXAMPLES = 50_000


def progress(epoch: int, total: int = 8, examples_per_epoch: int = EXAMPLES) -> Progress:
    return Progress(epoch, epoch * examples_per_epoch, 0, examples_per_epoch, total)


def reading(eigenvalue: float, converged: bool = True) -> CurvatureReading:
    return CurvatureReading(eigenvalue, residual=0.01, matvecs=5, converged=converged)


SHARE = 0.2
"""Of the adversary, as in the published code."""


def absa(cap: int = 1024, **options: object) -> ABSA:
    return ABSA(128, cap, **options)  # type: ignore[arg-type]


def test_worked_trace() -> None:
    """Trace 1 of the reference: eigenvalues 100, 80, 50, 49, 25, 30, 12, 11 with a cap of 8 times
    the start."""
    controller = absa()
    table = [  # eigenvalue; reference, estimates, batch ratio, share, still asks for an eigenvalue
        (100, 100, 1, 1, 0.2, True),
        (80, 100, 2, 1, 0.2, True),
        (50, 50, 0, 2, 0.1, True),
        (49, 50, 1, 2, 0, True),
        (25, 25, 0, 4, 0, True),
        (30, 25, 1, 4, 0, True),
        (12, 12, 0, 8, 0, False),
        (11, 12, 0, 8, 0, False),
    ]
    for epoch, (eigenvalue, reference, estimates, ratio, share, wants) in enumerate(table, 1):
        assert controller.is_due(progress(epoch))
        decision = controller.update(
            progress(epoch), reading(eigenvalue) if controller.needs else None
        )
        state = controller.state_dict()
        assert (state["reference"], state["estimates"]) == (reference, estimates)
        assert (decision.batch_size, decision.lr_factor) == (128 * ratio, ratio)
        assert SHARE * decision.attack_factor == pytest.approx(share)
        assert controller.needs == ({"eigenvalue"} if wants else set())
        assert not controller.is_due(progress(epoch))


def test_patience_forces_growth() -> None:
    """Trace 2: a constant eigenvalue grows the batch after epochs 10, 20 and 30, then never
    again."""
    controller, seen = absa(), {}
    for epoch in range(1, 91):
        before = controller.decision.batch_size
        decision = controller.update(progress(epoch, 90), reading(100))
        if decision.batch_size != before:
            share = SHARE * decision.attack_factor
            seen[epoch] = (decision.batch_size // 128, share, decision.reason)
        if epoch >= 30:
            assert controller.state_dict()["estimates"] == 0
    assert {epoch: event[:2] for epoch, event in seen.items()} == {
        10: (2, 0.1),
        20: (4, 0.05),
        30: (8, 0),
    }
    assert all(event[2] == "no growth for 10 estimates" for event in seen.values())
    assert controller.state_dict()["reference"] == 100


@pytest.mark.parametrize(
    ("start", "cap", "updates"), [(128, 128, 35_100), (16_384, 16_384, 274), (128, 16_384, 7_799)]
)
def test_update_counts(start: int, cap: int, updates: int) -> None:
    """Trace 3: 390 microbatches of 128 an epoch over 90 epochs, remainders carried as in the
    published code."""
    controller, pending, counted = ABSA(start, cap), 0, 0
    for epoch in range(1, 91):
        for _ in range(390):
            pending += 128
            if pending >= controller.decision.batch_size:
                pending, counted = 0, counted + 1
        controller.update(progress(epoch, 90), reading(100))
    assert counted == updates


def test_growth_beyond_the_cap_scales_the_rate_by_the_actual_ratio() -> None:
    """Trace 7: a cap of 6 times the start; from 4 the batch grows to 6 and the rate by 1.5, not
    2."""
    controller = absa(cap=6 * 128)
    for epoch, eigenvalue in enumerate([100, 50, 25], 1):
        decision = controller.update(progress(epoch), reading(eigenvalue))
    assert decision.lr_factor == 4
    decision = controller.update(progress(4), reading(12))
    assert (decision.batch_size, decision.lr_factor) == (768, 6)
    assert controller.needs == frozenset()


def test_reasons_carry_the_numbers() -> None:
    controller = absa(decay_factor=1.5)
    assert controller.update(progress(1, 90), reading(100)).reason == ""
    assert (
        controller.update(progress(2, 90), reading(49)).reason
        == "eigenvalue fell from 100 to 49 (<= 1/1.5)"
    )
    assert controller.update(progress(3, 90), reading(40)).reason == ""


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (None, "no reading"),
        (reading(math.nan), r"not finite \(nan\)"),
        (reading(math.inf), r"not finite \(inf\)"),
        (reading(-3), r"not positive \(-3\)"),
        (reading(0), r"not positive \(0\)"),
        (reading(10, converged=False), r"not converged \(10, residual 0.01\)"),
    ],
)
def test_unusable_readings_are_never_compared_but_count(
    bad: CurvatureReading | None, reason: str
) -> None:
    """A bad reading would otherwise become the reference, or look like a fall; it still spends
    patience."""
    controller = absa(patience=4)
    first = controller.update(progress(1, 90), bad)
    assert first.reason == f"eigenvalue not used: {reason}".replace("\\", "")
    assert controller.state_dict()["reference"] is None
    controller.update(progress(2, 90), reading(100))
    assert controller.update(progress(3, 90), bad).batch_size == 128
    assert controller.state_dict()["reference"] == 100
    assert controller.update(progress(4, 90), bad).batch_size == 256
    assert controller.decision.reason.endswith("no growth for 4 estimates")


def test_a_negative_eigenvalue_does_not_grow_twice() -> None:
    controller = absa(patience=None)
    for epoch in range(1, 20):
        assert controller.update(progress(epoch, 90), reading(-3)).batch_size == 128


def test_without_patience_only_the_eigenvalue_grows_the_batch() -> None:
    controller = absa(patience=None)
    for epoch in range(1, 50):
        controller.update(progress(epoch, 90), reading(100))
    assert controller.decision.batch_size == 128
    assert controller.update(progress(50, 90), reading(50)).batch_size == 256


def test_forced_growth_keeps_the_reference() -> None:
    controller = absa(patience=2)
    controller.update(progress(1, 90), reading(100))
    assert controller.update(progress(2, 90), reading(60)).batch_size == 256
    assert controller.state_dict()["reference"] == 100
    assert controller.update(progress(3, 90), reading(50)).batch_size == 512


def test_growth_and_decay_factor_apart() -> None:
    controller = absa(cap=4096, decay_factor=4, growth_factor=3, share_decay=5)
    controller.update(progress(1, 90), reading(100))
    assert controller.update(progress(2, 90), reading(26)).batch_size == 128
    decision = controller.update(progress(3, 90), reading(25))
    assert (decision.batch_size, decision.lr_factor) == (384, 3)
    assert SHARE * decision.attack_factor == pytest.approx(0.04)


@pytest.mark.parametrize(
    ("start", "factor", "sizes"), [(5, 1.5, [7, 10, 15]), (4, 1.1, [5, 6, 7]), (100, 1.15, [115])]
)
def test_non_integer_growth_rounds_down_but_always_grows(
    start: int, factor: float, sizes: list[int]
) -> None:
    controller = ABSA(start, 1000, growth_factor=factor, patience=1)
    for epoch, size in enumerate(sizes, 1):
        decision = controller.update(progress(epoch, 90), reading(100))
        assert (decision.batch_size, decision.lr_factor) == (size, size / start)


@pytest.mark.parametrize(("own", "of_progress", "last"), [(None, 8, 3), (20, 8, 9), (None, 5, 1)])
def test_adversary_stops_half_way(own: int | None, of_progress: int, last: int) -> None:
    controller = absa(total_epochs=own, patience=None)
    factors = [
        controller.update(progress(e, of_progress), reading(100)).attack_factor
        for e in range(1, last + 2)
    ]
    assert factors == [1] * last + [0]
    total = own or of_progress
    assert controller.decision.reason == f"adversarial share 0 from half of the {total} epochs on"
    assert controller.update(progress(last + 2, of_progress), reading(100)).reason == ""


def test_shares_of_a_microbatch_of_128() -> None:
    """25, 12, 6, 3, 1, 0 adversarial images of 128 after k growths, as the reference counts
    them."""
    controller, images = ABSA(128, 50_000, patience=1), []
    for epoch in range(1, 7):
        images.append(int(128 * SHARE * controller.decision.attack_factor))
        controller.update(progress(epoch, 90), reading(100))
    assert images == [25, 12, 6, 3, 1, 0]


def test_no_room_to_grow_asks_for_nothing() -> None:
    controller = ABSA(128, 128)
    assert controller.needs == frozenset()
    assert controller.update(progress(1)).batch_size == 128
    assert controller.decision.attack_factor == 1


def test_abs_decides_the_batch_as_absa_does_and_attacks_nothing() -> None:
    controller, with_adversary = ABS(128, 1024), absa(total_epochs=100)
    assert controller.decision.attack_factor == 0
    for epoch in range(1, 9):
        decision = controller.update(progress(epoch), reading(200 / 2**epoch))
        assert decision.attack_factor == 0
        beside = with_adversary.update(progress(epoch), reading(200 / 2**epoch))
        assert decision == replace(beside, attack_factor=0.0)
    assert decision.batch_size == 1024


def test_saved_and_restored_continues_the_same() -> None:
    eigenvalues = [100, 80, math.nan, 49, 25, -1, 12, 11]
    whole, first = absa(patience=3), absa(patience=3)
    for epoch, value in enumerate(eigenvalues[:4], 1):
        whole.update(progress(epoch, 90), reading(value))
        first.update(progress(epoch, 90), reading(value))
    resumed = absa(patience=3)
    resumed.load_state_dict(first.state_dict())
    assert resumed.decision == whole.decision
    assert not resumed.is_due(progress(4))
    for epoch, value in enumerate(eigenvalues[4:], 5):
        assert resumed.update(progress(epoch, 90), reading(value)) == whole.update(
            progress(epoch, 90), reading(value)
        )
    assert resumed.state_dict() == whole.state_dict()
    assert all(isinstance(v, (int, float, str, type(None))) for v in whole.state_dict().values())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, r"batch_size must be a whole number >= 1, got 0"),
        ({"batch_size": 1.5}, r"batch_size must be a whole number >= 1, got 1.5"),
        ({"batch_size": True}, r"batch_size must be a whole number >= 1, got True"),
        ({"max_batch_size": 2.0}, r"max_batch_size must be a whole number >= 1, got 2.0"),
        ({"max_batch_size": 64}, r"max_batch_size must be >= batch_size 128, got 64"),
        ({"decay_factor": 1}, r"decay_factor must be a finite number > 1, got 1"),
        ({"decay_factor": math.nan}, r"decay_factor must be a finite number > 1, got nan"),
        ({"growth_factor": math.inf}, r"growth_factor must be a finite number > 1, got inf"),
        ({"growth_factor": "2"}, r"growth_factor must be a finite number > 1, got '2'"),
        ({"patience": 0}, r"patience must be a whole number >= 1, got 0"),
        ({"share_decay": 0.5}, r"share_decay must be a finite number >= 1, got 0.5"),
        ({"total_epochs": 0}, r"total_epochs must be a whole number >= 1, got 0"),
    ],
)
def test_bad_arguments(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(HessianFlowError, match=message):
        ABSA(**{"batch_size": 128, "max_batch_size": 1024, **arguments})  # type: ignore[arg-type]


def test_a_cap_beyond_the_training_set_is_refused_at_once() -> None:
    with pytest.raises(
        HessianFlowError, match="max_batch_size must be <= the 1000 training examples, got 1024"
    ):
        absa().update(progress(1, examples_per_epoch=1000), reading(100))


def test_a_foreign_state_is_refused() -> None:
    with pytest.raises(
        HessianFlowError, match=r"state must come from ABSA, but the names \['estimates'\]"
    ):
        absa().load_state_dict({k: v for k, v in absa().state_dict().items() if k != "estimates"})
