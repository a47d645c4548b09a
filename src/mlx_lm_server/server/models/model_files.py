"""From what the user calls a model to a local folder, and what the server reads in it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_lm_server.config import NANO
from mlx_lm_server.core import model_config
from mlx_lm_server.errors import ModelError, ModelNotFoundError
from mlx_lm_server.folders import expanded

# tokenizer_config.json's; often a stand-in, so that config.json goes first.
LENGTH_FIELD = "model_max_length"
NANO_FOLDER = Path(__file__).resolve().parents[2] / "nano"
# What mlx-lm downloads of a repository.
ALLOW_PATTERNS = [
    "*.json",
    "model*.safetensors",
    "*.py",
    "tokenizer.model",
    "*.tiktoken",
    "tiktoken.model",
    "*.txt",
    "*.jsonl",
    "*.jinja",
]


def resolve_model(model: str) -> Path:
    """The folder with the model's files; downloads it where it is a hub id.

    Blocks for as long as the download takes. Raises ModelNotFoundError.
    """
    if model == NANO:
        return _existing(NANO_FOLDER, "the bundled model is not in this installation")
    path = expanded(model)
    if path.exists() or model.startswith((".", "/", "~")) or model.count("/") > 1:
        return _existing(path, f"--model {model}: no such folder with a config.json in it")
    return _download(model)


def _existing(path: Path, message: str) -> Path:
    if not (path / "config.json").is_file():
        raise ModelNotFoundError(message)
    return path.resolve()


def _download(repo_id: str) -> Path:
    # Imported here: a server with a local model neither waits nor pays memory for it.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
    )

    try:
        return Path(snapshot_download(repo_id, allow_patterns=ALLOW_PATTERNS))
    except GatedRepoError as error:
        raise ModelNotFoundError(
            f"--model {repo_id}: access is restricted; accept its terms on the hub and set HF_TOKEN"
        ) from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise ModelNotFoundError(
            f"--model {repo_id}: neither a local folder nor a repository on the hub"
        ) from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, HfHubHTTPError, OSError) as error:
        raise ModelNotFoundError(
            f"--model {repo_id}: not downloaded yet, and the hub cannot be reached "
            f"({type(error).__name__}); `--model nano` works without a network"
        ) from error


def resolve_adapter(adapter_path: str | None) -> str | None:
    """Raises ModelNotFoundError where the folder holds no adapter."""
    if adapter_path is None:
        return None
    path = expanded(adapter_path)
    if not (path / "adapter_config.json").is_file():
        raise ModelNotFoundError(
            f"--adapter-path {adapter_path}: no such folder with an adapter_config.json in it"
        )
    return str(path.resolve())


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file that may be absent. Raises ModelError for anything else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path} holds no JSON object")
    return value


@dataclass(frozen=True)
class SamplingDefaults:
    """What a request gets that names no value; None where the model says nothing either."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None


@dataclass(frozen=True)
class ModelFacts:
    """What the files say about a model, as far as the server needs it."""

    context_tokens: int | None
    eos_ids: frozenset[int]
    defaults: SamplingDefaults
    tokenizer_config: Mapping[str, Any]
    num_rows: int | None = None
    """The size of its table of tokens, where config.json states it."""
    model_type: str = ""


def read_facts(folder: Path) -> ModelFacts:
    config = read_json(folder / "config.json")
    generation = read_json(folder / "generation_config.json")
    tokenizer_config = read_json(folder / "tokenizer_config.json")
    sources = (*model_config.sections(config), generation)
    return ModelFacts(
        context_tokens=model_config.context_tokens(config)
        or model_config.context_tokens({LENGTH_FIELD: tokenizer_config.get(LENGTH_FIELD)}),
        eos_ids=frozenset(i for source in sources for i in _ids(source.get("eos_token_id"))),
        defaults=SamplingDefaults(
            temperature=_number(generation, "temperature"),
            top_p=_number(generation, "top_p"),
            top_k=_whole(generation, "top_k"),
            min_p=_number(generation, "min_p"),
            repetition_penalty=_number(generation, "repetition_penalty"),
        ),
        tokenizer_config=tokenizer_config,
        num_rows=_whole(model_config.sections(config)[0], "vocab_size")
        or _whole(config, "vocab_size"),
        model_type=str(config.get("model_type") or ""),
    )


def _ids(value: Any) -> list[int]:
    values = value if isinstance(value, list) else [value]
    return [i for i in values if isinstance(i, int)]


def _number(source: Mapping[str, Any], name: str) -> float | None:
    value = source.get(name)
    return float(value) if isinstance(value, int | float) else None


def _whole(source: Mapping[str, Any], name: str) -> int | None:
    value = source.get(name)
    return value if isinstance(value, int) else None
