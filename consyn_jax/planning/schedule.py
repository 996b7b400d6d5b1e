"""Plays a compiled step through in the order that the compiler chose: how much of the exchanges lies behind products.

An instruction that starts an exchange puts it behind those before it, on the network; the one that ends it waits. Between them other
instructions run. Only matrix products take time here, at the best rate that was measured; what attention and all else would hide comes on
top, so the share is a lower bound.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from consyn_jax.planning.compiled import Instruction, called, computations, exchange, trips
from consyn_jax.planning.roofline import network_of
from consyn_jax.planning.topology import Topology

_OPERANDS = re.compile(r"%([\w.\-]+)")
_CONTRACTED = re.compile(r'lhs_contracting_dim(?:ension)?s"?[=:][{\[]([\d,"]*)')


@dataclass(frozen=True)
class Schedule:
    """Seconds of a step: its products, its exchanges, and what the products wait for them."""

    products: float
    exchanges: float
    waits: float

    @property
    def hidden_share(self) -> float:
        """Of the exchanges' time, what lies behind products; 1 where there are none."""
        return 1 - self.waits / self.exchanges if self.exchanges else 1.0


def play(program: str, sizes: Mapping[str, int], topology: Topology) -> Schedule:
    """Of a compiled program's text.

    Args:
        sizes: of the mesh's axes, in the order in which the program's devices are numbered.
    """
    bodies, entry = computations(program)
    return _Player(bodies, sizes, topology).run(entry)


@dataclass
class _Player:
    bodies: Mapping[str, list[Instruction]]
    sizes: Mapping[str, int]
    topology: Topology
    _flops: dict[str, int] = field(default_factory=dict)

    def run(self, computation: str) -> Schedule:
        """From an idle network to one that is idle again, as nothing crosses the boundary of a loop."""
        now = free = products = exchanges = 0.0
        ends: dict[str, float] = {}
        arrays = {each.name: each.arrays for each in self.bodies[computation]}
        for each in self.bodies[computation]:
            if exchanged := exchange(each, self.sizes):
                together = replace(exchanged[0], payload_bytes=sum(one.payload_bytes for one in exchanged))
                seconds = sum(network_of([together], self.sizes, self.topology).values())
                exchanges += seconds
                free = max(now, free) + seconds
                ends[each.name] = free
                if not each.operation.endswith("-start"):
                    now = free
            elif each.operation.endswith("-done"):
                now = max([now, *(ends[name] for name in _OPERANDS.findall(each.rest)[:1] if name in ends)])
            elif each.operation == "while":
                (body,) = called(each, "body")
                once, times = self.run(body), trips(each)
                products, exchanges = products + times * once.products, exchanges + times * once.exchanges
                now += times * (once.products + once.waits)
            else:
                seconds = self._product_flops(each, arrays) / self.topology.gpu.matmul_flops
                now, products = now + seconds, products + seconds
        return Schedule(products, exchanges, max(now, free) - products)

    def _product_flops(self, each: Instruction, arrays: Mapping[str, tuple[tuple[str, tuple[int, ...]], ...]]) -> int:
        if each.operation in ("fusion", "call"):
            return sum(map(self._fused_flops, called(each, "calls") + called(each, "to_apply")))
        if each.operation != "dot" and "__cublas$" not in each.rest:
            return 0
        contracted, left = _CONTRACTED.search(each.rest), _OPERANDS.search(each.rest)
        if contracted is None or left is None:
            return 0
        dimensions = arrays[left[1]][0][1]
        return 2 * math.prod(each.arrays[0][1]) * math.prod(dimensions[int(d)] for d in re.findall(r"\d+", contracted[1]))

    def _fused_flops(self, computation: str) -> int:
        if computation not in self._flops:
            arrays = {each.name: each.arrays for each in self.bodies[computation]}
            self._flops[computation] = sum(self._product_flops(each, arrays) for each in self.bodies[computation])
        return self._flops[computation]
