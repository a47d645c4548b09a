from __future__ import annotations

import pytest

from mlx_lm_server.config import AdmissionConfig, BatchingConfig, Config
from mlx_lm_server.errors import EngineUnavailableError, InvalidRequestError, OverloadedError
from mlx_lm_server.server.engines.admission import Admission


class Scene:
    def __init__(self, batch: int = 2, queue: int = 2, concurrent: int = 0) -> None:
        self.num_live = 0
        self.now = 100.0
        config = Config(
            batching=BatchingConfig(max_batch_size=batch, max_queue_size=queue),
            admission=AdmissionConfig(max_concurrent_requests=concurrent),
        )
        self.admission = Admission(config, num_live=lambda: self.num_live, clock=lambda: self.now)


def test_places_are_batch_plus_queue() -> None:
    scene = Scene()
    scene.num_live = 3
    with scene.admission.preparing(1):
        assert scene.admission.is_full
        with pytest.raises(OverloadedError), scene.admission.preparing(1):
            pass
    assert scene.admission.num_open == 3


def test_a_place_is_given_back_whatever_happens() -> None:
    scene = Scene()
    with pytest.raises(RuntimeError), scene.admission.preparing(4):
        raise RuntimeError
    assert scene.admission.num_open == 0


def test_several_sequences_take_several_places_or_none() -> None:
    scene = Scene()
    scene.num_live = 2
    with pytest.raises(OverloadedError), scene.admission.preparing(3):
        pass
    with scene.admission.preparing(2):
        pass


def test_more_than_there_will_ever_be_is_the_clients_mistake() -> None:
    with pytest.raises(InvalidRequestError), Scene().admission.preparing(5):
        pass


def test_max_concurrent_requests_bounds_it_further_but_never_widens_it() -> None:
    assert Scene(concurrent=3).admission.max_live == 3
    assert Scene(concurrent=300).admission.max_live == 4


def test_a_draining_server_takes_nothing() -> None:
    scene = Scene()
    scene.admission.is_draining = True
    with pytest.raises(EngineUnavailableError), scene.admission.preparing(1):
        pass


def test_retry_after_is_the_measured_pace() -> None:
    scene = Scene()
    assert scene.admission.retry_after_s() == 5.0
    for _ in range(10):
        scene.admission.observe_end()
        scene.now += 3.0
    assert scene.admission.retry_after_s() == 3.0
    scene.now += 10_000
    assert scene.admission.retry_after_s() == 60.0


def test_retry_after_is_at_least_a_second() -> None:
    scene = Scene()
    for _ in range(10):
        scene.admission.observe_end()
        scene.now += 0.01
    assert scene.admission.retry_after_s() == 1.0
