"""Many small arrays are one copy, out of memory that nobody writes while it is under way."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from services.worker.engine.cost_model import ChunkShape, CostModel
from services.worker.meter import BatchTiming, EngineMeter
from services.worker.model.queues.base import Array
from services.worker.model.queues.factory import make_queue
from services.worker.model.queues.host import HostQueue
from services.worker.model.queues.staged import StagedQueue
from services.worker.model.run_times import RunTimes
from services.worker.work_pacer import BatchActivity
from tests.late_copier import LateCopier


def random_array(dtype: type, shape: tuple[int, ...], seed: int) -> Array:
    return np.random.default_rng(seed).integers(-99, 99, shape).astype(dtype)


arrays_ = st.lists(
    st.builds(
        random_array,
        st.sampled_from([np.int32, np.int64, np.float32, np.float64]),
        st.lists(st.integers(0, 5), min_size=1, max_size=2).map(tuple),
        st.integers(0, 100),
    ),
    max_size=8,
)


@given(st.lists(arrays_, max_size=5))
def test_arrays_arrive_as_they_were_in_one_copy(batches: list[list[Array]]) -> None:
    copier = LateCopier()
    queue = StagedQueue(copier)
    placed = [(arrays, queue.place(arrays)) for arrays in batches]
    assert copier.num_uploads == len(batches)
    for arrays, tensors in placed:
        for array, tensor in zip(arrays, tensors, strict=True):
            assert tensor.dtype == torch.from_numpy(array).dtype
            assert np.array_equal(tensor.numpy(), array)
            assert tensor.storage_offset() * tensor.itemsize % 16 == 0
    queue.mark().wait()  # checks that every buffer stayed as it was


def test_a_buffer_is_used_again_when_its_copy_is_made_and_not_earlier() -> None:
    copier = LateCopier()
    queue, array = StagedQueue(copier), np.arange(9)
    for _ in range(3):
        queue.place([array])
    assert copier.num_pinned == 3
    queue.mark().wait()
    for _ in range(3):
        queue.place([array + 1])
    assert copier.num_pinned == 3


def test_a_buffer_that_is_too_small_makes_way_for_a_larger_one() -> None:
    copier = LateCopier(num_looks=0)
    queue = StagedQueue(copier)
    large = np.zeros(1_000_000)
    for array in (np.zeros(1), large, large, np.zeros(1)):
        (tensor,) = queue.place([array])
        assert len(tensor) == len(array)
    assert copier.num_pinned == 2


def test_what_is_fetched_is_here_when_it_was_waited_for() -> None:
    queue = StagedQueue(LateCopier())
    sent = torch.arange(5), torch.tensor([[0.5, 2.0]], dtype=torch.float64)
    fetch = queue.fetch(sent)
    assert not fetch.mark.is_reached
    assert not torch.equal(fetch.tensors[0], sent[0])
    assert all(torch.equal(*pair) for pair in zip(fetch.wait(), sent, strict=True))
    assert fetch.mark.is_reached


def test_the_cpu_copies_nothing_and_waits_for_nothing() -> None:
    queue, array = make_queue(torch.device("cpu")), np.arange(3)
    assert isinstance(queue, HostQueue)
    (tensor,) = queue.place([array])
    assert tensor.data_ptr() == array.ctypes.data
    fetch = queue.fetch([tensor])
    assert fetch.mark.is_reached
    assert fetch.wait()[0] is tensor


class TestRunTimes:
    """Meter and activity are told what the device took, not what the launch took."""

    def _times(self, queue: StagedQueue | HostQueue) -> tuple[RunTimes, EngineMeter, BatchActivity]:
        meter, activity = EngineMeter(), BatchActivity()
        meter.layer = CostModel(alpha=0.0, beta=1.0, gamma=0.0, lam=0.0)
        return RunTimes(queue, meter, activity), meter, activity

    def test_a_late_device(self) -> None:
        queue = StagedQueue(LateCopier())
        times, meter, activity = self._times(queue)
        times.launched(queue.mark(), [ChunkShape(0, 4)], 3)
        assert activity.is_running
        assert not activity.is_idle(1e9)
        assert meter.read().timings == ()
        queue.mark().wait()
        times.look()
        assert not activity.is_running
        assert activity.is_idle(1e9)
        assert meter.read().timings == (BatchTiming(12.0, 1.0),)

    def test_a_device_that_is_still_at_the_second_batch(self) -> None:
        queue = StagedQueue(LateCopier())
        times, meter, activity = self._times(queue)
        times.launched(queue.mark(), [ChunkShape(0, 4)], 1)
        between = queue.mark()
        times.launched(queue.mark(), [ChunkShape(0, 5)], 1)
        between.wait()
        times.look()
        assert activity.is_running
        assert [timing.predicted_seconds for timing in meter.read().timings] == [4.0]

    def test_a_device_that_computes_at_once(self) -> None:
        queue = HostQueue()
        times, meter, activity = self._times(queue)
        times.launched(queue.mark(), [ChunkShape(0, 4)], 3)
        assert not activity.is_running
        ((predicted, measured),) = meter.read().timings
        assert predicted == 12.0
        assert measured == pytest.approx(0.0, abs=0.1)
