"""Where Python's buffers lie, for C code that is told addresses."""

from __future__ import annotations

import ctypes

from mlx_lm_server import native

_MEDIA = native.numbers_in("files/media.h")
# A direct write or read wants memory and files to be cut at the first; some media at the second.
(SECTOR_BYTES,), (PAGE_BYTES,) = (map(int, _MEDIA[n]) for n in ("SECTOR_BYTES", "PAGE_BYTES"))


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


def address_of(view: memoryview) -> int:
    """Where the view's bytes lie, for as long as it lives. ctypes itself tells it only of memory
    that may be written."""
    buffer = _Buffer()
    ctypes.pythonapi.PyObject_GetBuffer(ctypes.py_object(view), ctypes.byref(buffer), 0)
    address: int | None = buffer.buf
    ctypes.pythonapi.PyBuffer_Release(ctypes.byref(buffer))
    return address or 0


def unwritten_bytes(num_bytes: int) -> memoryview:
    """Memory that begins at a page and holds whatever stood there."""
    room = _new_bytearray(None, num_bytes + PAGE_BYTES)
    view = memoryview(room)
    first = -address_of(view) % PAGE_BYTES
    return view[first : first + num_bytes]


_new_bytearray = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.c_char_p, ctypes.c_ssize_t)(
    ("PyByteArray_FromStringAndSize", ctypes.pythonapi)
)
