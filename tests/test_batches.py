"""What counts as one batch, how many examples it has, and what happens to each kind of entry when
it is cut."""

from collections import OrderedDict, UserDict, defaultdict, namedtuple
from collections.abc import MutableMapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pack_sequence
from torch.utils.data import DataLoader, TensorDataset

from hessianflow.batches import (
    as_batches,
    as_pair,
    map_tensors,
    num_examples,
    split,
    take_rows,
    to_device,
    training_pair,
)
from hessianflow.interfaces import HessianFlowError

X, Y = torch.zeros(4, 2), torch.zeros(4)
ROWS = torch.arange(32.0).view(32, 1)
CLASSES = torch.arange(32)


@dataclass(frozen=True)
class Graph:
    nodes: Tensor
    name: str = "g"
    scale: Tensor = field(default_factory=lambda: torch.tensor(2.0), init=False)


Pair = namedtuple("Pair", "left right")


class Encoding(UserDict):
    """As tokenizers return it: with more than its entries."""

    def __init__(self, data: Any, encodings: Any = None) -> None:
        super().__init__(data)
        self.encodings = encodings


def test_pairs_dicts_and_streams_are_told_apart():
    mapping = UserDict(a=X, labels=Y)
    pairs = ((X, Y), [X, Y], ((X, X), Y), (X, (Y, Y)), ({"a": X}, Y), (X, {"b": Y}))
    for one in (*pairs, {"a": X, "labels": Y}, mapping):
        assert list(as_batches(one)) == [one]
    for several in (
        [(X, Y), (X, Y)],
        [[X, Y], [X, Y]],
        [{"a": X}, {"a": X}],
        [mapping, mapping],
        [(X, Y)] * 3,
    ):
        assert as_batches(several) is several
    loader = DataLoader(TensorDataset(X, Y), 2)
    assert as_batches(loader) is loader


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ((X, Y, Y), r"a batch must be a pair \(inputs, targets\), got a tuple of 3"),
        ([X], r"a batch must be a pair \(inputs, targets\), got a list of 1"),
        (X, "an iterable of pairs, got a Tensor: batch a data set by torch.utils.data.DataLoader"),
        (
            TensorDataset(X, Y),
            "got a TensorDataset: batch a data set by torch.utils.data.DataLoader",
        ),
    ],
)
def test_what_is_no_batch_is_refused(data, message):
    with pytest.raises(HessianFlowError, match=message):
        as_batches(data)


@pytest.mark.parametrize(
    ("batch", "count"),
    [
        (X, 4),
        (Y.numpy(), 4),
        ((torch.zeros(7, 2), Y), 4),  # the targets decide
        (({"mask": torch.ones(3, 3), "x": X}, Y), 4),
        ((X, None), 4),
        ((X, 1.0), 4),
        ((X, torch.tensor(1.0)), 4),
        ((X, {"boxes": torch.zeros(9, 4), "sizes": torch.zeros(4, 2)}), 4),  # the inputs say which
        ({"temperature": torch.tensor(1.0), "x": X, "y": Y}, 4),
        ({"prototypes": torch.zeros(100, 3, 3), "x": X, "labels": Y}, 4),
        (UserDict(prototypes=torch.zeros(100, 3), input_ids=X, labels=Y), 4),
        (
            {
                "input_ids": torch.zeros(1, 50),
                "cu_seqlens": torch.zeros(9),
                "labels": torch.zeros(1, 50),
            },
            1,
        ),
        ((Y, Y, Y), 4),
        ([("a", "b", "c"), [1, 2, 3]], 3),
        (["a", "b", "c"], 3),
        ([], 0),
        (Graph(X), 4),
        (Pair(X, (Y, Y)), 4),
        (({"a": X}, {"a": X}), 4),
        ((torch.zeros(3, 5, 5), [{"boxes": torch.zeros(2, 4)}] * 3), 3),
    ],
)
def test_the_number_of_examples(batch, count):
    assert num_examples(batch) == count


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (
            {"p": torch.zeros(100, 3), "x": X},
            "number of examples of a dict whose entries have 4 and 100 rows: pass a",
        ),
        (
            (Y, torch.zeros(5), torch.zeros(5)),
            "number of examples of a tuple whose entries have 4 and 5 rows",
        ),
        (torch.tensor(1.0), "found none in a Tensor: pass batches"),
        (
            DataLoader(TensorDataset(X), 2),
            r"found none in a DataLoader: pass batches, such as next\(iter\(loader\)\)",
        ),
        ({}, "found none in a dict"),
    ],
)
def test_a_number_that_nothing_decides_is_refused(batch, message):
    with pytest.raises(HessianFlowError, match=message):
        num_examples(batch)


def test_everything_per_example_goes_with_its_rows():
    """Pieces of a batch that holds every kind, put together again by hand."""
    inputs = {
        "x": ROWS,
        "mask": torch.ones(1, 4, 4),
        "temperature": torch.tensor(0.5),
        "names": [str(n) for n in range(32)],
        "lengths": tuple(range(32)),
        "boxes": [torch.full((n % 3, 4), float(n)) for n in range(32)],
        "metas": [{"size": (n, n)} for n in range(32)],
        "array": np.arange(32),
        "size": (224, 223),
        "shared": [torch.ones(1, 2)],
        "nothing": None,
        "graph": Graph(ROWS),
        "views": (ROWS, Pair(ROWS, CLASSES)),
    }
    pieces = list(split((inputs, CLASSES), 12))
    assert [len(targets) for _, targets in pieces] == [11, 11, 10]
    assert torch.equal(torch.cat([targets for _, targets in pieces]), CLASSES)
    for name in ("x", "array"):
        assert (
            torch.cat([torch.as_tensor(piece[name]) for piece, _ in pieces]).tolist()
            == inputs[name].tolist()
        )
    for name in ("names", "lengths", "metas"):
        assert [entry for piece, _ in pieces for entry in piece[name]] == list(inputs[name])
        assert type(pieces[0][0][name]) is type(inputs[name])
    assert [len(boxes) for piece, _ in pieces for boxes in piece["boxes"]] == [
        n % 3 for n in range(32)
    ]
    for piece, targets in pieces:
        for name in ("mask", "temperature", "nothing"):
            assert piece[name] is inputs[name]
        assert piece["size"] == (224, 223)
        assert piece["shared"][0] is inputs["shared"][0]
        assert type(piece["graph"]) is Graph
        assert (piece["graph"].name, piece["graph"].scale.item()) == ("g", 2.0)
        for rows in (piece["graph"].nodes, piece["views"][0], piece["views"][1].left):
            assert torch.equal(rows[:, 0].long(), targets)


@pytest.mark.parametrize(
    "make", [dict, UserDict, OrderedDict, Encoding, lambda d: defaultdict(list, d)]
)
def test_mappings_are_cut_and_moved_like_a_dict_and_keep_their_type(make):
    mapping = make({"x": ROWS, "y": CLASSES})
    pieces = list(split(mapping, 16))
    assert [piece["x"].shape for piece in pieces] == [(16, 1), (16, 1)]
    assert all(type(piece) is type(mapping) for piece in [*pieces, to_device(mapping, "cpu")])
    assert torch.equal(torch.cat([piece["y"] for piece in pieces]), CLASSES)
    assert mapping["x"] is ROWS
    doubled = map_tensors(lambda t: 2 * t, mapping)
    assert torch.equal(doubled["x"], 2 * ROWS)
    assert type(doubled) is type(mapping)


def test_what_a_mapping_has_beside_its_entries_is_kept_where_it_can_be():
    assert take_rows(Encoding({"x": ROWS}, "fast"), slice(3), 32).encodings == "fast"
    assert take_rows(defaultdict(list, x=ROWS), slice(3), 32)["other"] == []
    found = take_rows(MappingProxyType({"x": ROWS}), slice(3), 32)
    assert type(found) is dict
    assert torch.equal(found["x"], ROWS[:3])


class Strict(dict):
    """As the outputs of transformers: entries are attributes, too, and `update` is forbidden."""

    def __setitem__(self, key: str, value: Any) -> None:
        super().__setitem__(key, value)
        setattr(self, key, value)

    def update(self, *_: Any) -> None:
        raise TypeError("you cannot use update")


class Closed(dict):
    def __setitem__(self, key: str, value: Any) -> None:
        raise TypeError("no entry can be set")


class Sharing(MutableMapping):
    """A shallow copy writes into the same entries."""

    def __init__(self, found: Any) -> None:
        self.found = found

    def __getitem__(self, key: str) -> Any:
        return self.found[key]

    def __setitem__(self, key: str, value: Any) -> None:
        self.found[key] = value

    def __delitem__(self, key: str) -> None:
        del self.found[key]

    def __iter__(self) -> Any:
        return iter(self.found)

    def __len__(self) -> int:
        return len(self.found)


def test_mappings_with_rules_of_their_own_are_kept_or_become_dicts():
    mapping = Strict()
    mapping["x"] = ROWS
    found = take_rows(mapping, slice(3), 32)
    assert type(found) is Strict
    assert torch.equal(found.x, ROWS[:3])
    assert mapping.x is ROWS
    for other in (Closed(x=ROWS), Sharing({"x": ROWS})):
        found = take_rows(other, slice(3), 32)
        assert type(found) is dict
        assert torch.equal(found["x"], ROWS[:3])
        assert other["x"] is ROWS


def test_rows_by_number_are_taken_from_every_kind():
    rows = torch.tensor([5, 2])
    found = take_rows({"x": ROWS, "names": list("abcdefgh" * 4), "array": np.arange(32)}, rows, 32)
    assert found["x"].tolist() == [[5.0], [2.0]]
    assert found["names"] == ["f", "c"]
    assert found["array"].tolist() == [5, 2]


@pytest.mark.parametrize("size", [None, 4, 5])
def test_a_batch_in_one_piece_may_hold_anything(size):
    batch = ({"x": X, "mask": torch.ones(3, 3), "odd": object()}, Y)
    assert list(split(batch, size)) == [batch]


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (
            {"x": ROWS, "mask": torch.ones(4, 4)},
            r"inputs\['mask'\] has 4 rows in a batch of 32 examples and cannot",
        ),
        (
            {"x": ROWS, "p": np.ones((100, 3))},
            r"inputs\['p'\] has 100 rows .* first dimension of 1 \(t\[None\]\)",
        ),
        ((ROWS, {"ids": ROWS.T.repeat(5, 1)}), r"inputs\[1\]\['ids'\] has 5 rows"),
        (Graph(torch.zeros(40, 2)), r"inputs\.nodes has 40 rows"),
        (Pair(ROWS, torch.zeros(31)), r"inputs\.right has 31 rows"),
        ([torch.zeros(3, 8, 8)] * 8, r"inputs\[0\] has 3 rows"),
        (torch.zeros(35, 32, 2), r"inputs has 35 rows .* pad these to one"),
        ({"x": ROWS, "tree": object()}, r"inputs\['tree'\] is an object, whose rows are not known"),
        ({"x": ROWS, "ids": {1, 2}}, r"inputs\['ids'\] is a set, whose rows are not known"),
        (
            pack_sequence([torch.zeros(2)] * 32),
            r"inputs is a PackedSequence, whose rows are not known",
        ),
    ],
)
def test_what_might_be_shared_or_several_rows_an_example_is_refused_by_name(inputs, message):
    with pytest.raises(HessianFlowError, match=message):
        list(split((inputs, CLASSES), 16))


def test_an_entry_of_a_mapping_batch_is_named_too():
    with pytest.raises(
        HessianFlowError, match=r"batch\['p'\] has 100 rows in a batch of 32 examples"
    ):
        list(split({"p": torch.zeros(100, 3), "x": ROWS, "y": CLASSES}, 8))


def test_a_list_that_can_be_read_in_two_ways_is_refused():
    """Three colour images in a list, or three inputs of three examples each."""
    batch = ([torch.zeros(3, 8, 8)] * 3, torch.zeros(3))
    with pytest.raises(
        HessianFlowError, match="inputs is a list of 3 entries of 3 rows in a batch of 3 examples"
    ):
        list(split(batch, 2))
    three = {str(n): torch.zeros(3, 8, 8) for n in range(3)}
    assert [len(targets) for _, targets in split((three, torch.zeros(3)), 2)] == [3]  # none alone
    assert [len(targets) for _, targets in split((three, torch.zeros(3)), 1)] == [1, 1, 1]


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (
            {"x": X, "labels": Y},
            (
                r"a batch must be a pair \(inputs, targets\), got a dict of 2: let each item of the"
                r" data set"
            ),
        ),
        (UserDict(x=X, labels=Y), "got a UserDict of 2"),
        ((X, Y, Y), "got a tuple of 3"),
        ((X,), "got a tuple of 1"),
        (X, "got a Tensor: let each item"),
        (
            (X, tuple({"boxes": torch.zeros(n, 4)} for n in range(4))),
            "got a tuple of 4 entries of type dict: pad them",
        ),
        ((X, [Graph(torch.zeros(1))] * 2), "got a list of 2 entries of type Graph"),
        ((X, torch.zeros(40)), "inputs of 4 rows do not go with targets of 40"),
        ((X, torch.tensor(1.0)), "found none in a Tensor"),
    ],
)
def test_what_cannot_be_trained_on_is_refused(batch, message):
    with pytest.raises(HessianFlowError, match=message):
        training_pair(batch)


@pytest.mark.parametrize(
    "inputs",
    [
        X,
        {"x": X, "mask": torch.ones(3, 3)},
        [torch.zeros(3, n, 8) for n in range(4)],
        torch.zeros(1, 2),
        list("abcd"),
    ],
)
def test_pairs_to_train_on_pass(inputs):
    assert training_pair((inputs, Y)) == (inputs, Y)
    assert training_pair([inputs, Y]) == (inputs, Y)


def test_a_pair_to_evaluate_need_not_agree_on_rows():
    flattened = torch.zeros(20)
    assert as_pair([X, flattened]) == (X, flattened)
    with pytest.raises(
        HessianFlowError,
        match=r"a batch must be a pair \(inputs, targets\), got a tuple of 3: let each",
    ):
        as_pair((X, Y, Y))


def test_objects_that_can_move_are_moved():
    class Holder:
        device = "cpu"

        def to(self, device: str) -> "Holder":
            made = Holder()
            made.device = device
            return made

    moved = to_device(
        {"h": Holder(), "name": "a", "packed": pack_sequence([torch.zeros(2)])}, "meta"
    )
    assert moved["h"].device == "meta"
    assert moved["name"] == "a"
    assert moved["packed"].data.device.type == "meta"
    assert moved["packed"].batch_sizes.device.type == "cpu"
