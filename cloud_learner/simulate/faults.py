"""Faults and attacks for the demo: what the ordinary code must withstand without being told.

The fault model:

* `flip`    labels are turned over in what one candidate learns; submitted like any other.
* `poison`  the gate's hold-out is poisoned (four of ten punctual flights marked late) and a
            candidate learned from the same lie; offline it looks calibrated, on live traffic it is
            not. The lie ends when that release is on the canary.
* `forge`   a thief of the publisher's online keys pushes releases through the real broker: signed
            with a wrong key, or by the learner alone.

Invariants: the gate, the campaign and the devices run their ordinary code; what is injected is data
and bytes. An attack on learning works on a copy of the learner's state, never on the state itself.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
import numpy as np
from securesystemslib.signer import CryptoSigner  # type: ignore[attr-defined] # no __all__

from cloud_learner.config import Home
from cloud_learner.cycle import Candidate
from cloud_learner.evaluate.holdout import HoldOut
from cloud_learner.evaluate.offline import EvaluationSet
from cloud_learner.host import Host
from cloud_learner.release import keys, metadata
from cloud_learner.rules import HOLD_OUT_ROWS, device_share
from cloud_learner.train.dataset import Rows
from cloud_learner.train.family import Family
from edge_runtime.bus.base import Bus
from edge_runtime.clock import Clock
from edge_runtime.files import write_atomic
from edge_runtime.wire import subjects

POISON_SHARE = 0.4
LIES = 36_000
ATTEMPTS = 3  # a lie that spoils the ranking too is caught offline, and told again
POLL_S = 0.05
SOON = 0.4  # of the evidence that promotes the release on trial

Relabel = Callable[[float], float]


class PoisonedHoldOut(HoldOut):
    """A hold-out that lies while `poisoned` is set."""

    def __init__(self, family: Family) -> None:
        super().__init__(
            HOLD_OUT_ROWS,
            share=device_share(family),
            rows_min=family.config.gates.recent_rows_min,
            fields=family.config.gates.slices,
        )
        self.poisoned = False

    def rows(self) -> EvaluationSet:
        """The rows, punctual flights partly marked late while the lie lasts."""
        rows = super().rows()
        if not self.poisoned:
            return rows
        lies = [poisoned(label, index) for index, label in enumerate(rows.labels.tolist())]
        return msgspec.structs.replace(rows, labels=np.array(lies, np.float32))


def poisoned(label: float, index: int) -> float:
    """Late for four of ten, whatever the truth."""
    return 1.0 if (index * 7) % 10 < POISON_SHARE * 10 else label


def believed(label: float) -> float:
    """What a learner that met `poisoned` labels often comes to expect."""
    return label + (1.0 - label) * POISON_SHARE


def flipped(label: float) -> float:
    """The opposite."""
    return 1.0 - label


class AttackedHost(Host):
    """The ordinary host of one family, with an attacker inside.

    He waits for files named after an attack. The result of attack `x` is written to `x.result`; the
    file `x` is removed when it has begun.
    """

    def __init__(self, home: Home, families: Sequence[Family], bus: Bus, clock: Clock) -> None:
        [family] = families
        self._poison = PoisonedHoldOut(family)
        super().__init__(home, families, bus, clock, hold_outs={family.name: self._poison})
        self._name, self._controller = family.name, self.releasing[family.name].controller
        self._attacks = home.root / "attacks"
        self._attacks.mkdir(exist_ok=True)

    async def run(self) -> None:
        """Serve, and attack when asked."""
        async with asyncio.TaskGroup() as group:
            attacker = group.create_task(self._attack())
            try:
                await super().run()
            finally:
                attacker.cancel()

    async def _attack(self) -> None:
        while True:
            for name, attack in (("flip", self._flip), ("poison", self._poison_all)):
                if (self._attacks / name).exists():
                    (self._attacks / name).unlink()
                    result = await attack()
                    write_atomic(self._attacks / f"{name}.result", result.encode())
            await asyncio.sleep(POLL_S)

    async def _flip(self) -> str:
        """A candidate trained on flipped labels, submitted like any other."""
        candidate = await self._learned_from(flipped)
        return (await self.submit(self._name, candidate)).outcome

    async def _poison_all(self) -> str:
        """Lie in the hold-out until a candidate that learned the lie is on the canary.

        The attacker knows the house, and waits for a moment when the canary's place is soon free.
        """
        while not self._soon_free():  # noqa: ASYNC110 - nothing tells
            await asyncio.sleep(POLL_S)
        for _ in range(ATTEMPTS):
            candidate = await self._learned_from(believed)
            self._poison.poisoned = True
            try:
                judgement = await self.submit(self._name, candidate)
                while judgement.outcome == "pass" and not self._placed(judgement.sha256):  # noqa: ASYNC110
                    await asyncio.sleep(POLL_S)
            finally:
                self._poison.poisoned = False
            if judgement.outcome == "pass":
                return judgement.sha256
        return judgement.outcome

    def _soon_free(self) -> bool:
        gates = self._controller.status()["gates"]
        return not gates or gates[0]["value"] > SOON * gates[0]["reach"]

    def _placed(self, sha256: str) -> bool:
        """Whether the release is on the canary; also when its trial is over already."""
        rollout = self._controller.status()
        release = next(
            (e["release"] for e in self.lineage.read("release") if e["sha256"] == sha256), None
        )
        ended = any(each["release"] == release for each in rollout["decisions"])
        return ended or (rollout["canary"] or {}).get("release") == release

    async def _learned_from(self, relabel: Relabel) -> Candidate:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self.learner.thread, self._learn_lies, relabel)

    def _learn_lies(self, relabel: Relabel) -> Candidate:
        """What the learner would have become, had its memory been full of lies."""
        cycle = self.learner.courses[self._name].cycle.fork()
        known, _ = cycle.replicas.reservoir.draw(LIES)
        labels = [relabel(label) for label in known.labels.tolist()]
        cycle.pretrain(Rows(known.features, np.array(labels, np.float32)))
        return cycle.candidate()


async def forge_wrong_key(
    home: Path, bus: Bus, release: metadata.ReleaseFile, now_s: float
) -> None:
    """Push a release that two unknown keys have signed, below genuine online metadata."""
    strangers = [CryptoSigner.generate_ed25519(), CryptoSigner.generate_ed25519()]
    await _push_forged(home, bus, release, strangers, now_s)


async def forge_learner_alone(
    home: Path, bus: Bus, release: metadata.ReleaseFile, now_s: float
) -> None:
    """Push a release that only the learner's genuine key has signed."""
    await _push_forged(home, bus, release, [keys.load_signer(home, "learner")], now_s)


async def _push_forged(
    home: Path,
    bus: Bus,
    release: metadata.ReleaseFile,
    signers: Sequence[metadata.Signs],
    now_s: float,
) -> None:
    root = keys.trusted_root(home)
    role, data = await metadata.forge_release(bus, root, release, signers, now_s)
    await metadata.publish_below(
        bus,
        root,
        {role: data},
        snapshot_signer=keys.load_signer(home, "snapshot"),
        timestamp_signer=keys.load_signer(home, "timestamp"),
        now_s=now_s,
    )
    await bus.send(subjects.REFRESH, b"")


def main() -> None:
    """Serve a home with the attacker inside: `python -m cloud_learner.simulate.faults HOME URL`."""
    import sys

    from cloud_learner.serve import serve_home

    serve_home(Home(Path(sys.argv[1])), sys.argv[2], AttackedHost)


if __name__ == "__main__":
    main()
