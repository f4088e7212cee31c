"""Rows that end in padding: run on their first columns alone, with the answers of the whole row."""

from __future__ import annotations

import asyncio
import json

import numpy as np
import pytest

from edge_runtime.api.telling import told
from edge_runtime.clock import ManualClock
from edge_runtime.config import EdgeConfig, InferenceConfig
from edge_runtime.errors import PackageError, RequestError
from edge_runtime.features.feature import Padding
from edge_runtime.inference.buckets import TOKENS_AT_ONCE, Buckets, padding_in
from edge_runtime.inference.prover import Prover
from edge_runtime.inference.runner import Runner
from edge_runtime.inference.slot import load_arm
from edge_runtime.runtime import Event, Runtime

SIZES = [8, 10, 12, 14, 16, 20, 24, 28, 32, 40, 48, 56, 64]
TEXTS = ["", "my card is lost", "when will it come ? where is my card ?", "cards " * 60, "где 😀"]
PLACE = None, "stable", "r1", 1.0


@pytest.fixture
def runner(write_text_package):
    return Runner(write_text_package(64)[0])


@pytest.fixture
def rows(text_spec):
    return np.stack([np.float32(text_spec(64).encoders["text"](text)) for text in TEXTS])


def whole(runner, rows):
    """The answers to rows with all their padding."""
    return np.concatenate([runner.whole({"features": row[None]})[0] for row in rows])


def refused(path):
    with pytest.raises(PackageError) as caught:
        load_arm(path, *PLACE)
    return caught.value


@pytest.mark.parametrize(
    ("length", "sizes"),
    [(3, [3]), (8, [8]), (20, [8, 10, 12, 14, 16, 20]), (65, [*SIZES, 65]), (64, SIZES)],
)
def test_there_are_four_buckets_for_each_doubling_up_to_the_length(length, sizes):
    assert Buckets(Padding(length, 0)).sizes == sizes


def test_a_row_is_run_in_the_smallest_bucket_that_holds_it():
    x = np.full((5, 20), 9, np.float32)
    for row, end in zip(x, [1, 8, 9, 20], strict=False):
        row[:end] = 1
    x[0, 0], x[2, 4] = 9, 9  # nothing but padding; padding inside
    ran = []

    def run(part):
        ran.append(part.shape)
        return [part[:, :1] * 10, part.sum(1)]

    first, total = Buckets(Padding(20, 9)).run(run, x)
    assert sorted(ran) == [(1, 8), (1, 10), (3, 20)]
    assert first[:, 0].tolist() == [90, 10, 10, 10, 90]
    assert total[1:4].tolist() == [8, 8 + 9 + 9, 20]


def test_many_rows_are_run_in_parts_and_answers_stand_in_their_order():
    x = np.zeros((TOKENS_AT_ONCE // 5, 16), np.float32)
    x[:, 0] = 1 + np.arange(len(x))
    x[::2, 13] = 1
    ran = []

    def run(part):
        ran.append(part.size)
        return [part[:, :1]]

    [found] = Buckets(Padding(16, 0)).run(run, x)
    assert found.tolist() == x[:, :1].tolist()
    assert sum(ran) == len(x) // 2 * (8 + 14)
    assert max(ran) <= TOKENS_AT_ONCE


def test_a_model_that_loses_rows_is_told():
    x = np.ones((3, 8), np.float32)
    with pytest.raises(PackageError, match="other rows"):
        Buckets(Padding(8, 0)).run(lambda part: [part[:1]], x)


def test_every_way_to_ask_gives_the_answers_of_the_whole_row(runner, rows):
    expected = whole(runner, rows)
    assert runner.buckets.sizes_of(rows).tolist() == [8, 8, 12, 64, 8]
    assert list(runner.bucket_us) == SIZES
    packed = [row.tobytes() for row in rows]
    feeds = [{"features": row[None]} for row in rows]
    for found in (
        runner.run(rows),
        [runner.answer(each) for each in packed],
        runner.answer_many(packed),
        runner.infer({"features": rows})["probability"],
        np.concatenate([runner.infer(each)["probability"] for each in feeds]),
        np.concatenate([each["probability"] for each in runner.infer_many(feeds)]),
    ):
        assert np.allclose(found, expected, rtol=0, atol=1e-5)


def test_a_row_is_answered_alike_whatever_was_asked_before(runner, rows):
    long, short = rows[3].tobytes(), rows[1].tobytes()
    first = runner.answer(short)
    runner.answer(long)
    assert runner.answer(short) == first


def test_columns_that_are_fixed_are_run_whole(write_text_package, rows):
    arm = load_arm(*write_text_package(64, fixed=True), "stable", "r1", 1.0)
    assert arm.runner.buckets is None
    assert np.allclose(arm.runner.run(rows), whole(arm.runner, rows), rtol=0, atol=1e-5)


def test_a_package_of_texts_passes_the_proof_of_the_child(write_text_package):
    prover = Prover()
    try:
        prover.prove(write_text_package()[0])
        with pytest.raises(PackageError) as caught:
            prover.prove(write_text_package(leaky=1.0)[0])
    finally:
        prover.close()
    assert caught.value.code == "padding_counts"


@pytest.mark.parametrize("leaky", [1.0, 1e-3])
def test_an_answer_that_depends_on_padding_is_refused_however_little(write_text_package, leaky):
    error = refused(write_text_package(leaky=leaky)[0])
    assert (error.code, "'probability'" in error.message) == ("padding_counts", True)


@pytest.mark.parametrize("length", [3, 8, 20, 64, 65, 512])
@pytest.mark.parametrize("pad", [0, 5, 14])
def test_each_bucket_is_proven_by_rows_that_do_not_begin_with_padding(length, pad):
    buckets = Buckets(Padding(length, pad))
    proofs, proven = buckets.proofs(15), set()
    for row, sizes in proofs:
        end = length - int((row[0, ::-1] != pad).argmax())
        assert row.shape == (1, length)
        assert 0 <= row.min() <= row.max() <= 14
        assert pad not in row[0, :end]
        assert min(sizes) == buckets.sizes_of(row)[0]
        proven |= set(sizes)
    assert sorted(proven) == buckets.sizes[:-1]
    assert len(proofs) <= 14


def test_no_rows_give_no_rows(runner, rows):
    assert runner.run(rows[:0]).shape == (0, 3)
    assert Buckets(Padding(8, 0)).run(lambda part: [part[:, :2]], rows[:0])[0].shape == (0, 2)


def test_a_tokenizer_that_pads_with_another_id_than_the_model_masks_is_refused(
    write_text_package, text_spec
):
    tokenizer = json.loads(text_spec(8).tokenizers["tiny"])
    named = {"strategy": "BatchLongest", "direction": "Right", "pad_to_multiple_of": None}
    tokenizer["padding"] = named | {"pad_id": 14, "pad_type_id": 0, "pad_token": "##s"}
    package, _ = write_text_package(tokenizer=json.dumps(tokenizer))
    assert refused(package).code == "padding_counts"


def test_an_embedding_that_depends_on_padding_is_refused(write_text_package):
    error = refused(write_text_package(also={"embedding": "every"})[0])
    assert (error.code, "'embedding'" in error.message) == ("padding_counts", True)


def test_an_embedding_that_does_not_is_given_alike_however_it_is_asked_for(
    write_text_package, rows
):
    runner = load_arm(write_text_package(64, also={"embedding": "pooled"})[0], *PLACE).runner
    expected = [runner.whole({"features": row[None]}, ["embedding"])[0][0] for row in rows]
    for found in (
        runner.embed(rows)[0],
        runner.infer({"features": rows}, ["embedding"])["embedding"],
        [runner.infer({"features": row[None]}, ["embedding"])["embedding"][0] for row in rows],
    ):
        assert np.allclose(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("texts", [1, 2])
def test_tensors_are_asked_in_buckets_too(write_text_package, rows, texts):
    """Seen by a model whose answers change with padding, which no device would load."""
    runner, short = Runner(write_text_package(64, leaky=1.0)[0]), rows[[1, 4][:texts]]
    found = runner.infer({"features": short})["probability"]
    cut = runner.whole({"features": short[:, :8].copy()})[0]
    assert np.allclose(found, cut, rtol=0, atol=1e-5)
    assert not np.allclose(found, whole(runner, short), rtol=0, atol=1e-3)


def test_a_model_that_gives_more_than_is_proven_is_run_whole(write_text_package, rows):
    runner = load_arm(write_text_package(64, also={"other": "every"})[0], *PLACE).runner
    assert (runner.buckets, runner.features) == (None, 64)
    expected = runner.whole({"features": rows}, ["other"])[0]
    assert np.allclose(runner.infer({"features": rows})["other"], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("fixed", [False, True])
def test_a_vocabulary_larger_than_the_table_is_refused(write_text_package, fixed):
    error = refused(write_text_package(words=10, fixed=fixed)[0])
    assert error.code == "wrong_vocabulary"


def test_golden_rows_that_come_out_otherwise_are_refused(write_text_package):
    assert refused(write_text_package(off=0.01)[0]).code == "golden_mismatch"


@pytest.mark.parametrize(
    "told",
    ["", "[]", '{"length":0,"pad":0}', '{"length":4096,"pad":0}', '{"length":8}']
    + [f'{{"length":8,"pad":{pad}}}' for pad in (-1, 2**24 + 1, 10**400)],
)
def test_padding_that_cannot_be_is_refused(told):
    with pytest.raises(PackageError) as caught:
        padding_in({"headwater.padding": told})
    assert caught.value.code == "bad_metadata"


def test_a_runtime_answers_texts_alone_and_together(write_text_package):
    with Runtime.open(package=write_text_package(64)[0]) as runtime:
        events = [Event("asked", 10.0, {"text": text}) for text in TEXTS]
        alone = [runtime.predict(None, event).outputs for event in events]
        together = [each.outputs for each in runtime.predict_many(None, events)]
        late = [asyncio.run(runtime.predict_async(None, event)).outputs for event in events]
        [arm] = runtime.statistics()["families"]["intent"]["arms"]
        told_of = told(runtime.statistics())
    assert np.allclose(alone, together, rtol=0, atol=1e-5)
    assert alone == late
    assert list(arm["bucket_us"]) == [str(size) for size in SIZES]
    assert f"({min(arm['bucket_us'].values()):.0f} to {arm['run_us']:.0f} µs a run)" in told_of


def test_texts_of_all_lengths_that_wait_for_the_worker_are_run_together(
    tmp_path, write_text_package
):
    """Rows of 512 tokens take the worker; those that came together are run by their buckets."""
    inference = InferenceConfig(batch_rows_max=16, batch_delay_us=200_000)
    config = EdgeConfig(
        device="a",
        families=["intent"],
        state_dir=tmp_path / "state",
        socket=tmp_path / "edge.sock",
        inference=inference,
    )
    arm = load_arm(*write_text_package(512, heavy=True), "stable", "r1", 1.0)
    events = [Event("asked", 10.0, {"text": text}) for text in TEXTS * 3]

    async def all_of(runtime):
        asks = [runtime.predict_async("intent", event) for event in events]
        return [each.outputs for each in await asyncio.gather(*asks)]

    with Runtime.open(config, clock=ManualClock(10.0)) as runtime:
        runtime.swap("intent", [arm], None)
        expected = [runtime.predict("intent", event).outputs for event in events]
        assert not arm.runner.inline
        assert np.allclose(asyncio.run(all_of(runtime)), expected, rtol=0, atol=1e-5)
        assert runtime.statistics()["worker"]["runs"] < len(events)


@pytest.mark.parametrize(
    ("text", "code"),
    [("x" * 100_000, "out_of_range"), ("a\ud800", "out_of_range"), (b"card", "wrong_type")],
)
def test_a_text_that_is_none_is_refused_and_the_next_is_answered(write_text_package, text, code):
    with Runtime.open(package=write_text_package()[0]) as runtime:
        with pytest.raises(RequestError) as caught:
            runtime.predict(None, Event("asked", 10.0, {"text": text}))
        assert caught.value.code == code
        assert runtime.predict(None, Event("asked", 10.0, {"text": "my card"})).outputs
