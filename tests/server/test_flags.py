"""Every flag has an effect that somebody can see."""

from __future__ import annotations

import json
import os
import re
import socket
import ssl
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mlx_lm_server import __version__
from mlx_lm_server.cli import COMMANDS, main, shown_flag
from mlx_lm_server.config_loading import flag_name, settings
from mlx_lm_server.folders import cache_folder
from mlx_lm_server.protocol import LENGTH, DiskTier, LoadModel, decode_to_engine
from tests.observations import observes
from tests.server.harness import RunningServer, make_model

SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
CLI = [sys.executable, "-m", "mlx_lm_server"]


def loaded_with(start: Callable[..., Any], tmp_path: Path, flags: dict[str, str]) -> LoadModel:
    """What the engine was told."""
    record = tmp_path / "load.bin"
    start(flags=flags, engine={"record": record})
    message = decode_to_engine(record.read_bytes()[LENGTH.size :])
    assert isinstance(message, LoadModel)
    return message


def test_what_concerns_the_engine_reaches_it(start: Callable[..., Any], tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    load = loaded_with(
        start,
        tmp_path,
        {
            "--adapter-path": str(adapter),
            "--trust-remote-code": "true",
            "--cpu-weights": "native",
            "--cpu-threads": "3",
            "--max-batch-size": "7",
            "--max-num-batched-tokens": "900",
            "--prefill-step-size": "300",
            "--prefill-batch-size": "5",
            "--itl-goal-ms": "40",
            "--max-kv-size": "5000",
            "--memory-limit-gb": "1.5",
        },
    )
    assert load.adapter_path == str(adapter)
    assert load.trust_remote_code
    assert (load.cpu_weights, load.num_threads) == ("native", 3)
    assert (load.max_batch_size, load.max_num_batched_tokens) == (7, 900)
    assert (load.prefill_step_size, load.prefill_batch_size) == (300, 5)
    assert load.itl_goal_s == pytest.approx(0.04)
    assert load.max_kv_tokens == 5000
    assert load.memory_limit_bytes == 1_500_000_000


def test_by_default_the_engine_chooses(
    start: Callable[..., Any], tmp_path: Path, model: Path
) -> None:
    tier = DiskTier(str(cache_folder() / "kv-cache"))
    assert loaded_with(start, tmp_path, {}) == LoadModel(model_path=str(model), disk_tier=tier)


@observes("TierConfig.no_ssd")
def test_no_ssd_means_no_disk_tier(start: Callable[..., Any], tmp_path: Path) -> None:
    assert loaded_with(start, tmp_path, {"--no-ssd": "true"}).disk_tier is None


class Recorder:
    """A server whose engine shows the sampling of its last request."""

    def __init__(self, start: Callable[..., Any], file: Path, **flags: str) -> None:
        self._file = file
        self.server = start(engine={"record_sampling": file}, flags=flags)

    def saw(self, **fields: Any) -> dict[str, Any]:
        assert self.server.complete("x", **{"max_tokens": 1, **fields}).status_code == 200
        seen: dict[str, Any] = json.loads(self._file.read_text())
        return seen


def test_all_sampling_fields_reach_the_engine(start: Callable[..., Any], tmp_path: Path) -> None:
    recorder = Recorder(start, tmp_path / "seen.json")
    assert recorder.saw().items() >= {
        "temperature": 0.5,  # generation_config.json
        "top_k": 7,
        "top_p": 1.0,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
    }.items()  # fmt: skip
    seen = recorder.saw(
        max_tokens=3,
        seed=-1,
        presence_penalty=0.5,
        frequency_penalty=-0.5,
        logit_bias={"5": -100, "6": 1},
        stop_token_ids=[9],
        priority=-2,
    )
    assert seen["max_tokens"] == 3
    assert seen["seed"] == 2**64 - 1
    assert (seen["presence_penalty"], seen["frequency_penalty"]) == (0.5, -0.5)
    assert seen["logit_bias"] == {"5": -100.0, "6": 1.0}
    assert sorted(seen["stop_token_ids"]) == [9, 256]
    assert seen["priority"] == -2
    assert len({recorder.saw()["seed"] for _ in range(3)}) == 3, "a random one for each request"


@observes(
    "GenerationConfig.default_temperature",
    "GenerationConfig.default_top_p",
    "GenerationConfig.default_top_k",
    "GenerationConfig.default_min_p",
    "GenerationConfig.default_repetition_penalty",
)
def test_sampling_flags_go_before_the_models_defaults_and_fields_before_both(
    start: Callable[..., Any], tmp_path: Path
) -> None:
    flags = {
        "--default-temperature": "0.9",
        "--default-top-p": "0.8",
        "--default-top-k": "3",
        "--default-min-p": "0.1",
        "--default-repetition-penalty": "1.2",
    }
    recorder = Recorder(start, tmp_path / "seen.json", **flags)
    seen = recorder.saw()
    assert [seen[name] for name in SAMPLING] == [0.9, 0.8, 3, 0.1, 1.2]
    seen = recorder.saw(temperature=0, top_k=-1, top_p=0.5)
    assert [seen[name] for name in SAMPLING] == [0.0, 0.5, 0, 0.1, 1.2]


@observes("ServerConfig.api_key_file")
def test_a_key_names_its_client_to_the_scheduler(start: Callable[..., Any], tmp_path: Path) -> None:
    record, keys = tmp_path / "sampling.json", tmp_path / "keys"
    keys.write_text("sesame ali baba\n")
    server = start(engine={"record_sampling": record}, flags={"--api-key-file": str(keys)})
    server.client.headers["authorization"] = "Bearer sesame"
    server.complete("x", max_tokens=1)
    assert json.loads(record.read_text())["client_key"] == "ali baba"


@observes("ModelConfig.model", "ModelConfig.served_model_name")
def test_models_go_by_the_names_they_were_given(start: Callable[..., Any], model: Path) -> None:
    served = start(flags={"--served-model-name": ["one", "two"]}).client
    assert [card["id"] for card in served.get("/v1/models").json()["data"]] == ["one", "two"]
    assert served.get("/v1/models/two").json()["root"] == str(model)


@observes("ModelConfig.chat_template", "ModelConfig.chat_template_args")
def test_a_chat_template_as_text_and_its_arguments(start: Callable[..., Any]) -> None:
    server = start(
        flags={
            "--chat-template": "{{ greeting }} {{ messages[0].content }}",
            "--chat-template-args": '{"greeting": "Hi"}',
        }
    )
    answer = server.chat("Bo", max_tokens=5).json()
    assert answer["choices"][0]["message"]["content"] == "Hi Bo"
    answer = server.chat("Bo", max_tokens=5, chat_template_kwargs={"greeting": "Yo"}).json()
    assert answer["choices"][0]["message"]["content"] == "Yo Bo"


def test_a_chat_template_as_a_file(start: Callable[..., Any], tmp_path: Path) -> None:
    file = tmp_path / "template.jinja"
    file.write_text("[{{ messages[0].content }}]")
    server = start(flags={"--chat-template": str(file)})
    answer = server.chat("Bo", max_tokens=4).json()
    assert answer["choices"][0]["message"]["content"] == "[Bo]"


@pytest.mark.parametrize(
    ("flags", "code", "words"),
    [
        ({"--chat-template": "{% if %}"}, 1, "cannot be compiled"),
        ({"--chat-template-args": '{"messages": 1}'}, 2, "set by the server"),
        ({"--adapter-path": "/nowhere"}, 1, "--adapter-path /nowhere"),
        ({"--ssl-certfile": "/nowhere", "--ssl-keyfile": "/nowhere"}, 2, "--ssl-certfile"),
    ],
    ids=lambda part: str(part)[:40],
)
def test_what_cannot_be_used_is_one_line(
    start: Callable[..., Any], flags: dict[str, str], code: int, words: str
) -> None:
    server = start(wait=False, flags=flags)
    assert server.process.wait(10) == code
    lines = [line for line in server.output().splitlines() if "INFO" not in line]
    assert len(lines) == 1
    assert words in lines[0]


def test_a_model_without_a_tokenizer(start: Callable[..., Any], tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model")
    (folder / "tokenizer.json").unlink()
    server = start(wait=False, model=folder)
    assert server.process.wait(10) == 1
    assert "has no tokenizer.json" in server.output()


def test_a_hub_id_without_a_network(start: Callable[..., Any], tmp_path: Path) -> None:
    server = start(
        wait=False,
        flags={"--model": "some-org/some-model"},
        env={"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)},
    )
    assert server.process.wait(10) == 1
    assert "some-org/some-model: not downloaded yet" in server.output()
    assert "Traceback" not in server.output()


@observes("ServerConfig.port")
def test_a_port_in_use(start: Callable[..., Any], server: RunningServer) -> None:
    second = start(wait=False, flags={"--port": str(server.port)})
    assert second.process.wait(10) == 1
    assert f"cannot listen on 127.0.0.1:{server.port}" in second.output()


@observes("ServerConfig.uds")
def test_a_unix_socket(start: Callable[..., Any], tmp_path: Path) -> None:
    path = str(tmp_path / "s.sock")
    server = start(flags={"--uds": path}, uds=path)
    assert server.chat("x", max_tokens=1).status_code == 200
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
    assert server.stop() == 0
    assert not Path(path).exists()


def test_a_unix_socket_that_was_left_behind_is_replaced(
    start: Callable[..., Any], tmp_path: Path
) -> None:
    path = str(tmp_path / "s.sock")
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(path)
    os.chmod(path, 0o666)
    server = start(flags={"--uds": path}, uds=path)
    assert server.chat("x", max_tokens=1).status_code == 200
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
    second = start(wait=False, flags={"--uds": path})
    assert second.process.wait(10) == 1
    assert "another server does" in second.output()
    assert server.chat("x", max_tokens=1).status_code == 200


@pytest.mark.parametrize("kind", [socket.SOCK_DGRAM, socket.SOCK_STREAM])
def test_a_unix_socket_of_another_program_stays(
    start: Callable[..., Any], tmp_path: Path, kind: socket.SocketKind
) -> None:
    path = str(tmp_path / "s.sock")
    with socket.socket(socket.AF_UNIX, kind) as others:
        others.bind(path)
        if kind is socket.SOCK_STREAM:
            others.listen()
        server = start(wait=False, flags={"--uds": path})
        assert server.process.wait(10) == 1
        assert f"cannot listen on {path}" in server.output()
        assert Path(path).exists()


@pytest.mark.parametrize(
    ("path", "reason"), [("file", "no socket"), ("none/s", "No such file"), ("x" * 200, "too long")]
)
def test_a_unix_socket_that_cannot_be(
    start: Callable[..., Any], tmp_path: Path, path: str, reason: str
) -> None:
    (tmp_path / "file").write_text("mine")
    server = start(wait=False, flags={"--uds": str(tmp_path / path)})
    assert server.process.wait(10) == 1
    assert "cannot listen on" in server.output()
    assert reason in server.output()
    assert (tmp_path / "file").read_text() == "mine"


def test_a_stream_over_a_unix_socket(start: Callable[..., Any], tmp_path: Path) -> None:
    path = str(tmp_path / "s.sock")
    server = start(flags={"--uds": path}, uds=path)
    events = server.events("/v1/completions", prompt="abc", max_tokens=3)
    assert events[-1] == "[DONE]"


@observes("ServerConfig.ssl_certfile", "ServerConfig.ssl_keyfile")
def test_tls(start: Callable[..., Any], tmp_path: Path) -> None:
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2",
         "-subj", "/CN=localhost", "-keyout", str(key), "-out", str(cert)],
        check=True, capture_output=True,
    )  # fmt: skip
    server = start(flags={"--ssl-certfile": str(cert), "--ssl-keyfile": str(key)})
    assert server.url.startswith("https:")
    assert ssl.get_server_certificate(("127.0.0.1", server.port)) == cert.read_text()
    assert server.chat("x", max_tokens=1).status_code == 200


@observes("ServerConfig.host")
def test_ipv6(start: Callable[..., Any]) -> None:
    server = start(wait=False, flags={"--host": "::1"})
    server.client.base_url = f"http://[::1]:{server.port}"
    server.wait_until(lambda: server.status("/readyz") == 200)
    assert f"http://[::1]:{server.port}" in server.output()


@observes("ServerConfig.log_format")
def test_log_lines_are_json_and_hold_no_prompt(start: Callable[..., Any]) -> None:
    server = start(flags={"--log-format": "json", "--log-level": "debug"})
    server.chat("my secret", max_tokens=2)
    server.stop()
    lines = [json.loads(line) for line in server.output().splitlines()]
    assert all({"time", "level", "logger", "message"} <= set(line) for line in lines)
    assert any("2 new tokens" in line["message"] for line in lines)
    assert "my secret" not in server.output()


@observes("ServerConfig.log_level")
def test_a_level_hides_what_is_less_severe(start: Callable[..., Any]) -> None:
    server = start(flags={"--log-level": "error"})
    server.chat("x", max_tokens=2)
    server.stop()
    assert "INFO" not in server.output()


def test_prompts_are_logged_at_trace(start: Callable[..., Any]) -> None:
    server = start(flags={"--log-level": "trace"})
    server.chat("my secret", max_tokens=2)
    server.stop()
    assert "my secret" in server.output()


def test_the_banner_says_what_is_served_and_how_to_use_it(server: RunningServer) -> None:
    server.wait_until(lambda: "openai.OpenAI" in server.output())
    banner = server.output()
    url = f"http://127.0.0.1:{server.port}"
    for words in ("tiny, other", "4,096 tokens", "8-bit, groups of 64", url, "curl"):
        assert words in banner
    assert f"{url}/docs" in banner
    assert server.status("/docs") == 200
    assert "Ctrl-C" in banner


@pytest.mark.parametrize(("limit", "words"), [("0.5", "up to 0.5 GB"), ("0", "no limit")])
def test_the_banner_says_how_much_of_the_disk_is_taken_and_where(
    start: Callable[..., Any], tmp_path: Path, limit: str, words: str
) -> None:
    folder = str(tmp_path / "kv")
    server = start(
        flags={"--ssd-max-size-gb": limit, "--ssd-cache-dir": folder}, env={"COLUMNS": "200"}
    )
    server.wait_until(lambda: "openai.OpenAI" in server.output())
    assert f"evict_only, {words} (--ssd-max-size-gb), {folder} " in server.output()


def test_the_banner_of_a_server_without_a_disk_tier_says_so(start: Callable[..., Any]) -> None:
    server = start(flags={"--no-ssd": "true"})
    server.wait_until(lambda: "openai.OpenAI" in server.output())
    assert re.search(r"disk cache +off ", server.output())


def usage_error(args: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line of a call that must fail with exit code 2."""
    with pytest.raises(SystemExit) as caught:
        main(args)
    assert caught.value.code == 2
    line = capsys.readouterr().err
    assert line.startswith("mlx-lm-server: ")
    assert line.count("\n") == 1
    return line


def printed(*args: str, columns: int = 200) -> str:
    """What a call prints that ends well."""
    env = {**os.environ, "COLUMNS": str(columns)}
    done = subprocess.run([*CLI, *args], capture_output=True, text=True, env=env, timeout=20)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_setting_is_in_the_help() -> None:
    text = printed("--help")
    for setting in settings():
        assert flag_name(setting.name) in text
    for panel in ("model", "server", "kv cache", "batching", "generation", "admission", "cpu"):
        assert f"─ {panel} ─" in text
    assert all(name in text for name in COMMANDS)


@pytest.mark.parametrize("columns", [80, 60, 30])
def test_the_help_never_cuts_a_name_and_switches_have_no_value(columns: int) -> None:
    lines = printed("--help", columns=columns).splitlines()
    words = {word.strip(",") for line in lines for word in line.split()}
    flags = {f for s in settings() for n in s.names for f in shown_flag(s, n).split("/")}
    assert flags <= words
    assert not any("…" in line or "<bool>" in line for line in lines)
    for switch in (setting for setting in settings() if setting.kind == "bool"):
        shown = shown_flag(switch, switch.name).replace("/", " / ")
        assert any(f"{line}  ".startswith(f"  {shown}  ") for line in lines)
    if columns >= 60:
        assert max(map(len, lines)) <= columns


@pytest.mark.parametrize("command", [(), *((name,) for name in COMMANDS)], ids=str)
def test_a_short_h_is_help(command: tuple[str, ...]) -> None:
    assert printed(*command, "-h") == printed(*command, "--help")


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ("--no-ssd true", "--no-ssd is a switch and takes no value: instead of --no-ssd true "),
        ("--no-ssd=1", "instead of --no-ssd 1 write --no-ssd alone"),
        ("--port 1 --trust-remote-code off nano", "leave it out"),
        ("--ssd-async-writes false", "write --no-ssd-async-writes"),
    ],
)
def test_a_switch_with_a_value_says_how_to_write_it(
    args: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert words in usage_error(args.split(), capsys)


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ("bnech", "bnech is no command (serve, bench, chat, top, doctor); did you mean bench?"),
        ("--port 1 srve", "did you mean serve?"),
        ("nnao", "did you mean nano?"),
        ("gpt2", "If it is a model: mlx-lm-server serve gpt2"),
        ("--port 1 bench", "bench is a command and comes first"),
        ("serve serve", "serve is a command and comes first"),
        ("nano other/model", "unexpected extra argument"),
        ("nano --model other/model", "two models are named, nano and --model other/model"),
    ],
)
def test_a_word_that_is_no_model_is_not_served(
    args: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert words in usage_error(args.split(), capsys)


@pytest.mark.parametrize(
    "args",
    ["{}", "serve {}", "--log-level error {}", "{} --model {}", "serve --served-model-name on {}"],
)
def test_a_model_can_be_an_argument(args: str, tmp_path: Path) -> None:
    """It is taken for the model: the start says that nothing is in its folder."""
    folder = f"{tmp_path}/nothing"
    done = subprocess.run(
        [*CLI, *args.format(folder, folder).split(), "--port", "0"],
        capture_output=True,
        text=True,
        timeout=20,
    )
    assert done.returncode == 1
    assert f"--model {folder}: no such folder" in done.stderr


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"mlx-lm-server {__version__}\n"


@pytest.mark.parametrize(
    "args",
    [
        ["--prot", "1"],
        ["--port"],
        ["--port", "x"],
        ["nonsense"],
        ["serve", "--max-batch-size", "0"],
        ["--cpu-weights", "float8"],
        ["--max-batch-size", "2", "--completion-batch-size", "3"],
        ["--config", "/nowhere.toml"],
        ["--ssl-certfile", "x"],
        ["--host", "0.0.0.0"],
    ],
    ids=" ".join,
)
def test_usage_errors_are_one_line_and_exit_code_2(
    args: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    usage_error(args, capsys)


def test_an_unknown_variable_is_a_usage_error(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLX_LM_SERVER_PROT", "1")
    assert "did you mean MLX_LM_SERVER_PORT?" in usage_error([], capsys)
