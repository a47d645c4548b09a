"""`native/files`: reading and writing that neither hold the interpreter's lock nor wait for it."""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Sequence

from mlx_lm_server import native
from mlx_lm_server.native.memory import address_of


@functools.cache
def files_library() -> ctypes.CDLL | None:
    """Returns the library, compiled at the first start, which takes a moment; None where it cannot
    be."""
    library = native.load("files")
    if library is not None:
        library.begin_reading.restype = ctypes.c_void_p
        library.result_of.argtypes = ctypes.c_void_p, ctypes.c_int
        library.result_of.restype = ctypes.c_long
        library.end_reading.argtypes = (ctypes.c_void_p,)
    return library


def write_pieces(library: ctypes.CDLL, fd: int, pieces: Sequence[memoryview]) -> int:
    """Writes all bytes of the pieces and returns how many they are. Raises OSError."""
    num_pieces = len(pieces)
    addresses = (ctypes.c_void_p * num_pieces)(*map(address_of, pieces))
    sizes = (ctypes.c_long * num_pieces)(*(piece.nbytes for piece in pieces))
    result = library.write_pieces(fd, addresses, sizes, num_pieces)
    if result < 0:
        raise OSError(-result, os.strerror(-result))
    return sum(sizes)
