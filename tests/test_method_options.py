"""Options of methods at the command: nested, refused by name, printed, taken from older files."""

import json
import sys
import textwrap
from pathlib import Path

import pytest
import yaml
from command_runs import (
    in_a_folder_of_its_own,  # noqa: F401
    run,
)

from hessianflow import History

QUICK = ("--epochs", "1", "--plots", "false", "--curvature", "needed", "--run-dir", "run")

OWN = '''
"""Methods of a user."""
from hessianflow.control.controller import Controller, ControllerState


class Doubling(Controller):
    """Double the batch every few epochs.

    Args:
        batch_size: examples per step at the start.
        max_batch_size: the cap.
        every: epochs between two growths.
    """

    def __init__(self, batch_size, max_batch_size, *, every: int = 1):
        super().__init__(ControllerState(batch_size), max_batch_size)
        self.every = every

    def _decide(self, measured, /):
        if measured.progress.epoch % self.every:
            return ""
        self._state.batch_size = min(2 * self._state.batch_size, self.max_batch_size)
        return "doubled"


class Halves:
    """Half of the rate from a share of the run on.

    Args:
        epochs: length of the run.
        after: share of the run.
    """

    def __init__(self, epochs, *, after: float = 0.5):
        self.begin = after * epochs

    def __call__(self, epoch):
        return 1.0 if epoch < self.begin else 0.5


class Nothing:
    """No controller at all."""


def function():
    """No class either."""


VALUE = 3
'''


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> str:
    """The name of a module with methods of a user in the working directory."""
    name = f"own_{abs(hash(request.node.name))}"
    (tmp_path / f"{name}.py").write_text(OWN)
    monkeypatch.syspath_prepend(str(tmp_path))
    return name


def config(folder: str = "run") -> dict:
    return json.loads(Path(folder, "config.json").read_text())["settings"]


def test_nested_options_reach_the_methods_and_the_record(
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = [
        *("--controller", "critical", "--controller.edge-share", "0.5"),
        *("--adversary=pgd", "--adversary.steps=2", "--adversary.share", "0.5"),
        *("--optimizer.momentum", "0.8", "--schedule.decay_from", "0"),
    ]
    status, _, errors = run("train", *QUICK, *arguments, capsys=capsys)
    assert (status, errors) == (0, "")
    settings = config()
    assert settings["controller"] | {"edge_share": 0.5, "momentum": 0.8} == settings["controller"]
    assert settings["adversary"] | {"steps": 2, "share": 0.5} == settings["adversary"]
    assert settings["schedule"] == {"name": "cooldown", "decay_from": 0.0}
    assert settings["norm_mode"] == "batch", "which critical prefers"
    assert History.load("run").epochs[0]["adversarial_share"] == 0.5


def test_help_shows_the_options_of_what_was_chosen_and_of_nothing_else(
    capsys: pytest.CaptureFixture[str],
) -> None:
    _, text, _ = run("train", "--controller", "critical", "--help", capsys=capsys)
    assert "--controller.edge-share" in text
    assert "--controller.patience" not in text
    _, text, _ = run("train", "--help", capsys=capsys)
    assert "--controller.patience" in text, "of absa, the default"
    assert "--controller.edge-share" not in text
    _, text, _ = run(
        "train", "--adversary", "conadv", "--adversary.attack", "pgd", "-h", capsys=capsys
    )
    assert "--adversary.attack.steps" in text
    assert "--controller" in text
    _, text, _ = run("train", "--adversary", "none", "--help", capsys=capsys)
    assert "--adversary.eps" not in text


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            "--controller critical --controller.patience 3",
            "--controller.patience is an option of absa and abs, not of critical: leave it out, or"
            " use --controller absa",
        ),
        (
            "--controller critical --controller.edg-share 1",
            "unknown option --controller.edg-share (did you mean --controller.edge-share?);"
            " critical has momentum, loss-power, edge-share",
        ),
        (
            "--edge-share 0.5",
            "unknown option --edge-share: use --controller.edge-share with --controller critical",
        ),
        (
            "--weight-decay 0.1",
            "use --optimizer.weight-decay with --optimizer sgd or adam or adamw",
        ),
        ("--controller criticl", "unknown controller 'criticl' (did you mean critical?)"),
        ("--optimizer soap", "--optimizer: unknown optimizer 'soap'; there are sgd, adam, adamw"),
        (
            "--controller critical --controller.edge-share 2",
            "--controller critical: edge_share must be a finite number > 0 and <= 1, got 2.0",
        ),
        ("--controller.patience x", "--controller.patience: expected int, got x"),
        ("--controller.patience nan", "--controller.patience: expected int, got nan"),
        ("--optimizer.momentum -1", "--optimizer sgd: Invalid momentum value: -1.0"),
        ("--optimizer lars --optimizer.form paperr", "--optimizer.form: expected one of 'paper'"),
        ("--adversary none --adversary.eps 0.1", "--adversary.eps needs an adversary"),
        ("--adversary fgsm --adversary.share 0", "does nothing with --adversary.share 0"),
        ("--controller abs --adversary fgsm", "--controller abs: it trains on clean examples"),
        (
            "--controller warmup --warmup-epochs 3",
            "--controller warmup: --warmup-epochs is the ramp of the schedule",
        ),
        (
            "--controller grow-instead-of-decay --schedule cosine",
            "--controller grow-instead-of-decay: it replaces --schedule cosine, leave that out",
        ),
        ("--controller absa --curvature off", "--controller absa needs curvature"),
        (
            "--controller critical --norm-mode eval",
            "--controller critical: --norm-mode eval measures another function",
        ),
        ("--schedule.milestones [5,3]", "milestones must be increasing epochs, got [5, 3]"),
        ("--optimizer extrapolation", "--optimizer extrapolation needs --optimizer.lookahead-lr"),
        ("--controller nowhere:Thing", "--controller nowhere:Thing: importing 'nowhere' failed"),
        ("--controller os:getcwd", "'os' is of Python's own library"),
        ("--controller a.py:Thing", "name the module, not its file: a:Thing"),
        ("--controller null", "--controller: unknown controller 'null'"),
    ],
)
def test_mistakes_are_one_line(
    arguments: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    status, _, errors = run("train", *QUICK, *arguments.split(), capsys=capsys)
    assert status == 2
    assert words in errors
    assert errors.count("\n") == 1
    assert not Path("run").exists()


def test_a_controller_and_a_schedule_of_ones_own(
    own: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [
        *("--controller", f"{own}:Doubling", "--controller.every", "2"),
        *("--schedule", f"{own}:Halves", "--schedule.after", "0.3"),
        *("--optimizer", "torch.optim:RMSprop", "--optimizer.alpha", "0.9", "--lr", "0.001"),
    ]
    quick = ("--plots", "false", "--curvature", "off", "--run-dir", "run")
    status, _, errors = run("train", "--epochs", "4", *quick, *arguments, capsys=capsys)
    assert (status, errors) == (0, "")
    rows = History.load("run").epochs
    assert [row["batch_size"] for row in rows] == [32, 32, 64, 64]
    assert [row["lr"] for row in rows] == [0.001, 0.001, 0.0005, 0.0005]
    _, _, refused = run("resume", "run", capsys=capsys)
    paths = [f"{own}:Doubling", "torch.optim:RMSprop", f"{own}:Halves"]
    assert f"if you trust it, add --code {','.join(paths)}" in refused
    status, said, _ = run("resume", "run", "--code", ",".join(paths), capsys=capsys)
    assert (status, said) == (0, "run has finished already: nothing to resume\n")


@pytest.mark.parametrize(
    ("kind", "method"),
    [
        ("optimizer", {"name": "sam", "base": "{own}:Doubling"}),
        ("adversary", {"name": "conadv", "attack": "{own}:Doubling"}),
        ("adversary", {"name": "conadv", "runner": {"name": "{own}:Doubling"}}),
        ("controller", "{own}:Doubling"),
    ],
)
@pytest.mark.parametrize("command", ["resume", "spectrum", "replay", "robustness"])
def test_a_run_directory_runs_no_code_however_it_names_it(
    kind: str, method: object, command: str, own: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("--train-examples", "64", "--controller", "fixed")
    assert run("train", *QUICK, *arguments, capsys=capsys)[0] == 0
    record = json.loads(Path("run/config.json").read_text())
    record["settings"][kind] = json.loads(json.dumps(method).replace("{own}", own))
    Path("run/config.json").write_text(json.dumps(record))
    status, _, errors = run(command, "run", capsys=capsys)
    assert status == 2
    assert f"names code that would be run: if you trust it, add --code {own}:Doubling" in errors
    assert own not in sys.modules


def test_an_older_run_directory_runs_no_code_either(
    own: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("--train-examples", "64", "--controller", "fixed")
    assert run("train", *QUICK, *arguments, capsys=capsys)[0] == 0
    record = json.loads(Path("run/config.json").read_text())
    for name in ("controller", "optimizer", "schedule", "adversary"):
        record["settings"][name] = record["settings"][name]["name"]
    record["settings"] |= {"adversary": "conadv", "conadv_attack": f"{own}:Doubling", "eps": 0.1}
    Path("run/config.json").write_text(json.dumps(record))
    _, _, errors = run("robustness", "run", capsys=capsys)
    assert f"add --code {own}:Doubling" in errors
    assert own not in sys.modules


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("Nothing", "Nothing is no controller: it lacks decision and is_due and needs and update"),
        ("function", "function is no controller: it lacks decision"),
        ("VALUE", "has no class or function 'VALUE'; write it as package.module:Class"),
        ("Missing", "has no class or function 'Missing'"),
    ],
)
def test_what_is_no_controller_is_refused(
    name: str, words: str, own: str, capsys: pytest.CaptureFixture[str]
) -> None:
    status, _, errors = run("train", *QUICK, "--controller", f"{own}:{name}", capsys=capsys)
    assert status == 2
    assert words in errors
    assert errors.count("\n") == 1


def test_a_scheduler_of_torch_takes_a_step_an_epoch(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("--schedule", "torch.optim.lr_scheduler:StepLR", "--schedule.step-size", "1")
    quick = ("--plots", "false", "--curvature", "off", "--run-dir", "run", "--controller", "fixed")
    status, _, errors = run("train", "--epochs", "2", *quick, *arguments, capsys=capsys)
    assert (status, errors) == (0, "")
    assert [row["lr"] for row in History.load("run").epochs] == pytest.approx([0.05, 0.005])


@pytest.mark.parametrize(
    "arguments",
    ["", "--controller critical --optimizer sam --optimizer.base adamw", "--adversary conadv"],
)
def test_the_printed_settings_load_again(
    arguments: str, capsys: pytest.CaptureFixture[str]
) -> None:
    status, printed, errors = run("train", *arguments.split(), "--print-config", capsys=capsys)
    assert (status, errors) == (0, "")
    assert "# Method that decides the batch size.\ncontroller:\n  name: " in printed
    assert yaml.safe_load(printed)["epochs"] == 30
    Path("printed.yaml").write_text(printed)
    _, again, errors = run("train", "--config", "printed.yaml", "--print-config", capsys=capsys)
    assert errors == ""
    assert again == printed


def test_a_file_of_an_older_release_is_upgraded_and_said_once(
    capsys: pytest.CaptureFixture[str],
) -> None:
    Path("old.yaml").write_text(
        textwrap.dedent(
            """
            controller: critical
            edge_share: 0
            patience: 4
            momentum: 0.8
            adversarial_share: 0.4
            plots: false
            epochs: 1
            """
        )
    )
    status, _, errors = run("train", "--config", "old.yaml", "--run-dir", "run", capsys=capsys)
    assert status == 0
    assert errors.count("\n") == 1
    assert (
        "note: --config old.yaml has the form of an older release (edge_share, patience" in errors
    )
    settings = config()
    assert settings["controller"]["edge_share"] is None
    assert settings["optimizer"]["momentum"] == 0.8
    assert settings["adversary"]["share"] == 0.4


def test_of_an_older_file_only_what_moved_is_read_as_a_value(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """off is a word of the settings, 007 the name of a folder, and neither is a value of YAML."""
    text = "controller: fixed\ncurvature: 'off'\nmomentum: 0.8\nrun_dir: '007'\nepochs: 1\n"
    Path("old.yaml").write_text(f"{text}plots: false\ntrain_examples: 64\n")
    assert run("train", "--config", "old.yaml", capsys=capsys)[0] == 0
    assert config("007")["curvature"] == "off"
    assert config("007")["optimizer"]["momentum"] == 0.8


def test_the_alarm_attacks_with_the_size_of_the_adversary_or_its_own() -> None:
    from hessianflow.config import TrainConfig
    from hessianflow.measurements import _alarm_eps
    from hessianflow.resolve import resolve

    attack = {"name": "conadv", "attack": {"name": "fgsm", "eps": 0.05}}
    for given, eps in [
        ({"adversary": attack}, 0.05),
        ({"adversary": {"name": "pgd", "eps": 0.07}}, 0.07),
        ({"adversary": "none"}, 0.005),
        ({"adversary": "none", "alarm_eps": 0.1}, 0.1),
    ]:
        assert _alarm_eps(resolve(TrainConfig(overfitting_alarm=True, **given))) == eps


@pytest.mark.parametrize(
    ("settings", "today"),
    [
        (
            {"controller": {"name": "absa"}, "adversary": "fgsm", "eps": 0.1},
            {"controller": {"name": "absa"}, "adversary": {"name": "fgsm", "eps": 0.1}},
        ),
        (
            {"optimizer": {"name": "sgd"}, "momentum": 0.3},
            {"optimizer": {"name": "sgd", "momentum": 0.3}},
        ),
        (
            {"controller": "grow-instead-of-decay", "lr_decay": 0.0},
            {"controller": {"name": "grow-instead-of-decay", "decay_factor": 0.0}},
        ),
        (
            {"controller": "critical", "optimizer": "adam", "momentum": 0.5},
            {"controller": {"name": "critical", "momentum": 0.5}, "optimizer": {"name": "adam"}},
        ),
        (
            {"controller": "warmup", "warmup_epochs": 3},
            {"controller": {"name": "warmup", "warmup_epochs": 3}},
        ),
        (
            {"adversary": "none", "eps": 0.2, "overfitting_alarm": True},
            {"adversary": {"name": "none"}, "alarm_eps": 0.2, "overfitting_alarm": True},
        ),
    ],
)
def test_odd_settings_of_an_older_release_are_upgraded(settings: dict, today: dict) -> None:
    from hessianflow.upgrade import upgrade

    assert upgrade(settings) == today


def test_a_replay_takes_the_options_of_the_run(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("--train-examples", "64", "--controller.patience", "1")
    quick = ("--epochs", "3", "--plots", "false", "--run-dir", "run")
    assert run("train", *quick, *arguments, capsys=capsys)[0] == 0
    status, said, _ = run("replay", "run", "--controller", "abs", capsys=capsys)
    assert status == 0
    assert "no growth for 1 estimate" in said


def test_options_in_a_file_for_another_method_are_said_to_be_unused(
    capsys: pytest.CaptureFixture[str],
) -> None:
    Path("file.yaml").write_text("controller: {name: absa, patience: 3}\nplots: false\nepochs: 1\n")
    arguments = ("--config", "file.yaml", "--run-dir", "run")
    status, _, errors = run("train", *arguments, "--controller", "fixed", capsys=capsys)
    assert status == 0
    assert errors == "hessianflow: note: not used with these settings: controller.patience\n"
    assert config()["controller"] == {"name": "fixed"}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("controller: {patience: 3}", "controller needs a name, as in {name: ...}"),
        (
            "controller: {name: absa, edge_share: 1}",
            "--controller.edge-share is an option of critical",
        ),
        ("controller: {name: absa, patience: [1]}", "--controller.patience: expected"),
        ("controller: {name: absa, patience: 1, patience: 2}", "set a second time"),
        ("controller: {name: [absa]}", "controller"),
        ("controler: {name: absa}", "there is no setting 'controler' (did you mean controller?)"),
    ],
)
def test_mistakes_in_files_are_one_line(
    text: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("file.yaml").write_text(f"{text}\n")
    status, _, errors = run("train", *QUICK, "--config", "file.yaml", capsys=capsys)
    assert status == 2
    assert words in errors
    assert errors.count("\n") == 1


def test_polynomial_is_one_curve_with_and_without_warm_up() -> None:
    """(1 - t)^2 of the run, as the help says: 1, 0.81, 0.64 in ten epochs."""
    from hessianflow.config import TrainConfig
    from hessianflow.resolve import resolve, schedule_of

    plain = schedule_of(resolve(TrainConfig(schedule="polynomial", epochs=10)))
    warm = schedule_of(resolve(TrainConfig(schedule="polynomial", epochs=10, warmup_epochs=2)))
    for factor in (plain, warm):
        assert [factor(epoch) for epoch in (0, 1, 2, 10)] == pytest.approx([1, 0.81, 0.64, 0])
