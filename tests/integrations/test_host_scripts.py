"""The scripts and the notebook in experiments/integrations, run as readers would run them."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from peers import library

FOLDER = Path(__file__).parents[2] / "experiments" / "integrations"
SCRIPTS = {
    "transformers_bert.py": ["transformers"],
    "lightning_digits.py": ["lightning"],
    "accelerate_digits.py": ["accelerate"],
}


def output(command: list[str]) -> str:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def options(script: str) -> list[str]:
    if script.startswith("transformers"):
        return ["--passes", "2", "--examples", "512"]
    return ["--passes", "3"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_runs_and_its_batch_grows(script: str) -> None:
    for name in SCRIPTS[script]:
        library(name)
    source = (FOLDER / script).read_text()
    assert "# line 1" in source
    assert "# line 2" in source
    text = output([sys.executable, str(FOLDER / script), *options(script)])
    [line] = [line for line in text.splitlines() if line.startswith("batch")]
    assert max(float(number) for number in re.findall(r"[\d.]+", line.partition(",  ")[0])[:1]) > 16


@pytest.mark.slow
@pytest.mark.ranks
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("script", SCRIPTS)
def test_two_processes_train_one_model(script: str) -> None:
    """Each host wraps the model in DistributedDataParallel; both ranks end with equal weights."""
    for name in SCRIPTS[script]:
        library(name)
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    launch += ["--standalone", str(FOLDER / script), *options(script)]
    text = output(launch)
    lines = re.findall(r"batch.*?weights -?[\d.]+", text)
    assert len(lines) == 2
    assert lines[0] == lines[1]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_gpt2_trains_in_our_trainer() -> None:
    library("transformers")
    text = output([sys.executable, str(FOLDER / "gpt2_in_our_trainer.py"), "--updates", "60"])
    first, last = map(float, re.findall(r"loss ([\d.]+) -> ([\d.]+)", text)[0])
    assert last < first
    assert "64" in text


@pytest.mark.slow
def test_a_stream_of_text_is_resumed() -> None:
    script = str(FOLDER / "stream_of_text.py")
    text = output([sys.executable, script, "--examples", "2048"])
    assert text.splitlines()[-1] == "batches [16, 16, 32, 32], resumed run equal: True"


@pytest.mark.slow
def test_a_loop_is_monitored() -> None:
    script = str(FOLDER / "monitor_in_a_loop.py")
    lines = output([sys.executable, script, "--updates", "40"]).splitlines()
    assert [line.partition(":")[0] for line in lines] == ["update 20", "update 40"]
    shares = [float(re.findall(r"edge_share ([\d.e+-]+)", line)[0]) for line in lines]
    assert all(0 < share < 1 for share in shares)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_notebook_runs_and_shows_figures_tables_and_progress() -> None:
    for name in ("nbclient", "ipykernel", "pandas"):
        library(name)
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(FOLDER / "first_steps.ipynb", as_version=4)
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(FOLDER)}}).execute()
    shown = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert not [output for output in shown if output.output_type == "error"]
    kinds = [set(output.get("data", {})) for output in shown]
    assert sum("image/png" in kind for kind in kinds) >= 3  # live, trajectory, curves
    text = "\n".join(
        str(part)
        for output in shown
        for part in [*output.get("data", {}).values(), output.get("text", "")]
    )
    assert "HessianOperator(" in text
    assert "<table>" in text
    assert "100%" in text  # the bar
