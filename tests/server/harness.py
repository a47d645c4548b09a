"""A real server process with a fake engine or another one behind it, and a tiny model to serve."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

PROGRAM = Path(__file__).with_name("serve_fake.py")
SPECIALS = ["<eos>", "<user>", "<assistant>"]
EOS_ID = 256
VOCAB_SIZE = 256 + len(SPECIALS)
CONTEXT = 4096
TEMPLATE = (
    "{%- for m in messages -%}"
    "{%- if m.role == 'tool' and not m.tool_call_id -%}"
    "{{ raise_exception('tool messages need an id') }}{%- endif -%}"
    "<{{ 'assistant' if m.role == 'assistant' else 'user' }}>"
    "{{ prefix | default('') }}{{ m.content }}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt %}<assistant>{% endif -%}"
)


def make_model(folder: Path, **config: Any) -> Path:
    """A tokenizer of single bytes: the id of a byte is its place in GPT-2's alphabet."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in SPECIALS])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    texts = {
        "config.json": {"max_position_embeddings": CONTEXT, "eos_token_id": EOS_ID, **config},
        "tokenizer_config.json": {"eos_token": "<eos>", "chat_template": TEMPLATE},
        "generation_config.json": {"temperature": 0.5, "top_k": 7},
    }
    for name, value in texts.items():
        (folder / name).write_text(json.dumps(value))
    return folder


@dataclass
class RunningServer:
    """A server process of its own; ended by `stop`."""

    model: Path
    flags: dict[str, Any] = field(default_factory=dict)
    engine: dict[str, Any] = field(default_factory=dict)
    limits: dict[str, Any] = field(default_factory=dict)
    connection: dict[str, Any] = field(default_factory=dict)
    drain_s: float = 5.0
    env: dict[str, str] = field(default_factory=dict)
    uds: str | None = None
    engine_command: tuple[str, ...] = ()

    def start(self, *, wait: bool = True) -> RunningServer:
        self.port = _free_port()
        flags = {
            "--model": str(self.model),
            "--port": str(self.port),
            "--drain-s": self.drain_s,
            **self.flags,
        }
        engine = {"vocab_size": VOCAB_SIZE, **self.engine}
        spec = {
            "flags": flags,
            "engine": engine,
            "engine_command": self.engine_command,
            "limits": self.limits,
            "connection": self.connection,
        }
        self.log = self.model.parent / f"server-{self.port}.log"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, str(PROGRAM), json.dumps(spec, default=str)],
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **self.env},
            )
        scheme = "https" if "--ssl-certfile" in flags else "http"
        self.url = f"{scheme}://127.0.0.1:{self.port}"
        self.client = self.new_client()
        if wait:
            self.wait_until(lambda: self.status("/readyz") == 200)
        return self

    def new_client(self) -> httpx.Client:
        """One more connection; `verify` is off since reading certificates takes longest."""
        transport = httpx.HTTPTransport(uds=self.uds, verify=False)
        return httpx.Client(base_url=self.url, transport=transport, timeout=20)

    def status(self, path: str) -> int | None:
        """The status of a GET, or None where nobody listens."""
        try:
            return self.client.get(path).status_code
        except httpx.TransportError:
            return None

    def wait_until(self, is_so: Any, limit_s: float = 15) -> None:
        deadline_s = time.monotonic() + limit_s
        while not is_so():
            if self.process.poll() is not None:
                raise AssertionError(f"the server ended:\n{self.output()}")
            if time.monotonic() > deadline_s:
                raise AssertionError(f"not within {limit_s} s:\n{self.output()}")
            time.sleep(0.02)

    def output(self) -> str:
        return self.log.read_text()

    def chat(self, text: str = "hello", **fields: Any) -> httpx.Response:
        body = {"messages": [{"role": "user", "content": text}], **fields}
        return self.client.post("/v1/chat/completions", json=body)

    def complete(self, prompt: Any, **fields: Any) -> httpx.Response:
        return self.client.post("/v1/completions", json={"prompt": prompt, **fields})

    def events(self, path: str, **body: Any) -> list[Any]:
        """The events of a stream, parsed; the last is the string [DONE]."""
        with self.client.stream("POST", path, json={"stream": True, **body}) as response:
            assert response.status_code == 200, response.read()
            return [
                line[6:] if line == "data: [DONE]" else json.loads(line[6:])
                for line in response.iter_lines()
                if line
            ]

    def health(self) -> dict[str, Any]:
        facts: dict[str, Any] = self.client.get("/health").json()
        return facts

    def is_idle(self) -> bool:
        facts = self.health()
        return bool(facts["num_running"] == 0 and facts["num_waiting"] == 0)

    @property
    def engine_pid(self) -> int:
        return int(self.health()["engine"]["pid"])

    def connect(self) -> socket.socket:
        link = socket.create_connection(("127.0.0.1", self.port))
        link.settimeout(10)
        return link

    def signal(self, number: int = signal.SIGTERM) -> None:
        self.process.send_signal(number)

    def stop(self) -> int:
        """Ends it and gives its exit code. No engine may be left."""
        children = psutil.Process(self.process.pid).children() if self.is_running else []
        if self.is_running:
            self.signal()
        try:
            code = self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise AssertionError(f"the server does not end:\n{self.output()}") from None
        self.client.close()
        _, alive = psutil.wait_procs(children, timeout=5)
        assert not alive, "an engine was left behind"
        return code

    @property
    def is_running(self) -> bool:
        return self.process.poll() is None


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def http_request(path: str, body: bytes, *headers: str) -> bytes:
    """A POST as bytes, for tests that send it piece by piece."""
    lines = [
        f"POST {path} HTTP/1.1",
        "host: localhost",
        "content-type: application/json",
        f"content-length: {len(body)}",
        *headers,
    ]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def read_all(link: socket.socket) -> bytes:
    """Everything until the other side closes."""
    data = b""
    while True:
        try:
            piece = link.recv(65536)
        except ConnectionResetError:
            return data
        if not piece:
            return data
        data += piece
