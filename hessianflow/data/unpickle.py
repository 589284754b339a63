"""Load pickled NumPy arrays without running what is in the file.

A pickle names the functions that rebuild its objects; `pickle.load` calls whatever is named. This reader knows five
names, those that arrays of numbers need, and refuses all others.
"""

import io
import pickle
from typing import Any

import numpy as np

from hessianflow.data.sources import one_line
from hessianflow.interfaces import HessianFlowError

# NumPy moved this function between versions; an array tells where it is.
_RECONSTRUCT = np.empty(0).__reduce__()[0]
_ALLOWED: dict[tuple[str, str], Any] = {
    ("numpy.core.multiarray", "_reconstruct"): _RECONSTRUCT,
    ("numpy._core.multiarray", "_reconstruct"): _RECONSTRUCT,
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
}


def load_arrays(content: bytes, origin: str) -> Any:
    """Unpickle dicts, lists, numbers, strings and NumPy arrays; text of Python 2 is read as latin-1.

    Args:
        content: the pickle.
        origin: names the file in errors.

    Raises:
        HessianFlowError: the pickle asks for any other object, or is damaged.
    """
    try:
        return _ArrayUnpickler(io.BytesIO(content), origin).load()
    except (pickle.UnpicklingError, EOFError, ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
        if isinstance(error, HessianFlowError):
            raise
        raise HessianFlowError(f"{origin}: damaged pickle ({one_line(error)}); get it again") from error


class _ArrayUnpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, origin: str) -> None:
        super().__init__(file, encoding="latin1")
        self._origin = origin

    def find_class(self, module: str, name: str) -> Any:
        """The object of an allowed name."""
        if (module, name) == ("_codecs", "encode"):
            return _encode
        if (module, name) not in _ALLOWED:
            raise HessianFlowError(f"{self._origin}: refused, the pickle would run {module}.{name}")
        return _ALLOWED[module, name]


def _encode(text: str, encoding: str) -> bytes:
    """What Python 3 writes for bytes in an old protocol: latin-1 only, not every codec there is."""
    if encoding != "latin1":
        raise ValueError(f"unexpected encoding {encoding!r}")
    return text.encode("latin1")
