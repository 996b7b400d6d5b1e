"""AdamW and Muon as PyTorch users would write them, for comparisons with ours."""

from __future__ import annotations

import torch
from torch import Tensor, nn

UPDATE_RMS = 0.2  # an update of Muon has the size of AdamW's (Liu et al., 2025, section 2.2)
ITERATIONS, COEFFICIENTS = 5, (3.4445, -4.7750, 2.0315)  # Jordan et al. (2024)


def adamw(
    parameters: list[nn.Parameter], beta1: float, beta2: float, eps: float, weight_decay: float
) -> torch.optim.AdamW:
    """Fused AdamW that decays matrices only; the rate is set at each step."""
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() == 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, betas=(beta1, beta2), eps=eps, fused=True)


class Muon:
    """Muon for some matrices, and another optimizer for the rest.

    Matrices of one shape are one batch, which `torch.optim.Muon` of torch 2.13 has not, and the
    iterations are compiled; on a GPU they are in bfloat16.

    Args:
        matrices: each is updated by itself; a merged weight is given as its parts, with the lengths
            of these parts along its first dimension.
        rest: the optimizer of all other parameters.
    """

    def __init__(
        self,
        matrices: list[tuple[nn.Parameter, tuple[int, ...]]],
        rest: torch.optim.Optimizer,
        momentum: float,
        weight_decay: float,
    ) -> None:
        self.matrices, self.rest = matrices, rest
        self.momentum, self.weight_decay, self.steps = momentum, weight_decay, 0
        own = {"params": [weight for weight, _ in matrices], "lr": 0.0}
        self.param_groups = [own, *rest.param_groups]
        self.buffers: dict[torch.Size, Tensor] = {}
        self.orthogonal = torch.compile(orthogonal, dynamic=False)

    @torch.no_grad()
    def step(self) -> None:
        """Update all parameters from their gradients."""
        self.rest.step()
        self.steps += 1
        lr = self.param_groups[0]["lr"]
        parts = [part for weight, cuts in self.matrices for part in weight.split(cuts)]
        grads = [part for weight, cuts in self.matrices for part in weight.grad.split(cuts)]
        torch._foreach_mul_(parts, 1 - lr * self.weight_decay)
        for shape in dict.fromkeys(part.shape for part in parts):
            mine = [number for number, part in enumerate(parts) if part.shape == shape]
            updates = self._updates(shape, torch.stack([grads[number] for number in mine]))
            scale = lr * UPDATE_RMS * max(shape) ** 0.5
            torch._foreach_add_([parts[number] for number in mine], updates, alpha=-scale)

    def _updates(self, shape: torch.Size, grad: Tensor) -> list[Tensor]:
        """Orthogonalise Nesterov's momentum of a batch of gradients."""
        buffer = self.buffers.setdefault(shape, torch.zeros_like(grad))
        buffer.lerp_(grad, 1 - self.momentum)
        now, soon = (1 - self.momentum ** (self.steps + ahead) for ahead in (0, 1))
        ahead = buffer * (self.momentum / soon) + grad * ((1 - self.momentum) / now)
        return list(self.orthogonal(ahead).unbind())

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop all gradients."""
        self.rest.zero_grad(set_to_none)
        for weight, _ in self.matrices:
            weight.grad = None


def orthogonal(x: Tensor) -> Tensor:
    """Newton-Schulz iterations of a batch of matrices [n, r, c], in the type of `x`."""
    y = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-8)
    y = y if y.shape[1] <= y.shape[2] else y.mT
    y = y.bfloat16() if y.is_cuda else y
    a, b, c = COEFFICIENTS
    for _ in range(ITERATIONS):
        gram = y @ y.mT
        y = a * y + (b * gram + c * (gram @ gram)) @ y
    return (y if x.shape[1] <= x.shape[2] else y.mT).to(x.dtype)
