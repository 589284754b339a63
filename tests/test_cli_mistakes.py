"""Nothing is mis-set or ignored in silence: what a user may get wrong at the command, each with its
one line."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from command_runs import (
    in_a_folder_of_its_own,  # noqa: F401
    run,
)

from hessianflow import History
from hessianflow.config import TrainConfig
from hessianflow.resolve import resolve

QUICK = ["--epochs", "1", "--plots", "false", "--run-dir", "run"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ["train", "--batch_size", "32"],
            "unknown option: --batch_size 32 (did you mean --batch-size?)",
        ),
        (
            ["train", "--batchsize=32"],
            "unknown option: --batchsize=32 (did you mean --batch-size?)",
        ),
        (["train", "--epoch", "3"], "unknown option: --epoch 3 (did you mean --epochs?)"),
        (["train", "--lr.x", "3"], "unknown option: --lr.x (did you mean --lr?)"),
        (["train", "--data", "digit"], "unknown data set 'digit' (did you mean digits?)"),
        (["train", "--controller", "null"], "--controller: unknown controller 'null'"),
        (
            ["train", "--controller.patients", "3"],
            "unknown option --controller.patients (did you mean --controller.patience?); absa has",
        ),
        (
            ["train", "--controller.patience", "x"],
            "--controller.patience: expected int, got x",
        ),
        (
            ["train", "--controller.growth_factor", "-inf"],
            "--controller.growth-factor: expected float, got -inf",
        ),
        (
            ["train", "--adversary", "none", "--adversary.share", "0.5"],
            "--adversary.share needs an adversary: name one with --adversary",
        ),
        (
            ["train", "--controller", "nowhere:Mine"],
            "--controller nowhere:Mine",
        ),
        (
            ["train", "--optimizer", "torch.nn:Linear"],
            "--optimizer torch.nn:Linear",
        ),
        (["train", "stray"], "unknown option: stray"),
        (["trian"], "unknown command 'trian' (did you mean train?); there are train, resume,"),
        (
            ["--lr", "3", "train"],
            "--lr stands before the command: name that first, as in hessianflow train --lr",
        ),
        (["train", "--lr", "-1e3"], "--lr must be at least 0, got -1000.0"),
        (["train", "--lr", "-inf"], "--lr: expected float, got -inf"),
        (
            ["train", "--schedule.milestones", "[" * 100_000],
            "--schedule.milestones: 100000 characters, more than 65536",
        ),
        (
            ["train", "--schedule.milestones", "[" * 50_000],
            "--schedule.milestones: more than 8 levels: no setting has as many",
        ),
        (
            ["train", "--schedule.milestones", "&a [*a]"],
            "--schedule.milestones: aliases are not read here: write the value out",
        ),
        (["train", "--epochs=&a [*a]"], "--epochs: aliases are not read here"),
        (["train", "--model", "&a [*a]"], "unknown model '&a [*a]'"),
        (
            ["train", "--epochs", "9" * 5000],
            "--epochs: a number of 5000 digits: none that is used here has more than 300",
        ),
        (["train", "--epochs", "9" * 400], "--epochs: a number of 400 digits"),
        (["train", "--lr", "-" + "9" * 400], "--lr: a number of 400 digits"),
        (
            ["train", "--epochs", "9" * 20],
            "--epochs must be at most 1e+06, got 99999999999999999999",
        ),
        (["train", "--run-dir", "a\0b"], r"--run-dir must not hold the character '\x00'"),
        (["train", "--run-dir", ""], "--run-dir must not be empty"),
        (["plot"], "the following arguments are required: run_dirs (see hessianflow plot --help)"),
        (
            ["compare"],
            "the following arguments are required: run_dirs (see hessianflow compare --help)",
        ),
        (
            ["data"],
            (
                "hessianflow data: error: name what to do: fetch or verify (see hessianflow data"
                " --help)"
            ),
        ),
        (["data", "fetch"], "required: name (see hessianflow data fetch --help)"),
        (["plan", "nope"], "hessianflow plan: error: unknown kind 'nope'; there are dual-batch"),
        (["resume", "~nobody-here"], "no home folder is known"),
        (
            ["train", "--data", "folder", "--data-dir", "~nobody-here/x"],
            "~nobody-here/x: no home folder is known",
        ),
        (
            ["train", "--data", "cifar10", "--data-dir", "~nobody-here/x"],
            "~nobody-here/x: no home folder is known",
        ),
        (["report", "x", "--out", ""], "a path must not be empty"),
        (["train", "--config"], "--config needs the name of a file of settings"),
        (["train", "--device", "hpu"], "--device hpu cannot be used here"),
        (["train", "--device", "mkldnn"], "--device mkldnn cannot be used here"),
        (["train", "--model", "torch.nn:Identity"], "has no parameter to train"),
        (
            ["robustness", "run", "--attack", "pgd" + "9" * 30],
            "--attack must be fgsm or pgd and a number of steps up to",
        ),
        (["spectrum", "run", "--k", "1000000"], "--k must be at most 1000, got 1000000"),
        (["spectrum", "run", "--seed", "-1"], "--seed must be at least 0, got -1"),
        (
            ["plan", "--workers", "9" * 400],
            "--workers must be at most 1e+09, got a number of about 400 digits",
        ),
        (["plan", "--price", "nan"], "--price: expected float, got nan"),
        (
            ["plan", "dual-batch", "--preset", "cifar100", "--workers", "-1"],
            "--workers must be at least 1, got -1",
        ),
        (
            ["plan", "dual-batch", "--preset", "cifar100", "--extra-time", "1e308"],
            "--extra-time must be at most 1e+06",
        ),
    ],
    ids=lambda value: " ".join(value)[:50] if isinstance(value, list) else "",
)
def test_a_mistake_is_one_line_with_the_way_out(arguments: list[str], words: str, capsys):
    status, out, err = run(*arguments, capsys=capsys)
    assert (status, out, err.count("\n")) == (2, "", 1), err
    assert words in err
    assert len(err) < 700
    assert list(Path().iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ["--schedule", "cosine", "--schedule.milestones", "[3]"],
            "--schedule.milestones is an option of multistep, not of cosine: leave it out, or use",
        ),
        (
            ["--schedule", "cosine", "--milestones", "[3]"],
            "unknown option --milestones: use --controller.milestones with --controller"
            " grow-instead-of-decay or --schedule.milestones with --schedule multistep",
        ),
        (
            ["--controller", "fixed", "--controller.patience", "3"],
            "--controller.patience is an option of absa and abs, not of fixed",
        ),
        (
            ["--controller", "fixed", "--patience", "3"],
            "unknown option --patience: use --controller.patience with --controller absa or abs",
        ),
        (
            ["--sam-rho", "0.05"],
            "unknown option --sam-rho: use --optimizer.rho with --optimizer sam",
        ),
        (
            ["--conadv-attack", "pgd"],
            "unknown option --conadv-attack: use --adversary.attack with --adversary conadv",
        ),
        (
            ["--adversarial-share=0.5"],
            "unknown option --adversarial-share: use --adversary.share with --adversary fgsm or",
        ),
        (
            ["--data-dir", "somewhere"],
            "--data-dir does nothing with --data digits: name the data set",
        ),
        (
            ["--probe-examples", "5000"],
            "--probe-examples 5000 is larger than the 1438 training examples of digits",
        ),
        (
            ["--train-examples", "5000"],
            "--train-examples 5000 is more than the 1438 that the train set of digits has",
        ),
        (
            ["--test-examples", "360"],
            "--test-examples 360 is more than the 359 that the test set of digits has",
        ),
        (
            ["--adversary", "pgd", "--adversary.share", "0"],
            "--adversary pgd does nothing with --adversary.share 0",
        ),
        (
            ["--controller", "abs", "--adversary", "pgd"],
            "--controller abs: it trains on clean examples, leave --adversary pgd out or use absa",
        ),
        (
            ["--optimizer", "adamw", "--optimizer.momentum", "0.5"],
            "--optimizer.momentum is an option of sgd and lars and clars and muon, not of adamw",
        ),
        (
            ["--data", "cifar10", "--optimizer", "lamb"],
            "--optimizer lamb needs --lr: 0.1, the rate of cifar10 runs, is",
        ),
        (
            ["--data", "fake", "--optimizer", "lars"],
            "--optimizer lars needs --lr: 0.02, the rate of fake runs, is SGD's",
        ),
        (["--max-lr-factor", "4"], "--max-lr-factor 4 needs --lr-rule"),
    ],
    ids=" ".join,
)
def test_an_option_that_would_be_ignored_is_refused(arguments: list[str], words: str, capsys):
    status, out, err = run("train", *arguments, capsys=capsys)
    assert (status, out, err.count("\n")) == (2, "", 1), err
    assert words in err
    assert list(Path().iterdir()) == []


def test_a_replay_and_a_plan_refuse_them_too(capsys):
    assert run("train", *QUICK, capsys=capsys)[0] == 0
    status, _, err = run(
        "replay", "run", "--controller", "critical", "--controller.patience", "3", capsys=capsys
    )
    assert (status, err.count("\n")) == (2, 1)
    assert "--controller.patience is an option of absa and abs, not of critical" in err
    status, _, err = run(
        "plan", "--controller", "fixed", "--controller.growth-factor", "3", capsys=capsys
    )
    assert (status, err.count("\n")) == (2, 1)
    assert "--controller.growth-factor is an option of absa and abs and adabatch, not of" in err


@pytest.mark.slow
def test_what_a_file_holds_for_other_choices_is_said_not_refused(capsys):
    """One file may serve several choices; what is as it would be anyway is no word worth."""
    Path("base.yaml").write_text(
        "epochs: 1\nplots: false\nschedule: {name: multistep, milestones: [1]}\nseed: null\n"
        "train_examples: 128\ntest_examples: 32\nmax_batch_size: 64\n"
        "controller: {name: absa, patience: 3}\nimage_size: null\nmax_rollbacks: 3\n"
    )
    options = [
        "--config",
        "base.yaml",
        "--schedule",
        "cosine",
        "--optimizer",
        "adamw",
        "--run-dir",
        "run",
    ]
    status, _, err = run("train", *options, capsys=capsys)
    told = "hessianflow: note: not used with these settings: schedule.milestones\n"
    assert (status, err) == (0, told)
    again = ["train", "--config", "run/settings.yaml", "--run-dir", "again"]
    assert run(*again, capsys=capsys)[::2] == (0, "")
    assert run("train", *QUICK[:-1], "plain", capsys=capsys)[0] == 0
    assert run("train", "--config", "plain/settings.yaml", "--run-dir", "copy", capsys=capsys)[
        ::2
    ] == (0, "")


def test_a_file_in_the_words_of_an_older_release_is_upgraded_and_said_once(capsys):
    Path("old.yaml").write_text(
        "epochs: 1\nplots: false\nmilestones: [1]\npatience: 3\nmomentum: 0.8\nseed: null\n"
        "adversarial_share: 0.1\nsam_rho: 0\n"
    )
    status, _, err = run("train", "--config", "old.yaml", "--run-dir", "run", capsys=capsys)
    assert status == 0
    assert err.count("\n") == 1
    assert "old.yaml has the form of an older release (" in err
    for name in ("milestones", "patience", "momentum", "adversarial_share", "sam_rho"):
        assert name in err
    settings = History.load("run").config["settings"]
    assert settings["controller"]["patience"] == 3
    assert settings["schedule"]["milestones"] == [1]
    assert settings["optimizer"]["momentum"] == 0.8
    assert settings["adversary"]["share"] == 0.1
    status, text, _ = run("train", "--config", "old.yaml", "--print-config", capsys=capsys)
    assert status == 0
    Path("new.yaml").write_text(text)
    assert run("train", "--config", "new.yaml", "--run-dir", "again", capsys=capsys)[::2] == (0, "")
    again = History.load("again").config["settings"]
    assert {**again, "run_dir": "run"} == settings
    status, out, err = run("train", "--config", "old.yaml", "--lr", "-1", capsys=capsys)
    assert (status, out, err.count("\n")) == (2, "", 1)


def test_what_is_typed_counts_wherever_it_stands_beside_a_file(capsys):
    Path("base.yaml").write_text("epochs: 3\nplots: false\nlr: 0.5\n")
    options = ["--lr", "0.02", "--config", "base.yaml", "--epochs", "1", "--run-dir", "run"]
    assert run("train", *options, capsys=capsys)[0] == 0
    settings = History.load("run").config["settings"]
    assert (settings["lr"], settings["epochs"]) == (0.02, 1)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("batch-size: 3\n", "there is no setting 'batch-size' (did you mean batch_size?)"),
        ("batchsize: 3\n", "there is no setting 'batchsize' (did you mean batch_size?)"),
        ("config: base.yaml\n", "there is no setting 'config'"),
        ("epochs: many\n", "in base.yaml: --epochs: expected int, got many"),
        (
            "schedule: {name: multistep, milestones: [a, b]}\n",
            "in base.yaml: --schedule.milestones: expected int, got a",
        ),
        ("milestones: [a, b]\n", "in base.yaml: --schedule.milestones: expected int, got a"),
        ("schedule: {milestones: [1]}\n", "schedule needs a name, as in {name: ...}"),
        (
            "controller: {name: fixed, patience: 3}\n",
            "--controller.patience is an option of absa and abs, not of fixed",
        ),
        ("epochs: [1, 2]\n", "in base.yaml: --epochs: expected int, got [1, 2]"),
        (f"epochs: {'9' * 5000}\n", "--epochs: a number of 5000 digits"),
    ],
    ids=lambda value: value[:20],
)
def test_a_mistake_in_a_file_names_the_file(content: str, words: str, capsys):
    Path("base.yaml").write_text(content)
    status, out, err = run("train", "--config", "base.yaml", capsys=capsys)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert words in err
    assert "base.yaml" in err
    assert len(err) < 400


@pytest.mark.parametrize("optimizer", ["adam", "adamw", "lars", "clars", "lamb", "muon"])
def test_an_optimizer_has_a_rate_of_its_own(optimizer: str):
    """Not SGD's 0.05; on digits all have one, measured; and where the noise follows the root, the
    rate does."""
    config = resolve(TrainConfig(optimizer=optimizer))  # type: ignore[arg-type]
    assert config.lr is not None
    assert config.lr != 0.05
    follows_the_root = optimizer in ("adam", "adamw", "lamb", "muon")
    assert config.lr_rule == ("sqrt" if follows_the_root else None)
    own = resolve(TrainConfig(optimizer=optimizer, lr=0.05, lr_rule="linear"))  # type: ignore[arg-type]
    assert (own.lr, own.lr_rule) == (0.05, "linear")


@pytest.mark.parametrize(
    ("controller", "rule"),
    [
        ("absa", "sqrt"),
        ("warmup", "sqrt"),
        ("timed", "sqrt"),
        ("critical", "sqrt"),
        ("fixed", None),
        ("adabatch", None),
    ],
)
def test_the_rule_of_adaptive_optimizers_is_for_controllers_that_scale_the_rate(
    controller: str, rule: str | None
):
    assert resolve(TrainConfig(optimizer="adamw", controller=controller)).lr_rule == rule  # type: ignore[arg-type]
    assert resolve(TrainConfig(controller=controller)).lr_rule is None  # type: ignore[arg-type]


def test_a_growth_under_adamw_multiplies_the_rate_by_the_root(capsys):
    options = [
        "--optimizer",
        "adamw",
        "--schedule",
        "constant",
        "--epochs",
        "2",
        "--controller.patience",
        "1",
        "--plots",
        "false",
        "--run-dir",
        "run",
    ]
    assert run("train", *options, capsys=capsys)[0] == 0
    first, second = History.load("run").epochs
    assert (first["batch_size"], second["batch_size"]) == (32, 64)
    assert (first["lr"], second["lr"]) == (0.001, pytest.approx(0.001 * 2**0.5))


def test_the_warm_up_of_the_warmup_controller_is_the_one_asked_for(capsys):
    """From the rate of 32 to that of 64 within one epoch; the schedule has no ramp beside it."""
    options = [
        "--controller",
        "warmup",
        "--max-batch-size",
        "64",
        "--controller.warmup-epochs",
        "1",
        "--epochs",
        "2",
    ]
    options += ["--schedule", "constant"]
    assert run("train", *options, "--plots", "false", "--run-dir", "run", capsys=capsys)[0] == 0
    history = History.load("run")
    assert [row["lr"] for row in history.epochs] == [
        pytest.approx(0.1, rel=0.05),
        pytest.approx(0.1),
    ]
    assert [row["lr_factor"] for row in history.of_kind("batch")][-1] == 2


@pytest.mark.slow
def test_switches_are_true_when_nothing_follows(capsys):
    small = ["--train-examples", "128", "--test-examples", "32", "--max-batch-size", "64"]
    assert run("train", "--overfitting-alarm", *small, *QUICK, capsys=capsys)[0] == 0
    assert History.load("run").of_kind("robustness")
    status, _, err = run(
        "spectrum", "--density", "run", "--k", "1", "--examples", "16", "--trace", capsys=capsys
    )
    assert status == 0, err
    found = json.loads(Path("run/spectrum.json").read_text())
    assert found["density"] is not None
    assert found["trace"] is not None
    assert run("train", "--augment", "false", *small, *QUICK[:-1], "again", capsys=capsys)[0] == 0


def test_paths_begin_at_home_with_a_tilde(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    import matplotlib.pyplot  # noqa: F401 - at its first import it makes folders of its own

    monkeypatch.setenv("HOME", str(tmp_path))
    assert run("train", *QUICK[:-1], "~/run", capsys=capsys)[0] == 0
    assert run("compare", "~/run", "--out=~/compared", capsys=capsys)[0] == 0
    status, out, _ = run("data", "verify", "cifar10", "--data-dir", "~", capsys=capsys)
    assert (status, f"{tmp_path}/cifar" in out) == (2, True)
    assert {path.name for path in tmp_path.iterdir()} == {"run", "compared"}


MODEL = """
from torch import nn


def net(num_classes, input_size, in_channels):
    import helper_of_own_net

    return nn.Sequential(nn.Flatten(), nn.Linear(in_channels * input_size**2, num_classes))
"""


@pytest.fixture
def own_net(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A model beside the user's, in a folder that is not on Python's path."""
    (tmp_path / "own_net.py").write_text(MODEL)
    (tmp_path / "helper_of_own_net.py").write_text("")
    monkeypatch.setattr(
        sys, "path", [entry for entry in sys.path if entry not in ("", str(tmp_path))]
    )
    yield "own_net:net"
    for name in ("own_net", "helper_of_own_net"):
        sys.modules.pop(name, None)


def test_a_model_in_the_working_directory_is_found(own_net: str, capsys):
    assert run("train", "--model", own_net, *QUICK, capsys=capsys)[0] == 0
    assert sys.path[-1] == os.getcwd(), "what it imports later is found, and hides nothing"


@pytest.mark.parametrize(
    "command",
    [
        ["resume", "run"],
        ["spectrum", "run", "--k", "1"],
        ["second-opinion", "run", "--k", "1", "--examples", "8"],
        ["robustness", "run", "--attack", "fgsm", "--eps", "0", "--examples", "8"],
        ["plan", "--run", "run", "--workers", "1", "--slope", "1e-3", "--intercept", "1e-3"],
    ],
    ids=lambda command: command[0],
)
def test_a_run_directory_alone_runs_no_code(
    command: list[str], own_net: str, tmp_path: Path, capsys
):
    assert run("train", "--model", own_net, *QUICK, capsys=capsys)[0] == 0
    del sys.modules["own_net"]
    source = tmp_path / "own_net.py"
    source.write_text(f"open('ran', 'w').close()\n{source.read_text()}")
    status, _, err = run(*command, capsys=capsys)
    assert (status, err.count("\n")) == (2, 1)
    assert (
        "run/config.json names code that would be run: if you trust it, add --model own_net:net"
        in err
    )
    assert not Path("ran").exists()
    assert run(*command, "--model", own_net, capsys=capsys)[0] == 0
    status, _, err = run(*command, "--model", "other:net", capsys=capsys)
    assert status == 2
    assert "--model other:net: the model of run is own_net:net" in err


def test_a_preempted_run_says_how_it_goes_on(own_net: str, capsys, monkeypatch: pytest.MonkeyPatch):
    from hessianflow.training import AdaptiveBatchTrainer

    fit = AdaptiveBatchTrainer.fit

    def stopped(trainer: AdaptiveBatchTrainer) -> History:
        trainer.request_stop()
        return fit(trainer)

    monkeypatch.setattr(AdaptiveBatchTrainer, "fit", stopped)
    assert (
        f"hessianflow resume run --model {own_net}  continues"
        in run("train", "--model", own_net, *QUICK, capsys=capsys)[1]
    )


def test_an_error_of_a_loading_process_is_its_last_line():
    from hessianflow.cli import _last_cause

    wrapped = (
        "Caught HessianFlowError in DataLoader worker process 0.\nOriginal Traceback (most recent"
        ' call last):\n  File "x.py", line 3, in f\n    raise'
        " E\nhessianflow.interfaces.HessianFlowError: a.png: cannot be decoded\n"
    )
    assert _last_cause(wrapped) == "a.png: cannot be decoded"
    assert _last_cause("plain: words") == "plain: words"


def started(*arguments: str, **options: object) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "hessianflow", *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=120, **options
    )  # type: ignore[call-overload,no-any-return]


@pytest.mark.slow
def test_standard_output_that_is_closed_or_full(tmp_path: Path):
    """`>&-` and `>/dev/full`: silence, or one line, but never a traceback."""
    code = (
        "import os, sys; os.close(1); os.execv(sys.executable, [sys.executable, '-m',"
        " 'hessianflow', '--version'])"
    )
    closed = subprocess.run(
        [sys.executable, "-c", code], stderr=subprocess.PIPE, text=True, check=False, timeout=120
    )
    assert (closed.returncode, closed.stderr) == (0, "")
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "hessianflow", "--help"],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert (done.returncode, done.stderr) == (2, "hessianflow: error: No space left on device\n")


@pytest.mark.slow
def test_a_name_that_the_terminal_cannot_show_is_written_in_escapes(capsys):
    assert run("train", *QUICK[:-1], "Läufe", capsys=capsys)[0] == 0
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    done = started("compare", "Läufe", env=environment)
    assert (done.returncode, done.stderr) == (0, "")
    assert r"| L\xe4ufe | 1 |" in done.stdout
