"""`native/files`: reading and writing that neither hold the interpreter's lock nor wait for it."""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Sequence

from mlx_lm_server import native


@functools.cache
def files_library() -> ctypes.CDLL | None:
    """Compiled at the first start, which takes a moment; None where it cannot be."""
    library = native.load("files")
    if library is not None:
        library.begin_reading.restype = ctypes.c_void_p
        library.result_of.argtypes = ctypes.c_void_p, ctypes.c_int
        library.result_of.restype = ctypes.c_long
        library.end_reading.argtypes = (ctypes.c_void_p,)
    return library


def write_pieces(library: ctypes.CDLL, fd: int, pieces: Sequence[memoryview]) -> int:
    """Write all bytes of the pieces; how many they are. Raises OSError."""
    num_pieces = len(pieces)
    addresses = (ctypes.c_void_p * num_pieces)(*map(_address_of, pieces))
    sizes = (ctypes.c_long * num_pieces)(*(piece.nbytes for piece in pieces))
    result = library.write_pieces(fd, addresses, sizes, num_pieces)
    if result < 0:
        raise OSError(-result, os.strerror(-result))
    return sum(sizes)


class _Buffer(ctypes.Structure):
    """Py_buffer of the stable ABI."""

    _fields_ = (
        ("buf", ctypes.c_void_p),
        ("obj", ctypes.c_void_p),
        ("len", ctypes.c_ssize_t),
        ("itemsize", ctypes.c_ssize_t),
        ("readonly", ctypes.c_int),
        ("ndim", ctypes.c_int),
        ("format", ctypes.c_void_p),
        ("shape", ctypes.c_void_p),
        ("strides", ctypes.c_void_p),
        ("suboffsets", ctypes.c_void_p),
        ("internal", ctypes.c_void_p),
    )


def _address_of(view: memoryview) -> int | None:
    """Where the view's bytes lie, for as long as it lives. ctypes itself tells it of memory that
    may be written only."""
    buffer = _Buffer()
    ctypes.pythonapi.PyObject_GetBuffer(ctypes.py_object(view), ctypes.byref(buffer), 0)
    address: int | None = buffer.buf
    ctypes.pythonapi.PyBuffer_Release(ctypes.byref(buffer))
    return address
