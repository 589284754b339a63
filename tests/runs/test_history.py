"""The reader of history.jsonl and of the files beside it: what comes back, and what is refused by
name."""

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from made_rows import batch, curvature, epoch, event, place

from hessianflow.interfaces import HessianFlowError
from hessianflow.runs import History
from hessianflow.runs.documents import read_config, read_measurement, read_robustness, read_summary
from hessianflow.runs.history import LONGEST_LINE


def write(folder: Path, *lines: Any) -> Path:
    """A history of these rows; text goes in as it is."""
    texts = [line if isinstance(line, (str, bytes)) else json.dumps(line) for line in lines]
    whole = b"".join((text if isinstance(text, bytes) else text.encode()) + b"\n" for text in texts)
    (folder / "history.jsonl").write_bytes(whole)
    return folder


def test_no_run_there(tmp_path: Path):
    with pytest.raises(HessianFlowError, match="not a run directory"):
        History.load(tmp_path)


def test_a_torn_last_line_is_left_out(tmp_path: Path):
    for torn in (b'{"kind":"epoch","epo', b"\0\0\0\0", b'{"kind":"ep\n', b"\xff\xfe"):
        (tmp_path / "history.jsonl").write_bytes(json.dumps(epoch()).encode() + b"\n" + torn)
        assert History.load(tmp_path).epochs == [epoch()]


def test_kinds_and_fields_of_later_releases_are_read(tmp_path: Path):
    rows = [
        {"kind": "tomorrow", "figure": 1.5},
        epoch(trusted=True, spread={"low": 1}),
        place("robustness") | {"a": 1},
    ]
    assert History.load(write(tmp_path, *rows)).records == rows


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (curvature(eigenvalue="big"), 'eigenvalue must be a number or null, got "big"'),
        (epoch(train_loss=[1]), "train_loss must be a number or null, got [1]"),
        (epoch(epoch=None), "epoch must be a whole number, got null"),
        (epoch(epoch=1.5), "epoch must be a whole number, got 1.5"),
        (batch(32, True), "to must be a whole number, got true"),
        (batch(0, 4), "from must be at least 1, got 0"),
        (epoch(examples=-1), "examples must be at least 0, got -1"),
        (
            epoch(examples=10**18),
            "examples must be at most 9007199254740992, got 1000000000000000000",
        ),
        (epoch(eval_accuracy=7), "eval_accuracy must be at most 1.000001, got 7"),
        (epoch(lr=1e308), "lr must be a finite number of at most 1e+100, got 1e+308"),
        (
            epoch(note=[{"deep": 1e200}]),
            "note.0.deep must be a finite number of at most 1e+100, got 1e+200",
        ),
        (curvature(norm_mode=["eval"]), 'norm_mode must be text, got ["eval"]'),
        (curvature(converged=1), "converged must be true or false, got 1"),
        (curvature(eigenvalues=[1.0, "x"]), 'eigenvalues.1 must be a number or null, got "x"'),
        (curvature(matvecs=None), "matvecs must be a whole number, got null"),
        (
            {name: value for name, value in epoch().items() if name != "updates"},
            "updates is missing",
        ),
        (
            {name: value for name, value in batch(1, 2).items() if name != "lr_factor"},
            "lr_factor is missing",
        ),
        ({name: value for name, value in event().items() if name != "event"}, "event is missing"),
        (place("commit") | {"commits": 1, "worker": "w"}, "started is missing"),
        (place("throughput"), "elapsed is missing"),
        ({"epoch": 1}, "kind is missing"),
        ({"kind": 5}, "kind must be text, got 5"),
        ({"kind": "mine", "epoch": "one"}, 'epoch must be a whole number, got "one"'),
        ([1], "it is not a record"),
        ("NaN", "must be a finite number"),
        ('{"kind": "epoch", "lr": 1e999}', "lr must be a finite number"),
        ('{"kind": "epoch", "examples": ' + "9" * 400 + "}", "examples must be a finite number"),
        ('{"kind": "epoch", "examples": ' + "9" * 5000 + "}", "examples must be a finite number"),
        (
            '{"kind": "mine", "examples": 99999999999999999999}',
            "examples must be a whole number, got 1e+20",
        ),
        ("[" * 200_000, "lists or objects are nested deeper than 50"),
        ('{"kind": ' * 100 + "1" + "}" * 100, "lists or objects are nested deeper than 50"),
        ('"' + "x" * (LONGEST_LINE + 10) + '"', f"it is longer than {LONGEST_LINE} bytes"),
        ("rubbish", "it is not JSON"),
        (b"\xff\xfe{}", "it is not JSON"),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, str) else "",
)
def test_a_damaged_line_is_named_or_skipped(tmp_path: Path, row: Any, words: str):
    folder = write(tmp_path, epoch(), row, curvature(), epoch(2))
    begins = re.escape(f"history.jsonl line 2: {words}")
    with pytest.raises(
        HessianFlowError, match=begins + r".*: the file is damaged; delete the line"
    ) as caught:
        History.load(folder)
    assert len(str(caught.value)) < 400 + len(str(folder))
    assert History.load(folder, damaged="skip").records == [epoch(), curvature(), epoch(2)]


def test_brackets_within_text_are_no_nesting(tmp_path: Path):
    row = batch(1, 2, reason="[" * 500 + '\\"{')
    assert History.load(write(tmp_path, row)).records == [row]


def test_an_endless_line_is_not_read_to_its_end(tmp_path: Path):
    with open(tmp_path / "history.jsonl", "wb") as file:
        file.truncate(10**12)  # sparse: a terabyte of zeros
    with pytest.raises(HessianFlowError, match=r"line 1: it is longer than"):
        History.load(tmp_path)


def test_what_to_do_about_damage_is_one_of_two(tmp_path: Path):
    with pytest.raises(
        HessianFlowError, match='damaged must be "refuse" or "skip", got \'ignore\''
    ):
        History.load(tmp_path, damaged="ignore")  # type: ignore[arg-type]


def test_damaged_config_is_named(tmp_path: Path):
    write(tmp_path)
    for text, words in (
        ("{", r"config.json is not JSON"),
        ("[1]", "must hold a JSON object, found a list"),
        ('{"trainer": [1]}', r"trainer must be an object, got \[1\]: the file is damaged"),
        ('{"trainer": {"epochs": "3"}}', r'trainer.epochs must be a whole number or null, got "3"'),
        (
            '{"trainer": {"examples_per_epoch": 0}}',
            r"trainer.examples_per_epoch must be at least 1, got 0",
        ),
        ('{"settings": 5}', "settings must be an object, got 5"),
        ('{"resolution_stages": [{"start": 0}]}', r"resolution_stages.0.level is missing"),
        (
            '{"dual_batch": {"times": {"8": {"slope": -1}}}}',
            "times.8.slope must be at least 1e-100, got -1",
        ),
        (
            '{"dual_batch": {"times": {"x": {}}}}',
            r"dual_batch.times must have a resolution as each key, got 'x'",
        ),
        ('{"a": ' + "[" * 100_000, "nested deeper than 50"),
        ('{"a": {"b": 1e400}}', r"a.b must be a finite number of at most"),
    ):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(HessianFlowError, match=words):
            History.load(tmp_path)
        with pytest.raises(HessianFlowError, match=words):
            read_config(tmp_path)


def test_a_file_out_of_proportion_is_not_read(tmp_path: Path):
    with open(tmp_path / "summary.json", "wb") as file:
        file.truncate(10**12)
    with pytest.raises(
        HessianFlowError, match=r"summary.json is larger than 64 MiB: the file is damaged"
    ):
        read_summary(tmp_path)


def test_damaged_summary_and_robustness_are_named(tmp_path: Path):
    assert read_summary(tmp_path) == {}
    assert read_robustness(tmp_path) is None
    (tmp_path / "summary.json").write_text('{"final_accuracy": "high"}')
    with pytest.raises(
        HessianFlowError, match=r'final_accuracy must be a number or null, got "high"'
    ):
        read_summary(tmp_path)
    for text, words in (
        ('{"eps": [0.1]}', "accuracy is missing"),
        ('{"eps": [0.1], "accuracy": {}}', "must hold at least one attack"),
        (
            '{"eps": [0.1], "accuracy": {"fgsm": []}}',
            "accuracy.fgsm must hold 1 values, one an eps, got 0",
        ),
        (
            '{"eps": [0.1], "accuracy": {"fgsm": [[0.1, 0.2]]}}',
            r"accuracy.fgsm.0 must hold 3 values, got \[0.1, 0.2\]",
        ),
    ):
        (tmp_path / "robustness.json").write_text(text)
        with pytest.raises(
            HessianFlowError, match=rf"{words}.*make it again with `hessianflow robustness"
        ):
            read_robustness(tmp_path)


def test_a_fact_that_is_not_there_is_named(tmp_path: Path):
    write(tmp_path)
    (tmp_path / "config.json").write_text('{"trainer": {"epochs": 3}}')
    history = History.load(tmp_path)
    assert history.fact("epochs") == 3
    with pytest.raises(HessianFlowError, match=r"config.json holds no trainer.parameters"):
        history.fact("parameters")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{}", "it must hold sizes and seconds"),
        ('{"slope": 1}', "it must hold sizes and seconds"),
        ('{"sizes": [1, 2], "seconds": [1]}', "it must hold sizes and seconds"),
        ('{"sizes": [1, 0], "seconds": [1, 2]}', "sizes.1 must be at least 1, got 0"),
        ('{"measured": {"slope": "1", "intercept": 1}}', 'slope must be a number, got "1"'),
        ('{"measured": 5}', "must be an object, got 5"),
        ('{"slope": 1e300, "intercept": 1}', "slope must be a finite number"),
    ],
)
def test_damaged_step_times_are_named(tmp_path: Path, text: str, words: str):
    (tmp_path / "plan.json").write_text(text)
    with pytest.raises(HessianFlowError, match=words):
        read_measurement(tmp_path / "plan.json")


def ended() -> History:
    rows = [epoch(1), epoch(2), curvature(2)]
    return History(rows, summary={"status": "finished"}, run_dir=Path("runs/<one>"))


def test_a_history_is_one_line_and_a_table_in_a_notebook() -> None:
    text = repr(ended())
    assert text.startswith("History(runs/<one>; 2 epochs; ")
    assert "1 curvature readings" in text
    assert "\n" not in text
    html = ended()._repr_html_()
    assert "runs/&lt;one&gt;" in html
    assert html.count("<tr>") == 3
    assert repr(History([])) == "History(0 epochs; 0 curvature readings; 0 growths of the batch)"


def test_rows_become_a_data_frame_where_pandas_is() -> None:
    pytest.importorskip("pandas")
    frame = ended().to_pandas()
    assert list(frame["epoch"]) == [1, 2]
    assert len(ended().to_pandas("curvature")) == 1
    assert len(ended().to_pandas("")) == 3


def test_without_pandas_the_way_out_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(HessianFlowError, match=r"needs the package pandas: pip install .*notebook"):
        ended().to_pandas()
