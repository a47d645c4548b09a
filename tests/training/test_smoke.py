"""A tiny training run goes through: init, steps, checkpoint, export."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("tokenizers")

from training.circuit import install_copy_circuit  # noqa: E402
from training.export import export  # noqa: E402
from training.model import SHAPES, SMOKE, Decoder  # noqa: E402
from training.tokenizer import NANO_FOLDER  # noqa: E402


def test_a_fresh_model_already_copies() -> None:
    torch.manual_seed(random.Random(1).randrange(2**31))
    model = Decoder(SHAPES["nano"])
    install_copy_circuit(model)
    half = torch.randint(0, model.shape.vocab_size, (2, 40))
    tokens = torch.cat([half, half], dim=1)
    with torch.no_grad():
        logits = model.head(model(tokens)[:, 40:-1])
    right = (logits.argmax(-1) == tokens[:, 41:]).float().mean()
    assert right > 0.7


def test_an_export_has_every_file_and_matching_sizes(tmp_path: Path) -> None:
    export(Decoder(SMOKE).state_dict(), SMOKE, NANO_FOLDER, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["hidden_size"] == SMOKE.hidden_size
    assert (tmp_path / "model.safetensors").stat().st_size > 2 * SMOKE.vocab_size
    assert {"tokenizer.json", "chat_template.jinja", "generation_config.json"} <= {
        path.name for path in tmp_path.iterdir()
    }
