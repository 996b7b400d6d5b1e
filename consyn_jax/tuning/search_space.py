"""Parse the search space of `--search`, and check it against the flags of training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from consyn_jax.config import RunConfig
from consyn_jax.errors import UserError, nearest
from consyn_jax.flags import Flag, convert, flags

_GROUPS = ("model", "budget", "optimizer", "regularisation", "lora")
_SAME = "it is the same in all trials"
_FIXED = {
    **dict.fromkeys(("model", "checkpoint", "context", "objective"), _SAME),
    **dict.fromkeys(("epochs", "max_steps", "total_tokens"), "all trials have the same budget"),
    "decay_from": "a trial starts at step 0",
}


@dataclass(frozen=True)
class Dimension:
    """A flag that varies: over the range from `low` to `high`, or over `choices`.

    Attributes:
        is_log: whether values are drawn uniformly on a logarithmic scale.
    """

    name: str
    low: float | int = 0
    high: float | int = 0
    is_log: bool = False
    choices: tuple[Any, ...] = ()

    @property
    def is_whole(self) -> bool:
        """Whether the values are whole numbers."""
        return isinstance(self.low, int) and not self.choices

    @property
    def ends(self) -> tuple[Any, ...]:
        """The extreme values, which are checked before the first trial."""
        return self.choices or (self.low, self.high)

    def text(self) -> str:
        """The dimension in the syntax of `--search`.

        >>> Dimension("lr", 1e-4, 1e-2, True).text()
        'lr=0.0001:0.01:log'
        """
        if self.choices:
            return f"{self.name}={','.join(map(as_text, self.choices))}"
        scale = ":log" if self.is_log else ""
        return f"{self.name}={as_text(self.low)}:{as_text(self.high)}{scale}"


def as_text(value: Any) -> str:
    """A value as the user would type it.

    >>> as_text(0.001), as_text(True), as_text("muon")
    ('0.001', 'true', 'muon')
    """
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def parse_search(items: Sequence[str]) -> list[Dimension]:
    """Parse `--search`.

    Raises:
        UserError: a flag is unknown or cannot vary, or a range is empty or invalid.
    """
    found: dict[str, Dimension] = {}
    for item in items:
        name, equals, values = item.partition("=")
        flag = _flag(item, name)
        if not equals or not values.strip():
            raise UserError(
                f"--search {item} has no values. Write {flag.name}=LOW:HIGH, {flag.name}=LOW:HIGH"
                f":log or {flag.name}=A,B."
            )
        if flag.name in found:
            raise UserError(f"--search has {flag.name} twice. Leave one of the two out.")
        is_range = ":" in values and flag.type in (int, float)
        found[flag.name] = (_range if is_range else _choice)(item, flag, values)
    return list(found.values())


def _flag(item: str, given: str) -> Flag:
    known = flags(RunConfig)
    name = given.strip().lstrip("-").replace("-", "_")
    by_alias = {alias: flag.name for flag in known.values() for alias in flag.aliases}
    name = by_alias.get(name, name)
    if name not in known:
        hint = nearest(name, [*known, *by_alias])
        if hint == ".":
            hint = ". consyn-tune --help all lists the flags."
        raise UserError(f"--search {item}: there is no flag --{name}{hint}")
    flag = known[name]
    reason = _FIXED.get(name)
    if flag.group == "data":
        reason = "the data is prepared once, for all trials"
    elif flag.group not in _GROUPS or flag.many:
        reason = "a study searches only flags of the model, the batch and the optimizer"
    if reason is not None:
        raise UserError(f"--search {item}: --{name} cannot vary, because {reason}. Leave it out.")
    return flag


def _range(item: str, flag: Flag, text: str) -> Dimension:
    low_text, high_text, *scale = text.split(":")
    if scale not in ([], ["log"]):
        raise UserError(
            f"--search {item} is no range. Write {flag.name}=LOW:HIGH or {flag.name}=LOW:HIGH:log."
        )
    low, high = (
        convert(flag, end.strip(), f"--search {flag.name}") for end in (low_text, high_text)
    )
    if low >= high:
        raise UserError(
            f"--search {item} is an empty range: {as_text(low)} is not below {as_text(high)}. "
            "Write the lower end first."
        )
    if scale and low <= 0:
        raise UserError(
            f"--search {item} begins at {as_text(low)}, which has no logarithm. Begin above 0, or "
            "leave :log out."
        )
    return Dimension(flag.name, low, high, bool(scale))


def _choice(item: str, flag: Flag, text: str) -> Dimension:
    # A value of --lr_multipliers itself contains commas.
    words = [word.strip() for word in text.split(";" if flag.name == "lr_multipliers" else ",")]
    choices = tuple(convert(flag, word, f"--search {flag.name}") for word in words)
    if len(set(choices)) < len(choices):
        raise UserError(f"--search {item} has a value twice. Leave one of the two out.")
    if len(choices) == 1:
        raise UserError(
            f"--search {item} has only one value. Give --{flag.name} {words[0]}, or a second value."
        )
    return Dimension(flag.name, choices=choices)
