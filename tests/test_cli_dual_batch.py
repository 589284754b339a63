"""Resolutions and dual-batch runs from the command line."""

import pytest
from command_runs import (
    in_a_folder_of_its_own,  # noqa: F401
    run,
)

from hessianflow import History
from hessianflow.build import build_trainer
from hessianflow.config import TrainConfig
from hessianflow.resolve import resolve

FAKE = [
    "--data",
    "fake",
    "--model",
    "resnet8",
    "--train-examples",
    "256",
    "--test-examples",
    "64",
    "--plots",
    "false",
]
CYCLIC = [
    "--resolution",
    "cyclic",
    "--epochs",
    "4",
    "--schedule.milestones",
    "[2]",
    "--curvature",
    "off",
]


@pytest.mark.slow
def test_resolution_under_any_controller(capsys):
    plan = [
        *CYCLIC,
        "--resolution-batch-sizes",
        "[64, 32]",
        "--dropouts",
        "[0.1, 0.2]",
        "--batch-size",
        "32",
    ]
    status, _, err = run(
        "train",
        *FAKE,
        *plan,
        "--controller",
        "fixed",
        "--adversary",
        "none",
        "--run-dir",
        "r",
        capsys=capsys,
    )
    assert (status, err) == (0, "")
    history = History.load("r")
    assert [row["updates"] for row in history.epochs] == [4, 12, 16, 24]
    stages = [
        (s["start"], s["end"], s["level"]["resolution"], s["level"]["dropout"])
        for s in history.config["resolution_stages"]
    ]
    assert stages == [(0, 1, 12, 0.1), (1, 2, 16, 0.2), (2, 3, 12, 0.1), (3, 4, 16, 0.2)]
    assert history.of_kind("batch")[0]["reason"] == "resolution 16 from epoch 1 on"
    assert run("spectrum", "r", "--k", "1", capsys=capsys)[0] == 0, (
        "the model is built with its dropout again"
    )


def test_absa_measures_at_the_resolution_it_trains_at_and_forgets_it_at_a_change():
    config = TrainConfig(
        data="fake",
        model="resnet8",
        train_examples=128,
        test_examples=32,
        batch_size=32,
        max_batch_size=64,
        epochs=2,
        schedule={"name": "multistep", "milestones": ()},
        resolution="cyclic",
        probe_examples=16,
        adversary="none",
    )
    trainer, sides = build_trainer(resolve(config)), []
    trainer.model[0].register_forward_pre_hook(
        lambda _, inputs: sides.append((len(inputs[0]), inputs[0].shape[-1]))
    )
    history = trainer.fit()
    assert len(history.curvature) == 2
    assert {side for count, side in sides if count == 16} == {12, 16}, "one reading at each"
    state = trainer.controller.state_dict()["controller"]
    assert state["reference"] is None
    assert state["estimates"] == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ["--resolution", "cyclic", "--epochs", "9", "--model", "c1"],
            "layer '9' (Linear(in_features=1024",
        ),
        (
            ["--resolution", "cyclic", "--resolutions", "[16, 24]"],
            "--resolutions must end with 16, the pixels a side",
        ),
        (
            ["--resolution", "cyclic", "--resolutions", "[16, 12]"],
            "--resolutions must be one or more increasing sizes",
        ),
        (
            ["--resolution", "cyclic", "--epochs", "1"],
            "--resolution cyclic: phase_ends must leave 2 epochs for 2",
        ),
        (["--resolutions", "[12, 16]"], "--resolutions needs --resolution cyclic, once or uniform"),
        (
            ["--resolution", "once", "--dropouts", "[0.1]"],
            "--dropouts must hold one value for each of the 2 resolutio",
        ),
        (
            ["--resolution", "once", "--dropouts", "[0.1, 1.0]"],
            "--dropouts must lie in [0, 1), got [0.1, 1.0]",
        ),
        (
            ["--resolution", "once", "--dropouts", "[0.1, 0.2]", "--adversary", "conadv"],
            (
                "--dropouts needs --adversary.staleness 0: dropout is set when a batch is drawn,"
                " which is too early with staleness 1"
            ),
        ),
        (
            ["--resolution", "once", "--resolution-batch-sizes", "[0, 1]"],
            "--resolution-batch-sizes must be 1 or more",
        ),
        (
            ["--workers", "2"],
            "unknown option --workers: use --controller.workers with --controller dual-batch",
        ),
        (
            ["--controller", "dual-batch", "--norm-batch-size", "ranks"],
            "--norm-batch-size ranks: dual batches train",
        ),
        (
            ["--controller.extra-time", "1.1"],
            "--controller.extra-time is an option of dual-batch, not of fixed",
        ),
    ],
)
def test_bad_resolutions_are_one_line(arguments: list[str], words: str, capsys):
    status, _, err = run("train", *FAKE, "--controller", "fixed", *arguments, capsys=capsys)
    assert status == 2
    assert err.startswith("hessianflow train: error: ")
    assert words in err
    assert err.count("\n") == 1


def test_plan_prints_a_line_for_each_number_of_small_workers(capsys):
    """The published CIFAR-100 setting; 7.0025 s and 243 are the reference's own figures."""
    status, out, err = run(
        "plan", "dual-batch", "--preset", "cifar100", "--extra-time", "1.05", capsys=capsys
    )
    assert (status, err) == (0, "")
    lines = [line.split() for line in out.splitlines()]
    assert ["3", "243", "12292", "0.9365", "560", "13125", "7.0025", "0.02%", "28.009"] in lines
    assert ["0", "-", "-", "-", "600", "12500", "4.7166", "0.00%", "18.866"] in lines
    assert (
        "140 epochs with 0 small workers: 933.5 s at 32 pixels, 796.9 s cyclic (0.8537 of it)"
        in out
    )


def test_plan_from_figures_shows_which_lines_cannot_be(capsys):
    figures = [
        "--examples",
        "50000",
        "--batch-size",
        "500",
        "--slope",
        "0.0005",
        "--intercept",
        "0.01",
    ]
    status, out, _ = run("plan", "dual-batch", *figures, "--extra-time", "1.4", capsys=capsys)
    assert status == 0
    assert "extra_time_ratio must be < 1.333 with 3 large of 4 workers, got 1.4" in out
    status, out, _ = run(
        "plan", "dual-batch", *figures, "--small-workers", "2", "--workers", "8", capsys=capsys
    )
    assert status == 0
    assert len(out.splitlines()) == 3


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--examples", "9"], "--batch-size is needed, or --preset cifar100, imagenet, compsac"),
        (
            ["--preset", "cifar100", "--slope", "1"],
            "--slope and --preset cifar100 both give it: leave one out",
        ),
        (
            ["--preset", "cifar100", "--small-workers", "5"],
            "--small-workers 5 is more than --workers 4",
        ),
        (
            ["--examples", "9", "--batch-size", "4", "--slope", "-1", "--intercept", "1"],
            "slope must be a finite number > 0, got -1.0",
        ),
        (["--preset", "mnist"], "--preset"),
    ],
)
def test_bad_plans_are_one_line(arguments: list[str], words: str, capsys):
    status, _, err = run("plan", "dual-batch", *arguments, capsys=capsys)
    assert status == 2
    assert words in err
    assert err.count("\n") == 1


DUAL = [
    *FAKE,
    "--controller",
    "dual-batch",
    "--controller.slope",
    "0.001",
    "--controller.intercept",
    "0.02",
    "--batch-size",
    "16",
]


@pytest.mark.slow
def test_dual_batch_trains_stops_and_resumes(capsys):
    """The command of the README; resumed it has nothing to do."""
    plan = [
        "--controller.workers",
        "4",
        "--controller.small-workers",
        "3",
        "--controller.extra-time",
        "1.05",
        "--epochs",
        "2",
        "--schedule.milestones",
        "[]",
    ]
    status, out, err = run("train", *DUAL, *plan, "--run-dir", "r", capsys=capsys)
    assert (status, err) == (0, "")
    assert "finished: test accuracy" in out
    history = History.load("r")
    assert len(history.of_kind("commit")) == 8
    assert history.summary["predicted_seconds"] == pytest.approx(
        2 * 1.05 * (0.001 + 0.02 / 16) * 64
    )
    assert run("resume", "r", capsys=capsys)[1] == "r has finished already: nothing to resume\n"
    assert run("spectrum", "r", "--k", "1", capsys=capsys)[0] == 0
    assert run("replay", "r", "--controller", "dual-batch", capsys=capsys)[2].startswith(
        "hessianflow replay: error: --controller dual-batch plans its batches before a run"
    )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ["--controller.small-workers", "5"],
            "--controller dual-batch: small_workers 5 is more than workers 4",
        ),
        (
            ["--controller.small-workers", "1", "--controller.extra-time", "1.4"],
            (
                "--controller dual-batch: extra_time must be less than 1.333 (workers / large"
                " workers) with 3 large of 4 workers, got 1.4"
            ),
        ),
        (["--controller.extra-time", "0.9"], "extra_time must be a finite number >= 1, got 0.9"),
        (["--controller.workers", "0"], "workers must be a whole number >= 1, got 0"),
        (["--controller.slope", "0"], "slope must be a finite number > 0, got 0.0"),
        (
            ["--controller.intercept", "[0.1, -0.1]"],
            "intercept must be a finite number > 0, got -0.1",
        ),
        (
            ["--controller.slope", "[0.1, 0.1]"],
            "--controller.slope must hold one value for each of the resolutions [16], got"
            " [0.1, 0.1]",
        ),
        (
            ["--controller.slope", "null"],
            "slope and intercept make a line together: give both or neither",
        ),
        (
            ["--on-divergence", "rollback"],
            "--on-divergence does nothing with --controller dual-batch: leave it out",
        ),
        (["--batch-size", "128"], "a batch of 86 is more than the 63 examples"),
        (["--model", "c1", "--resolution", "once"], "layer '9' (Linear(in_features=1024"),
        (
            ["--controller.server", "ray", "--ray-address", "127.0.0.1:1"],
            "no Ray cluster answers at 127.0.0.1:1",
        ),
    ],
)
def test_bad_dual_batch_settings_are_one_line(arguments: list[str], words: str, capsys):
    status, _, err = run("train", *DUAL, *arguments, capsys=capsys)
    assert status == 2
    assert err.startswith("hessianflow train: error: ")
    assert words in err
    assert err.count("\n") == 1
