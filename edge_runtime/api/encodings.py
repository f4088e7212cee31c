"""Bodies that their sender made smaller: gzip and deflate, within bounds.

Why: a few bytes may say that they are gigabytes, so nothing is inflated beyond what a body may be.

Invariants: what is returned is whole and at most as large as a body may be.

Knows nothing about connections and paths.
"""

from __future__ import annotations

import zlib

from edge_runtime.errors import RequestError

_WINDOW_BITS = {b"gzip": 31, b"deflate": 15}


def inflated(body: bytes, encoding: bytes, bytes_max: int) -> bytes:
    """The body that `encoding` (gzip or deflate) made smaller.

    Raises: RequestError (body_too_large, bad_encoding, unknown_encoding).
    """
    name, bits = encoding.decode("latin1"), _WINDOW_BITS.get(encoding.lower())
    if bits is None:
        raise RequestError(
            "unknown_encoding",
            f"content encoding {name!r:.64} is not understood",
            "send gzip or deflate, or the body as it is",
        )
    inflater = zlib.decompressobj(bits)
    try:
        data = inflater.decompress(body, bytes_max + 1)
    except zlib.error as error:
        raise RequestError("bad_encoding", f"the body is no {name}: {error}") from error
    if len(data) > bytes_max:
        raise too_large(bytes_max)
    if not inflater.eof or inflater.unused_data:
        raise RequestError("bad_encoding", f"the body is not one whole {name}")
    return data


def too_large(bytes_max: int) -> RequestError:
    """The error about a body that is larger than `bytes_max`."""
    return RequestError(
        "body_too_large",
        f"the body is larger than {bytes_max} bytes; nothing was done",
        "send fewer rows at once, or raise http.body_max_mb in the configuration",
    )
