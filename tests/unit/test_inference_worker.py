"""The worker: what waits is bounded, what is given up is never begun, what fits runs together."""

from __future__ import annotations

import asyncio
import threading

import pytest

from edge_runtime.errors import CapacityError, PackageError
from edge_runtime.inference.worker import Worker

PATIENCE_S = 30.0
ALWAYS_US = 3e7  # a delay that only a full batch, another group or the end cuts short


class Model:
    """Work that answers each payload doubled; the payload "gate" waits until `gate` opens."""

    def __init__(self):
        self.runs = []
        self.threads = set()
        self.begun, self.gate = threading.Event(), threading.Event()

    def __call__(self, payloads):
        self.runs.append(list(payloads))
        self.threads.add(threading.current_thread().name)
        if "gate" in payloads:
            self.begun.set()
            assert self.gate.wait(PATIENCE_S)
        if "bad" in payloads:
            raise PackageError("run_failed", "bad is bad")
        return [payload * 2 for payload in payloads]


@pytest.fixture
def model():
    return Model()


@pytest.fixture
def worker_of(model):
    workers = []

    def worker_of(**options):
        workers.append(Worker(**options))
        return workers[-1]

    yield worker_of
    model.gate.set()
    for worker in workers:
        worker.close()


async def busy(worker, model):
    """The task of a piece of work that the worker is at, until `model.gate` opens."""
    task = asyncio.create_task(worker.submit(model, "gate"))
    assert await asyncio.to_thread(model.begun.wait, PATIENCE_S)
    return task


async def queued(worker, model, payloads, **options):
    """Tasks of `payloads`, all of them in the queue."""
    tasks = [asyncio.create_task(worker.submit(model, each, **options)) for each in payloads]
    await asyncio.sleep(0)  # each runs up to where it waits for its answer
    return tasks


async def code(awaitable):
    with pytest.raises((CapacityError, PackageError)) as caught:
        await awaitable
    return caught.value.code


def test_work_is_done_on_one_thread_that_starts_with_the_first(worker_of, model):
    started = []
    worker = worker_of(on_start=lambda: started.append(threading.current_thread().name))
    assert started == []

    async def ask():
        return await asyncio.gather(*(worker.submit(model, n) for n in range(5)))

    assert asyncio.run(ask()) == [0, 2, 4, 6, 8]
    assert (started, model.threads) == (["inference"], {"inference"})
    assert model.runs == [[n] for n in range(5)]
    assert worker.statistics() == {
        "jobs": 5,
        "runs": 5,
        "overloaded": 0,
        "deadline_exceeded": 0,
        "threads_lost": 0,
        "waiting": 0,
    }


def test_beyond_the_bound_of_the_queue_work_is_refused_at_once(worker_of, model):
    worker = worker_of(queue_max=2)

    async def ask():
        first = await busy(worker, model)
        waiting = await queued(worker, model, [1, 2])
        assert worker.statistics()["waiting"] == 2
        assert await code(worker.submit(model, 3)) == "overloaded"
        model.gate.set()
        return await asyncio.gather(first, *waiting)

    assert asyncio.run(ask()) == ["gategate", 2, 4]
    assert model.runs == [["gate"], [1], [2]]
    assert worker.statistics()["overloaded"] == 1


def test_work_whose_deadline_passes_in_the_queue_is_never_begun(worker_of, model):
    worker = worker_of()

    async def ask():
        first = await busy(worker, model)
        assert await code(worker.submit(model, 1, timeout_s=0.01)) == "deadline_exceeded"
        [last] = await queued(worker, model, [2], timeout_s=PATIENCE_S)
        model.gate.set()
        return await asyncio.gather(first, last)

    assert asyncio.run(ask()) == ["gategate", 4]
    assert model.runs == [["gate"], [2]]
    assert worker.statistics()["deadline_exceeded"] == 1


def test_a_deadline_ends_the_waiting_for_work_that_was_begun_too(worker_of, model):
    worker = worker_of()

    async def ask():
        late = asyncio.create_task(worker.submit(model, "gate", timeout_s=0.25))
        assert await asyncio.to_thread(model.begun.wait, PATIENCE_S)
        assert await code(late) == "deadline_exceeded"
        model.gate.set()
        return await worker.submit(model, 1)

    assert asyncio.run(ask()) == 2


def test_work_whose_caller_went_away_is_never_begun(worker_of, model):
    worker = worker_of()

    async def ask():
        first = await busy(worker, model)
        gone, stays = await queued(worker, model, [1, 2])
        gone.cancel()
        with pytest.raises(asyncio.CancelledError):
            await gone
        model.gate.set()
        return await asyncio.gather(first, stays)

    assert asyncio.run(ask()) == ["gategate", 4]
    assert model.runs == [["gate"], [2]]


def test_what_shares_a_group_runs_together_up_to_the_bound_on_rows(worker_of, model):
    worker = worker_of(rows_max=4, delay_us=0)

    async def ask():
        first = await busy(worker, model)
        tasks = await queued(worker, model, [1, 2, 3], group="a", rows=2)
        tasks += await queued(worker, model, [4, 5], group="a", rows=1)
        tasks += await queued(worker, model, [6], group="a", rows=9)
        model.gate.set()
        return await asyncio.gather(first, *tasks)

    assert asyncio.run(ask())[1:] == [2, 4, 6, 8, 10, 12]
    assert model.runs == [["gate"], [1, 2], [3, 4, 5], [6]]
    assert worker.statistics()["runs"] == 4


def test_a_full_batch_does_not_wait_for_its_delay(worker_of, model):
    worker = worker_of(rows_max=2, delay_us=ALWAYS_US)

    async def ask():
        async with asyncio.timeout(PATIENCE_S / 2):
            return await asyncio.gather(*await queued(worker, model, [1, 2], group="a"))

    assert asyncio.run(ask()) == [2, 4]
    assert model.runs == [[1, 2]]


def test_work_of_another_group_ends_a_batch_and_keeps_its_turn(worker_of, model):
    worker = worker_of(rows_max=8, delay_us=ALWAYS_US)

    async def ask():
        tasks = await queued(worker, model, [1, 2], group="a")
        tasks += await queued(worker, model, [3], group=None)
        async with asyncio.timeout(PATIENCE_S / 2):
            return await asyncio.gather(*tasks)

    assert asyncio.run(ask()) == [2, 4, 6]
    assert model.runs == [[1, 2], [3]]


def test_after_the_delay_a_batch_runs_as_it_is(worker_of, model):
    worker = worker_of(rows_max=8, delay_us=1000)

    async def ask():
        return await worker.submit(model, 1, group="a")

    assert asyncio.run(ask()) == 2
    assert model.runs == [[1]]


def test_with_one_row_at_most_nothing_is_gathered_and_nothing_waits(worker_of, model):
    worker = worker_of(rows_max=1, delay_us=ALWAYS_US)

    async def ask():
        async with asyncio.timeout(PATIENCE_S / 2):
            return await asyncio.gather(*await queued(worker, model, [1, 2], group="a"))

    assert asyncio.run(ask()) == [2, 4]
    assert model.runs == [[1], [2]]


def test_a_batch_that_fails_is_done_again_one_by_one_and_only_the_bad_one_fails(worker_of, model):
    worker = worker_of(rows_max=8)

    async def ask():
        first = await busy(worker, model)
        good, bad, other = await queued(worker, model, ["x", "bad", "y"], group="a")
        model.gate.set()
        assert await code(bad) == "run_failed"
        return await asyncio.gather(first, good, other)

    assert asyncio.run(ask())[1:] == ["xx", "yy"]
    assert model.runs == [["gate"], ["x", "bad", "y"], ["x"], ["bad"], ["y"]]


def test_a_run_that_is_left_to_itself_holds_up_nobody(worker_of, model):
    worker, owner = worker_of(deadline_s=2.0), object()

    async def ask():
        stuck = asyncio.create_task(worker.submit(model, "gate", owner=owner, timeout_s=1.0))
        assert await asyncio.to_thread(model.begun.wait, PATIENCE_S)
        run = worker.running
        assert (run.owner, run.useless_s) == (owner, 4.0)
        others = await queued(worker, model, [1, 2])
        worker.leave(run)
        worker.leave(run)
        assert await asyncio.gather(*others) == [2, 4]
        stuck.cancel()
        model.gate.set()
        assert await worker.submit(model, 3) == 6
        assert worker.running is None

    asyncio.run(ask())
    assert worker.statistics()["threads_lost"] == 1


def test_close_ends_after_the_run_that_it_is_at_and_fails_what_waits(worker_of, model):
    worker = worker_of(queue_max=2)

    async def ask():
        first = await busy(worker, model)
        waiting = await queued(worker, model, [1, 2])
        closing = asyncio.get_running_loop().run_in_executor(None, worker.close)
        while await code(worker.submit(model, 3)) == "overloaded":
            pass  # until close has begun; then it is refused for that
        model.gate.set()
        await closing
        assert [await code(task) for task in waiting] == ["closed", "closed"]
        return await first

    assert asyncio.run(ask()) == "gategate"
    assert model.runs == [["gate"]]
    assert not [each for each in threading.enumerate() if each.name == "inference"]


def test_close_does_not_wait_for_the_delay_of_a_batch(worker_of, model):
    worker = worker_of(rows_max=8, delay_us=ALWAYS_US)

    async def ask():
        [task] = await queued(worker, model, [1], group="a")
        async with asyncio.timeout(PATIENCE_S / 2):
            await asyncio.to_thread(worker.close)
            return (await asyncio.gather(task, return_exceptions=True))[0]

    answer = asyncio.run(ask())
    assert answer == 2 or answer.code == "closed"


def test_a_worker_that_never_worked_closes_and_then_refuses(worker_of, model):
    worker = worker_of()
    worker.close()
    worker.close()
    assert asyncio.run(code(worker.submit(model, 1))) == "closed"
    assert model.runs == []


def test_several_event_loops_share_it(worker_of, model):
    worker, answers = worker_of(rows_max=4, delay_us=100), {}
    together = threading.Barrier(3)

    def loop(base):
        async def ask():
            together.wait(PATIENCE_S)
            asks = [worker.submit(model, base + n, group="a") for n in range(20)]
            return await asyncio.gather(*asks)

        answers[base] = asyncio.run(ask())

    threads = [threading.Thread(target=loop, args=(base,)) for base in (0, 100, 200)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_S)
    assert answers == {base: [2 * (base + n) for n in range(20)] for base in (0, 100, 200)}
    assert worker.statistics()["jobs"] == 60
    assert max(map(len, model.runs)) <= 4


def test_an_answer_for_a_loop_that_is_gone_hurts_nobody(worker_of, model):
    worker = worker_of()

    async def leave():
        await busy(worker, model)

    asyncio.run(leave())
    model.gate.set()
    assert asyncio.run(worker.submit(model, 1)) == 2
