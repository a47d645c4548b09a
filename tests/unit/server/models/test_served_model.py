from __future__ import annotations

from pathlib import Path

import pytest

from mlx_lm_server.config import Config, GenerationConfig, KVConfig, ModelConfig
from mlx_lm_server.errors import ContextLengthError, ModelUnknownError, RequestTooLargeError
from mlx_lm_server.protocol import Ready
from mlx_lm_server.server.models.model_files import ModelFacts, SamplingDefaults
from mlx_lm_server.server.models.served_model import Bounds, ModelNames, bounds_of, defaults_of

BOUNDS = Bounds(
    max_prompt_tokens=100,
    max_generation_tokens=50,
    context_tokens=120,
    kv_tokens=1000,
    default_max_tokens=None,
)


def ready(**fields: int) -> Ready:
    numbers = {
        "weights_bytes": 0,
        "vocab_size": 10,
        "context_tokens": 0,
        "kv_bytes_per_token": 2,
        "kv_limit_bytes": 2000,
        "kv_limit_tokens": 1000,
        "memory_limit_bytes": 0,
        **fields,
    }
    return Ready(model_type="x", device="x", blas="x", weights="x", load_s=0.0, **numbers)


def facts(context: int | None) -> ModelFacts:
    return ModelFacts(context, frozenset(), SamplingDefaults(), {})


def test_without_a_wish_it_is_what_is_left() -> None:
    assert BOUNDS.max_tokens(20, None) == 50
    assert BOUNDS.max_tokens(90, None) == 30


@pytest.mark.parametrize(
    ("num_prompt", "wanted", "numbers"),
    [(101, 5, ("101", "100")), (120, None, ("120",)), (10, 51, ("51", "50")),
     (90, 40, ("130", "120"))],
)  # fmt: skip
def test_what_is_over_a_limit_shows_the_numbers(
    num_prompt: int, wanted: int | None, numbers: tuple[str, ...]
) -> None:
    with pytest.raises(ContextLengthError) as caught:
        BOUNDS.max_tokens(num_prompt, wanted)
    assert all(number in str(caught.value) for number in numbers)


def test_what_the_memory_can_never_hold_is_too_large() -> None:
    small = Bounds(100, 100, 200, kv_tokens=50, default_max_tokens=None)
    with pytest.raises(RequestTooLargeError):
        small.max_tokens(50, None)
    with pytest.raises(RequestTooLargeError):
        small.max_tokens(30, 30)
    assert small.max_tokens(30, None) == 20


def test_the_context_is_the_smaller_of_what_files_and_engine_say() -> None:
    assert bounds_of(Config(), facts(500), ready(context_tokens=400)).context_tokens == 400
    assert bounds_of(Config(), facts(300), ready(context_tokens=400)).context_tokens == 300
    assert bounds_of(Config(), facts(None), ready()).context_tokens == 32768


def test_without_flags_the_context_is_the_only_limit() -> None:
    bounds = bounds_of(Config(), facts(200_000), ready(kv_limit_tokens=0))
    assert bounds.max_tokens(150_000, 50_000) == 50_000
    assert bounds.max_tokens(150_000, None) == 50_000
    assert bounds.served_tokens == 200_000


def test_what_is_served_is_the_least_of_all_limits() -> None:
    flags = GenerationConfig(max_prompt_tokens=100, max_generation_tokens=50)
    assert bounds_of(Config(generation=flags), facts(500), ready()).served_tokens == 150
    flags = GenerationConfig(max_prompt_tokens=100)
    assert bounds_of(Config(generation=flags), facts(500), ready()).served_tokens == 500
    assert bounds_of(Config(), facts(5000), ready()).served_tokens == 1000


@pytest.mark.parametrize(("wanted", "longest"), [(None, 100), (0, 100), (40, 80), (500, 1)])
def test_the_longest_prompt_leaves_room_for_the_answer(wanted: int | None, longest: int) -> None:
    assert BOUNDS.longest_prompt(wanted) == longest


def test_errors_name_the_fields_that_the_client_gave() -> None:
    with pytest.raises(ContextLengthError) as caught:
        BOUNDS.max_tokens(101, 1, "messages", "max_completion_tokens")
    assert caught.value.param == "messages"
    with pytest.raises(ContextLengthError) as caught:
        BOUNDS.max_tokens(90, 40, "messages", "max_completion_tokens")
    assert caught.value.param == "max_completion_tokens"
    assert "max_completion_tokens asks for 40" in str(caught.value)


def test_max_kv_size_caps_what_the_memory_holds() -> None:
    assert bounds_of(Config(), facts(500), ready()).kv_tokens == 1000
    capped = Config(kv=KVConfig(max_kv_size=64))
    assert bounds_of(capped, facts(500), ready()).kv_tokens == 64


def test_sampling_defaults_are_the_flags_then_the_models_then_openais() -> None:
    config = Config(generation=GenerationConfig(default_temperature=0.0))
    model = SamplingDefaults(temperature=0.7, top_k=20)
    assert defaults_of(config, model) == SamplingDefaults(0.0, 1.0, 20, 0.0, 1.0)


def test_names() -> None:
    config = Config(model=ModelConfig(model="org/name", served_model_name=("a", "b")))
    names = ModelNames.of(config, Path("/models/x"))
    assert names.resolve(None) == names.resolve("default") == names.resolve("a") == "a"
    assert names.resolve("b") == "b"
    assert names.resolve("org/name") == "org/name"
    assert names.resolve("/models/x") == "/models/x"
    with pytest.raises(ModelUnknownError, match="a, b"):
        names.resolve("c")
