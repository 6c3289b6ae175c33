"""Blobs as answers: files sent by the kernel, objects piece by piece, each read once and sound at its end."""

from __future__ import annotations

import asyncio
import io
import logging
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack
from typing import IO, TYPE_CHECKING, Any

from aiohttp import web

from aggregator.calls import FILE_PARTS
from aggregator.handling import SERVICE, refuse
from aggregator.inline import Aside
from aggregator.problems import past_end
from fedtt.errors import StorageError
from storage.blobs import FileBlobs, check, part, sound

if TYPE_CHECKING:
    from aiohttp.abc import AbstractStreamWriter

__all__ = ["blob_answer"]

_log = logging.getLogger("fedtt.aggregator")
_PIECE_BYTES = 1 << 14  #: of a file that is sent over TLS


async def blob_answer(
    request: web.Request, sha256: str, *, checked: bool = False, **headers: str
) -> web.StreamResponse:
    """All of a blob, or what Range asks of it: a reader may be slow, but must move (`aggregator.unread`).

    A whole object is checked while it is sent. checked: a whole file is, too, which costs a second reading.
    Whoever asks for parts checks the whole. Raises StorageError where it is missing or damaged.
    """
    service = request.app[SERVICE]
    blobs, beside = service.blobs, service.beside_blobs
    is_part = "Range" in request.headers
    if isinstance(blobs, FileBlobs):
        size = await beside(blobs.size, sha256)
        if is_part and not _part_of(request, size):
            return _past_end(request, size)
        if checked and not is_part and request.method == "GET":
            await beside(check, blobs, sha256)
        return _File(blobs.path(sha256), headers=headers)
    opened: ExitStack[None] = ExitStack()
    with opened:
        file = opened.enter_context(await beside(blobs.open, sha256))
        size = await beside(file.seek, 0, io.SEEK_END)
        wanted = _part_of(request, size) if is_part else range(size)
        if is_part and not wanted:
            return _past_end(request, size)
        start, stop = wanted.start, wanted.stop
        if is_part:
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{size}"
        pieces = _brought(beside, part(file, start, stop) if is_part else sound(file, sha256))
        first = b"" if request.method == "HEAD" else await anext(pieces, b"")
        answer = _Pieces(first, pieces, opened.pop_all(), status=206 if is_part else 200, headers=headers)
        answer.content_length = stop - start
        return answer


def _part_of(request: web.Request, size: int) -> range:
    """The bytes that Range asks for; none where the file has no such part, or it asks for no single one."""
    try:
        start, stop, _ = request.http_range.indices(size)
    except ValueError:
        return range(0)
    return range(start, stop)


def _past_end(request: web.Request, size: int) -> web.Response:
    response = refuse(request.app, past_end(request.headers["Range"], size), FILE_PARTS[1])
    response.headers["Content-Range"] = f"bytes */{size}"
    return response


async def _brought(beside: Aside, pieces: Iterator[bytes]) -> AsyncIterator[bytes]:
    while piece := await beside(next, pieces, b""):
        yield piece


class _File(web.FileResponse):
    """Sent by the kernel, but not over TLS, where asyncio's own way ends in a traceback if a reader goes."""

    async def _sendfile(
        self, request: web.BaseRequest, fobj: IO[Any], offset: int, count: int
    ) -> AbstractStreamWriter:
        if request.transport is None or request.transport.get_extra_info("sslcontext") is None:
            return await super()._sendfile(request, fobj, offset, count)
        writer = await web.StreamResponse.prepare(self, request)
        if writer is None:
            raise ConnectionResetError
        await asyncio.to_thread(fobj.seek, offset)
        while piece := await asyncio.to_thread(fobj.read, min(count, _PIECE_BYTES)):
            await writer.write(piece)
            await writer.drain()
            count -= len(piece)
        return writer


class _Pieces(web.StreamResponse):
    """Sends itself when it is prepared, outside all middleware, like web.FileResponse."""

    def __init__(
        self,
        first: bytes,
        rest: AsyncIterator[bytes],
        opened: ExitStack[None],
        *,
        status: int,
        headers: dict[str, str],
    ) -> None:
        """opened: closed once all is sent."""
        super().__init__(status=status, headers=headers)
        self._first, self._rest, self._opened = first, rest, opened

    async def prepare(self, request: web.BaseRequest) -> AbstractStreamWriter | None:
        """Raises ConnectionError where it breaks off: what has begun cannot become a refusal."""
        with self._opened:
            writer = await super().prepare(request)
            try:
                if self._first:
                    await self.write(self._first)
                    async for piece in self._rest:
                        await self.write(piece)
            except StorageError as error:
                _log.error("%s %s broke off: %s", request.method, request.path, error)
                raise ConnectionAbortedError from None
            await self.write_eof()
        return writer
