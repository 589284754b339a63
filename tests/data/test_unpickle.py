"""The reader of CIFAR's pickles: what it makes, and that nothing else can be made with it."""

import io
import pickle
import struct
import tracemalloc

import numpy as np
import pytest
from layouts import pixels, python2_array, python2_cifar

from hessianflow.data.unpickle import load_arrays
from hessianflow.interfaces import HessianFlowError

IMAGES = pixels(4).reshape(4, -1)
DTYPE = (
    b"cnumpy\ndtype\n(U\x02u1K\x00K\x01tR(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
)
NEW_ARRAY = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00tU\x01btR"


def record(value: bytes) -> bytes:
    """A pickled dict with one entry."""
    return b"\x80\x02}(U\x04data" + value + b"u."


def array(
    shape: bytes = b"K\x02K\x03",
    dtype: bytes = DTYPE,
    raw: bytes = b"U\x06abcdef",
    order: bytes = b"\x89",
) -> bytes:
    return NEW_ARRAY + b"(K\x01(" + shape + b"t" + dtype + order + raw + b"tb"


def refusal(content: bytes) -> str:
    """What is said of a pickle; nothing where it is read."""
    try:
        load_arrays(content, "a file")
    except HessianFlowError as error:
        return str(error)
    return ""


def test_what_python_2_wrote_is_read() -> None:
    found = load_arrays(python2_cifar(pixels(4), [3, 1, 4, 1], "labels"), "a file")
    assert found.keys() == {"data", "labels"}
    assert np.array_equal(found["data"], IMAGES)
    assert found["data"].dtype == np.uint8
    assert found["labels"] == [3, 1, 4, 1]


@pytest.mark.parametrize("order", ["C", "F"])
def test_what_python_3_writes_is_read_alike(order: str) -> None:
    """Oracle: Python's own reader, on a file that we trust."""
    whole = {
        "data": np.array(IMAGES, order=order),
        "fine_labels": [0, 99, 7, 300],
        "filenames": ["a_s_000001.png", "\u00fcber"],
        "batch_label": b"training batch 1 of 5",
        "number": 70_000,
        "none yet": [],
    }
    content = pickle.dumps(whole, protocol=2)
    found, expected = load_arrays(content, "a file"), pickle.loads(content)
    assert np.array_equal(found.pop("data"), expected.pop("data"))
    assert found == expected


def test_a_small_array_by_hand() -> None:
    assert load_arrays(record(array()), "a file")["data"].tolist() == [
        [97, 98, 99],
        [100, 101, 102],
    ]
    assert load_arrays(record(array(order=b"\x88")), "a file")["data"].tolist() == [
        [97, 99, 101],
        [98, 100, 102],
    ]


def objects_over_bytes() -> bytes:
    """The wild memory: an array of objects whose addresses are bytes of the file."""
    array_ = np.zeros(3, dtype="u8").view("S8")
    content = pickle.dumps({"data": array_}, protocol=2)
    return content.replace(b"S8", b"O8")


@pytest.mark.parametrize("dtype", ["O", "u2", "f8", "i1", "S3", [("a", "u1"), ("b", "O")], "M8[s]"])
def test_arrays_of_another_dtype_are_refused(dtype: object) -> None:
    content = pickle.dumps({"data": np.zeros((2, 3), dtype=dtype)}, protocol=2)
    with pytest.raises(
        HessianFlowError, match=r"a file: (damaged pickle .*dtype|refused, the pickle)"
    ):
        load_arrays(content, "a file")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (objects_over_bytes(), "refused|damaged"),
        (record(array(shape=b"K\x02K\x04")), "another number of bytes than its shape needs"),
        (record(array(shape=b"K\x06")), "does not have two dimensions"),
        (record(array(shape=b"K\x01K\x02K\x03")), "does not have two dimensions"),
        (
            record(array(shape=b"J\xff\xff\xff\xffJ\xfa\xff\xff\xff")),
            "does not have two dimensions",
        ),
        (
            record(
                array(shape=b"\x8a\x06\x00\x00\x00\x00\x00\x48\x8a\x06\x00\x00\x00\x00\x00\x48")
            ),
            "another number of bytes",
        ),
        (record(array(shape=b"\x88K\x06")), "does not have two dimensions"),
        (record(array(raw=b"](K\x01K\x02e")), "another number of bytes"),
        (record(array(dtype=b"N")), "another form than NumPy writes"),
        (record(array(dtype=DTYPE.replace(b"u1", b"O8"))), "dtype other than uint8"),
        (
            record(array(dtype=DTYPE.replace(b"K\x03U\x01|", b"K\x03U\x01<"))),
            "dtype other than uint8",
        ),
        (record(array(dtype=DTYPE.replace(b"NNN", b"N}N"))), "dtype other than uint8"),
        (record(NEW_ARRAY), "holds NoneType"),
        (record(DTYPE), "holds _UInt8"),
        (record(b"cnumpy\nndarray\n(K\x00tR"), "not made from its bytes"),
        (record(b"cnumpy\nndarray\n"), "holds _Function"),
        (record(b"cnumpy\ndtype\n}b"), "a dict where a tuple is expected"),
        (record(b"K\x01(K\x01tR"), "a int where a _Function is expected"),
        (record(b"](K\x01U\x01ae"), "holds int, str"),
        (record(b"]](K\x01ea"), "holds list"),
        (record(b"}"), "holds dict"),
        (record(b"N"), "holds NoneType"),
        (record(b"](" + array() + b"e"), "holds _Array"),
        (b"\x80\x02}(K\x01K\x02u.", "a int where a str is expected"),
        (b"\x80\x02K\x01.", "a int where a dict is expected"),
        (b"\x80\x02}(U\x01au.", "damaged pickle"),
        (b"\x80\x02.", "damaged pickle"),
        (b"\x80\x02(((", "damaged pickle"),
        (b"\x80\x02U\x01as.", "lacks its arguments"),
        (b"\x80\x02h\x05.", "damaged pickle .KeyError"),
        (record(b"X" + struct.pack("<I", 1 << 31) + b"a"), "damaged pickle"),
        (b"\x80\x04\x95" + bytes(8) + b".", "refused, the pickle holds the instruction FRAME"),
        (b"\x80\x02cos\nsystem\n(U\x02idtR.", r"refused, the pickle would run os\.system"),
        (b"\x80\x02(ios\nsystem\n.", "holds the instruction INST"),
        (b"\x80\x02\x82\x01.", "holds the instruction EXT1"),
        (b"\x80\x02Pname\n.", "holds the instruction PERSID"),
        (b"\x80\x02cnumpy\nndarray\n)\x81.", "holds the instruction (EMPTY_TUPLE|NEWOBJ)"),
    ],
)
def test_everything_else_is_refused_in_one_line(content: bytes, words: str) -> None:
    with pytest.raises(HessianFlowError, match=words) as caught:
        load_arrays(content, "a file")
    assert str(caught.value).startswith("a file: ")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


LARGE_MEMO = record(b"]r\xff\xff\xff\x7f")
"""Two billion places in Python's own reader; here a number like any other."""


@pytest.mark.parametrize(
    "content",
    [
        b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".",  # lists in lists
        b"\x80\x02" + b"K\x01" + b"\x85" * 100_000 + b".",  # tuples in tuples
        b"\x80\x02" + b"}" + b"(U\x01a}" * 50_000 + b"u" * 50_000 + b".",  # dicts in dicts
        LARGE_MEMO,
        record(b"](" + b"h\x00" * 100_000 + b"e").replace(b"}", b"}q\x00", 1),  # itself, many times
        record(b"\x8b\xff\xff\xff\x7f"),  # an integer of two billion bytes
        record(b"T\xff\xff\xff\x7f" + b"x" * 1000),  # bytes that are not there
    ],
)
def test_bombs_stay_small(content: bytes) -> None:
    tracemalloc.start()
    outcome = refusal(content)
    assert (
        outcome.startswith(("a file: damaged pickle", "a file: refused")) or content == LARGE_MEMO
    )
    assert tracemalloc.get_traced_memory()[1] < 64 << 20
    tracemalloc.stop()


def test_no_pickle_of_the_standard_library_runs(capfd: pytest.CaptureFixture[str]) -> None:
    class Speaks:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return print, ("hostile",)

    for protocol in range(6):
        with pytest.raises(HessianFlowError, match="refused, the pickle"):
            load_arrays(pickle.dumps({"data": Speaks()}, protocol=protocol), "a file")
    assert "hostile" not in capfd.readouterr().out


def test_flipped_bits_end_in_one_line() -> None:
    rng = np.random.default_rng(0)
    good = python2_cifar(pixels(2)[:, :, :2, :2], [0, 1], "labels")
    for _ in range(300):
        bad = bytearray(good)
        for place in rng.integers(0, len(bad), rng.integers(1, 4)):
            bad[place] ^= 1 << rng.integers(0, 8)
        assert "\n" not in refusal(bytes(bad))


def test_the_layout_of_the_tests_is_that_of_numpy() -> None:
    """The bytes that `layouts` writes by hand mean the same to Python's own reader."""
    content = b"\x80\x02" + python2_array(IMAGES) + b"."
    assert np.array_equal(pickle.Unpickler(io.BytesIO(content), encoding="latin1").load(), IMAGES)
