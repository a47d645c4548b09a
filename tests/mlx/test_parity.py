"""Greedy tokens equal mlx-lm's own, whatever shares the batch and however a prompt is cut."""

from __future__ import annotations

from pathlib import Path

import pytest
from msgspec.structs import replace

from mlx_lm_server.errors import UnsupportedModelError
from tests.back_ends import BACKEND, WAY
from tests.observations import observes

from .driver import GREEDY, EngineDriver, random_prompts
from .reference import ReferenceStep, assert_same_tokens, run_jobs
from .tiny_models import CONFIGS, VOCAB_SIZE, write_adapter, write_model

pytestmark = pytest.mark.each_way

# Forced ways differ in what is done with K, V and weights, not in the families.
FAMILIES = sorted(CONFIGS) if WAY is None else ["llama", "qwen3"]
PROMPTS = random_prompts(1, (1, 3, 17, 40, 64, 90, 7, 130), VOCAB_SIZE)
NATIVE = [("qwen3", 4), ("llama", 8), ("qwen3_moe", 4), ("phi3", 8)][: 4 if WAY is None else 1]

Reference = dict[str, list[list[ReferenceStep]]]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    folders = {family: write_model(family, root / family) for family in FAMILIES}
    for family, bits in NATIVE:
        folders[f"{family}-{bits}bit"] = write_model(family, root / f"{family}-{bits}", bits)
    folders["adapter"] = write_adapter(folders["qwen3"], root / "adapter")
    return folders


@pytest.fixture(scope="module")
def reference(models: dict[str, Path]) -> Reference:
    """mlx-lm's own tokens for all models, from one process."""
    jobs = {name: {"model": models[name], "float32": True} for name in FAMILIES}
    for family, bits in NATIVE:
        name = f"{family}-{bits}bit"
        jobs[name] = {"model": models[name], "float32": True}
        jobs[f"{name}-native"] = {"model": models[name], "float32": False}
    jobs["lora"] = {"model": models["qwen3"], "adapter": models["adapter"], "float32": True}
    common = {"prompts": PROMPTS, "num_tokens": GREEDY.max_tokens}
    requests = [
        {k: str(v) if isinstance(v, Path) else v for k, v in j.items()} for j in jobs.values()
    ]
    return dict(zip(jobs, run_jobs([job | common for job in requests]), strict=True))


def _assert_all(actual: list[list[int]], expected: list[list[ReferenceStep]]) -> None:
    ties = sum(assert_same_tokens(a, e) for a, e in zip(actual, expected, strict=True))
    print(f"ties: {ties} of {len(actual)} sequences")
    assert ties <= 1


@pytest.mark.parametrize("family", FAMILIES)
def test_a_row_alone_gives_mlx_lms_tokens(
    family: str, models: dict[str, Path], reference: Reference
) -> None:
    engine = EngineDriver(models[family])
    _assert_all([engine.run([prompt])[0] for prompt in PROMPTS], reference[family])


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_of_different_lengths_give_mlx_lms_tokens_together(
    family: str, models: dict[str, Path], reference: Reference
) -> None:
    engine = EngineDriver(models[family])
    _assert_all(engine.run(PROMPTS), reference[family])


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_that_join_and_leave_at_every_step_do_not_touch_the_others(
    family: str, models: dict[str, Path], reference: Reference
) -> None:
    engine = EngineDriver(models[family], max_batch_size=6)
    strangers = random_prompts(2, (2, 30, 5, 61, 9, 33, 4, 12, 70, 1), VOCAB_SIZE)
    for i, prompt in enumerate(PROMPTS):
        engine.add(f"kept-{i}", prompt)
    for i, prompt in enumerate(strangers):
        engine.add(f"stranger-{i}", prompt)
        engine.step()
        engine.step()
        engine.abort(f"stranger-{i}")
    engine.finish()
    _assert_all([engine.tokens[f"kept-{i}"] for i in range(len(PROMPTS))], reference[family])
    assert engine.core.stats().kv_used_bytes == 0


@pytest.mark.parametrize("chunk", [1, 7, 16, 64])
def test_prompts_cut_into_chunks_give_the_same_tokens(
    chunk: int, models: dict[str, Path], reference: Reference
) -> None:
    engine = EngineDriver(models["qwen3"], prefill_step_size=chunk)
    _assert_all(engine.run(PROMPTS), reference["qwen3"])


@pytest.mark.parametrize(("family", "bits"), NATIVE)
def test_quantised_weights_are_served_as_they_are(
    family: str, bits: int, models: dict[str, Path], reference: Reference
) -> None:
    name = f"{family}-{bits}bit"
    engine = EngineDriver(models[name], cpu_weights="native")
    assert engine.ready.weights == f"{bits}-bit"
    _assert_all(engine.run(PROMPTS), reference[f"{name}-native"])


@pytest.mark.skipif(not BACKEND.policy.widens_weights, reason="weights stay as they are stored")
@pytest.mark.parametrize(("family", "bits"), NATIVE)
def test_quantised_weights_widened_to_float32_give_the_widened_models_tokens(
    family: str, bits: int, models: dict[str, Path], reference: Reference
) -> None:
    name = f"{family}-{bits}bit"
    engine = EngineDriver(models[name], cpu_weights="float32")
    assert engine.ready.weights == "float32"
    _assert_all(engine.run(PROMPTS), reference[name])


@observes("ModelConfig.adapter_path")
def test_an_adapter_changes_the_tokens_as_in_mlx_lm(
    models: dict[str, Path], reference: Reference
) -> None:
    engine = EngineDriver(models["qwen3"], adapter_path=str(models["adapter"]))
    plain = [[step.token for step in steps] for steps in reference["qwen3"]]
    adapted = engine.run(PROMPTS)
    assert adapted != plain
    _assert_all(adapted, reference["lora"])


def test_preempted_rows_go_on_with_the_same_tokens(models: dict[str, Path]) -> None:
    """Two rows start within the memory and outgrow it together, so that one has to give way."""
    prompts = random_prompts(4, (40, 60), VOCAB_SIZE)
    long = [(p, replace(GREEDY, max_tokens=400, seed=i)) for i, p in enumerate(prompts)]
    long += [(p, replace(s, temperature=0.7)) for p, s in long]
    cramped = EngineDriver(models["qwen3"], max_kv_tokens=900)
    assert cramped.run_each(long) == EngineDriver(models["qwen3"]).run_each(long)
    assert cramped.core.stats().num_preemptions_total > 0


def test_a_family_that_mlx_lm_does_not_have_is_refused_by_name(
    tmp_path: Path, models: dict[str, Path]
) -> None:
    config = (models["qwen3"] / "config.json").read_text().replace('"qwen3"', '"qwen99"')
    (tmp_path / "config.json").write_text(config)
    (tmp_path / "model.safetensors").symlink_to(models["qwen3"] / "model.safetensors")
    with pytest.raises(UnsupportedModelError, match="qwen99"):
        EngineDriver(tmp_path)


def test_steps_write_the_kv_memory_in_place(models: dict[str, Path]) -> None:
    """A copy of a slab at each step would show as a peak of twice the KV memory."""
    engine = EngineDriver(models["llama"], max_batch_size=8)
    prompts = random_prompts(3, (2000,) * 8, VOCAB_SIZE)
    for i, prompt in enumerate(prompts):
        engine.add(f"long-{i}", prompt, replace(GREEDY, max_tokens=200))
    while not all(engine.tokens.values()):
        engine.step()
    held = engine.core.stats().kv_used_bytes
    assert engine.usual_peak_bytes() < held / 3
    assert engine.core.stats().kv_used_bytes == held
