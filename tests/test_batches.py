"""What counts as one batch."""

import torch

from hessianflow.batches import as_batches

X, Y = torch.zeros(4, 2), torch.zeros(4)


def test_pairs_dicts_and_streams_are_told_apart():
    for one in ((X, Y), [X, Y], ((X, X), Y), ({"a": X}, Y), (X, {"b": Y}), {"a": X, "labels": Y}):
        assert list(as_batches(one)) == [one]
    for several in ([(X, Y), (X, Y)], [[X, Y], [X, Y]], [{"a": X}, {"a": X}], [(X, Y)], [(X, Y)] * 3):
        assert as_batches(several) is several
