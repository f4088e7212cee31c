"""What requests are answered with: the runtime's answers, many in one model run where that is fit.

Why: a client that pipelines pays for a model run and for Python once per group, not per request.

Invariants: requests begin in their order. Consecutive requests of one kind to one family make a
group; a group is answered as its requests would be one by one, each with its own answer or error.
What would keep the loop's thread for too long is answered by `later`, anything else by `now`.

Knows nothing about sockets. Implements the requests of proto/socket.md.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

from edge_runtime.api import frames, raw, session_answers
from edge_runtime.api.frames import (
    Done,
    Failed,
    Hello,
    Infer,
    Inferred,
    Label,
    Observe,
    Predict,
    Predicted,
    Reply,
    Request,
    Rollback,
    RolledBack,
    Status,
    StatusReply,
    Survived,
    Welcome,
)
from edge_runtime.api.session_frames import SessionPredict, SessionRank, SessionRequest
from edge_runtime.errors import HeadwaterError, RequestError
from edge_runtime.inference.tensors import Array
from edge_runtime.runtime import Event, ModelInfo, Prediction, Runtime

Item = Request | Failed
"""A request, or what stands in the place of one that could not be read."""

_OF_A_MODEL = frozenset((Predict, Infer, SessionPredict, SessionRank))

GROUP_BYTES = 256 * 1024
"""What the answers to several requests in one run may take."""


def group_end(items: Sequence[Item], start: int, model: ModelInfo | None) -> int:
    """Where the group ends that begins at `start` and asks `model`: the next item that needs a run
    of its own, or is more than the loop's thread may be kept with.
    """
    first, end = items[start], start + 1
    if end == len(items) or model is None:
        return end
    if type(first) is Predict:
        items = items[: start + max(model.quick_rows, 1)]
        while end < len(items) and type(item := items[end]) is Predict:
            if item.family != first.family:
                break
            end += 1
    elif type(first) is Infer:
        signature = raw.signature_of(first.inputs)
        items = items[: start + _together(first, model)]
        while end < len(items) and type(item := items[end]) is Infer:
            asks_for_more = item.family != first.family or item.outputs or item.release
            if asks_for_more or raw.signature_of(item.inputs) != signature:
                break
            end += 1
    return end


def _together(request: Infer, model: ModelInfo) -> int:
    """How many like `request` a run may answer: quickly, and in few bytes.

    Texts have no size that would tell in which of two requests a wrong one stands. Where rows do
    not answer rows, one value may make an answer of any size.
    """
    has_rows = all(each.has_rows for each in (*model.inputs, *model.outputs))
    has_texts = any(each.datatype == "BYTES" for each in request.inputs)
    if request.outputs or request.release or not request.inputs or has_texts or not has_rows:
        return 1
    sent, answer = raw.size(request.inputs), raw.answer_size(request.inputs, model.outputs)
    return max(1, min(model.quick_bytes // max(sent, 1), GROUP_BYTES // max(answer, 1)))


def takes_long(item: Item, model: ModelInfo | None) -> bool:
    """Whether `later` must answer: the loop's thread would be kept for too long."""
    if model is None:
        return type(item) is Rollback
    if type(item) is Infer:
        return raw.size(item.inputs) > model.quick_bytes
    if type(item) is SessionRank:
        return len(item.candidates) > model.quick_rows
    return not model.inline


class Answers:
    """The answers of `service`; `status` is what a Status request is answered with."""

    def __init__(self, service: Runtime, status: Callable[[], dict[str, Any]]) -> None:
        self._service = service
        self._status = status

    def model(self, item: Item) -> ModelInfo | None:
        """The model that an item asks; None where it asks none, or one that is not there."""
        if type(item) not in _OF_A_MODEL:
            return None
        try:
            return self._service.model(cast("Predict", item).family)
        except RequestError:
            return None  # `now` says why

    def now(self, group: Sequence[Item], model: ModelInfo | None) -> list[Reply]:
        """The replies to a group that asks `model`, in order; nothing is awaited."""
        first = group[0]
        try:
            if len(group) == 1:
                return [self._one(first, model)]
            if type(first) is Predict:
                return self._predict_many(cast("Sequence[Predict]", group))
            return self._infer_many(cast("Sequence[Infer]", group), model)
        except HeadwaterError as error:
            return [frames.failed(each.request_id, error) for each in group]

    async def later(self, item: Item) -> Reply:
        """The reply to a request that `takes_long`."""
        service = self._service
        try:
            if type(item) is Predict:
                answer = await service.predict_async(item.family, _event(item))
                return _predicted(item.request_id, answer)
            if type(item) is Rollback:
                release = await service.rollback_async(item.family, item.reason)
                return RolledBack(item.request_id, release)
            if type(item) is SessionPredict or type(item) is SessionRank:
                return await session_answers.later(service, item)
            assert type(item) is Infer
            release = item.release or service.model(item.family).release
            arrays = await service.infer_async(
                item.family, _arrays(item), item.outputs or None, release=item.release or None
            )
            return Inferred(item.request_id, release, raw.raws_of(arrays))
        except HeadwaterError as error:
            return frames.failed(item.request_id, error)

    def _one(self, item: Item, model: ModelInfo | None) -> Reply:
        if type(item) is Infer:
            return self._infer(item, model)
        if type(item) is Predict:
            return _predicted(item.request_id, self._service.predict(item.family, _event(item)))
        if type(item) is Observe:
            return Done(item.request_id, self._service.observe(item.family, _event(item)))
        if type(item) is Label:
            return Done(item.request_id, self._label(item))
        if type(item) is Status:
            return StatusReply(item.request_id, self._status())
        if type(item) is Hello:
            return self._welcome(item)
        if type(item) is Failed:
            return item
        return session_answers.now(self._service, cast("SessionRequest", item))

    def _predict_many(self, group: Sequence[Predict]) -> list[Reply]:
        events = [_event(each) for each in group]
        answers = self._service.predict_many(group[0].family, events)
        return [
            frames.failed(each.request_id, answer)
            if isinstance(answer, HeadwaterError)
            else _predicted(each.request_id, answer)
            for each, answer in zip(group, answers, strict=True)
        ]

    def _infer(self, request: Infer, model: ModelInfo | None) -> Inferred:
        arrays = self._service.infer(
            request.family,
            _arrays(request),
            request.outputs or None,
            release=request.release or None,
        )
        assert model is not None
        return Inferred(request.request_id, request.release or model.release, raw.raws_of(arrays))

    def _infer_many(self, group: Sequence[Infer], model: ModelInfo | None) -> list[Reply]:
        family, names = group[0].family, raw.names_of(group[0].inputs)
        columns = [
            raw.arrays_of(column) for column in zip(*[each.inputs for each in group], strict=True)
        ]
        rows = [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)]
        answers = self._service.infer_many(family, rows)
        assert model is not None
        return [
            frames.failed(each.request_id, answer)
            if isinstance(answer, HeadwaterError)
            else Inferred(each.request_id, model.release, raw.raws_of(answer))
            for each, answer in zip(group, answers, strict=True)
        ]

    def _label(self, request: Label) -> int:
        return self._service.label(
            request.prediction_id,
            request.value,
            time_s=request.time_s,
            final=request.final,
            family=request.family,
        )

    def _welcome(self, request: Hello) -> Welcome:
        if request.version != frames.PROTOCOL_VERSION:
            raise RequestError(
                "bad_version",
                f"the client speaks version {request.version}; this {frames.PROTOCOL_VERSION}",
            )
        survived = [Survived(*each) for each in self._service.survived()]
        return Welcome(request.request_id, self._service.device, self._service.epoch, survived)


def _event(request: Predict | Observe) -> Event:
    fields: Any = request.fields  # a family's interface refuses bool and None by the field's name
    return Event(request.kind, request.time_s, fields)


def _predicted(request_id: int, answer: Prediction) -> Predicted:
    return Predicted(request_id, answer.id, answer.outputs, answer.release, answer.arm)


def _arrays(request: Infer) -> dict[str, Array]:
    return dict(zip(raw.names_of(request.inputs), map(raw.array_of, request.inputs), strict=True))
