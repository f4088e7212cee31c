"""The engine: events in, feature vectors out.

Why: the only code that turns events into numbers, on the device and wherever a release is judged,
so that training and serving cannot drift apart.

Invariants: reading never writes; the values depend on the set of events and labels observed, not on
the questions asked, and, but for what sketches and decayed means say of themselves, not on the
order of arrival (within what is kept); restoring a snapshot and observing what came after it gives
the same bits as never having stopped.

Knows nothing about clocks, interfaces, models or files: who calls has checked the fields.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from edge_runtime.errors import RequestError
from edge_runtime.features import snapshot
from edge_runtime.features.compiler import compiled
from edge_runtime.features.feature import LABEL
from edge_runtime.features.plan import AnyTable, TableId, new_table, windows_by_table
from edge_runtime.features.spec import Spec, hash_of
from edge_runtime.wire.messages import Value

Vector = npt.NDArray[np.float32]
Fields = Mapping[str, Value]


class Engine:
    """Windows of one spec and the functions, compiled from it, that feed and read them.

    `tables` are those of an engine with the same windows and lateness, to be shared with it: then
    one of the two observes. What is kept allows questions up to `lateness_s` behind the newest.
    `packed(time_s, fields)` gives the feature values as little-endian float32, as of `time_s`, the
    event itself not counted; it may be kept: restoring and inheriting change tables in place.
    `packed_many(time_s, many)` gives the same of each of many, and looks once at what they share.
    """

    packed: Callable[[float, Fields], bytes]
    packed_many: Callable[[float, Sequence[Fields]], list[bytes]]

    def __init__(
        self,
        spec: Spec,
        *,
        lateness_s: float = 0.0,
        tables: dict[TableId, AnyTable] | None = None,
    ) -> None:
        self.spec = spec
        self.lateness_s = lateness_s
        self.tables = tables or {
            name: new_table(windows, lateness_s)
            for name, windows in windows_by_table(spec.features).items()
        }
        self._program = program = compiled(spec)
        functions = program.bind(self.tables)
        self.packed, self.packed_many = functions["packed"], functions["packed_many"]
        self._observers = {kind: functions[name] for kind, name in program.observers.items()}
        self._observe_label = self._observers.pop(LABEL, None)

    @property
    def source(self) -> str:
        """The Python that this engine runs, for a person to read."""
        return self._program.source

    @property
    def sees_labels(self) -> bool:
        """Whether some window is over labels."""
        return self._observe_label is not None

    @property
    def label_fields(self) -> frozenset[str]:
        """The fields of a predicting event that its label has to be observed with."""
        return frozenset(name.key for name in self.tables if name.over == LABEL and name.key)

    def observe(self, kind: str, time_s: float, fields: Fields) -> None:
        """Let every window over `kind` see the event; a window whose field is absent skips it."""
        see = self._observers.get(kind)
        if see is not None:
            see(time_s, fields)

    def observe_label(self, time_s: float, value: float, fields: Fields) -> None:
        """Let every window over labels see one; `fields` are of the event that was predicted."""
        if self._observe_label is not None:
            self._observe_label(time_s, value, fields)

    def vector(self, time_s: float, fields: Fields) -> Vector:
        """What `packed` gives as float32 of shape (size,), read-only.

        An event just observed at `time_s` does count: ask first, then observe.
        """
        return np.frombuffer(self.packed(time_s, fields), np.float32)

    def snapshot(self) -> bytes:
        """All state, with a checksum."""
        return snapshot.write(hash_of(self.spec.windows_json()), self.tables)

    def restore(self, data: bytes) -> None:
        """Replace all state by that of a snapshot of the same windows.

        Raises: RequestError `bad_snapshot` or `other_spec`, with the state unchanged.
        """
        spec, states = snapshot.read(data)
        if spec not in (hash_of(self.spec.windows_json()), self.spec.hash):
            raise RequestError(
                "other_spec", f"the snapshot is of feature spec {spec}, not {self.spec.hash}"
            )
        if states.keys() != self.tables.keys():
            raise snapshot.bad_snapshot("its tables are not those of its spec")
        loaded = {name: snapshot.load(self.tables[name], each) for name, each in states.items()}
        for name, held in loaded.items():
            self.tables[name].replace(held)

    def inherit(self, others: Collection[Engine]) -> None:
        """Take over, when new, what engines of other specs have observed for the same windows.

        A window longer than they kept is short of its oldest entries until its extent has passed.
        """
        for name, table in self.tables.items():
            known = [other.tables[name] for other in others if name in other.tables]
            richest = max(known, key=lambda each: each.entries, default=None)
            if richest is not None:
                table.replace(snapshot.load(table, snapshot.dump(richest)))

    def statistics(self) -> dict[str, int]:
        """What is held, and what the bounds have pushed out."""
        tables = self.tables.values()
        return {
            "tables": len(tables),
            "keys": sum(table.keys for table in tables),
            "entries": sum(table.entries for table in tables),
            "keys_evicted": sum(table.keys_evicted for table in tables),
            "entries_evicted": sum(table.entries_evicted for table in tables),
        }
