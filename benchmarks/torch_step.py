"""The train step in PyTorch, in the ways that `vs_pytorch.py` races with ours."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NamedTuple

THREADS, BATCHES = 2, 4
EAGER, COMPILED = "eager", "compiled"


class Way(NamedTuple):
    """A way to run the step in PyTorch.

    Attributes:
        who: its name in the results.
        mode: of `torch.compile`; None for eager.
    """

    who: str
    mode: str | None = "default"
    fused_loss: bool = False
    fp8: bool = False


WAYS = {
    EAGER: Way("torch eager", None),
    COMPILED: Way("torch.compile"),
    "fused_loss": Way("torch.compile, fused loss", fused_loss=True),
    "max_autotune": Way("torch.compile, max-autotune", "max-autotune"),
    "fp8": Way("torch.compile, fp8 by torchao", fp8=True),
}


class Torch:
    """The same step in PyTorch, in the ways of `WAYS`.

    Ways that differ only in how they compile share weights and optimizer.

    Args:
        given: `Ours.facts`.
    """

    def __init__(self, given: dict[str, Any], exported: Path) -> None:
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")
        import torch
        from safetensors.torch import load_file

        self.torch, self.given, self.options = torch, given, given["optimizer"]
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        if self.device == "cpu":
            torch.set_num_threads(THREADS)
        torch.set_float32_matmul_precision("highest" if given["precision"] == "no" else "high")
        self.weights: dict[str, Any] = {}
        for file in sorted(exported.glob("*.safetensors")):
            self.weights |= load_file(file)
        self.models: dict[bool, Any] = {}  # in 8 bits or not
        self.optimizers: dict[bool, Any] = {}
        self.ways: dict[str, tuple[Any, Any]] = {}
        names = ("input_ids", "labels", "segment_ids")
        self.batches = [
            tuple(torch.from_numpy(batch[name][0]).long().to(self.device) for name in names)
            for batch in given["batches"]
        ]
        self.facts: dict[str, Any] = {"device": self.device}

    def way(self, name: str) -> tuple[Any, Any]:
        """The function of a step's loss, and the one of its mask."""
        if name not in self.ways:
            from torch_model import document_blocks, document_mask

            mode, model = WAYS[name].mode, self.model(WAYS[name].fp8)
            if mode is None:
                self.ways[name] = model, document_mask
            else:
                compiled = self.torch.compile(model, mode=mode)
                self.ways[name] = compiled, self.torch.compile(document_blocks)
        return self.ways[name]

    def model(self, fp8: bool) -> Any:
        """The decoder, which is made when it is first wanted."""
        if fp8 not in self.models:
            from torch_model import Decoder

            made = Decoder(self.given["config"], self.device)
            self.models[fp8] = made.to_fp8() if fp8 else made
        return self.models[fp8]

    def optimizer(self, model: Any) -> Any:
        """A new optimizer of our kind."""
        from torch_optimizers import Muon, adamw

        options = [self.options[name] for name in ("beta1", "beta2", "eps", "weight_decay")]
        if self.options["optimizer"] == "adamw":
            return adamw(list(model.parameters()), *options)
        assert self.options["optimizer"] == "muon"
        own = {id(weight) for weight, _ in model.matrices}
        rest = adamw([p for p in model.parameters() if id(p) not in own], *options)
        momentum, decay = (self.options[name] for name in ("momentum_decay", "weight_decay"))
        return Muon(model.matrices, rest, momentum, decay)

    def reset(self, name: str) -> None:
        """Return to the initial weights, without moments."""
        fp8 = WAYS[name].fp8
        model = self.model(fp8)
        model.load(self.weights)
        self.optimizers[fp8] = self.optimizer(model)
        self.step_number = 0

    def step(self, name: str) -> Any:
        """Take a step and return its loss without waiting for it."""
        torch, number, way = self.torch, self.step_number, WAYS[name]
        model, optimizer = self.models[way.fp8], self.optimizers[way.fp8]
        for group in optimizer.param_groups:
            group["lr"] = self.given["rates"][min(number, len(self.given["rates"]) - 1)]
        ids, labels, documents = self.batches[number % BATCHES]
        loss_of, mask_of = self.way(name)
        mask = mask_of(documents) if self.given["documents"] > 1 else None
        torch.compiler.cudagraph_mark_step_begin()  # for max-autotune, which captures graphs
        with torch.autocast(self.device, torch.bfloat16, enabled=self.given["precision"] != "no"):
            loss = loss_of(ids, labels, mask, way.fused_loss)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), self.options["max_grad_norm"])
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        self.step_number += 1
        return loss.detach()

    def losses(self, name: str, steps: int) -> list[float]:
        """The losses of the first steps from the initial weights."""
        self.reset(name)
        return [self.step(name).item() for _ in range(steps)]

    def turn(self, name: str, steps: int) -> None:
        """Steps, to the end of the last."""
        for _ in range(steps - 1):
            self.step(name)
        self.step(name).item()
