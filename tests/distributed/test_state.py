from collections import OrderedDict

import numpy as np
import pytest
import torch
from torch import nn

from hessianflow.distributed import LocalReducer, check_same_program, code_fingerprint
from hessianflow.distributed.launch import run_local
from hessianflow.distributed.state import (
    average_buffers,
    broadcast_module,
    broadcast_state,
    pack,
    unpack,
)


def nested(scale: float = 1.0) -> dict:
    return {
        "weights": OrderedDict(
            a=torch.arange(6.0).view(2, 3) * scale, b=torch.tensor(3, dtype=torch.int64)
        ),
        "list": [
            1,
            "two",
            None,
            (torch.ones(3, dtype=torch.bfloat16), torch.tensor([True, False, True])),
        ],
        "empty": torch.zeros(0, 4),
        "strided": torch.arange(12.0).view(3, 4).T,
    }


def check_nested(found: dict) -> None:
    expected = nested()
    torch.testing.assert_close(found["weights"], dict(expected["weights"]), rtol=0, atol=0)
    assert found["list"][:3] == [1, "two", None]
    assert isinstance(found["list"][3], tuple)
    torch.testing.assert_close(found["list"][3], expected["list"][3], rtol=0, atol=0)
    assert found["empty"].shape == (0, 4)
    assert torch.equal(found["strided"], expected["strided"])


def test_pack_and_unpack():
    skeleton, data = pack(nested())
    assert data.dtype == np.uint8
    data.flags.writeable = False  # as an object store hands it out
    found = unpack(skeleton, data)
    check_nested(found)
    found["weights"]["a"].zero_()
    check_nested(unpack(skeleton, data))


def test_state_without_tensors():
    assert unpack(*pack({"a": [1, 2]})) == {"a": [1, 2]}


def give(reducer):
    return broadcast_state(
        reducer, nested() if reducer.rank == 0 else nested(9.0)
    ), broadcast_state(reducer, [1, "x"])


def test_rank_zero_gives_its_state():
    for tensors, plain in run_local(give, 2):
        check_nested(tensors)
        assert plain == [1, "x"]


def one_model(reducer):
    torch.manual_seed(reducer.rank)
    model = nn.Sequential(
        nn.Conv2d(2, 3, 3).to(memory_format=torch.channels_last), nn.BatchNorm2d(3)
    )
    broadcast_module(reducer, model)
    weights = [p.detach().clone() for p in model.parameters()]
    model[1].running_mean.fill_(float(reducer.rank))
    model[1].num_batches_tracked.fill_(5 + reducer.rank)
    average_buffers(reducer, model)
    return weights, model[1].running_mean.tolist(), int(model[1].num_batches_tracked)


def test_models_are_made_one():
    (first, *buffers), (second, *others) = run_local(one_model, 2)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert buffers == others == [[0.5] * 3, 5]


def differ(reducer, what):
    settings = {
        "lr": 0.1,
        "model": "c1",
        **({"lr": 0.2} if what == "settings" and reducer.rank else {}),
    }
    if what == "absent" and reducer.rank:
        del settings["model"]
    check_same_program(reducer, settings, f"code{reducer.rank}" if what == "code" else "code")
    return True


def test_same_program_passes():
    assert run_local(differ, 2, "nothing") == [True, True]


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("settings", r"lr is 0\.1 on rank 0 but 0\.2 on rank 1"),
        ("absent", "model is 'c1' on rank 0 but 'absent' on rank 1"),
        ("code", "rank 0 has code0 but rank 1 has code1"),
    ],
)
def test_ranks_that_differ_are_refused(what, message):
    with pytest.raises(ValueError, match=message):
        run_local(differ, 2, what)


def test_code_fingerprint_sees_a_changed_script(tmp_path):
    script = tmp_path / "train.py"
    script.write_text("lr = 0.1")
    before = code_fingerprint([script])
    assert before == code_fingerprint([script])
    assert before != code_fingerprint()
    script.write_text("lr = 0.2")
    assert before != code_fingerprint([script])
    check_same_program(LocalReducer(), {"lr": 0.1}, before)
