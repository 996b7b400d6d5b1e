"""Simulate a compiled step's schedule, to find how much of its collectives overlaps with matmuls.

An asynchronous collective starts when the network has finished earlier collectives. The `-done`
instruction waits until the collective has ended; other instructions run in between. Besides
collectives, only matmuls take time in this simulation, at the best measured rate. On a device,
attention and other kernels also overlap with collectives, so the hidden share is a lower bound.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from consyn_jax.distributed.compiled import Instruction, collectives_of, computations
from consyn_jax.planning.network import network_of
from consyn_jax.planning.topology import GpuTopology
from consyn_jax.training.diagnostics.operation_costs import MatmulFlops


@dataclass(frozen=True)
class Schedule:
    """Seconds of a step's matmuls and collectives, and of waiting for collectives."""

    matmuls: float
    collectives: float
    waits: float

    @property
    def hidden_share(self) -> float:
        """The share of the collectives' time that overlaps with matmuls; 1 without collectives."""
        return 1 - self.waits / self.collectives if self.collectives else 1.0


def play(program: str, sizes: Mapping[str, int], topology: GpuTopology) -> Schedule:
    """Simulate a compiled program, given as text.

    Args:
        sizes: size of each mesh axis. The program numbers the devices along the last axis first.
    """
    bodies, entry = computations(program)
    return _Player(bodies, sizes, topology).run(entry)


@dataclass
class _Player:
    bodies: Mapping[str, list[Instruction]]
    sizes: Mapping[str, int]
    topology: GpuTopology
    _flops: MatmulFlops = field(init=False)

    def __post_init__(self) -> None:
        self._flops = MatmulFlops(self.bodies)

    def run(self, computation: str) -> Schedule:
        """Simulate a computation from its first instruction until the network is idle again."""
        now = free = matmuls = collectives = 0.0
        ends: dict[str, float] = {}
        arrays = {each.name: each.arrays for each in self.bodies[computation]}
        for each in self.bodies[computation]:
            if (seconds := self._collective_seconds(each)) is not None:
                collectives += seconds
                ends[each.name] = free = max(now, free) + seconds
                if not each.operation.endswith("-start"):
                    now = free
            elif each.operation.endswith("-done"):
                now = max(now, ends.get(each.first_operand, 0.0))
            elif each.operation == "while":
                (body,) = (name for attribute, name in each.calls if attribute == "body")
                once, times = self.run(body), each.trips
                matmuls += times * once.matmuls
                collectives += times * once.collectives
                now += times * (once.matmuls + once.waits)
            else:
                seconds = self._flops.of(each, arrays) / self.topology.gpu.matmul_flops
                now, matmuls = now + seconds, matmuls + seconds
        return Schedule(matmuls, collectives, max(now, free) - matmuls)

    def _collective_seconds(self, each: Instruction) -> float | None:
        """Seconds of the collective that an instruction starts; None for other instructions."""
        communicated = collectives_of(each, self.sizes)
        if not communicated:
            return None
        payload = sum(one.payload_bytes for one in communicated)
        together = replace(communicated[0], payload_bytes=payload)
        return sum(network_of([together], self.sizes, self.topology).values())
