"""Hundreds of damaged run directories before every command that reads them: refused in one line, or
read."""

import copy
import json
import math
import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("fuzz", reason="needs SIGALRM")
from fuzz import VALUES, Case, Prepare, report, run, run_all, some, torn

from hessianflow.runs.names import LOCK

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]

SECONDS = 120.0
"""Far more than the 2 s that a case takes on an idle machine."""
SMALL = [
    "--data",
    "fake",
    "--train-examples",
    "64",
    "--test-examples",
    "32",
    "--model",
    "resnet8",
    "--batch-size",
    "16",
]
SMALL += ["--epochs", "3", "--plots", "false", "--device", "cpu"]
GROWING = [*SMALL, "--probe-examples", "16", "--max-batch-size", "32", "--controller.patience", "1"]
SERVER = [*SMALL, "--controller", "dual-batch"]
SERVER += ["--controller.slope", "0.1", "--controller.intercept", "1.0"]
RUN_FILES = ("run/config.json", "run/history.jsonl", "run/summary.json", "run/checkpoints/last.pt")
Change = Callable[[Any, random.Random], None]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Finished runs: one with readings and growths, one on a parameter server; with what was
    measured of the first."""
    folder = tmp_path_factory.mktemp("runs")
    threads = torch.get_num_threads()
    for name, arguments in (("absa", GROWING), ("server", SERVER)):
        status, error = run(["train", *arguments, "--run-dir", str(folder / name)], 600)
        assert status == 0, error
    small = ["--examples", "16"]
    for command in (
        ["spectrum", "--k", "1", "--density", "true", "--layers", "*"],
        ["robustness", "--eps", "0.1"],
    ):
        status, error = run([command[0], str(folder / "absa"), *command[1:], *small], 600)
        assert status == 0, error
    yield folder
    torch.set_num_threads(threads)


def placed(source: Path, change: Callable[[Path], None], name: str = "run") -> Prepare:
    """A copy of a run, changed."""

    def prepare(folder: Path) -> None:
        shutil.copytree(source, folder / name)
        change(folder / name)

    return prepare


def interrupted(run_dir: Path) -> None:
    """As if it had been killed after its second epoch: resuming has something to do."""
    (run_dir / "summary.json").unlink()
    if (run_dir / "checkpoints" / "previous.pt").exists():
        os.replace(run_dir / "checkpoints" / "previous.pt", run_dir / "checkpoints" / "last.pt")


READERS = (
    ["plot", "run", "--out", "pictures"],
    ["compare", "run"],
    ["report", "run"],
    ["replay", "run"],
    ["replay", "run", "--controller", "critical"],
    ["plan", "--run", "run", "--slope", "0.001", "--intercept", "0.01", "--workers", "1,2"],
)


def dumped(value: Any) -> bytes:
    """JSON with whatever Python can say: NaN, lone surrogates."""
    return json.dumps(value).encode("utf-8", "surrogatepass")


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every (container, key) inside a JSON value."""
    entries = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    )
    for key, item in list(entries):
        yield value, key
        yield from places(item)


def spoil(value: Any, chance: random.Random) -> str:
    """Put another value somewhere, or take one away; says what was done."""
    container, key = chance.choice(list(places(value)))
    if chance.random() < 0.15:
        del container[key]
        return f"{key} gone"
    container[key] = copy.deepcopy(chance.choice(VALUES))
    return f"{key} = {str(container[key])[:20]!r}"


def history_cases(source: Path, count: int, chance: random.Random) -> Iterator[Case]:
    """A field of a row changed, a row lost or doubled, or the bytes of the file damaged."""
    lines = [json.loads(line) for line in (source / "history.jsonl").read_bytes().splitlines()]
    for _ in range(some(count)):
        rows, what = copy.deepcopy(lines), []
        kind = chance.random()
        if kind < 0.75:
            what = [spoil(chance.choice(rows), chance) for _ in range(chance.choice((1, 1, 3)))]
        elif kind < 0.85:
            chance.shuffle(rows)
            del rows[chance.randrange(len(rows)) :]
            what.append("rows lost and shuffled")
        content = b"".join(dumped(row) + b"\n" for row in rows)
        if kind >= 0.85:
            accident, content = torn(content, chance)
            what.append(accident)

        def change(run_dir: Path, content: bytes = content) -> None:
            (run_dir / "history.jsonl").write_bytes(content)

        yield Case(
            f"history: {', '.join(what)}",
            chance.choice(READERS),
            placed(source, change),
            keeps=RUN_FILES,
        )


def json_cases(
    source: Path, name: str, commands: Any, count: int, chance: random.Random
) -> Iterator[Case]:
    """One or several values of a JSON file changed, or its bytes damaged."""
    whole = json.loads((source / name).read_text())
    for _ in range(some(count)):
        value, what = copy.deepcopy(whole), []
        if chance.random() < 0.85:
            what = [spoil(value, chance) for _ in range(chance.choice((1, 1, 2)))]
            content = dumped(value)
        elif chance.random() < 0.3:
            content = dumped(chance.choice(VALUES))
            what.append(f"all of it {content[:20]!r}")
        else:
            accident, content = torn(dumped(value), chance)
            what.append(accident)

        def change(run_dir: Path, content: bytes = content) -> None:
            (run_dir / name).write_bytes(content)

        yield Case(
            f"{name}: {', '.join(what)}",
            chance.choice(commands),
            placed(source, change),
            keeps=RUN_FILES,
        )


def checked(cases: list[Case], folder: Path) -> None:
    """Run all, and say how many ended how; where no case was accepted, something else would be
    tested than is meant."""
    tally = run_all(cases, folder, seconds=SECONDS)
    print(f"{len(cases)} cases: {tally.counts}; slowest {tally.slowest}")
    assert not tally.failures, report(tally)
    assert tally.counts.get(0, 0) > 0
    assert tally.counts.get(2, 0) > 0


def test_histories(runs: Path, tmp_path: Path):
    chance = random.Random(1)
    cases = [
        *history_cases(runs / "absa", 130, chance),
        *history_cases(runs / "server", 40, chance),
    ]
    checked(cases, tmp_path)


def test_configs_before_readers(runs: Path, tmp_path: Path):
    chance = random.Random(2)
    cases = [*json_cases(runs / "absa", "config.json", READERS, 100, chance)]
    cases += json_cases(
        runs / "server", "config.json", [*READERS, ["plot", "run", "--out", "p"]], 30, chance
    )
    checked(cases, tmp_path)


def test_settings_before_what_trains_and_measures(runs: Path, tmp_path: Path):
    """One setting of the file changed; what trains is small, so settings that make it large are
    left out."""
    chance = random.Random(3)
    whole = json.loads((runs / "absa" / "config.json").read_text())
    heavy = {
        "epochs",
        "model",
        "threads",
        "loader_workers",
        "compile",
        "data",
        "resolution",
        "precision",
    }
    measure = (
        ["spectrum", "run", "--k", "1", "--examples", "8"],
        ["robustness", "run", "--eps", "0.1"],
        ["resume", "run"],
    )
    cases = []
    for name in sorted(whole["settings"].keys()):
        for value in chance.sample(VALUES, some(3)):
            if name in heavy and (type(value) is int or isinstance(value, str)):
                continue
            config = copy.deepcopy(whole)
            config["settings"][name] = value

            def change(run_dir: Path, config: Any = config) -> None:
                interrupted(run_dir)
                (run_dir / "config.json").write_bytes(dumped(config))

            argv = chance.choice(measure)
            keeps = () if argv[0] == "resume" else RUN_FILES
            title = f"settings.{name} = {str(value)[:20]!r}"
            cases.append(Case(title, argv, placed(runs / "absa", change), keeps=keeps))
    checked(cases, tmp_path)


def test_summaries_and_measurements(runs: Path, tmp_path: Path):
    chance = random.Random(4)
    drawn = (["compare", "run"], ["report", "run"], ["resume", "run"])
    cases = [*json_cases(runs / "absa", "summary.json", drawn, 40, chance)]
    cases += json_cases(runs / "absa", "spectrum.json", [["report", "run"]], 45, chance)
    cases += json_cases(runs / "absa", "robustness.json", [["report", "run"]], 25, chance)
    checked(cases, tmp_path)


def test_step_times(runs: Path, tmp_path: Path):
    chance = random.Random(5)
    plan = {
        "measured": {
            "sizes": [1, 2, 4],
            "seconds": [0.1, 0.15, 0.25],
            "update_seconds": 0.01,
            "source": "here",
        }
    }

    def prepared(content: bytes) -> Prepare:
        return lambda folder: (folder / "plan.json").write_bytes(content) and None

    cases = []
    for _ in range(some(40)):
        value = copy.deepcopy(plan)
        what, content = spoil(value, chance), dumped(value)
        if chance.random() < 0.2:
            what, content = torn(content, chance)
        argv = [
            "plan",
            "--data",
            "fake",
            "--train-examples",
            "64",
            "--batch-size",
            "16",
            "--max-batch-size",
            "16",
        ]
        argv += [
            "--gradient-bytes",
            "1000",
            "--workers",
            "1,2",
            "--measured",
            "plan.json",
            "--controller",
            "fixed",
        ]
        cases.append(Case(f"plan.json: {what}", argv, prepared(content)))
    checked(cases, tmp_path)


def test_checkpoints(runs: Path, tmp_path: Path):
    """Well-formed files with something else inside, and files with damaged bytes."""
    chance = random.Random(6)
    commands = (
        ["resume", "run"],
        ["resume", "run"],
        ["spectrum", "run", "--k", "1", "--examples", "8"],
    )
    cases = []
    for number in range(some(120)):
        source = runs / ("server" if number % 4 == 0 else "absa")
        older = chance.random() < 0.5

        def change(run_dir: Path, seed: int = number, older: bool = older) -> None:
            damage(run_dir, random.Random(seed), older=older)

        argv = chance.choice(commands)
        cases.append(Case(f"checkpoint {number}, older one: {older}", argv, placed(source, change)))
    checked(cases, tmp_path)


def damage(run_dir: Path, chance: random.Random, *, older: bool) -> None:
    """Spoil the last checkpoint of an interrupted run; with an older one beside it, or without."""
    interrupted(run_dir)
    path = run_dir / "checkpoints" / "last.pt"
    if older:
        shutil.copy(path, run_dir / "checkpoints" / "previous.pt")
    if chance.random() < 0.3:
        path.write_bytes(torn(path.read_bytes(), chance)[1])
        return
    state = torch.load(path, weights_only=True)
    values = [value for value in VALUES if not isinstance(value, str) or value.isprintable()]
    values += [torch.ones(2), torch.zeros(0), torch.tensor(5), torch.ones(2, dtype=torch.int8)]
    for _ in range(chance.choice((1, 1, 2))):
        container, key = chance.choice(list(places(state)))
        if chance.random() < 0.2 and isinstance(container, dict):
            del container[key]
        elif isinstance(container[key], torch.Tensor) and chance.random() < 0.5:
            container[key] = chance.choice(
                [
                    container[key] * math.inf,
                    container[key].flatten(),
                    container[key].to(torch.int8),
                    container[key][:0],
                ]
                if container[key].ndim
                else [container[key] * math.nan]
            )
        else:
            container[key] = chance.choice(values)
    torch.save(state, path)


def test_names_and_targets(runs: Path, tmp_path: Path):
    """Run directories with odd names, and odd places to write to."""
    names = [
        "$x^$",
        "a\nb",
        "a\udcffb",
        "_a",
        " ",
        "日本",
        "=1",
        "<b>|`",
        "\x1b[31m",
        "x" * 200,
        "-",
        "a$b$c",
    ]
    given = ["--slope", "0.001", "--intercept", "0.01", "--workers", "1,2"]
    readers = (
        ["plot", "{{}}/{}"],
        ["compare", "{{}}/{}", "--out", "o"],
        ["report", "{{}}/{}"],
        ["resume", "{{}}/{}"],
    )
    readers = (*readers, ["plan", *given, "--run", "{{}}/{}"])
    cases = [
        Case(
            f"named {name[:20]!r}",
            [word.format(name) for word in argv],
            placed(runs / "absa", unchanged, name),
        )
        for name in names
        for argv in readers
    ]
    targets = [
        *RUN_FILES,
        "/dev/null",
        "/dev/full",
        "/proc/self/mem",
        "run/pipe",
        "run/folder",
        "run/nowhere",
    ]
    targets += ["run/mine.html", "run/plots/x.html", "", "x" * 300, "a\udcffb"]
    drawing = ["run/pipe", "run/history.jsonl", "/dev/null", "run/folder", "run/nowhere"]
    commands = [["report", "run", "--out", target] for target in targets]
    commands += [
        [command, "run", "--out", target] for target in drawing for command in ("plot", "compare")
    ]
    keeps = (*RUN_FILES, "run/mine.html")
    cases += [
        Case(f"to {argv[-1][:20]}", argv, placed(runs / "absa", odd), keeps=keeps)
        for argv in commands
    ]
    checked(cases, tmp_path)


def unchanged(_run_dir: Path) -> None:
    """Nothing."""


def odd(run_dir: Path) -> None:
    """Things that no report may take the place of."""
    os.mkfifo(run_dir / "pipe")
    (run_dir / "folder").mkdir()
    (run_dir / "nowhere").symlink_to(run_dir / "not" / "there")
    (run_dir / "mine.html").write_text("<html>mine</html>")


def test_directories_that_hold_something(runs: Path, tmp_path: Path):
    """A run is started, or resumed, where there is something already."""
    chance = random.Random(7)
    files = [
        "config.json",
        "settings.yaml",
        "history.jsonl",
        "summary.json",
        "checkpoints",
        "notes.txt",
        LOCK,
    ]
    sorts = ["empty", "folder", "link", "pipe", "json", "noise", "temporary"]
    train = [
        "train",
        *SMALL,
        "--epochs",
        "1",
        "--controller",
        "fixed",
        "--curvature",
        "off",
        "--run-dir",
        "run",
    ]
    cases = []
    for number in range(some(40)):
        chosen = [name for name in files if chance.random() < 0.25]
        kinds = {name: chance.choice(sorts) for name in chosen}

        def prepare(folder: Path, kinds: dict[str, str] = kinds) -> None:
            (folder / "run").mkdir()
            for name, kind in kinds.items():
                make(folder / "run" / name, kind)

        argv = train if number % 3 else ["resume", "run"]
        cases.append(Case(f"{kinds}", argv, prepare))
    checked(cases, tmp_path)


def make(path: Path, kind: str) -> None:
    """Something of this kind at a path."""
    if kind == "folder":
        path.mkdir()
    elif kind == "link":
        path.symlink_to(path.with_name("nothing"))
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "temporary":
        path.with_name(f".{path.name}.1.tmp").touch()
    else:
        path.write_bytes(
            {"empty": b"", "json": b'{"architectures": []}', "noise": b"\xff\0[{"}[kind]
        )
