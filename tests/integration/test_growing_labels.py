"""Labels that grow: a new intent is told by two devices, learned, and answered by the one that
takes new releases; the other stays on the first release, and its labels count all the same.

All of it is real: the broker, `cloud-learner serve`, two daemons, and texts through a tokenizer and
a small transformer.
"""

from __future__ import annotations

import asyncio
import random
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import ExitStack, asynccontextmanager, contextmanager
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest

from cloud_learner.admission import Admissions
from cloud_learner.bootstrap import bootstrap
from cloud_learner.broker import Broker
from cloud_learner.children import spawn_tied
from cloud_learner.config import Home
from cloud_learner.evaluate.offline import is_held_out
from cloud_learner.host import Host
from cloud_learner.simulate.fleet import DeviceProcess, Fleet
from cloud_learner.simulate.watch import Watch
from cloud_learner.steering import Word, say
from cloud_learner.store.examples import Example
from cloud_learner.store.ingest_db import IngestDb
from cloud_learner.train import checkpoint
from cloud_learner.train.family import Family
from edge_runtime.api.client import AsyncClient
from edge_runtime.api.frames import Predicted
from edge_runtime.bus import nats
from edge_runtime.bus.memory import MemoryBroker
from edge_runtime.clock import SystemClock
from edge_runtime.errors import ConfigError, RequestError

WAIT_S = 120.0
ROUNDS_MAX = 60
NEXT_TO_NOTHING = 0.1
START_S = 1_700_000_000.0
CLASSES, NEW = 6, 4  # the first four are known from the start, the last one never comes
SAID = [
    "card lost stolen missing thief wallet",
    "transfer sent money account bank wire",
    "exchange rate euro dollar pound currency",
    "pin code forgot change blocked reset",
]
ONLY_A, ONLY_B = "phone device mobile", "screen tablet laptop"  # of the new intent
FILLERS = ["my", "the", "a", "please", "hello", "help", "i", "need", "with", "about", "is", "it"]
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *FILLERS, *" ".join([*SAID, ONLY_A, ONLY_B]).split()]
FAMILY = f"""
name = "wish"
output = "intent"
task = {{ kind = "multiclass", classes = {CLASSES} }}
label = {{ window_s = 40.0 }}
package = {{ quantize = "dynamic" }}
events.asked = {{ predicts = true, fields = {{ text = "str" }} }}

[learning]
batch_size = 40
device_cap = 40
bootstrap_passes = 15
reservoir_rows = 300
contributors = 0
steps = {{ rows = 20 }}
fast = {{ on = false, window_rows = 0 }}
stable = {{ passes = 6, replay_rows = 60, learning_rate = 1e-3 }}
student = {{ passes = 6, replay_rows = 60, learning_rate = 1e-3 }}

[gates]
static_drop_max = 0.1
recent_drop_max = 0.5
int8_gap_max = 0.1
calibration_min = 0.01
calibration_max = 100.0
recent_rows_min = 2
latency_us_max = 1e9

[rollout]
selector = {{ site = "a" }}
canary_share = 0.5
margin = 0.05
pairs_min = 10
gates = {{ slowdown = 0.0 }}
"""
FEATURES = """
version = 1
tokenizers.words = { file = "tokenizer.json" }
[[features]]
name = "text"
tokens = { field = "text", tokenizer = "words", length = 16 }
"""
NETWORK = f"""
from cloud_learner.train.blocks_text import Shape, TextNetwork


def build_teacher(spec, _rows):
    return TextNetwork(Shape({len(WORDS)}, 32, 1, 2, 32, spec.size), {CLASSES})


build_student = build_teacher
"""


class Customers:
    """What people write: three words of an intent among others, in any order."""

    def __init__(self, seed: int) -> None:
        self._chance = random.Random(seed)

    def writes(self, keywords: str) -> str:
        words = self._chance.sample(keywords.split(), 3) + self._chance.sample(FILLERS, 3)
        self._chance.shuffle(words)
        return " ".join(words)

    def old(self, count: int) -> list[tuple[str, int]]:
        """Texts with their intents, each of the first as often as another."""
        return [(self.writes(SAID[at % len(SAID)]), at % len(SAID)) for at in range(count)]


@pytest.fixture(scope="module")
def home(
    tmp_path_factory: pytest.TempPathFactory, word_tokenizer: Callable[[Sequence[str]], str]
) -> Home:
    """The home of a family that knows four intents of six."""
    var = tmp_path_factory.mktemp("growing")
    folder = var / "wish"
    folder.mkdir()
    (folder / "family.toml").write_text(FAMILY)
    (folder / "features.toml").write_text(FEATURES)
    (folder / "network.py").write_text(NETWORK)
    (folder / "tokenizer.json").write_text(word_tokenizer(WORDS))
    lines = ["event_time,text,label,label_time"]
    for at, (text, intent) in enumerate(Customers(1).old(320)):
        asked, told = (
            datetime.fromtimestamp(START_S - 1000 + at + after, UTC).isoformat() for after in (0, 1)
        )
        lines.append(f"{asked},{text},{intent},{told}")
    (var / "past.csv").write_text("\n".join(lines) + "\n")
    bootstrap(folder, var / "past.csv", Home(var / "home"), lambda _text: None)
    return Home(var / "home")


@contextmanager
def learner(home: Home, url: str) -> Iterator[subprocess.Popen[bytes]]:
    """`cloud-learner serve` as a process; ended as an operator does."""
    log = home.root.parent / "learner.log"
    with log.open("wb") as output:
        command = [sys.executable, "-m", "cloud_learner.cli", "serve"]
        options = ["--home", str(home.root), "--nats", url]
        process = spawn_tied([*command, *options], output=output.fileno())
    try:
        yield process
    finally:
        process.terminate()
        assert process.wait(WAIT_S) == 0, log.read_text()


class Site:
    """A learner and two devices; `play` brings texts of both, with their intents told."""

    def __init__(self, url: str, watch: Watch, clients: dict[str, AsyncClient]) -> None:
        self.url, self.watch, self._clients = url, watch, clients
        self._customers = Customers(2)
        self._time_s = START_S
        self.told: dict[str, int] = {}  # the intent, by the prediction

    async def answers(self, device: str, texts: Sequence[str]) -> np.ndarray:
        """What a device answers (texts, classes); nobody tells what was right."""
        asked = [await self._ask(device, text) for text in texts]
        return np.array([each.outputs for each in asked])

    async def play(self) -> None:
        """One micro-batch of the texts of both devices, and until the learner has dealt with it."""
        for device, words in (("a", ONLY_A), ("b", ONLY_B)):
            new = [(self._customers.writes(words), NEW) for _ in range(8)]
            for text, intent in [*self._customers.old(12), *new]:
                answer = await self._ask(device, text)
                await self._clients[device].label("wish", answer.id, intent, self._time_s)
                self.told[answer.id] = intent
        due = len(self.told) // 40 - 3  # the newest are not mature yet
        await self.until(f"batch {due}", lambda: self.watch.status.counters["cycles"] >= due)

    async def refuses_what_is_no_class(self, device: str) -> None:
        answer = await self._ask(device, "help")
        for value in (CLASSES, -1, 0.5):
            with pytest.raises(RequestError, match=f"classes 0 to {CLASSES - 1} of wish") as caught:
                await self._clients[device].label("wish", answer.id, value, self._time_s)
            assert caught.value.code == "bad_label"

    async def until(self, what: str, ready: Callable[[], object]) -> None:
        await self.watch.wait(what, ready, WAIT_S)

    async def serves(self, device: str, release: str) -> None:
        def ready() -> bool:
            report = self.watch.reports.get(device)
            return report is not None and release in [arm.release for arm in report.arms]

        await self.until(f"{release} on {device}", ready)

    async def _ask(self, device: str, text: str) -> Predicted:
        self._time_s += 1.0
        return await self._clients[device].predict("wish", "asked", self._time_s, {"text": text})


@asynccontextmanager
async def site(home: Home) -> AsyncIterator[Site]:
    with ExitStack() as stack:
        admissions = Admissions(home)
        broker = stack.enter_context(Broker.start(home.broker, admissions.rules()))
        devices = [
            DeviceProcess(
                name,
                home.root.parent / name,
                families=["wish"],
                attributes={"site": name},
                nats=broker.url,
                root=home.trusted_root,
            )
            for name in "ab"
        ]
        for device in devices:
            admissions.admit(device.name, device.public_key())
        process = stack.enter_context(learner(home, broker.url))
        bus = await nats.connect(broker.url, name="test", access=admissions.access())
        watch = Watch()
        watch.check_alive = lambda: None if process.poll() is None else pytest.fail("it ended")
        try:
            await watch.follow(bus)
            async with Fleet(devices) as fleet:
                clients = {
                    name: await AsyncClient.connect(socket)
                    for name, socket in fleet.sockets.items()
                }
                await watch.wait("the learner", lambda: watch.status is not None, WAIT_S)
                yield Site(broker.url, watch, clients)
                for client in clients.values():
                    await client.close()
        finally:
            await bus.close()


def right(answers: np.ndarray, intents: Sequence[int]) -> float:
    """The share of the answers (texts, classes) whose largest number is that of the intent."""
    return float((answers.argmax(1) == intents).mean())


def of_id(example: Example) -> str:
    return ".".join(map(str, example.id))


def test_a_new_intent_is_learned_of_two_devices_and_one_that_stays_on_its_release_goes_on(
    home: Home,
) -> None:
    first = home.of("wish").origin().release
    asked = Customers(3)
    old, intents = zip(*asked.old(40), strict=True)
    new = [asked.writes(words) for words in (ONLY_A, ONLY_B) for _ in range(10)]

    async def learned(here: Site) -> bool:
        return right(await here.answers("a", new), [NEW] * len(new)) > 0.9

    async def scenario() -> dict[str, int]:
        async with site(home) as here:
            await here.serves("a", first)
            await here.serves("b", first)
            hold = Word("hold", "wish", "anna", "it stays on what it has", "b")
            await say(here.url, Admissions(home).access(), hold)
            before = await here.answers("b", old)
            assert (await here.answers("a", new))[:, NEW:].max() < NEXT_TO_NOTHING

            for _ in range(ROUNDS_MAX):
                await here.play()
                if await learned(here):
                    break
            else:
                pytest.fail(f"not learned: {here.watch.detail}")
            assert right(await here.answers("a", old), intents) > 0.9
            await here.until("promotion", lambda: here.watch.rollout("wish")["counts"]["promoted"])

            assert np.array_equal(await here.answers("b", old), before)
            assert right(before, intents) > 0.9
            assert (await here.answers("b", new))[:, NEW:].max() < NEXT_TO_NOTHING
            assert {arm.release for arm in here.watch.reports["b"].arms} == {first}
            assert here.watch.counter("request_errors") == here.watch.refusals() == 0
            counters = here.watch.status.counters
            assert counters["balanced"] == 1
            assert counters["quarantined"] == counters["micro_batches_failed"] == 0
            await here.refuses_what_is_no_class("b")
            return here.told

    told = asyncio.run(scenario())
    state = checkpoint.load(home.of("wish").checkpoint)
    db = IngestDb(home.ingest_db)
    batches = [each for each in db.batches_after("wish", 0) if each.number <= state["number"]]
    db.close()
    learned_of = [each for batch in batches for each in batch.examples]
    assert {of_id(each): each.label for each in learned_of}.items() <= told.items()
    ours = [each for each in learned_of if each.device == "b" and each.label == NEW]
    assert len(ours) > 10
    assert {tuple(arm.release for arm in each.scored) for each in ours} == {(first,)}
    held_out = {each.id for each in ours if is_held_out(each)}
    assert {each.id for each in ours} - set(state["ledger"]["mature"]) == held_out


@pytest.mark.parametrize("classes", [CLASSES - 1, CLASSES + 2])
def test_a_family_that_asks_for_another_number_of_classes_is_told_what_to_do(
    home: Home, tmp_path: Path, classes: int
) -> None:
    folder, before = tmp_path / "wish", set(home.root.rglob("*"))
    shutil.copytree(home.root.parent / "wish", folder)
    for name, old in (("family.toml", f"classes = {CLASSES}"), ("network.py", f", {CLASSES})")):
        text = (folder / name).read_text()
        assert old in text
        (folder / name).write_text(text.replace(old, old.replace(f"{CLASSES}", f"{classes}")))

    async def opened() -> Host:
        bus = await MemoryBroker().connect(name="learner")
        return Host(home, [Family.load(folder)], bus, SystemClock())

    with pytest.raises(ConfigError) as caught:
        asyncio.run(opened())
    assert caught.value.code == "other_classes"
    assert f"asks for answers of {classes} numbers" in caught.value.message
    assert f"go back to {CLASSES} in family.toml" in caught.value.hint
    assert set(home.root.rglob("*")) == before
