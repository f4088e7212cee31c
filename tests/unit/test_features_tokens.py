"""Texts as features: any text gives ids, what cannot be read is refused by name."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.errors import ConfigError, PackageError
from edge_runtime.features.engine import Engine
from edge_runtime.features.feature import Column, Padding
from edge_runtime.features.histogram import Histograms, counts_of
from edge_runtime.features.spec import Spec
from edge_runtime.inference.package import Interface, Kind, check_agreement

PAD, UNK, CLS, SEP, MY, CARD = 0, 1, 2, 3, 4, 5
LOST, LAST = 7, 14


def ids(spec, text):
    return Engine(spec).vector(0.0, {"text": text}).astype(int).tolist()


def edited(spec, **changes):
    """The tokenizer of `spec` with parts replaced."""
    return json.dumps(json.loads(spec.tokenizers["tiny"]) | changes)


def refusal(call, *arguments):
    with pytest.raises(ConfigError) as caught:
        call(*arguments)
    return caught.value


def test_a_text_is_a_row_of_ids_filled_with_padding(text_spec):
    spec = text_spec(8)
    assert ids(spec, "My LOST cards") == [CLS, MY, LOST, CARD, LAST, SEP, PAD, PAD]
    assert spec.names == [f"text_{n}" for n in range(8)]
    assert spec.columns[0] == Column("text_0", LAST + 1, PAD)
    assert spec.padding == Padding(8, PAD)


def test_an_odd_text_has_the_same_ids_with_each_version_of_the_library(text_spec):
    assert text_spec(8).encoders["text"].digest == "8288cb6f10cc6e7c"


def test_what_is_too_long_is_cut_before_the_end_mark(text_spec):
    assert ids(text_spec(5), "my card is lost when") == [CLS, MY, CARD, 6, SEP]


def test_of_a_text_so_many_characters_are_read_for_each_id(text_spec):
    assert ids(text_spec(5), " " * 38 + "my") == [CLS, MY, SEP, PAD, PAD]
    assert ids(text_spec(5), " " * 40 + "my") == [CLS, SEP, PAD, PAD, PAD]


def test_a_word_that_is_too_long_is_unknown_whatever_its_tokenizer_allows(text_spec):
    spec = text_spec(40)
    model = json.loads(spec.tokenizers["tiny"])["model"]
    vocab = {"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "q": 4, "##q": 5}
    for allowed, most in ((100, 32), (10, 10)):
        changed = model | {"vocab": vocab, "max_input_chars_per_word": allowed}
        words = text_spec(40, edited(spec, model=changed))
        assert ids(words, "q" * most).count(5) == most - 1
        assert ids(words, "q" * (most + 1) + " q")[:4] == [CLS, UNK, 4, SEP]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", [CLS, SEP, PAD, PAD, PAD, PAD, PAD, PAD]),
        ("\0 \x01", [CLS, UNK, UNK, SEP, PAD, PAD, PAD, PAD]),
        ("漢字 мир 😀", [CLS, *[UNK] * 3, SEP, PAD, PAD, PAD]),
        ("[SEP] [PAD]", [CLS, *[UNK] * 6, SEP]),
    ],
)
def test_strange_texts_have_defined_ids(text_spec, text, expected):
    assert ids(text_spec(8), text) == expected


def test_any_text_gives_ids_of_the_vocabulary_with_padding_only_at_its_end(text_spec):
    encode = text_spec(16).encoders["text"]

    @given(st.text(max_size=200))
    def holds(text):
        row = encode(text)
        end = row.index(SEP) + 1
        assert (len(row), row[0]) == (16, CLS)
        assert all(PAD < each <= LAST for each in row[:end])
        assert set(row[end:]) <= {PAD}

    holds()


def test_the_tokenizer_travels_in_the_spec_and_moves_its_hash(text_spec):
    spec = text_spec(8)
    again = Spec.from_json(spec.to_json())
    assert again == spec
    assert again.hash == spec.hash
    assert again.encoders["text"] is spec.encoders["text"]
    other = text_spec(8, edited(spec, normalizer=None))
    assert other.hash != spec.hash
    assert other != spec


def test_an_absent_text_reads_as_an_empty_one(text_spec):
    engine = Engine(text_spec(8))
    assert engine.packed(0.0, {}) == engine.packed(0.0, {"text": ""})


def test_many_events_at_once_read_as_each_alone(text_spec):
    engine = Engine(text_spec(8))
    texts = [{"text": "my card"}, {"text": ""}]
    assert engine.packed_many(0.0, texts) == [engine.packed(0.0, each) for each in texts]


def test_a_subset_takes_its_tokenizers_along_and_no_other(text_spec):
    document = json.loads(text_spec(8).to_json())
    document["features"].append({"name": "x", "field": "x"})
    spec = Spec.from_document(document)
    assert spec.padding is None
    assert spec.subset(["text"]) == text_spec(8)
    assert spec.subset(["x"]).tokenizers == {}


@pytest.mark.parametrize(
    ("tokens", "code", "word"),
    [
        ({"tokenizer": "tinny"}, "unknown_tokenizer", "tokens.tokenizer"),
        ({"field": ""}, "bad_value", "tokens.field"),
        ({"length": 513}, "bad_value", "tokens.length"),
        ({"length": 0}, "bad_value", "tokens.length"),
        ({"length": 2}, "bad_tokenizer", "3 ids at least"),
        ({"size": 2}, "unknown_key", "tokens.size"),
    ],
)
def test_a_wrong_text_feature_is_refused_by_name(text_spec, tokens, code, word):
    document = json.loads(text_spec(8).to_json())
    document["features"][0]["tokens"] |= tokens
    error = refusal(Spec.from_document, document)
    assert (error.code, word in error.message) == (code, True)


@pytest.mark.parametrize("key", ["log1p", "one_hot"])
def test_nothing_is_done_to_a_text(text_spec, key):
    document = json.loads(text_spec(8).to_json())
    document["features"][0][key] = True
    assert refusal(Spec.from_document, document).code == "bad_value"


@pytest.mark.parametrize(
    ("broken", "word"),
    [
        ("", "cannot be used"),
        ("{}", "cannot be used"),
        ("[" * 1000, "cannot be used"),
        ({"model": {"type": "WordLevel", "vocab": {"[PAD]": 0, "a": 5}, "unk_token": "a"}}, "id"),
        ({"post_processor": None}, "post-processor"),
        ({"model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "b"}}, "cannot be used"),
    ],
)
def test_a_tokenizer_that_cannot_serve_any_text_is_refused(text_spec, broken, word):
    text = broken if isinstance(broken, str) else edited(text_spec(8), **broken)
    error = refusal(text_spec, 8, text)
    assert (error.code, "'tiny'" in error.message) == ("bad_tokenizer", True)
    assert word in str(error)


def test_a_text_must_be_a_text_field(text_spec):
    for kind in ("int", "float"):
        kinds = {"asked": Kind(predicts=True, fields={"text": kind})}
        with pytest.raises(PackageError, match=f"asked.text to be text; it is a {kind}"):
            check_agreement(Interface("f", kinds, "event", 1.0, 1.0, "o"), text_spec(8))


def test_a_sketch_of_texts_says_how_long_they_are_and_no_word(text_spec):
    spec = text_spec(8)
    found = Histograms(spec.columns)
    found.add(np.float32([ids(spec, "my card"), ids(spec, "where"), ids(spec, "")]))
    counts = [counts_of(each, 3) for each in found.sketches()]
    assert counts == [{1: 3}, {1: 3}, {0: 1, 1: 2}, {0: 2, 1: 1}, *[{0: 3}] * 4]


CHILD = """
import json, sys
from pathlib import Path
from edge_runtime.errors import HeadwaterError
from edge_runtime.inference.prover import Prover
from edge_runtime.rollout.arms import load_plan_arm
from edge_runtime.rollout.plan import PlanArm, model_path
from edge_runtime.runtime import Event, Runtime
from edge_runtime.update.shelf import Shelf

package, sha256, toy, folder = sys.argv[1:]
shelf = Shelf(Path(folder))
shelf.put_whole(sha256, Path(package).read_bytes())
arm = PlanArm("r2", model_path("intent", "r2"), sha256, 1, 1.0)
said = []
with Runtime.open(package=Path(toy)) as runtime:
    prover = Prover()
    for prove in (None, prover.prove):
        try:
            load_plan_arm(shelf, "stable", arm, None, prove)
        except HeadwaterError as error:
            said.append([type(error).__name__, error.code, error.hint])
    prover.close()
    event = Event("scheduled", 10.0, {"carrier": "AA", "distance": 100.0})
    answered = runtime.predict(None, event).release
print(json.dumps([said, shelf.quarantined(), answered]))
"""


def test_a_device_without_the_extra_says_so_keeps_what_serves_and_will_try_again(
    tmp_path, write_text_package, write_package, without_tokenizers
):
    """In a process where the library cannot be imported, and in the child that proves there."""
    package, sha256 = write_text_package()
    toy, _ = write_package()
    folder = tmp_path / "shelf"
    search = os.pathsep.join([str(without_tokenizers), *filter(None, sys.path)])
    result = subprocess.run(
        [sys.executable, "-c", CHILD, str(package), sha256, str(toy), str(folder)],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": search},
    )
    assert result.stderr == ""
    said, quarantined, answered = json.loads(result.stdout)
    assert said == [["PackageError", "missing_extra", "pip install 'headwater[text]'"]] * 2
    assert quarantined == {}
    assert answered
