"""Trains nano or its draft: `python -m training.train --shape nano --out FOLDER`.

Checkpoints (`last.pt`) hold model, optimizers and step; `--resume` goes on from one. A run is
repeatable: data and weights follow from `--seed`, and the schedule from `--steps`.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional

from .circuit import held_parts, hold_circuit, install_copy_circuit
from .corpus import Batch, Shares, batch_at
from .model import SHAPES, Decoder
from .optim import optimizers
from .skills import DRAFT_WEIGHTS, WEIGHTS
from .tokenizer import NANO_FOLDER, vocabulary

REPORT_EVERY = 20
WARMUP_STEPS = 50


@dataclass(frozen=True)
class Plan:
    """The schedule: warm up, go on, and fall to zero over the last `decay_steps`.

    The copying circuit is held for the first `hold_steps`.
    """

    steps: int
    decay_steps: int
    tokens_per_batch: int
    seed: int
    rates: tuple[float, float, float]
    hold_steps: int

    def lr_factor(self, step: int) -> float:
        """Share of the full learning rate at a step."""
        left = (self.steps - step) / max(1, self.decay_steps)
        return min(1.0, (step + 1) / WARMUP_STEPS, left)


def loss_of(forward: Callable[[Tensor], Tensor], model: Decoder, batch: Batch) -> Tensor:
    """Weighted mean cross entropy of the next token, at positions that carry weight only."""
    tokens = torch.from_numpy(batch.tokens)
    weights = torch.from_numpy(batch.weights)[:, 1:].reshape(-1)
    where = weights.nonzero()[:, 0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        hidden = forward(tokens)[:, :-1].reshape(-1, model.shape.hidden_size)
        logits = model.head(hidden[where])
    losses = functional.cross_entropy(
        logits.float(), tokens[:, 1:].reshape(-1)[where], reduction="none"
    )
    return (losses * weights[where]).sum() / weights.sum()


class Trainer:
    """Owns the model, its optimizers and the step count."""

    def __init__(self, model: Decoder, plan: Plan, compiled: bool) -> None:
        self.model = model
        self.plan = plan
        self.step = 0
        self.held = held_parts(model)
        self.optimizers = optimizers(model, plan.rates)
        self.forward: Callable[[Tensor], Tensor] = (
            torch.compile(model, dynamic=False) if compiled else model
        )

    def train_step(self, batch: Batch) -> float:
        """One update; returns the loss."""
        factor = self.plan.lr_factor(self.step)
        loss = loss_of(self.forward, self.model, batch)
        loss.backward()  # type: ignore[no-untyped-call]
        hold_circuit(self.model, whole=self.step < self.plan.hold_steps)
        for part in self.held:
            part.drop_gradient()
        for optimizer, rate in zip(self.optimizers, self.plan.rates, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = rate * factor
            optimizer.step()
            optimizer.zero_grad()
        for part in self.held:
            part.restore()
        self.step += 1
        return float(loss.detach())

    def save(self, path: Path) -> None:
        """Write a checkpoint, whole or not at all."""
        state = {
            "model": self.model.state_dict(),
            "optimizers": [o.state_dict() for o in self.optimizers],
            "step": self.step,
        }
        scratch = path.with_suffix(".tmp")
        torch.save(state, scratch)
        scratch.rename(path)

    def load(self, path: Path) -> None:
        """Go on from a checkpoint."""
        state: dict[str, Any] = torch.load(path)
        self.model.load_state_dict(state["model"])
        self.held = held_parts(self.model)
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.step = state["step"]


def run(trainer: Trainer, tokenizer: Tokenizer, shares: Shares, out: Path, save_every: int) -> None:
    """Train to the end of the plan, reporting and saving on the way."""
    plan = trainer.plan
    started, seen, total = time.monotonic(), 0, 0.0
    while trainer.step < plan.steps:
        batch = batch_at(tokenizer, plan.seed, trainer.step, plan.tokens_per_batch, shares)
        total += trainer.train_step(batch)
        seen += batch.tokens.size
        if trainer.step % REPORT_EVERY == 0:
            rate = seen / (time.monotonic() - started)
            print(
                f"step {trainer.step} loss {total / REPORT_EVERY:.4f} {rate:.0f} tok/s", flush=True
            )
            total = 0.0
        if trainer.step % save_every == 0:
            trainer.save(out / "last.pt")
    trainer.save(out / "last.pt")


def parse() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="nano")
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--decay-steps", type=int, default=1500)
    parser.add_argument("--tokens-per-batch", type=int, default=4096)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--matrix-lr", type=float, default=0.012)
    parser.add_argument("--other-lr", type=float, default=0.002)
    parser.add_argument("--circuit-lr", type=float, default=0.00005)
    parser.add_argument("--hold-steps", type=int, default=300)
    parser.add_argument("--key-bits", type=int, default=0, help="round keys as a cache would")
    parser.add_argument("--out", type=Path, default=Path("build/nano"))
    parser.add_argument("--resume", type=Path)
    parser.add_argument("--save-every", type=int, default=250)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--compile", action="store_true", help="needs a C++ compiler")
    parser.add_argument("--smoke", action="store_true", help="a tiny run of a few seconds, for CI")
    args = parser.parse_args()
    if args.smoke:
        args.shape, args.steps, args.decay_steps, args.tokens_per_batch = "smoke", 40, 10, 1024
    return args


def main() -> None:
    """Train as told."""
    args = parse()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    plan = Plan(
        args.steps,
        args.decay_steps,
        args.tokens_per_batch,
        args.seed,
        (args.matrix_lr, args.other_lr, args.circuit_lr),
        args.hold_steps,
    )
    model = Decoder(replace(SHAPES[args.shape], key_bits=args.key_bits))
    tokenizer = Tokenizer.from_file(str(NANO_FOLDER / "tokenizer.json"))
    install_copy_circuit(model, vocabulary(tokenizer))
    trainer = Trainer(model, plan, args.compile)
    if args.resume:
        trainer.load(args.resume)
    shares = DRAFT_WEIGHTS if args.shape == "draft" else WEIGHTS
    run(trainer, tokenizer, shares, args.out, args.save_every)


if __name__ == "__main__":
    main()
