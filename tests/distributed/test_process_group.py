import math
import multiprocessing
import os
import signal
import sys
import time
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
import torch
import torch.distributed as dist
from sockets import listening
from torch.distributed import TCPStore

from hessianflow import HessianFlowError, History
from hessianflow.distributed import LocalReducer
from hessianflow.distributed.launch import run_local
from hessianflow.distributed.plain import dumps, loads
from hessianflow.distributed.process_group import (
    Generation,
    _is_one_address,
    abort,
    enter,
    from_environment,
    leave,
    local_device,
    process_group,
)
from hessianflow.distributed.store import serve
from hessianflow.interfaces import CurvatureReading, Decision

TORCHRUN = {
    "RANK": "1",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "MASTER_ADDR": "localhost",
    "MASTER_PORT": "1",
}
CPU = torch.device("cpu")


def agree(reducer):
    total = reducer.sum(torch.full((2, 3), float(reducer.rank + 1)).T)  # not contiguous
    word = reducer.broadcast({"rank": reducer.rank})
    everyone = reducer.gather(reducer.rank * 10)
    tensor = torch.full((2,), reducer.rank + 7)
    reducer.broadcast_tensor(tensor)
    flat = torch.tensor([1.0, 2.0])
    wait = reducer.start_sum(flat)
    wait()
    return total, word, everyone, tensor, flat


def test_ranks_agree():
    for total, word, everyone, tensor, flat in run_local(agree, 2):
        assert torch.equal(total, torch.full((3, 2), 3.0))
        assert word == {"rank": 0}
        assert everyone == [0, 10]
        assert tensor.tolist() == [7, 7]
        assert flat.tolist() == [2.0, 4.0]


PLAIN = {
    "numbers": [1, -(10**30), 0.1, float("inf"), -0.0, 1e-320, True, None, 2 - 3j],
    "words": ["", "\u00fc\n\0", "\udcff", b"\x00\xff", Path("/a/b")],
    "nested": ({1: "one", (2, "b"): [()], None: {}}, {1, 2}, frozenset({"a"})),
    "kinds": [torch.float16, torch.device("cpu")],
    "list": ["tuple", 1],
    "record": {"": "record"},
}
TENSORS = [
    torch.arange(6.0, dtype=torch.float64).view(2, 3).T,
    torch.zeros(0, 3, dtype=torch.int32),
    torch.tensor(True),
    torch.ones(2, dtype=torch.bfloat16),
    torch.tensor([1 + 2j]),
]


def test_plain_values_travel_whole():
    found = loads(dumps(PLAIN))
    # also the kinds of numbers and of containers, and the sign of zero
    assert repr(found) == repr(PLAIN)
    for sent, received in zip(TENSORS, loads(dumps(TENSORS)), strict=True):
        assert (received.dtype, received.shape) == (sent.dtype, sent.shape)
        assert torch.equal(received, sent)
    arrays = [
        np.arange(6, dtype=">i2").reshape(2, 3),
        np.zeros((0, 2)),
        np.array(1.5, dtype=np.float32),
    ]
    for sent, received in zip(arrays, loads(dumps(arrays)), strict=True):
        assert (received.dtype, received.shape) == (sent.dtype, sent.shape)
        assert np.array_equal(received, sent)
    assert math.isnan(loads(dumps(float("nan"))))
    assert loads(dumps([np.float32(0.5), np.int64(3), np.bool_(True)])) == [0.5, 3, True]
    assert loads(dumps(OrderedDict(a=1))) == {"a": 1}


def test_records_of_this_package_travel_as_themselves():
    decision = Decision(8, 0.5, 0.25, "because")
    reading = CurvatureReading(1.0, math.inf, 3, False, (1.0, 2.0), details={"trace": 4.0})
    history = History([{"kind": "epoch", "epoch": 1}], {"a": 1}, {}, Path("runs/x"))
    for record in (decision, reading, history):
        assert loads(dumps(record)) == record


@dataclass(frozen=True)
class Foreign:
    value: int


@pytest.mark.parametrize(
    "value", [object(), print, Foreign(1), {"a": [lambda: 0]}, np.array(["a"]), Thread()]
)
def test_what_is_no_plain_value_is_not_sent(value):
    with pytest.raises(HessianFlowError, match="cannot be sent to other ranks"):
        dumps(value)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[]",
        b"\x80\x04.",
        b'["nothing"]',
        b'["record", "os", "system", {"command": "echo hostile"}]',
        b'["record", "hessianflow.interfaces", "HessianFlowError", {}]',
        b'["record", "hessianflow.interfaces", "nothing", {}]',
        b'["record", "hessianflow.elastic.run", "ElasticRun", {}]',
        b'["record", "hessianflow.interfaces", "Decision", {"nothing": 1}]',
        b'["record", "hessianflow.never_imported", "X", {}]',
        b'["dtype", "load"]',
        b'["tensor", "float32", [3], "AAAA"]',
        b'["tensor", "float32", [1], "?"]',
        b'["array", "O", [1], "AAAAAAAAAAA="]',
        b'["array", "V8", [1], "AAAAAAAAAAA="]',
        b'["dict", [["list"], 1]]',
        b'["device", "nowhere"]',
        b"[" * 100_000,
    ],
)
def test_what_another_rank_sends_cannot_run_anything(content, capfd):
    with pytest.raises(HessianFlowError, match="what another rank sent cannot be read") as caught:
        loads(content)
    assert "\n" not in str(caught.value)
    assert "hostile" not in capfd.readouterr().out


def agree_without_pickles(reducer):
    def never(*_):
        raise AssertionError("a pickle")

    dist.distributed_c10d._pickler = dist.distributed_c10d._unpickler = never
    return agree(reducer)


def test_nothing_between_ranks_is_a_pickle():
    """Torch's own way to send objects."""
    assert dist.distributed_c10d._pickler
    assert dist.distributed_c10d._unpickler
    for _, word, everyone, _, _ in run_local(agree_without_pickles, 2):
        assert (word, everyone) == ({"rank": 0}, [0, 10])


def reached(reducer, parent):
    reducer.sum(torch.ones(2))
    return listening() | listening(parent)


def test_ranks_of_this_machine_are_out_of_reach_of_others():
    """Of each rank the sockets on which gloo waits, and of this process the store's, beside those
    it had."""
    before = listening()
    found = set().union(*run_local(reached, 2, os.getpid())) - before
    assert len(found) >= 3
    assert {address for address, _ in found} <= {"127.0.0.1", "::1"}


def test_a_store_serves_one_address_only():
    store = serve("127.0.0.1")
    assert ("127.0.0.1", store.port) in listening()
    assert not {address for address, port in listening() if port == store.port} - {"127.0.0.1"}
    TCPStore("127.0.0.1", store.port, is_master=False).set("key", "value")
    assert store.get("key") == b"value"
    with pytest.raises(
        HessianFlowError, match=rf"port {store.port} of 127.0.0.1 is taken: name another"
    ):
        serve("127.0.0.1", store.port)


def test_a_name_that_may_mean_another_machine_is_served_on_all():
    """(198.51.100.0/24 is for documentation.)"""
    assert _is_one_address("127.0.0.1", True)
    assert not _is_one_address("127.0.0.1", False), "it means another machine elsewhere"
    assert _is_one_address("198.51.100.1", False)
    assert not _is_one_address("no.such.host.invalid", True)
    assert not _is_one_address("a" * 80, True)


def test_one_process_agrees_with_itself():
    total, word, everyone, tensor, flat = agree(LocalReducer())
    assert torch.equal(total, torch.ones(3, 2))
    assert (word, everyone, tensor.tolist(), flat.tolist()) == (
        {"rank": 0},
        [0],
        [7, 7],
        [1.0, 2.0],
    )


def generations(reducer, port):
    """World sizes 2, 1, 2, 1, 2 in the same two processes; rank 1 sits out the generations of
    one."""
    rank = reducer.rank
    store = TCPStore("127.0.0.1", port, is_master=False)
    sums, seconds = [], []
    leave()
    for number, world_size in enumerate([1, 2, 1, 2], start=1):
        if rank < world_size:
            began = time.perf_counter()
            again = enter(Generation(number, rank, world_size), store, CPU)
            seconds.append(time.perf_counter() - began)
            sums.append(float(again.sum(torch.tensor(float(rank + 1)))))
            if number < 4:
                leave()
    return sums, seconds


def test_generations_follow_each_other_in_place():
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    (sums, _), (others, _) = run_local(generations, 2, store.port)
    assert sums == [1.0, 3.0, 1.0, 3.0]
    assert others == [3.0, 3.0]


def one_dies(reducer, port):
    if reducer.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    with pytest.raises(RuntimeError):
        reducer.sum(torch.ones(1000))
    abort()
    survivor = enter(Generation(1, 0, 1), TCPStore("127.0.0.1", port, is_master=False), CPU)
    raise KeyError(f"alone with a sum of {float(survivor.sum(torch.ones(1)))}")


def test_a_survivor_goes_on_alone():
    """The survivor reports by its error, since the run as such has failed: whichever pipe is read
    first says so."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with pytest.raises(ValueError, match=r"alone with a sum of 1\.0|rank 1 died without a word"):
        run_local(one_dies, 2, store.port)


def too_early(reducer, port):
    with pytest.raises(ValueError, match="in a process group already"):
        enter(Generation(1, 0, 1), TCPStore("127.0.0.1", port, is_master=False), CPU)
    leave()
    store = TCPStore("127.0.0.1", port, is_master=False)
    if reducer.rank == 0:  # rank 1 never comes
        with pytest.raises(
            ValueError, match=r"could not meet the 2 ranks of generation 1 within 0\.5 s"
        ):
            enter(Generation(1, 0, 2), store, CPU, timeout_seconds=0.5)
    enter(Generation(2, reducer.rank, 2), store, CPU)
    return True


def test_entering_twice_or_alone_is_refused():
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    assert run_local(too_early, 2, store.port) == [True, True]


def fail_on_rank_one(reducer):
    if reducer.rank == 1:
        raise KeyError("a bug of the user's")
    reducer.sum(torch.ones(1))


def test_a_failing_rank_ends_the_run():
    began = time.perf_counter()
    with pytest.raises(ValueError, match='rank 1 failed: KeyError: "a bug of the user\'s"'):
        run_local(fail_on_rank_one, 2)
    assert time.perf_counter() - began < 20


def sleep(reducer):
    time.sleep(60)


@pytest.mark.slow
def test_launch_refuses_and_gives_up():
    with pytest.raises(ValueError, match="world_size must be a whole number >= 1, got 0"):
        run_local(agree, 0)
    with pytest.raises(ValueError, match=r"ranks \[0\] did not finish in time"):
        run_local(sleep, 1, timeout_seconds=1.5)


def test_environment():
    assert from_environment({}) is None
    assert from_environment(TORCHRUN) == Generation(0, 1, 4, 1)
    assert from_environment({k: v for k, v in TORCHRUN.items() if k != "LOCAL_RANK"}) == Generation(
        0, 1, 4, 0
    )
    with pytest.raises(ValueError, match="MASTER_PORT is not: start with torchrun"):
        from_environment({k: v for k, v in TORCHRUN.items() if k != "MASTER_PORT"})
    with pytest.raises(ValueError, match="WORLD_SIZE must be a whole number, got 'many'"):
        from_environment({**TORCHRUN, "WORLD_SIZE": "many"})
    with pytest.raises(ValueError, match="got rank 4 of 4"):
        from_environment({**TORCHRUN, "RANK": "4"})
    for port in ("0", "-1", "65536", "99999"):
        with pytest.raises(ValueError, match=f"MASTER_PORT must be a port, 1 to 65535, got {port}"):
            from_environment({**TORCHRUN, "MASTER_PORT": port})
    for port in ("http", "1e3", "9" * 5000):
        with pytest.raises(ValueError, match="MASTER_PORT must be a whole number, got"):
            from_environment({**TORCHRUN, "MASTER_PORT": port})
    with pytest.raises(ValueError, match="RANK is set but MASTER_PORT is not"):
        from_environment({**TORCHRUN, "MASTER_PORT": ""})
    with pytest.raises(ValueError, match="LOCAL_RANK must be at least 0, got -1"):
        from_environment({**TORCHRUN, "LOCAL_RANK": "-1"})
    with pytest.raises(
        ValueError, match="RANK is set but MASTER_ADDR is not: start with torchrun, or unset RANK"
    ):
        from_environment({**TORCHRUN, "MASTER_ADDR": ""})


def test_a_store_that_cannot_be_served_is_one_line(monkeypatch: pytest.MonkeyPatch):
    """The port belongs to another: a second store on it cannot be."""
    taken = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    for name, value in {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(taken.port)}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    words = f"rank 0 of 2 cannot meet the others at 127.0.0.1:{taken.port}"
    with (
        pytest.raises(ValueError, match=words) as refused,
        process_group(Generation(0, 0, 2), CPU, timeout_seconds=2),
    ):
        pass
    assert "\n" not in str(refused.value)


def test_local_device():
    assert local_device("cpu", 3) == CPU
    with pytest.raises(ValueError, match="has no CUDA device of its own"):
        local_device("cuda", 99)


def one_rank(environment, fails):
    """What a script started by torchrun does; ends the process with its status."""
    os.environ.update(environment)
    place = from_environment()
    with process_group(place, CPU, timeout_seconds=20) as reducer:
        if fails and reducer.rank == 1:
            raise SystemExit(3)
        if reducer.sum(torch.tensor(1.0)) != 2.0:
            raise SystemExit(4)
        if sys.platform == "linux" and {address for address, _ in listening()} - {
            "127.0.0.1",
            "::1",
        }:
            raise SystemExit(5)


@pytest.mark.parametrize("fails", [False, True])
def test_under_a_launchers_environment(fails, capfd):
    """The environment of torchrun, without its ten seconds: rank 0 serves the store, to this
    machine only."""
    # a port that is free again
    port = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False).port
    whole = {**TORCHRUN, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_PORT": str(port)}
    places = [{**whole, "RANK": str(rank)} for rank in range(2)]
    context = multiprocessing.get_context("forkserver")
    ranks = [context.Process(target=one_rank, args=(place, fails)) for place in places]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(30)
    assert [rank.exitcode for rank in ranks] == ([1, 3] if fails else [0, 0]), capfd.readouterr()


@pytest.mark.slow
def test_a_rank_that_is_alone_says_what_it_waited_for(monkeypatch):
    """RANK and the others left in the environment by something else."""
    port = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False).port
    for name, value in {
        **TORCHRUN,
        "RANK": "0",
        "WORLD_SIZE": "2",
        "MASTER_PORT": str(port),
    }.items():
        monkeypatch.setenv(name, value)
    with (
        pytest.raises(HessianFlowError, match="rank 0 could not meet the 2 ranks"),
        process_group(Generation(0, 0, 2), CPU, timeout_seconds=1.0),
    ):
        pytest.fail("there is nobody to meet")
    with (
        pytest.raises(
            HessianFlowError,
            match=rf"rank 1 of 2 cannot meet the others at localhost:{port}, as MASTER",
        ),
        process_group(Generation(0, 1, 2), CPU, timeout_seconds=1.0),
    ):
        pytest.fail("nobody serves a store")


def test_no_group_is_left_behind():
    assert not dist.is_initialized()
