"""What was known before the stream, learned with progress told: a transformer takes minutes.

Invariants: what is learned is what `Cycle.pretrain` learns alone.
"""

from __future__ import annotations

from collections.abc import Callable

from cloud_learner.cycle import STUDENT_PASSES, Cycle
from cloud_learner.experiment.progress import Progress
from cloud_learner.train.dataset import Rows
from cloud_learner.train.replica import each_step
from edge_runtime.clock import Clock


def pretrain(
    cycle: Cycle, rows: Rows, tell: Callable[[str], None], clock: Clock | None = None
) -> None:
    """`Cycle.pretrain` of the rows; `tell` hears how far it is."""
    learning, before = cycle.family.config.learning, cycle.sample_passes
    teachers = learning.bootstrap_passes if learning.stable.on else 0  # others count no rows
    passes = teachers + max(STUDENT_PASSES, learning.bootstrap_passes)
    progress = Progress("learning", passes * len(rows), tell, clock)
    with each_step(lambda: progress.step(cycle.sample_passes - before - progress.done)):
        cycle.pretrain(rows)
