"""A tiny training run goes through: init, steps, checkpoint, export, mlx-lm loads it."""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("tokenizers")

import mlx.core as mx  # noqa: E402
import mlx_lm  # noqa: E402
import numpy as np  # noqa: E402
from tokenizers import Tokenizer  # noqa: E402
from training.circuit import install_copy_circuit  # noqa: E402
from training.corpus import batch_at  # noqa: E402
from training.export import export  # noqa: E402
from training.model import SHAPES, SMOKE, VOCAB_SIZE, Decoder, rounded  # noqa: E402
from training.tokenizer import NANO_FOLDER, vocabulary  # noqa: E402
from training.train import Plan, Trainer  # noqa: E402

ROOT = Path(__file__).parents[2]


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


def test_the_commands_train_and_export_what_mlx_lm_loads(tmp_path: Path) -> None:
    """The shortest setting; the same logits in both frameworks, up to the rounding to bfloat16."""
    checkpoint, folder = tmp_path / "last.pt", tmp_path / "model"
    said = run("training.train", "--smoke", "--out", str(tmp_path))
    losses = [float(loss) for loss in re.findall(r"loss (\S+)", said)]
    assert losses[-1] < losses[0]
    run(
        *("training.export", "--checkpoint", str(checkpoint), "--shape", "smoke"),
        *("--out", str(folder)),
    )

    trained = Decoder(SMOKE)
    trained.load_state_dict(torch.load(checkpoint, weights_only=True)["model"])
    loaded, tokenizer = mlx_lm.load(str(folder))
    loaded.set_dtype(mx.float32)
    ids = tokenizer.encode("count from 3 to 9")
    with torch.no_grad():
        wanted = trained.head(trained(torch.tensor([ids]))).float().numpy()
    assert np.abs(np.array(loaded(mx.array([ids]))) - wanted).max() < 0.1


def run(*command: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return done.stdout


def test_what_is_held_stays_as_it_was() -> None:
    model = Decoder(SMOKE)
    tokenizer = Tokenizer.from_file(str(NANO_FOLDER / "tokenizer.json"))
    install_copy_circuit(model, vocabulary(tokenizer))
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    plan = Plan(10, 5, 256, 1, (0.01, 0.01, 0.01), hold_steps=0)
    trainer = Trainer(model, plan, compiled=False)
    for step in range(3):
        trainer.train_step(batch_at(tokenizer, 1, step, plan.tokens_per_batch))
    assert trainer.held
    q = "layers.1.self_attn.q_proj.weight"
    assert torch.equal(dict(model.named_parameters())[q], before[q])  # its only head is held
    other = "layers.1.mlp.up_proj.weight"
    assert not torch.equal(dict(model.named_parameters())[other], before[other])


def test_rounded_keys_have_as_many_values_as_bits_allow_and_pass_gradients() -> None:
    x = torch.randn(5, 64, requires_grad=True)
    out = rounded(x, 4)
    assert max(len(row.unique()) for row in (out * 1e4).round()) <= 16
    assert torch.allclose(out, x, atol=float((x.max() - x.min()).detach()) / 30 + 1e-5)
    out.sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))
