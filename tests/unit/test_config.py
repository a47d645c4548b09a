"""Settings and their sources."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from mlx_lm_server.config import Config
from mlx_lm_server.config_loading import (
    env_name,
    flag_name,
    key_name,
    load_config,
    settings,
)
from mlx_lm_server.errors import ConfigError


def load(
    flags: dict[str, Any] | None = None,
    env: dict[str, str] | None = None,
    toml: str | None = None,
    tmp_path: Path | None = None,
) -> Config:
    file = None
    if toml is not None and tmp_path is not None:
        file = tmp_path / "config.toml"
        file.write_text(toml)
    return load_config(flags or {}, env or {}, str(file) if file else None)


def test_the_defaults_load_and_are_those_of_the_fields() -> None:
    assert load() == Config()


def test_defaults_then_file_then_variables_then_flags(tmp_path: Path) -> None:
    toml = "port = 1\nmax-batch-size = 2\nmax-queue-size = 3"
    env = {"MLX_LM_SERVER_MAX_BATCH_SIZE": "20", "MLX_LM_SERVER_MAX_QUEUE_SIZE": "30"}
    config = load({"--max-queue-size": "300"}, env, toml, tmp_path)
    assert config.server.port == 1
    assert config.batching.max_batch_size == 20
    assert config.batching.max_queue_size == 300
    assert config.server.host == "127.0.0.1"


def test_the_file_can_come_from_a_variable(tmp_path: Path) -> None:
    file = tmp_path / "config.toml"
    file.write_text("port = 77")
    assert load(env={"MLX_LM_SERVER_CONFIG": str(file)}).server.port == 77


def test_values_of_every_type_from_a_file(tmp_path: Path) -> None:
    toml = """
        served-model-name = ["a", "b"]
        trust-remote-code = true
        chat-template-args = { enable_thinking = false }
        memory-limit-gb = 2
        request-timeout-s = 0.5
        prefill-step-size = "auto"
        log-format = "json"
    """
    config = load(toml=toml, tmp_path=tmp_path)
    assert config.model.served_model_name == ("a", "b")
    assert config.model.trust_remote_code is True
    assert config.model.chat_template_args == {"enable_thinking": False}
    assert config.kv.memory_limit_gb == 2.0
    assert config.generation.request_timeout_s == 0.5
    assert config.batching.prefill_step_size is None
    assert config.server.log_format == "json"


def test_values_of_every_type_from_variables() -> None:
    env = {
        "MLX_LM_SERVER_SERVED_MODEL_NAME": "a, b",
        "MLX_LM_SERVER_TRUST_REMOTE_CODE": "yes",
        "MLX_LM_SERVER_CHAT_TEMPLATE_ARGS": '{"a": 1}',
        "MLX_LM_SERVER_CPU_THREADS": "",
    }
    config = load(env=env)
    assert config.model.served_model_name == ("a", "b")
    assert config.model.trust_remote_code is True
    assert config.model.chat_template_args == {"a": 1}
    assert config.cpu.cpu_threads is None


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"--port": "x"}, "--port: 'x' is not a whole number"),
        ({"--port": "65536"}, "--port: 65536 is above 65535"),
        ({"--max-batch-size": "0"}, "--max-batch-size: 0 is below 1"),
        ({"--default-temperature": "nan"}, "nan is not a finite number"),
        ({"--itl-goal-ms": "-1"}, "--itl-goal-ms: -1.0 is below 1"),
        ({"--cpu-weights": "int3"}, "is not one of auto, float32, native"),
        ({"--kv-bits": "6"}, "--kv-bits: '6' is not one of 16, 8, 4"),
        ({"--kv-bits": "many"}, "--kv-bits: 'many' is not one of 16, 8, 4"),
        ({"--kv-group-size": "16"}, "is not one of 32, 64, 128"),
        ({"--trust-remote-code": "perhaps"}, "is not true or false"),
        ({"--chat-template-args": "[1]"}, "is not a JSON object"),
        ({"--chat-template-args": "{"}, "is not a JSON object"),
        ({"--model": ""}, "is not a text"),
        ({"--mode": "x"}, "--mode is no setting of mlx-lm-server; did you mean --model?"),
        ({"--host": "192.168.1.1"}, "is open to the network"),
        ({"--host": "example.org"}, "is open to the network"),
        ({"--ssl-certfile": "x"}, "go together"),
        ({"--uds": "x", "--ssl-certfile": "x", "--ssl-keyfile": "x"}, "exclude each other"),
        (
            {"--max-num-batched-tokens": "100", "--prefill-step-size": "200"},
            "--prefill-step-size 200 is over --max-num-batched-tokens 100",
        ),
        ({"--max-num-batched-tokens": "16"}, "each decoding row takes a token"),
        ({"--default-max-tokens": "9", "--max-generation-tokens": "5"}, "over --max-generation"),
        ({"--max-batch-size": "1", "--completion-batch-size": "2"}, "are the same setting"),
    ],
)
def test_what_is_wrong_is_said_in_the_words_of_its_source(
    flags: dict[str, str], words: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        load(flags)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("toml", "words"),
    [
        ("prot = 1", "prot is no setting of mlx-lm-server; did you mean port?"),
        ("max_batch_size = 1", "did you mean max-batch-size?"),
        ("port = true", "port: True is not a whole number"),
        ("port = 1.5", "port: 1.5 is not a whole number"),
        ("host = 1", "host: 1 is not a text"),
        ("served-model-name = [1]", "is not a list of texts"),
        ("[server]\nport = 1", "server is no setting"),
        ("port = ", "Invalid value"),
    ],
)
def test_what_is_wrong_in_a_file_names_the_file(toml: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load(toml=toml, tmp_path=tmp_path)
    assert words in str(caught.value)
    assert "config.toml" in str(caught.value)


def test_an_alias_with_the_same_value_is_no_conflict() -> None:
    flags = {"--max-batch-size": "4", "--completion-batch-size": "4"}
    assert load(flags).batching.max_batch_size == 4
    assert load({"--completion-batch-size": "5"}).batching.max_batch_size == 5


def test_a_key_is_not_shown_in_an_error() -> None:
    with pytest.raises(ConfigError) as caught:
        load(env={"MLX_LM_SERVER_API_KEY": ""} | {"MLX_LM_SERVER_PORT": "x"})
    assert "API_KEY" not in str(caught.value)


def test_an_open_host_goes_with_a_key_or_with_insistence() -> None:
    load({"--host": "0.0.0.0", "--api-key": "k"})
    load({"--host": "0.0.0.0", "--api-key-file": "f"})
    load({"--host": "0.0.0.0", "--allow-unauthenticated": True})
    load({"--host": "0.0.0.0", "--uds": "/tmp/s"})


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (
            {"--cors-origins": ["localhost"]},
            "--cors-origins: 'localhost' matches no page: it",
        ),
        ({"--cors-origins": ["http://a.b/"]}, "an origin looks like http://localhost:3000"),
        ({"--allowed-hosts": ["http://a.b"]}, "--allowed-hosts: 'http://a.b' is no host"),
    ],
)
def test_a_name_that_matches_nothing_stops_the_start(flags: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(flags)
    assert words in str(caught.value)


def test_an_origin_in_a_variable_or_a_file_is_checked_too(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="MLX_LM_SERVER_CORS_ORIGINS: 'b' matches no page"):
        load(env={"MLX_LM_SERVER_CORS_ORIGINS": "http://a, b"})
    with pytest.raises(ConfigError, match="cors-origins: 'b' matches no page"):
        load(toml='cors-origins = ["b"]', tmp_path=tmp_path)


def test_every_setting_says_what_and_why_and_has_one_name_everywhere() -> None:
    found = list(settings())
    names = [name for setting in found for name in setting.names]
    assert len(set(names)) == len(names)
    for setting in found:
        assert setting.option.help.endswith(".")
        assert setting.option.why.endswith(".")
        assert setting.default not in (None, ()) or setting.option.unset
        assert flag_name(setting.name) == "--" + key_name(setting.name)
        assert env_name(setting.name).isupper()


def test_the_configuration_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().server.port = 1  # type: ignore[misc]
