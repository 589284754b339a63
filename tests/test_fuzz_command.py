"""Hostile words for every option of every command: each case is done, or refused on one line,
within its time.

The options are those of the parsers, and every setting of `train` is tried where the table of
effects says that something looks at it. Runs are of a second or less; none starts Ray.
"""

import itertools
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import command
from fuzz import Case, Tally, report, run_all, some

from hessianflow.cli import main
from hessianflow.commands import (
    critical_batch,
    curvature,
    data,
    plan,
    records,
    robustness,
    training,
)
from hessianflow.commands.parser import Parser, main_parser
from hessianflow.config import CHOSEN, TrainConfig, option
from hessianflow.effects import EFFECTIVE
from hessianflow.methods import KINDS, method_options

pytestmark = pytest.mark.slow
SPREAD = True

WORDS: Sequence[str] = (
    *(
        "",
        " ",
        "x",
        "null",
        "~",
        "~nobody-here/x",
        "auto",
        "none",
        "true",
        "no",
        "-",
        "--",
        "-x",
        "=",
        "@x",
        "#x",
        "%s",
    ),
    *(
        "0",
        "1",
        "2",
        "7",
        "-1",
        "-0.5",
        "0.5",
        "1e-320",
        "1e30",
        "1e308",
        "-1e308",
        "1e999",
        "nan",
        ".nan",
        "inf",
        "-.inf",
    ),
    *(
        "2147483648",
        "999999999999",
        "18446744073709551616",
        "9" * 400,
        "-" + "9" * 400,
        "9" * 5000,
        "0x10",
        "1_0",
        "1:30",
    ),
    *(
        "[]",
        "[1]",
        "[1, 2]",
        "[0, -1]",
        "[[1, 2]]",
        "[[1, 2], [3, 64]]",
        "[null]",
        "[nan]",
        "[x]",
        "{}",
        "{a: 1}",
        "- 1",
    ),
    *(
        "[" * 60_000,
        "{a: " * 20_000,
        "&a [*a]",
        "*a",
        "!!python/name:os.system",
        "? x",
        "'",
        '"',
        "[1, 2",
        "2024-13-45",
    ),
    *(
        "a\0b",
        "a\nb",
        "a\x1b[31mb",
        "a\udcffb",
        "\u202e\u2028",
        "日本\U0001f600",
        "ａ",
        "$x^$",
        "x" * 5000,
        "../..",
        "/dev/null",
    ),
    *(
        "builtins:input",
        "os:abort",
        "http.server:test",
        "nowhere:net",
        "a b:c",
        ":",
        "timm/x",
        "torch.nn:Identity",
    ),
)
"""Words that no option expects, or that few do."""
TINY = {
    **{
        "train_examples": 64,
        "test_examples": 32,
        "batch_size": 16,
        "max_batch_size": 32,
        "epochs": 1,
        "schedule.milestones": "[]",
    },
    **{
        "microbatch_size": 16,
        "probe_examples": 8,
        "plots": "false",
        "threads": 1,
        "run_dir": "{}/run",
    },
}
"""Settings of a run that takes a moment."""
ON_RAY = ("elastic", "min_workers", "max_workers", "ray_address", "controller.server")
"""Settings that start processes, which take seconds; they get words that are refused before."""
SLOW_WORDS = {"compile": ("true", "1", "yes")}
"""Words that are fine, and start a compiler."""


@pytest.fixture(autouse=True)
def undisturbed() -> Iterator[None]:
    """Settings of the whole process, which cases change."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(False)


def check(cases: Sequence[Case], tmp_path: Path, *, least: int, seconds: float = 60) -> None:
    tally: Tally = run_all(cases, tmp_path, seconds=seconds)
    assert not tally.failures, report(tally)
    assert sum(tally.counts.values()) >= least, tally.counts
    assert tally.counts.get(2, 0) > len(cases) / 3, "most of these are to be refused"


def parser() -> Parser:
    found = main_parser("hessianflow", "")
    commands = found.add_subcommands(required=False)
    for room in (training, records, curvature, critical_batch, robustness, data, plan):
        room.add(commands)
    return found


def where_it_counts(name: str) -> dict[str, Any]:
    """Settings under which something looks at `name`, by the table of effects."""
    first = next(iter(EFFECTIVE.get(name, ())), {})
    chosen = {other: values[0] for other, values in first.items() if isinstance(values, tuple)}
    defaults = {field.name: field.default for field in fields(TrainConfig)}
    if chosen.get("controller") == "dual-batch":
        chosen |= LINE
    return {
        key: value
        for key, value in chosen.items()
        if value != defaults.get(key, value if key not in LINE else None) and key != name
    }


LINE = {"controller.slope": 0.001, "controller.intercept": 0.001}
"""What a dual-batch run would measure first."""


def train_case(settings: Mapping[str, Any], name: str) -> Case:
    dual = settings.get("controller") == "dual-batch"
    left_out = ("probe_examples", "schedule.milestones") if dual else ()
    base = {
        key: value for key, value in TINY.items() if key not in left_out and key not in settings
    }
    if settings.get("curvature") == "off" or settings.get("controller") in ("timed", "adabatch"):
        base.pop("probe_examples", None)
    if (
        settings.get("schedule", "multistep") != "multistep"
        or settings.get("controller", "absa") != "absa"
    ):
        base.pop("schedule.milestones", None)
    words = [f"{option(key)}={value}" for key, value in {**base, **settings}.items()]
    return Case(name, ["train", *words])


def test_every_setting_with_words_that_it_does_not_expect(tmp_path: Path):
    chance = random.Random(19)
    cases = []
    for field in fields(TrainConfig):
        name = field.name
        words = [word for word in WORDS if word not in SLOW_WORDS.get(name, ())]
        if name in ON_RAY:
            words = [
                word
                for word in words
                if word.startswith(("-", "9" * 100, "[", "{", "a\0", "a\n", "&"))
            ]
        if name == "data_dir":
            words = [word for word in words if word != "/dev/null"]
        cases += [
            train_case({**where_it_counts(name), name: word}, f"{name} = {word[:30]!r}")
            for word in chance.sample(words, min(some(9), len(words)))
        ]
    check(cases, tmp_path, least=some(550))


PAIRS: Mapping[str, Sequence[Any]] = {
    "controller": (
        "absa",
        "abs",
        "fixed",
        "warmup",
        "timed",
        "critical",
        "cabs",
        "grow-instead-of-decay",
        "dual-batch",
    ),
    "adversary": ("none", "pgd", "conadv", "reuse"),
    "optimizer": ("adamw", "lars", "clars", "lamb", "muon", "sam"),
    "schedule": ("constant", "cosine", "cooldown", "polynomial"),
    "curvature": ("off", "needed"),
    "resolution": ("cyclic", "once"),
    "on_divergence": ("rollback",),
    "optimizer.rho": (0.05,),
    "optimizer.base": ("adam", "lars"),
    "lr_rule": ("sqrt", "none"),
    "norm_batch_size": ("ranks", 0, 7),
    "norm_mode": ("batch",),
    "warmup_epochs": (0.5,),
    "adversary.share": (0, 1),
    "adversary.staleness": (0, 3),
    "adversary.attack": ("pgd",),
    "adversary.runner": ("interleaved", "stream"),
    "schedule.milestones": ("[1]",),
    "schedule.decay_from": (0,),
    "controller.patience": ("null", 1),
    "controller.momentum": (0.5,),
    "precision": ("bf16",),
    "controller.edge_share": ("null", 0.5),
    "optimizer.weight_decay": (1e30,),
    "lr": (1e30, 0),
    "max_lr_factor": (1e30,),
    "optimizer.trust_coefficient": (1e6,),
}
"""Settings that know of each other."""


def homes_of(settings: Mapping[str, Any], chance: random.Random) -> dict[str, str]:
    """A method for each option that belongs to some, or the options would all be refused."""
    found = {}
    for name in settings:
        setting, _, option_name = name.partition(".")
        if option_name:
            kind = KINDS[setting]
            holders = [m for m in kind.methods if option_name in method_options(kind, m)]
            found[setting] = chance.choice([m for m in holders if m != "dual-batch"])
    return found


def test_every_option_of_every_method_with_words_that_it_does_not_expect(tmp_path: Path):
    chance = random.Random(22)
    cases = []
    for setting in CHOSEN:
        kind = KINDS[setting]
        for method in kind.methods:
            for known in method_options(kind, method):
                name = f"{setting}.{known}"
                words = WORDS
                if name in ON_RAY or method == "dual-batch":
                    words = [word for word in WORDS if word.startswith(("-", "[", "{", "a\n", "&"))]
                chosen = {setting: method, **(LINE if method == "dual-batch" else {})}
                if method == "extrapolation":
                    chosen["optimizer.lookahead_lr"] = 0.1
                if setting == "optimizer":
                    chosen["lr"] = 0.01
                cases += [
                    train_case({**chosen, name: word}, f"{method} {name} = {word[:30]!r}")
                    for word in chance.sample(words, min(4, len(words)))
                ]
    check(cases, tmp_path, least=300)


def test_choices_that_contradict_each_other(tmp_path: Path):
    """Two or three of them at once, drawn at random: what goes together trains, the rest is one
    line."""
    chance = random.Random(20)
    cases = []
    pairs = list(itertools.combinations(PAIRS, 2))
    for names in chance.sample(pairs, 170)[: some(170)]:
        more = chance.sample(sorted(PAIRS), 1) if chance.random() < 0.3 else []
        settings = {name: chance.choice(PAIRS[name]) for name in dict.fromkeys((*names, *more))}
        if chance.random() < 0.7:
            settings = {**homes_of(settings, chance), **settings}
        if settings.get("controller") == "dual-batch":
            settings |= LINE
        cases.append(train_case(settings, str(settings)))
    tally = run_all(cases, tmp_path, seconds=60)
    assert not tally.failures, report(tally)
    assert sum(tally.counts.values()) == some(170)
    assert min(tally.counts.get(status, 0) for status in (0, 2)) > some(20), tally.counts


FILES: Sequence[str | bytes] = (
    *(
        "",
        "null",
        "epochs",
        "- 1",
        "epochs: 1\nepochs: 2",
        "epochs: {a: 1}",
        "? [1]\n: 2",
        "epochs: &a [*a]",
        "epochs: *a",
    ),
    *(
        "seed: null",
        "controller: null",
        "momentum: ~",
        "patience: 3\nsam_rho: 0.1",
        "controller: {name: absa, patience: 3}",
        "controller: {name: absa, patience: {a: 1}}",
        "controller: {patience: 3}",
        "controller: {name: {name: absa}}",
        "schedule: {name: multistep, milestones: [[1]]}",
        "nonsense: 1",
        "batch-size: 3",
        "config: x.yaml",
        "1: 2",
        "~: 3",
    ),
    *(
        "epochs: 9" + "9" * 5000,
        "lr: .nan",
        "lr: 1e999",
        'run_dir: "a\\0b"',
        "plots: maybe",
        "milestones: [[1]]",
        "a: !!x 1",
    ),
    *(
        "[" * 100_000,
        "a: " * 50_000,
        "{a: " * 50_000,
        "x" * 300_000,
        "- " * 60_000,
        "\t",
        "%YAML 9.9\n---\nepochs: 1",
        "---\n---",
    ),
    *(
        "epochs: 1".encode("utf-16"),
        b"model: \xe9",
        b"\x7fELF\0\0",
        b"\xff" * 100,
        b"epochs: 1\r\nplots: false\r",
        b"\xef\xbb\xbf",
    ),
    *(
        "data: digits\nmodel: builtins:input",
        "adversary: [pgd]",
        "stages: [[1, 2, 3]]",
        "{}",
        "[]",
        "epochs: '1'",
        "lr: '[0.1]'",
    ),
    '{"settings": {"epochs": 1}, "environment": {}}',
    "a: &a [x, x]\n"
    + "".join(f"{c}: &{c} [*{p}, *{p}]\n" for p, c in zip("abcdefghij", "bcdefghijk", strict=True)),
)


def test_files_of_settings(tmp_path: Path):
    def case(number: int, content: str | bytes) -> Case:
        def prepare(folder: Path) -> None:
            (folder / "x.yaml").write_bytes(
                content.encode() if isinstance(content, str) else content
            )

        small = [
            f"{option(key)}={value}"
            for key, value in TINY.items()
            if key not in ("epochs", "schedule.milestones")
        ]
        return Case(
            f"file {number}: {content[:30]!r}", ["train", "--config", "{}/x.yaml", *small], prepare
        )

    check([case(*item) for item in enumerate(FILES)], tmp_path, least=45)


def commands() -> Iterator[tuple[list[str], Parser]]:
    """The words that name a command, and its parser; those that only name others apart."""
    for name, child in parser().children.items():
        if not child.children or name == "plan":
            yield [name], child
        for inner, grandchild in child.children.items():
            yield [name, inner], grandchild


QUICK: Mapping[str, Sequence[str]] = {
    "spectrum": ["RUN", "--k=1", "--examples=8"],
    "second-opinion": ["RUN", "--k=1", "--examples=8"],
    "critical-batch": ["RUN", "--repeats=1", "--batch-sizes", "[8,16]", "--lr=0.01"],
    "robustness": ["RUN", "--attack", "fgsm", "--eps", "0.01", "--examples=8"],
    "plan": [
        "--slope=1e-3",
        "--intercept=1e-3",
        "--train-examples=64",
        "--workers=1,2",
        "--epochs=1",
        "--batch-size=16",
    ],
    "plan dual-batch": ["--examples=100", "--batch-size=10", "--slope=1e-3", "--intercept=1e-3"],
    "data fetch": ["nothing"],
    "data verify": ["cifar10", "--data-dir={}"],
}
"""Further words with which a command is fast; data that are not there are not fetched. RUN: a
finished run."""


ANSWERED = {("data verify", "--data-dir")}
"""What says on standard output that files are missing, and ends with status 2: no mistake of the
command line."""


def test_further_commands_with_words_that_they_do_not_expect(tmp_path: Path):
    done = tmp_path / "done"
    small = [f"{option(key)}={value}" for key, value in TINY.items() if key != "run_dir"]
    assert main(["train", *small, f"--run-dir={done}"]) == 0
    chance = random.Random(21)
    cases = []
    for words, child in commands():
        name = " ".join(words)
        if name == "train":
            continue
        usual = [word.replace("RUN", str(done)) for word in QUICK.get(name, ["RUN"])]
        out = ["--out={}/out"] if "--out" in child.options else []
        options = [key for key in child.options if (name, key) not in ANSWERED]
        for key in options:
            kept = [
                word for word in [*usual, *out] if not word.startswith(f"{key}=") and word != key
            ]
            cases += [
                Case(f"{name} {key} = {word[:30]!r}", [*words, *kept, f"{key}={word}"])
                for word in chance.sample([word for word in WORDS if word != "/dev/null"], some(7))
            ]
        cases += [
            Case(f"{name} on {word[:30]!r}", [*words, word, *out])
            for word in chance.sample(WORDS, some(9))
        ]
    check(cases, tmp_path, least=some(350))


def test_words_that_name_no_command_and_stray_ones(tmp_path: Path):
    stray = [word for word in WORDS if word]
    cases = [Case(f"{word[:20]!r} alone", [word]) for word in stray]
    cases += [Case(f"train {word[:20]!r}", ["train", word]) for word in stray if word != " "]
    cases += [
        Case(f"train --{word[:20]!r}", ["train", f"--{word}"])
        for word in stray
        if word not in ("-", "--")
    ]
    check(cases, tmp_path, least=180)


RANKS = {
    "RANK": "0",
    "WORLD_SIZE": "2",
    "LOCAL_RANK": "0",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29400",
}


@pytest.mark.parametrize(
    ("environment", "status"),
    [
        ({"MPLBACKEND": "nonsense"}, 0),
        (
            {
                "HOME": "",
                "TMPDIR": "/nowhere",
                "COLUMNS": "x",
                "TERM": "nonsense",
                "LC_ALL": "xx_YY",
            },
            0,
        ),
        # without RANK nobody looks at them
        ({"WORLD_SIZE": "x", "LOCAL_RANK": "-5", "MASTER_PORT": "x"}, 0),
        ({"RANK": "0"}, 2),
        *(
            ({**RANKS, name: value}, 2)
            for name in RANKS
            for value in ("", "-1", "x", "9" * 5000)
            if name != "MASTER_ADDR"
        ),
        ({**RANKS, "RANK": "7"}, 2),
        ({**RANKS, "MASTER_ADDR": ""}, 2),
    ],
    ids=lambda value: (
        " ".join(f"{k}={v[:9]}" for k, v in value.items()) if isinstance(value, dict) else ""
    ),
)
def test_environments(environment: dict[str, str], status: int, tmp_path: Path):
    words = [
        f"{option(key)}={value}"
        for key, value in {**TINY, "run_dir": tmp_path / "run", "plots": "true"}.items()
    ]
    done = command(["train", *words], tmp_path, environment)
    assert (done.status, done.err.count("\n")) == (status, status // 2), done.err
    assert len(done.err) < 400
