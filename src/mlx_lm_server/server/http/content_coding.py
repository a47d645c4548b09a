"""Compressed request bodies (RFC 9110, 8.4.1), never inflated beyond a limit."""

from __future__ import annotations

import zlib

from mlx_lm_server.errors import InvalidRequestError, RequestTooLargeError

IDENTITY, DEFLATE = "identity", "deflate"
# What is read; `x-gzip` is what older clients call gzip.
CODINGS = frozenset({"gzip", "x-gzip", DEFLATE})
ACCEPT_ENCODING = "gzip, deflate"
# What zlib shall expect around the data.
GZIP_WRAPPER, ZLIB_WRAPPER, NO_WRAPPER = 16 + zlib.MAX_WBITS, zlib.MAX_WBITS, -zlib.MAX_WBITS
# Given to zlib at a time, since it copies what lies behind the end of a member.
PIECE_BYTES = 65536
MAX_MEMBERS = 1024


def inflate(data: bytes, coding: str, max_bytes: int) -> bytes:
    """The body before it was compressed. One of gzip may have several members.

    Raises InvalidRequestError for what is damaged or cut off, and RequestTooLargeError as soon as
    there is more than `max_bytes`.
    """
    inflater = _Inflater(coding, max_bytes)
    for start in range(0, len(data), PIECE_BYTES):
        try:
            inflater.feed(data[start : start + PIECE_BYTES])
        except zlib.error as error:
            raise InvalidRequestError(f"the body is no {coding}: {error}") from error
    return inflater.finished()


class _Inflater:
    """One body, piece by piece."""

    def __init__(self, coding: str, max_bytes: int) -> None:
        self._coding = coding
        self._max_bytes = max_bytes
        self._parts: list[bytes] = []
        self._num_bytes = 0
        self._num_members = 0
        self._member: zlib._Decompress | None = None

    def feed(self, piece: bytes) -> None:
        while piece:
            if self._member is None:
                self._member = self._new_member(piece)
            # One byte more than may be, to see that there is more.
            part = self._member.decompress(piece, self._max_bytes + 1 - self._num_bytes)
            self._parts.append(part)
            self._num_bytes += len(part)
            if self._num_bytes > self._max_bytes:
                raise RequestTooLargeError(
                    f"the inflated request body has more than {self._max_bytes} bytes, the limit"
                )
            piece = self._member.unused_data  # all else was inflated, or was too much
            if self._member.eof:
                self._member = None

    def finished(self) -> bytes:
        if self._member is not None:
            raise InvalidRequestError(f"the {self._coding} body is cut off")
        return b"".join(self._parts)

    def _new_member(self, piece: bytes) -> zlib._Decompress:
        self._num_members += 1
        if self._num_members > MAX_MEMBERS:
            raise InvalidRequestError(
                f"the {self._coding} body has more than {MAX_MEMBERS} members"
            )
        return zlib.decompressobj(self._wrapper(piece))

    def _wrapper(self, piece: bytes) -> int:
        """What `deflate` names has zlib's wrapper, and many send it without."""
        if self._coding != DEFLATE:
            return GZIP_WRAPPER
        is_wrapped = piece[0] & 15 == zlib.DEFLATED and int.from_bytes(piece[:2]) % 31 == 0
        return ZLIB_WRAPPER if is_wrapped else NO_WRAPPER
