"""What family.toml may say: its tables as typed structs, with a default wherever one is sensible.

Why: one declaration serves the loader, the documentation's test and everything that a family may
tune; what differs from one model line to the next stands in its folder and nowhere else.

Invariants: unknown keys are refused; a declaration that was read is within its bounds.

Knows nothing about files. Documented in docs/configuration.md.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from cloud_learner.stats.sequential import MARGIN_MAX
from cloud_learner.stats.tasks import Task

Count = Annotated[int, Meta(ge=1)]
Whole = Annotated[int, Meta(ge=0)]
Share = Annotated[float, Meta(ge=0, lt=1)]
Seconds = Annotated[float, Meta(ge=0)]
Positive = Annotated[float, Meta(gt=0)]
Weight = Annotated[float, Meta(ge=0)]
Form = Literal["int8", "float32"]
Percent = Annotated[float, Meta(gt=0, le=100)]

_WINDOW = r"^(([01]\d|2[0-3]):[0-5]\d-([01]\d|2[0-3]):[0-5]\d)?$"


class Section(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A table of family.toml."""


class EventKind(Section, frozen=True):
    """`[events.<kind>]`: its fields and whether it asks for a prediction."""

    fields: dict[str, Literal["str", "int", "float"]]
    predicts: bool = False


class Label(Section, frozen=True):
    """`[label]`: when a prediction and its label become an example.

    `window_field` names a number of the predicting kinds: so many seconds after the prediction the
    `window_s` begin, where what is predicted has an end of its own that is known beforehand.
    `mature`: `window_s` after the prediction, when every outcome could be known. `arrival`: when
    the label comes. `weighted`: `fast` learns a label that comes within `early_s` at once, weighted
    by how rarely one of its outcome comes so soon, at most `weight_max`; the memory learns it when
    it is mature. What has no label by then is dropped, or is an example of the outcome 0
    (`negative`). A label that comes up to `amend_s` later brings the example out once more.
    """

    window_s: Positive
    window_field: str = ""
    policy: Literal["mature", "arrival", "weighted"] = "mature"
    early_s: Seconds = 0.0
    weight_max: Annotated[float, Meta(ge=1)] = 10.0
    expiry: Literal["drop", "negative"] = "drop"
    amend_s: Seconds = 0.0

    def __post_init__(self) -> None:
        if self.window_field and self.policy == "weighted":
            raise ValueError("label.window_field has no meaning with label.policy = 'weighted'")


class Fast(Section, frozen=True):
    """`[learning.fast]`: `passes` over the micro-batch, each with as many of `window_rows` before.

    `keep` is the pull towards its own former answers (LwF), against 1 for the labels.
    """

    on: bool = True
    passes: Count = 2
    learning_rate: Positive = 3e-4
    window_rows: Whole = 1000
    keep: Weight = 1.0


class Stable(Section, frozen=True):
    """`[learning.stable]`: `passes` over the micro-batch among `replay_rows` of the reservoir.

    `keep` is the pull towards the answers stored with those (DER++), against 1 for the labels.
    """

    on: bool = True
    passes: Count = 1
    learning_rate: Positive = 1.5e-3
    replay_rows: Whole = 1000
    keep: Weight = 0.0


class Scratch(Section, frozen=True):
    """`[learning.scratch]`: a third replica, trained anew over the newest `window_rows`.

    Every `every_s` of event time (0: never), and `on_alarm`.
    """

    on: bool = False
    every_s: Seconds = 604800.0
    on_alarm: bool = True
    passes: Count = 3
    learning_rate: Positive = 1e-3
    window_rows: Count = 20000


class Distilled(Section, frozen=True):
    """`[learning.student]`: `passes` and `replay_rows`; the pull to the replicas' `embedding`."""

    passes: Count = 1
    learning_rate: Positive = 2e-3
    replay_rows: Whole = 1000
    embedding: Weight = 0.0


class Steps(Section, frozen=True):
    """`[learning.steps]`: at most `rows` in a step; the first `warmup` grow to their full rate."""

    rows: Count = 250
    warmup: Whole = 0


class Learning(Section, frozen=True):
    """`[learning]`: sizes in rows; the seed that makes training repeatable.

    A micro-batch is cut at `batch_size` examples, or when they span `batch_s` of event time (0: by
    count alone); at most `device_cap` of them are of one device. `contributors` is how many of the
    largest devices of a micro-batch are tried without, besides suspects (0: nobody is judged);
    `trim_share` of a micro-batch, the rows with the largest loss, is left out while an alarm
    stands. `gradient_norm_max` 0 clips nothing.
    """

    batch_size: Annotated[int, Meta(ge=2)] = 500
    batch_s: Seconds = 0.0
    device_cap: Count = 250
    seed: Whole = 1
    bootstrap_passes: Count = 2
    reservoir_rows: Count = 20000
    gradient_norm_max: Weight = 1.0
    contributors: Whole = 3
    trim_share: Share = 0.0
    fast: Fast = Fast()
    stable: Stable = Stable()
    scratch: Scratch = Scratch()
    student: Distilled = Distilled()
    steps: Steps = Steps()

    def __post_init__(self) -> None:
        if not (self.fast.on or self.stable.on):
            raise ValueError("learning.fast.on and learning.stable.on are both false")


class Drift(Section, frozen=True):
    """`[drift]`: what raises an alarm, and what an alarm does.

    `delta` is the chance that a micro-batch of a world that stands still raises any, `psi_max` the
    population stability index of a feature. An alarm stands for `calm_batches` micro-batches after
    its last sign; while it does, the gate allows `tighten` of the drops it allows otherwise.
    """

    on: bool = True
    delta: Annotated[float, Meta(gt=0, lt=1)] = 0.002
    psi_max: Positive = 0.25
    calm_batches: Count = 20
    tighten: Annotated[float, Meta(ge=0, le=1)] = 0.5
    concepts: Whole = 4


class Gates(Section, frozen=True):
    """`[gates]`: limits of the offline gate; drops of quality against the release that serves.

    Quality is AUC, accuracy, R squared or NDCG, by the task. `slices` names fields of the
    predicting kind; a slice counts from `slice_rows_min` rows. `persistence_min` is the least kappa
    over persistence, which answers with the label before.
    """

    static_drop_max: float = 0.01
    recent_drop_max: float = 0.01
    quality_min: float = 0.5
    int8_gap_max: float = 0.001
    calibration_min: float = 0.7
    calibration_max: float = 1.4
    recent_rows_min: Count = 300
    slices: tuple[str, ...] = ()
    slice_drop_max: float = 0.05
    slice_rows_min: Count = 200
    persistence_min: float | None = None
    size_bytes_max: Count = 8_000_000
    latency_us_max: Positive = 5000.0


class LocalGates(Section, frozen=True):
    """`[rollout.gates]`: when a device leaves a release on trial by itself; 0 turns one off."""

    failures: Whole = 3
    slowdown: Seconds = 20.0
    memory_mb: Seconds = 0.0


class Rollout(Section, frozen=True):
    """`[rollout]`: where a release is tried, its share of the answers, the margin it must hold.

    `stages` are percent of the devices that have the attributes of `selector`; each ends with
    `pairs_min` new paired labels at least, and after `stage_s` at the latest. Before them, it is
    scored in the shadow for `shadow_rows`. With `approve` a person lets each stage follow. Devices
    change in the `window` (`22:00-04:00`, UTC), spread over `jitter_s`. `variants` are the forms
    that a release ships and devices choose from, the default one first. Contests are over
    `outcome`: the quality of answers, or the label as the reward of the answer that brought it
    about.
    """

    selector: dict[str, str]
    canary_share: Share = 0.2
    margin: Annotated[float, Meta(gt=0, le=MARGIN_MAX)] = 0.0025
    pairs_min: Count = 100
    pairs_max: Count = 8000
    stages: Annotated[tuple[Percent, ...], Meta(min_length=1)] = (100.0,)
    stage_s: Positive = 604_800.0
    shadow_rows: Whole = 0
    approve: bool = False
    window: Annotated[str, Meta(pattern=_WINDOW)] = ""
    jitter_s: Seconds = 0.0
    gates: LocalGates = LocalGates()
    variants: Annotated[tuple[Form, ...], Meta(min_length=1)] = ("int8", "float32")
    outcome: Literal["quality", "reward"] = "quality"

    def __post_init__(self) -> None:
        if any(one >= other for one, other in pairwise(self.stages)):
            raise ValueError("rollout.stages must rise")


class Personal(Section, frozen=True):
    """`[personal]`: sessions adapt the answers of this family on the device.

    `region` bounds every shift: in units of the label for regression, in log odds otherwise.
    `group` names the field of the predicting kinds that tells past sessions apart, of which the
    prior is learned; empty: a device has one after the other, `pause_s` of silence between them.
    `memory` is how many past sessions the learner keeps for it. `forgetting` is the share of what a
    session believes that each label takes back to the prior, for tastes that drift.
    `explore` is the share of a ranking's places that are filled at random, `optimism` how many
    deviations are added to a candidate's shift.
    """

    region: Positive
    group: str = ""
    pause_s: Positive = 1800.0
    memory: Count = 200
    forgetting: Share = 0.0
    explore: Share = 0.05
    optimism: Annotated[float, Meta(ge=0, le=10)] = 0.5


class Package(Section, frozen=True):
    """`[package]`: what exports the student, and where int8 takes its ranges from.

    `optimum` is for networks that hold a transformers model. `static` ranges are those of recent
    rows; `dynamic` are each row's own, each token's in a text.
    """

    exporter: Literal["torch", "optimum"] = "torch"
    quantize: Literal["static", "dynamic"] = "static"


class ArchiveConfig(Section, frozen=True):
    """`[archive]`: how long messages are kept as they came."""

    raw_days: Positive = 7.0


class FamilyConfig(Section, frozen=True):
    """The whole of family.toml."""

    name: str
    events: dict[str, EventKind]
    label: Label
    rollout: Rollout
    task: Task = Task()
    output: str = "probability"
    clock: Literal["event", "wall"] = "event"
    skew_s_max: Seconds = 86400.0
    lateness_s_max: Seconds = 3600.0
    learning: Learning = Learning()
    drift: Drift = Drift()
    gates: Gates = Gates()
    archive: ArchiveConfig = ArchiveConfig()
    package: Package = Package()
    personal: Personal | None = None

    def __post_init__(self) -> None:
        if self.rollout.outcome == "reward" and self.task.kind == "multiclass":
            raise ValueError("rollout.outcome = 'reward': the number of a class is no reward")

    @property
    def session_field(self) -> str:
        """The field that tells past sessions apart; empty where there is none."""
        return self.personal.group if self.personal is not None else ""
