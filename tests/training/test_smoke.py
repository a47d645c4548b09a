"""A tiny training run goes through: init, steps, checkpoint, export."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("tokenizers")

from tokenizers import Tokenizer  # noqa: E402
from training.circuit import install_copy_circuit  # noqa: E402
from training.export import export  # noqa: E402
from training.model import SHAPES, SMOKE, VOCAB_SIZE, Decoder  # noqa: E402
from training.tokenizer import NANO_FOLDER, vocabulary  # noqa: E402


def share_copied(text: torch.Tensor) -> float:
    """How much of a text `[rows, length]` a fresh nano writes right when it stands there again."""
    torch.manual_seed(random.Random(1).randrange(2**31))
    model = Decoder(SHAPES["nano"])
    tokenizer = Tokenizer.from_file(str(NANO_FOLDER / "tokenizer.json"))
    install_copy_circuit(model, vocabulary(tokenizer))
    tokens = torch.cat([text, text], dim=1)
    with torch.no_grad():
        logits = model.head(model(tokens)[:, text.shape[1] : -1])
    return float((logits.argmax(-1) == text[:, 1:]).float().mean())


def test_a_fresh_model_already_copies() -> None:
    torch.manual_seed(2)
    assert share_copied(torch.randint(0, VOCAB_SIZE, (2, 40))) > 0.9


def test_a_fresh_model_keeps_its_place_where_two_words_come_back() -> None:
    torch.manual_seed(3)
    words = torch.randint(0, VOCAB_SIZE, (2, 20, 6))
    words[:, :, 4:] = words[:, :1, 4:]  # every sixth and fifth token is the same
    assert share_copied(words.flatten(1)) > 0.9


def test_an_export_has_every_file_and_matching_sizes(tmp_path: Path) -> None:
    export(Decoder(SMOKE).state_dict(), SMOKE, NANO_FOLDER, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["hidden_size"] == SMOKE.hidden_size
    assert (tmp_path / "model.safetensors").stat().st_size > 2 * SMOKE.vocab_size
    assert {"tokenizer.json", "chat_template.jinja", "generation_config.json"} <= {
        path.name for path in tmp_path.iterdir()
    }
