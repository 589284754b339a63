"""Read the pickles of the CIFAR archives without running them.

A pickle is a program: its instructions call whatever function they name, with whatever arguments.
This reader executes only the few instructions that such a file needs, on objects of its own
(numbers, strings, lists, dicts, and arrays of uint8), and refuses everything else.
"""

import math
import pickletools
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hessianflow.data.sources import one_line
from hessianflow.interfaces import HessianFlowError

_DTYPE_STATE = (3, "|", None, None, None, -1, -1, 0)
"""What NumPy writes of a plain one-byte type: version, byte order, no fields, no alignment."""


def load_arrays(content: bytes, origin: str) -> dict[str, Any]:
    """Read a dict of integers, strings, lists of them, and uint8 arrays.

    Args:
        content: Pickle of protocol 1 or 2; text of Python 2 is read as latin-1.
        origin: Name of the file in error messages.

    Returns:
        Dict with strings as keys. A value is an int, a str, bytes, a list of one of these, or a
        read-only uint8 array of two dimensions.

    Raises:
        HessianFlowError: The pickle holds anything else, or is damaged.
    """
    try:
        return _values(_Machine(origin).run(content))
    except HessianFlowError:
        raise
    except _DAMAGE as error:
        raise HessianFlowError(
            f"{origin}: damaged pickle ({one_line(error)}); get it again"
        ) from error


_DAMAGE = (ValueError, TypeError, LookupError, OverflowError, MemoryError, RecursionError)
"""Errors of pickletools, which decodes, and of instructions on other objects than they need."""


_MARK = object()
"""What stands on the stack where the arguments of an instruction begin."""


class _Function:
    """A function or class that the pickle names; it is never called."""

    def __init__(self, make: Callable[..., Any] | None) -> None:
        self.make = make


class _UInt8:
    """The only dtype that is accepted, uint8."""


class _Array:
    """An array whose value is set once its state has been read."""

    value: NDArray[np.uint8] | None = None


class _Machine:
    """The machine that executes a pickle: a stack, a memo, and a method per kind of instruction."""

    def __init__(self, origin: str) -> None:
        self._origin = origin
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}

    def run(self, content: bytes) -> Any:
        for instruction, argument, _ in pickletools.genops(content):
            if instruction.name == "PROTO":
                continue
            if instruction.name == "STOP":
                return self._stack.pop()
            execute = _INSTRUCTIONS.get(instruction.name)
            if execute is None:
                raise HessianFlowError(
                    f"{self._origin}: refused, the pickle holds the instruction {instruction.name}"
                )
            execute(self, argument)
        raise ValueError("it does not end")

    def push(self, value: Any) -> None:
        self._stack.append(value)

    def remember(self, number: int) -> None:
        """Store the object on top of the stack under a number."""
        self._memo[number] = self._stack[-1]

    def recall(self, number: int) -> None:
        self._stack.append(self._memo[number])

    def extend(self, items: list[Any]) -> None:
        """Add items to the list below them."""
        _of_type(self._stack[-1], list).extend(items)

    def update(self, items: list[Any]) -> None:
        """Set keys, each followed by its value, of the dict below them."""
        target = _of_type(self._stack[-1], dict)
        for key, value in zip(items[::2], items[1::2], strict=True):
            target[_of_type(key, str)] = value

    def name(self, function: str) -> None:
        """Push a function or class, and refuse one that is not in the table."""
        if function not in _FUNCTIONS:
            raise HessianFlowError(
                f"{self._origin}: refused, the pickle would run {function.replace(' ', '.')}"
            )
        self._stack.append(_Function(_FUNCTIONS[function]))

    def call(self, _: None) -> None:
        """Replace a named function and its arguments by the object that it would return."""
        arguments = self._stack.pop()
        function = _of_type(self._stack.pop(), _Function)
        if function.make is None:
            raise ValueError("an array that is not made from its bytes")
        self._stack.append(function.make(*_of_type(arguments, tuple)))

    def build(self, _: None) -> None:
        """Give an array its content; a dtype has its own already."""
        state = self._stack.pop()
        target = self._stack[-1]
        if not isinstance(target, _UInt8):
            _of_type(target, _Array).value = _array(*_of_type(state, tuple))
        elif state != _DTYPE_STATE:
            raise ValueError("a dtype other than uint8")

    def last(self, count: int) -> list[Any]:
        """Take the last `count` objects from the stack."""
        if count > len(self._stack):
            raise ValueError("an instruction lacks its arguments")
        start = len(self._stack) - count
        items = self._stack[start:]
        del self._stack[start:]
        return items

    def above_mark(self) -> list[Any]:
        """Take the objects above the last mark from the stack, and the mark."""
        items = []
        while (item := self._stack.pop()) is not _MARK:
            items.append(item)
        return items[::-1]


_INSTRUCTIONS: Mapping[str, Callable[[_Machine, Any], None]] = {
    **dict.fromkeys(("INT", "BININT", "BININT1", "BININT2", "LONG1"), _Machine.push),
    **dict.fromkeys(("SHORT_BINSTRING", "BINSTRING", "BINUNICODE"), _Machine.push),
    "NONE": lambda machine, _: machine.push(None),
    "NEWTRUE": lambda machine, _: machine.push(True),
    "NEWFALSE": lambda machine, _: machine.push(False),
    "EMPTY_LIST": lambda machine, _: machine.push([]),
    "EMPTY_DICT": lambda machine, _: machine.push({}),
    "MARK": lambda machine, _: machine.push(_MARK),
    "BINPUT": _Machine.remember,
    "LONG_BINPUT": _Machine.remember,
    "BINGET": _Machine.recall,
    "LONG_BINGET": _Machine.recall,
    "APPEND": lambda machine, _: machine.extend(machine.last(1)),
    "APPENDS": lambda machine, _: machine.extend(machine.above_mark()),
    "SETITEM": lambda machine, _: machine.update(machine.last(2)),
    "SETITEMS": lambda machine, _: machine.update(machine.above_mark()),
    "TUPLE": lambda machine, _: machine.push(tuple(machine.above_mark())),
    "TUPLE1": lambda machine, _: machine.push(tuple(machine.last(1))),
    "TUPLE2": lambda machine, _: machine.push(tuple(machine.last(2))),
    "TUPLE3": lambda machine, _: machine.push(tuple(machine.last(3))),
    "GLOBAL": _Machine.name,
    "REDUCE": _Machine.call,
    "BUILD": _Machine.build,
}


def _new_array(kind: Any, shape: Any, code: Any) -> _Array:
    if not (isinstance(kind, _Function) and shape == (0,) and code in ("b", b"b")):
        raise ValueError("an array in another form than NumPy writes")
    return _Array()


def _new_dtype(*arguments: Any) -> _UInt8:
    if arguments != ("u1", 0, 1):
        raise ValueError("a dtype other than uint8")
    return _UInt8()


def _encoded(text: Any, encoding: Any) -> bytes:
    """Return the bytes that Python 3 writes as text in old protocols; refuse all but latin-1."""
    if encoding != "latin1":
        raise ValueError(f"unexpected encoding {str(encoding)[:40]!r}")
    return bytes(_of_type(text, str).encode("latin1"))


_FUNCTIONS: Mapping[str, Callable[..., Any] | None] = {
    "numpy.core.multiarray _reconstruct": _new_array,
    "numpy._core.multiarray _reconstruct": _new_array,  # NumPy 2 moved it
    "numpy ndarray": None,
    "numpy dtype": _new_dtype,
    "_codecs encode": _encoded,
}


def _array(version: Any, shape: Any, dtype: Any, by_columns: Any, raw: Any) -> NDArray[np.uint8]:
    if version != 1 or not isinstance(dtype, _UInt8) or type(by_columns) not in (bool, int):
        raise ValueError("an array in another form than NumPy writes")
    sides: tuple[int, ...] = shape if type(shape) is tuple else ()
    if len(sides) != 2 or not all(type(side) is int and side >= 0 for side in sides):
        raise ValueError("an array that does not have two dimensions")
    if isinstance(raw, str):
        raw = raw.encode("latin1")
    if type(raw) is not bytes or len(raw) != math.prod(shape):
        raise ValueError("an array of another number of bytes than its shape needs")
    numbers = np.frombuffer(raw, dtype=np.uint8)
    if by_columns:
        return numbers.reshape(sides, order="F")
    return numbers.reshape(sides)


def _values(record: Any) -> dict[str, Any]:
    """Return the values of a record as plain arrays, and refuse types that no file should hold."""
    values: dict[str, Any] = {}
    for key, value in _of_type(record, dict).items():
        if isinstance(value, _Array):
            value = value.value
        allowed: set[type] = {int, str, bytes}
        if type(value) is list:
            kinds = {type(item) for item in value}
        else:
            kinds = {type(value)}
            allowed.add(np.ndarray)
        if len(kinds) > 1 or not kinds <= allowed:
            found = ", ".join(sorted(kind.__name__ for kind in kinds))
            raise ValueError(f"{key[:40]!r} holds {found}")
        values[key] = value
    return values


def _of_type(value: Any, kind: type) -> Any:
    if type(value) is not kind:
        raise ValueError(f"a {type(value).__name__} where a {kind.__name__} is expected")
    return value
