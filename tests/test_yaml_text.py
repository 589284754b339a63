"""Files of settings and values from strangers: read within bounds, or refused without a word of
what they hold."""

import json
import os
import time
from pathlib import Path

import pytest
import yaml

from hessianflow.commands.yaml_text import MOST_BYTES, MOST_CHARACTERS, load_value, read_settings
from hessianflow.interfaces import HessianFlowError

LAUGHS = "a: &a [x, x]\n" + "".join(
    f"{c}: &{c} [*{p}, *{p}]\n" for p, c in zip("abcdefghij", "bcdefghijk", strict=True)
)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)


def refusal(content: str | bytes) -> str:
    Path("x.yaml").write_bytes(content.encode() if isinstance(content, str) else content)
    began = time.monotonic()
    with pytest.raises(HessianFlowError, match=r"^--config x\.yaml") as refused:
        read_settings("x.yaml")
    assert time.monotonic() - began < 10
    message = str(refused.value)
    assert "\n" not in message
    assert len(message) < 300
    return message


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (LAUGHS, "aliases are not read here"),
        ("&a {x: *a}", "aliases are not read here"),
        ("epochs: 2\n<<: {lr: 1}\n", "must be a number, a word or a list, found a mapping"),
        ("[" * 100_000, "more than 8 levels"),
        ("milestones: " + "[" * 50_000, "more than 8 levels"),
        ("- " * 30_000, "more than 8 levels"),
        ("{a: " * 50_000, "more than 8 levels"),
        ("- 1\n" * 60_000, "more than 20000 parts"),
        ("x" * (MOST_BYTES + 1), f"more than {MOST_BYTES} bytes"),
        ("epochs: 2".encode("utf-16"), "not UTF-8 text"),
        (b"model: caf\xe9\n", "not UTF-8 text"),
        (b"\x7fELF\x02\x01\x01\x00\x00", "not the YAML of a settings file"),
        ("password hunter2", "found a scalar"),
        ("- secret\n- hunter2", "found a sequence"),
        ("epochs: [hunter2\n", "not the YAML of a settings file"),
        (
            "epochs: {hunter2: 3}",
            "line 1: epochs must be a number, a word or a list, found a mapping",
        ),
        ("epochs: 2\nlr: 1\nepochs: 3\n", "line 3: epochs is set a second time"),
        ("? [hunter2]\n: 3", "the name of a setting must be a word, found a sequence"),
        ("model: !!python/object/apply:os.system [hunter2]", "found a tag"),
        ("model: !!python/name:os.system hunter2", "found a tag"),
        ("model: !!binary aHVudGVyMg==", "found a tag"),
        ("--- {epochs: 2}\n--- {epochs: 3}", "expected a single document"),
        ('run_dir: "a\\0b"\x00', "not the YAML of a settings file"),
        ("\ttab: 1", "not the YAML of a settings file"),
    ],
    ids=lambda value: repr(value[:24]),
)
def test_a_file_that_is_no_settings_is_one_short_line(content: str | bytes, words: str):
    message = refusal(content)
    assert words in message
    assert "hunter2" not in message, "nothing of what the file holds is repeated"


def test_the_record_of_a_run_points_to_its_settings():
    record = json.dumps({"settings": {"epochs": 2}, "environment": {"python": "3"}})
    assert "is the record of a run: its settings are in settings.yaml beside it" in refusal(record)


def test_what_is_no_plain_file_is_not_waited_for():
    os.mkfifo("pipe.yaml")
    Path("folder.yaml").mkdir()
    began = time.monotonic()
    for name in ("pipe.yaml", "folder.yaml", "/dev/zero"):
        with pytest.raises(HessianFlowError, match="must be a plain file"):
            read_settings(name)
    for name in ("nowhere.yaml", "a\0b", ""):
        with pytest.raises(HessianFlowError, match="cannot be read"):
            read_settings(name)
    assert time.monotonic() - began < 5


def test_values_are_what_would_be_typed():
    Path("x.yaml").write_text(
        "\ufeff# a comment\nepochs: 2\nlr: 1e-3\nplots: no\nmodel: '010'\nrun_dir:"
        " 2024-01-02\nmilestones: [1,\n  2]\nstages:\n- [2, 64]\n- - 3\n  - 128\nseed:\ndata_dir:"
        ' null\nlog_level: ~\ncontroller: "null"\n'
    )
    assert read_settings("x.yaml") == {
        **{"epochs": "2", "lr": "1e-3", "plots": "no", "model": "010", "run_dir": "2024-01-02"},
        **{"milestones": "[1, 2]", "stages": "[[2, 64], [3, 128]]"},
        **{"seed": "null", "data_dir": "null", "log_level": "null", "controller": "null"},
    }
    Path("empty.yaml").write_text("# nothing\n")
    assert read_settings("empty.yaml") == {}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("[1, 2]", [1, 2]),
        ("1e-3", 1e-3),
        ("[1E3, .5]", [1000.0, 0.5]),
        ("true", True),
        ("a b", "a b"),
        ("", ""),
    ],
)
def test_values_of_the_command_line(text: str, value: object):
    assert load_value(text) == value


@pytest.mark.parametrize(
    "text",
    [
        "[" * 50_000,
        "&a [*a]",
        "9" * 5000,
        "x" * (MOST_CHARACTERS + 1),
        "\ud800",
        "[" * 9 + "]" * 9,
        "- " * 9,
    ],
)
def test_values_beyond_the_bounds_are_an_error_of_yaml(text: str):
    with pytest.raises(yaml.YAMLError):
        load_value(text)
