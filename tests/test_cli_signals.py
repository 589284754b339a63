"""Signals to the command: a line and a status wherever they come, from the first import to the
last."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from hessianflow.cli import main
from hessianflow.commands.signals import Signalled, signals_raised

SPREAD = True
TRAIN = ["train", "--epochs", "1", "--run-dir", "run"]
SAID = {
    signal.SIGINT: (130, "hessianflow: interrupted\n"),
    signal.SIGTERM: (143, "hessianflow: terminated\n"),
}
BOTH = pytest.mark.parametrize("number", list(SAID), ids=lambda number: number.name)


@pytest.fixture(autouse=True)
def no_handler_of_tests_before():
    """Ray leaves one of its own in the process."""
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)


def ended(
    number: signal.Signals, wait: Callable[["subprocess.Popen[str]"], None], **environment: str
) -> tuple[int, str, str]:
    """Status, standard output and error of a command that got a signal when `wait` returned."""
    process = subprocess.Popen(
        [sys.executable, "-m", "hessianflow", *TRAIN],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
    )
    wait(process)
    process.send_signal(number)
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


def loads(module: str) -> Callable[["subprocess.Popen[str]"], None]:
    """Waits until the process has mapped a library of a module into its memory."""

    def wait(process: "subprocess.Popen[str]") -> None:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and process.poll() is None:
            if module in Path(f"/proc/{process.pid}/maps").read_text():
                return
            time.sleep(0.002)

    return wait


@pytest.mark.slow
@BOTH
@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="looks into /proc")
def test_while_a_library_is_imported(number: signal.Signals):
    """Torch catches every exception of its import of NumPy, and fails later on the half that was
    left."""
    status, out, err = ended(number, loads("numpy"))
    assert (status, out, err) == (SAID[number][0], "", SAID[number][1])
    assert not Path("run").exists()


@pytest.mark.slow
def test_while_the_plots_are_drawn():
    def wait(process: "subprocess.Popen[str]") -> None:
        assert process.stdout is not None
        while not Path("run/plots").exists() and process.poll() is None:
            time.sleep(0.002)

    status, out, err = ended(signal.SIGTERM, wait)
    assert (status, err) == SAID[signal.SIGTERM]
    assert out.startswith("finished")


@pytest.mark.slow
def test_when_all_is_done_the_status_is_that_of_the_command():
    """Between the last line and the end of the interpreter, which is half a second here."""

    def wait(process: "subprocess.Popen[str]") -> None:
        assert process.stdout is not None
        while "training_curves" not in (line := process.stdout.readline()) and line:
            pass

    status, _, err = ended(signal.SIGINT, wait, PYTHONUNBUFFERED="1")
    assert (status, err) in ((0, ""), SAID[signal.SIGINT])


@pytest.mark.slow
def test_while_it_waits_for_other_ranks():
    """Within torch's store, where no exception would be raised for ten minutes; the wait itself is
    spoken of."""
    place = {
        "RANK": "1",
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "1",
        "LOCAL_RANK": "0",
    }

    def wait(process: "subprocess.Popen[str]") -> None:
        assert process.stderr is not None
        wait.line = process.stderr.readline()  # type: ignore[attr-defined]

    began = time.monotonic()
    status, out, err = ended(signal.SIGTERM, wait, **place)
    assert (status, out, err) == (143, "", SAID[signal.SIGTERM][1])
    assert re.match(
        "hessianflow: note: rank 1 of 2 waits for the others at 127.0.0.1:1, as RANK", wait.line
    )  # type: ignore[attr-defined]
    assert time.monotonic() - began < 100


def test_within_another_program_only_sigterm_is_taken_and_given_back(
    capsys, monkeypatch: pytest.MonkeyPatch
):
    def told(*_: object) -> None:
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        signal.raise_signal(signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr("hessianflow.commands.curvature._load", told)
    assert main(["spectrum", "run"]) == 143
    assert capsys.readouterr().err == "hessianflow: terminated\n"
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_handler_of_the_program_around_stays():
    calls: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: calls.append(number))
    try:
        with signals_raised(own_process=True):
            signal.raise_signal(signal.SIGTERM)
            with pytest.raises(Signalled):
                signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert calls == [signal.SIGTERM]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_second_signal_ends_a_run_that_is_being_saved(capsys, monkeypatch: pytest.MonkeyPatch):
    from hessianflow.training import AdaptiveBatchTrainer

    def hangs(_: object) -> None:
        signal.raise_signal(signal.SIGTERM)  # asks it to stop
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(AdaptiveBatchTrainer, "fit", hangs)
    assert main([*TRAIN, "--plots", "false"]) == 143
    assert capsys.readouterr().err == "hessianflow: terminated\n"
