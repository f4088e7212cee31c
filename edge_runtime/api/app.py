"""The HTTP application: a request in, the runtime's reply out.

Why: one place says what each path answers, with nothing between a request and the runtime that the
request does not need.

Invariants: each request gets exactly one reply; an error is JSON and says why. A page that says
where it comes from (`Origin`, which browsers send with every POST) is refused, so that no site that
somebody visits can predict or label in passing. What is quick runs at once, on the loop's thread;
the replies of all else are awaited.

Knows nothing about connections. Implements proto/openapi.yaml.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any, NamedTuple
from urllib.parse import unquote

import msgspec

from edge_runtime.api import edge_v1, oip, sessions_v1
from edge_runtime.api.exposition import CONTENT_TYPE, exposition
from edge_runtime.device.serving import size_of
from edge_runtime.errors import CapacityError, HeadwaterError, RequestError
from edge_runtime.inference.tensors import Array
from edge_runtime.runtime import Event, Runtime

encode = msgspec.json.Encoder().encode

_JSON, _BINARY = b"application/json", b"application/octet-stream"
_STATUS = {
    "browser_refused": 403,
    "unknown_family": 404,
    "unknown_release": 404,
    "not_found": 404,
    "bad_method": 405,
    "body_too_large": 413,
    "unknown_encoding": 415,
    "head_too_large": 431,
    "unsupported": 501,
    "no_release": 503,
}
"""The statuses of errors that do not have the status of their family."""

Headers = dict[bytes, bytes]


class Request(NamedTuple):
    """A whole request; the names of `headers` are in small letters."""

    method: str
    target: bytes
    headers: Headers
    body: bytes


class Reply(NamedTuple):
    """What a request is answered with; `headers` are whole lines, beyond those that all have."""

    status: int
    content: bytes
    kind: bytes = _JSON
    headers: bytes = b""


Answer = Reply | Coroutine[Any, Any, Reply]
Handler = Callable[[str, str, Headers, bytes], Answer]
"""Takes family, release, headers and body; what a path does not have is empty."""
Route = tuple[str, Handler, str, str]


class App:
    """Answers for `runtime`; `status` is what /edge/v1/status and /metrics speak of."""

    def __init__(self, runtime: Runtime, status: Callable[[], dict[str, Any]]) -> None:
        self.counts = dict.fromkeys(("requests", "refused", "overloaded", "failed"), 0)
        self._runtime, self._status = runtime, status
        self._known: dict[bytes, Route] = {}  # of the families here: the hot path looks up once
        self._of_model: dict[str, tuple[str, Handler]] = {
            "infer": ("POST", self._infer),
            "": ("GET", self._metadata),
            "ready": ("GET", self._model_ready),
        }
        self._of_event: dict[str, tuple[str, Handler]] = {
            "predict": ("POST", self._predict),
            "observe": ("POST", self._observe),
        }
        self._of_session: dict[str, tuple[str, Handler]] = {
            word: ("POST", partial(self._ask, ask)) for word, ask in sessions_v1.WORDS.items()
        }
        self._alone: dict[str, tuple[str, Handler]] = {
            "/v2": ("GET", self._server_metadata),
            "/v2/": ("GET", self._server_metadata),
            "/v2/health/live": ("GET", self._live),
            "/v2/health/ready": ("GET", self._ready),
            "/edge/v1/label": ("POST", self._label),
            "/edge/v1/sessions/forget": ("POST", partial(self._ask, sessions_v1.forget)),
            "/edge/v1/status": ("GET", self._tell_status),
            "/metrics": ("GET", self._metrics),
        }

    def answer(self, request: Request) -> Answer:
        """The reply to a request, or what to await for it."""
        self.counts["requests"] += 1
        method, target, headers, body = request
        try:
            if b"origin" in headers:
                raise RequestError("browser_refused", "pages in a browser are not answered")
            wanted, handler, family, release = self._route(target)
            if method != wanted:
                return self._wrong_method(method, wanted, target)
            answer = handler(family, release, headers, body)
        except HeadwaterError as error:
            return self.failed(error, target)
        return answer if isinstance(answer, Reply) else self._awaited(answer, target)

    def failed(self, error: HeadwaterError, target: bytes) -> Reply:
        """The reply about an error; that of the Open Inference Protocol is one text."""
        status = _status_of(error)
        kind = "refused" if status < 500 else "overloaded" if status == 503 else "failed"
        self.counts[kind] += 1
        said = {"error": str(error)}
        if not target.startswith(b"/v2"):
            said = {"error": error.message, "code": error.code, "hint": error.hint}
        return Reply(status, encode(said), _JSON, b"retry-after: 1\r\n" if status == 503 else b"")

    def _wrong_method(self, method: str, wanted: str, target: bytes) -> Reply:
        error = RequestError("bad_method", f"this path takes {wanted}, not {method}")
        reply = self.failed(error, target)._replace(headers=b"allow: %b\r\n" % wanted.encode())
        return reply._replace(content=b"") if method == "HEAD" else reply

    async def _awaited(self, answer: Coroutine[Any, Any, Reply], target: bytes) -> Reply:
        try:
            return await answer
        except HeadwaterError as error:
            return self.failed(error, target)

    def _route(self, target: bytes) -> Route:
        """Method, handler, family and release of a path. Raises: RequestError."""
        known = self._known.get(target)
        if known is not None:
            return known
        path = target.partition(b"?")[0].decode("latin1")
        family = release = ""
        match path.split("/"):
            case ["", "v2", "models", family, "versions", release, *rest]:
                found = self._of_model.get("/".join(rest))
            case ["", "v2", "models", family, *rest]:
                found = self._of_model.get("/".join(rest))
            case ["", "edge", "v1", "predict" | "observe" as word, family]:
                found = self._of_event[word]
            case ["", "edge", "v1", "session", family, word]:
                found = self._of_session.get(word)
            case _:
                found = self._alone.get(path)
        if found is None:
            raise _no_such(path)
        if "%" in path:
            return *found, unquote(family), unquote(release)
        route = (*found, family, release)
        if family in self._runtime.families and not release and b"?" not in target:
            self._known[target] = route  # there are few of these, whatever anybody asks
        return route

    def _infer(self, family: str, release: str, headers: Headers, body: bytes) -> Answer:
        model = self._runtime.model(family)
        asked = oip.question(body, _json_bytes(headers), model.inputs)
        if size_of(asked.inputs) > model.quick_bytes:
            return self._infer_elsewhere(family, release, asked)
        outputs = self._runtime.infer(
            family, asked.inputs, asked.outputs or None, release=release or None
        )
        return _tensors(asked, family, release or model.release, outputs)

    async def _infer_elsewhere(self, family: str, release: str, asked: oip.Question) -> Reply:
        version = release or self._runtime.model(family).release  # that of the very next line
        outputs = await self._runtime.infer_async(
            family,
            asked.inputs,
            asked.outputs or None,
            release=release or None,
            timeout_s=asked.timeout_s,
        )
        return _tensors(asked, family, version, outputs)

    def _metadata(self, family: str, release: str, _headers: Headers, _body: bytes) -> Reply:
        model = self._runtime.model(family)
        if release and release not in model.releases:
            raise RequestError(
                "unknown_release",
                f"release {release!r:.64} of {family} is not in memory",
                f"these are: {', '.join(model.releases)}",
            )
        return _json(oip.model_metadata(family, model.releases, model.inputs, model.outputs))

    def _model_ready(self, family: str, release: str, _headers: Headers, _body: bytes) -> Reply:
        if family in self._runtime.families and not self._runtime.ready(family):
            return _json({"name": family, "ready": False}, 503)
        releases = self._runtime.model(family).releases
        ready = not release or release in releases
        return _json({"name": family, "ready": ready}, 200 if ready else 404)

    def _live(self, *_nothing: object) -> Reply:
        return _json({"live": True})

    def _ready(self, *_nothing: object) -> Reply:
        ready = self._runtime.ready()
        return _json({"live": True, "ready": ready}, 200 if ready else 503)

    def _server_metadata(self, *_nothing: object) -> Reply:
        return _json(oip.server_metadata())

    def _predict(self, family: str, _release: str, _headers: Headers, body: bytes) -> Answer:
        event = edge_v1.event_in(body)
        if not self._runtime.model(family).inline:
            return self._predict_elsewhere(family, event)
        return Reply(200, encode(self._runtime.predict(family, event)))

    async def _predict_elsewhere(self, family: str, event: Event) -> Reply:
        return Reply(200, encode(await self._runtime.predict_async(family, event)))

    def _observe(self, family: str, _release: str, _headers: Headers, body: bytes) -> Reply:
        return _json({"seq": self._runtime.observe(family, edge_v1.event_in(body))})

    def _label(self, _family: str, _release: str, _headers: Headers, body: bytes) -> Reply:
        said = edge_v1.label_in(body)
        seq = self._runtime.label(
            said.prediction_id, said.value, time_s=said.time_s, final=said.final, family=said.family
        )
        return _json({"seq": seq})

    def _ask(
        self, ask: sessions_v1.Ask, family: str, _release: str, _headers: Headers, body: bytes
    ) -> Answer:
        answer = ask(self._runtime, family, body)
        return _later(answer) if isinstance(answer, Coroutine) else _json(answer)

    def _tell_status(self, *_nothing: object) -> Reply:
        return _json(self._status())

    def _metrics(self, *_nothing: object) -> Reply:
        text = exposition(self._status(), self._runtime.latencies())
        return Reply(200, text.encode(), CONTENT_TYPE)


def _tensors(asked: oip.Question, family: str, release: str, outputs: dict[str, Array]) -> Reply:
    text, blobs = oip.answer(asked, family, release, outputs)
    if not blobs:
        return Reply(200, text)
    size = b"inference-header-content-length: %d\r\n" % len(text)
    return Reply(200, b"".join([text, *blobs]), _BINARY, size)


def _json(value: Any, status: int = 200) -> Reply:
    return Reply(status, encode(value))


def _json_bytes(headers: Headers) -> int | None:
    """How many bytes of the body are JSON; None: all. Raises: RequestError `bad_request`."""
    text = headers.get(b"inference-header-content-length")
    if text is None:
        return None
    if not text.isdigit() or len(text) > 12:
        raise oip.bad(
            f"Inference-Header-Content-Length is {text.decode('latin1')!r:.64}, no length"
        )
    return int(text)


async def _later(answer: Coroutine[Any, Any, Any]) -> Reply:
    return _json(await answer)


def _status_of(error: HeadwaterError) -> int:
    if error.code in _STATUS:
        return _STATUS[error.code]
    if isinstance(error, RequestError):
        return 400
    return 503 if isinstance(error, CapacityError) else 500


def _no_such(path: str) -> RequestError:
    """The error about a path that leads nowhere; what other servers have there is named."""
    if path.startswith("/v2") and path.rsplit("/", 1)[-1] in oip.NOT_BUILT:
        return RequestError("unsupported", f"{path:.64} is an extension that is not built here")
    return RequestError(
        "not_found",
        f"there is nothing at {path!r:.64}",
        "/v2, /v2/health/ready, /v2/models/FAMILY/infer, /edge/v1/status and /metrics are served",
    )
