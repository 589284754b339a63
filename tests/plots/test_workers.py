import pytest
from run_dirs import epoch, in_memory
from test_figures import overlapping, texts

from hessianflow.plots import has_workers, workers


def event(kind, elapsed, count):
    return {
        "kind": "event",
        "event": kind,
        "examples": 0,
        "elapsed": elapsed,
        "workers": count,
        "message": "",
    }


def rate(elapsed, batch_size, examples_per_second):
    row = {
        "elapsed": elapsed,
        "workers": 1,
        "batch_size": batch_size,
        "examples_per_second": examples_per_second,
    }
    return {"kind": "throughput", "examples": 0, **row}


RUN = [
    *(
        event("started", 1.0, 1),
        rate(10.0, 32, 100.0),
        event("requested", 11.0, 1),
        event("joined", 20.0, 2),
    ),
    *(
        rate(30.0, 64, 180.0),
        event("died", 31.0, 0),
        event("restored", 32.0, 1),
        rate(40.0, 64, 100.0),
    ),
    *(event("finished", 41.0, 1), epoch(1, updates=8, batch=64)),
]


def test_workers_batch_and_throughput_over_seconds(tmp_path):
    figure = workers(in_memory(RUN), tmp_path / "workers.png")
    assert overlapping(figure) == []
    assert (tmp_path / "workers.png").stat().st_size > 5000
    world, batch, throughput = figure.axes
    assert world.lines[0].get_xdata().tolist() == [1, 11, 20, 31, 32, 41]
    assert world.lines[0].get_ydata().tolist() == [1, 1, 2, 0, 1, 1]
    assert [line.get_xdata()[0] for line in world.lines[1:]] == [11, 20, 31]
    assert batch.lines[0].get_ydata().tolist() == [32, 32, 64, 64]
    assert throughput.lines[0].get_ydata().tolist() == [100, 180, 100]
    assert {"joined", "died or hung", "asked for"} <= {t.get_text() for t in texts(figure)}


def test_a_run_that_had_no_time_for_anything():
    figure = workers(in_memory([event("started", 1.0, 1)]))
    assert overlapping(figure) == []


def test_only_elastic_runs_have_workers():
    assert has_workers(in_memory(RUN))
    assert not has_workers(in_memory([epoch(1, updates=8, batch=64)]))
    with pytest.raises(ValueError, match="run 1 is no elastic run"):
        workers(in_memory([epoch(1, updates=8, batch=64)]))
