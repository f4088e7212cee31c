"""A device's log once more, with holes: what comes out whole is right, what is missing is told."""

from __future__ import annotations

import random

import msgspec
import numpy as np
import pytest

from cloud_learner.experiment.hindsight import Hindsight
from cloud_learner.experiment.lanes import Lost
from cloud_learner.experiment.logged import Known
from edge_runtime.features.engine import Engine
from edge_runtime.features.spec import Spec
from edge_runtime.inference.package import Interface, Kind
from edge_runtime.wire.messages import (
    NO_PRIOR,
    LabelRecord,
    ObservationRecord,
    PredictionRecord,
    Scored,
)

EVENTS = 3000
SKEW_S = 20.0
WINDOWS = {
    "sum": 'over = "departed", value = "delay", statistic = "sum", span_s = 60.0',
    "std": 'over = "departed", key = "carrier", value = "delay", statistic = "std", span_s = 90.0',
    "last": 'over = "departed", key = "carrier", value = "delay", statistic = "max", '
    "span_events = 7",
    "few": 'over = "departed", key = "carrier", value = "delay", statistic = "distinct", '
    "span_events = 5",
    "seen": 'over = "departed", value = "delay", statistic = "distinct", span_s = 50.0',
    "decayed": 'over = "departed", key = "carrier", value = "delay", '
    'statistic = "decayed_mean", half_life_s = 1.0',
    "asked": 'over = "asked", key = "carrier", statistic = "time_since_last", span_s = 80.0',
    "labels": 'over = "label", key = "carrier", statistic = "mean", span_s = 70.0',
}


def spec_of(names) -> Spec:
    parts = [f'[[features]]\nname = "{n}"\nwindow = {{ {WINDOWS[n]} }}\n' for n in names]
    plain = '[[features]]\nname = "distance"\nfield = "distance"\n'
    return Spec.from_toml("version = 1\n" + plain + "".join(parts))


OLD, NEW = spec_of(["sum"]), spec_of(WINDOWS)
INTERFACE = Interface(
    family="toy",
    kinds={
        "asked": Kind(predicts=True, fields={"carrier": "str", "distance": "float"}),
        "departed": Kind(predicts=False, fields={"carrier": "str", "delay": "float"}),
    },
    clock="event",
    skew_s_max=SKEW_S,
    lateness_s_max=30.0,
    output="late",
)
KNOWN = Known({OLD.hash: OLD, NEW.hash: NEW}, frozenset())


def lived(seed: int):
    """The lanes of a device under OLD: events a few seconds apart, some late, most labelled."""
    chance, engine = random.Random(seed), Engine(OLD, lateness_s=30.0)
    events, labels, newest_s, now_s = [], [], -np.inf, 1e6
    for seq in range(1, EVENTS + 1):
        now_s += chance.random() * 2
        time_s = now_s - chance.choice([0, 0, 0, 5, 20, 100]) * chance.random()
        carrier = chance.choice("AB")
        if chance.random() < 0.5:
            fields = {"carrier": carrier, "delay": float(chance.randrange(9))}
            events.append((seq, ObservationRecord("toy", "departed", time_s, fields)))
        else:
            fields = {"carrier": carrier, "distance": chance.random()}
            packed, scored = engine.packed(time_s, fields), [Scored("r1", "stable", [0.5])]
            said = ("toy", "asked", time_s, fields, OLD.hash, packed, 1.0, scored)
            events.append((seq, PredictionRecord(*said)))
            labels.append(LabelRecord("toy", 1, seq, float(chance.randrange(2)), now_s + 10.25))
        newest_s = max(newest_s, time_s)
        if time_s >= newest_s - 30.0:
            engine.observe(events[-1][1].kind, time_s, fields)
    return events, list(enumerate(labels, start=1))


def holed(lane, holes):
    """The lane without the numbers in `holes`, which are ranges."""
    gone = {seq for hole in holes for seq in hole}
    starts = {hole.start: Lost("dropped", len(hole)) for hole in holes}
    found = []
    for seq, record in lane:
        if seq in starts:
            found.append((seq, starts[seq]))
        elif seq not in gone:
            found.append((seq, record))
    return found


def replay(events, labels, spec=NEW, prior=NO_PRIOR, known=KNOWN):
    hindsight = Hindsight(spec, INTERFACE, known)
    return {each.seq: each.features for each in hindsight.live(1, prior, events, labels)}, hindsight


@pytest.mark.parametrize(
    "seed", [5, 31, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(40, 80))]
)
def test_what_comes_out_whole_after_gaps_is_what_a_whole_log_gives(seed) -> None:
    events, labels = lived(seed)
    chance = random.Random(seed)
    starts = sorted(chance.sample(range(100, EVENTS - 600, 200), 3))
    holes = [range(at, at + chance.choice([1, 5, 40])) for at in starts]
    whole, _ = replay(events, labels)

    found, hindsight = replay(holed(events, holes), labels)

    told = hindsight.found
    assert {seq: whole[seq] for seq in found} == found, f"seed {seed}"
    assert told.lost == {"dropped": sum(map(len, holes))}
    assert told.after_gap == told.predictions - told.whole > 0
    assert max(found) > EVENTS - 100, "gaps end"
    assert not told.differing
    assert told.compared == told.predictions


@pytest.mark.parametrize("name", ["last", "few", "decayed"])
def test_windows_without_a_span_are_whole_when_they_have_seen_enough_of_a_key(name) -> None:
    events, labels = lived(4)
    events = [(seq, r) for seq, r in events if seq < 1000 or seq % 5 == 0]  # few after the gap
    events = [(at, r) for at, (_, r) in enumerate(events, start=1)]
    whole, _ = replay(events, labels, spec=spec_of([name]))

    found, hindsight = replay(holed(events, [range(960, 1000)]), labels, spec=spec_of([name]))

    assert {seq: whole[seq] for seq in found} == found
    assert 0 < hindsight.found.after_gap < 100


def test_a_gap_in_what_was_logged_too_is_explained_and_its_logged_values_are_kept() -> None:
    events, labels = lived(5)
    whole, _ = replay(events, labels, spec=OLD)

    found, hindsight = replay(holed(events, [range(500, 540)]), labels, spec=OLD)

    assert found == {seq: whole[seq] for seq in whole if seq not in range(500, 540)}
    assert hindsight.found.explained > 0
    assert not hindsight.found.differing


def test_labels_that_are_missing_concern_windows_over_labels_alone() -> None:
    events, labels = lived(6)
    whole, _ = replay(events, labels)

    found, hindsight = replay(events, holed(labels, [range(300, 340)]))
    others, _ = replay(events, holed(labels, [range(300, 340)]), spec=spec_of(["std", "last"]))

    assert {seq: whole[seq] for seq in found} == found
    assert hindsight.found.after_gap > 0
    assert len(others) == len(whole)


def test_before_the_first_envelope_windows_fill_and_what_they_lack_is_partial() -> None:
    events, labels = lived(7)
    whole, _ = replay(events, labels)

    late = [(seq, record) for seq, record in events if seq >= 1000]
    found, hindsight = replay([(1, Lost("not_kept", 999)), *late], labels, prior=7)

    told = hindsight.found
    assert {seq: whole[seq] for seq in found} == found
    assert told.lost == {"before_raw": 999}
    assert told.partial == told.predictions - told.whole > 0
    assert min(found) > 1000
    assert max(found) > EVENTS - 100


def test_a_value_that_was_logged_otherwise_is_counted_by_feature() -> None:
    events, labels = lived(8)
    seq, record = next(each for each in events if isinstance(each[1], PredictionRecord))
    values = np.frombuffer(record.features, "<f4").copy()
    values[0] += 1
    forged = msgspec.structs.replace(record, features=values.tobytes())

    _, hindsight = replay([(seq, forged) if s == seq else (s, r) for s, r in events], labels)

    assert hindsight.found.differing == {"distance": 1}


def test_a_field_that_old_events_have_not_is_named_and_no_value_is_made_up_for_it() -> None:
    events, labels = lived(9)
    bare = [
        (
            seq,
            msgspec.structs.replace(
                r, fields={k: v for k, v in r.fields.items() if k != "carrier"}
            ),
        )
        for seq, r in events
    ]

    found, hindsight = replay(bare, labels, spec=spec_of(["std"]))

    told = hindsight.found
    assert found == {}
    assert told.lacking == {"asked.carrier": told.predictions}
    assert told.lost["without departed.carrier"] > EVENTS / 3  # not those that were late


def test_one_redacted_observation_hides_the_windows_that_missed_it_and_no_others() -> None:
    events, labels = lived(10)
    whole, _ = replay(events, labels)
    at = next(at for at, (seq, r) in enumerate(events) if r.kind == "departed" and seq > 1000)
    redacted = msgspec.structs.replace(events[at][1], fields={"carrier": "A"})
    holed_events = [*events[:at], (events[at][0], redacted), *events[at + 1 :]]

    found, hindsight = replay(holed_events, labels)
    others, _ = replay(holed_events, labels, spec=spec_of(["asked", "labels"]))

    assert {seq: whole[seq] for seq in found} == found
    assert hindsight.found.lost == {"without departed.delay": 1}
    assert hindsight.found.after_gap > 0
    assert len(others) == len(whole)


def test_a_log_that_begins_anew_begins_with_empty_windows() -> None:
    events, labels = lived(11)
    alone, _ = replay(events, labels)
    hindsight = Hindsight(NEW, INTERFACE, KNOWN)
    list(hindsight.live(0, NO_PRIOR, events, []))

    again = {each.seq: each.features for each in hindsight.live(1, NO_PRIOR, events, labels)}

    assert again == alone


def test_a_life_that_forked_from_an_older_one_is_a_gap() -> None:
    events, labels = lived(12)
    hindsight = Hindsight(NEW, INTERFACE, KNOWN)
    list(hindsight.live(1, NO_PRIOR, events[:1500], labels[:100]))
    list(hindsight.live(5, 1, events[:10], []))
    list(hindsight.live(9, 1, events[1500:], []))

    assert hindsight.found.lost == {"other_life": 1}
    assert hindsight.found.after_gap > 0
