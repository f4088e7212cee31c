"""A tokenizer that fails at a text, however it is asked: a failure of its own release alone."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace

import numpy as np
import pytest

from edge_runtime.clock import ManualClock
from edge_runtime.config import EdgeConfig
from edge_runtime.errors import HeadwaterError, PackageError
from edge_runtime.features.tokens import ODD
from edge_runtime.inference.slot import load_arm
from edge_runtime.personal.policy import Policy
from edge_runtime.personal.prior import Prior
from edge_runtime.runtime import Event, Runtime

KNOWN = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *ODD.split(), "my", "card"]
GOOD, BAD = "my card", "strange"


@pytest.fixture
def load(write_text_package, text_spec):
    """`load(name)` loads an arm; a `picky` one has no id for words that it does not know."""
    tokenizer = json.loads(text_spec(8).tokenizers["tiny"])
    vocab = {word: at for at, word in enumerate(KNOWN)}
    tokenizer |= {"pre_tokenizer": {"type": "WhitespaceSplit"}, "normalizer": None}
    tokenizer["model"] = {"type": "WordLevel", "vocab": vocab, "unk_token": "none"}
    picky_one = json.dumps(tokenizer)
    eye = np.eye(9, dtype=np.float32)
    policy = Policy(Prior("binary", eye[0] * 0, eye, 3.0, 50.0))

    def load(name, *, weight=0.0, picky=False, length=32, heavy=False):
        options = {"tokenizer": picky_one, "said": [GOOD]} if picky else {}
        package = write_text_package(
            length, policy=policy, also={"embedding": "pooled"}, heavy=heavy, **options
        )
        return load_arm(*package, name, "r2" if name != "stable" else "r1", weight)

    return load


@pytest.fixture
def runtime(tmp_path):
    config = EdgeConfig(
        device="a",
        families=["intent"],
        state_dir=tmp_path / "state",
        socket=tmp_path / "edge.sock",
    )
    with Runtime.open(config, clock=ManualClock(10.0)) as runtime:
        yield runtime


def asked(text):
    return Event("asked", 10.0, {"text": text})


def alone(runtime, text):
    return runtime.predict("intent", asked(text))


def later(runtime, text):
    return asyncio.run(runtime.predict_async("intent", asked(text)))


def together(runtime, text):
    found = runtime.predict_many("intent", [asked(GOOD), asked(text)])[1]
    if isinstance(found, HeadwaterError):
        raise found
    return found


def within(runtime, text):
    return runtime.session("intent", "ada").predict(asked(text))


def ranked(runtime, text):
    candidates = [{"text": text}, {"text": GOOD}]
    return runtime.session("intent", "ada").rank(Event("asked", 10.0, {}), candidates, 1)[0]


EVERY_WAY = pytest.mark.parametrize("ask", [alone, later, together, within, ranked])


def counts(runtime):
    arms = runtime.statistics()["families"]["intent"]["arms"]
    return {arm["arm"]: (arm["answered"], arm["failed"]) for arm in arms}


@EVERY_WAY
@pytest.mark.parametrize("heavy", [False, True])
def test_the_stable_release_answers_where_the_tokenizer_of_a_trial_fails(runtime, load, ask, heavy):
    length = 512 if heavy else 32
    stable = load("stable", weight=1.0, length=length, heavy=heavy)
    runtime.swap("intent", [stable, load("canary", picky=True)], None)
    assert stable.runner.inline is not heavy
    assert ask(runtime, BAD).release == ask(runtime, GOOD).release == "r1"
    assert counts(runtime)["stable"][1] == 0


@EVERY_WAY
def test_a_trial_that_is_drawn_and_fails_is_counted_and_the_stable_one_answers(runtime, load, ask):
    arms = load("stable", weight=0.0001), load("canary", weight=0.9999, picky=True)
    runtime.swap("intent", arms, None)
    assert ask(runtime, BAD).release == "r1"
    assert counts(runtime)["canary"][1] == 1


@EVERY_WAY
def test_a_lone_release_whose_tokenizer_fails_is_told_and_the_next_text_answered(
    runtime, load, ask
):
    runtime.swap("intent", [load("stable", weight=1.0, picky=True)], None)
    with pytest.raises(PackageError, match="tokenizer fails") as caught:
        ask(runtime, BAD)
    assert caught.value.code == "run_failed"
    if ask is not ranked:
        assert counts(runtime)["stable"][1] == 1
    assert alone(runtime, GOOD).release == "r1"


def test_a_shadow_whose_tokenizer_fails_is_not_usable_and_costs_nobody_an_answer(runtime, load):
    shadow = replace(load("shadow", picky=True), shadow=True)
    runtime.swap("intent", [load("stable", weight=1.0), shadow], None)
    assert alone(runtime, BAD).release == "r1"
    runtime._asking.shadowing.close()
    runtime._asking.shadowing.turn()
    [compared] = runtime._members["intent"].shadow_reports()
    assert (compared.rows, compared.bad) == (1, 1)
