"""Muon for the matrices of the layers, Adam for the rest."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .circuit import CIRCUIT


def orthogonalise(matrix: Tensor, steps: int = 5) -> Tensor:
    """The nearest semi-orthogonal matrix, about, by Newton-Schulz (Keller Jordan's Muon)."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrix.bfloat16()
    is_tall = x.shape[0] > x.shape[1]
    if is_tall:
        x = x.T
    x = x / (x.norm() + 1e-7)
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    out: Tensor = x.T if is_tall else x
    return out


class Muon(Optimizer):
    """Momentum, orthogonalised per matrix."""

    def __init__(self, params: Iterable[Tensor], lr: float, momentum: float = 0.95) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": 0.01})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of every matrix."""
        for group in self.param_groups:
            for weight in group["params"]:
                self._update(weight, group)

    def _update(self, weight: Tensor, group: dict[str, float]) -> None:
        assert weight.grad is not None
        buffer = self.state[weight].setdefault("momentum", torch.zeros_like(weight))
        buffer.lerp_(weight.grad, 1 - group["momentum"])
        update = orthogonalise(weight.grad.lerp(buffer, group["momentum"]))
        scale = max(1.0, weight.shape[0] / weight.shape[1]) ** 0.5
        weight.mul_(1 - group["lr"] * group["weight_decay"])
        weight.add_(update.to(weight.dtype), alpha=-group["lr"] * scale)


def optimizers(model: nn.Module, rates: tuple[float, float, float]) -> list[Optimizer]:
    """Muon for matrices in layers, Adam for embeddings and norms, Adam for the circuit's layers.

    Muon's steps have one size however small the gradient is, which would undo the copying circuit.
    `rates` are the three learning rates.
    """
    named = list(model.named_parameters())
    circuit = [p for n, p in named if n.startswith(CIRCUIT)]
    rest = [(n, p) for n, p in named if not n.startswith(CIRCUIT)]
    matrices = [p for n, p in rest if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in rest if p.ndim != 2 or "embed" in n]
    betas = (0.9, 0.98)
    return [
        Muon(matrices, rates[0]),
        torch.optim.Adam(others, lr=rates[1], betas=betas, eps=1e-10),
        torch.optim.Adam(circuit, lr=rates[2], betas=betas, eps=1e-8),
    ]
