"""A process group whose members are threads of one process."""

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from free_ports import free_port

from consyn_jax.distributed.cluster import Place
from consyn_jax.distributed.process_group import ProcessGroup
from consyn_jax.distributed.rendezvous import meet
from consyn_jax.errors import ProcessMissing, UserError


def together(
    *numbers: int,
    count: int,
    port: int | None = None,
    answer: Any = lambda abouts: abouts,
    arrive_s: float = 40.0,
    start: str = "",
) -> list[Any]:
    """Call `meet` in one thread per process number; its results, or the messages of its errors."""
    address = ("localhost", port or free_port())

    def one(number: int) -> Any:
        try:
            place = Place(address, count, number, start)
            return meet(place, arrive_s, f"about {number}", answer, "consyn-train")
        except (UserError, ProcessMissing) as refused:
            return str(refused)

    with ThreadPoolExecutor(len(numbers)) as threads:
        return list(threads.map(one, numbers))


def close(groups: Iterable[ProcessGroup]) -> None:
    groups = list(groups)
    for group in groups:
        group.leave()
    for group in groups:
        group.close()
