"""Numbers of a train step that are constants or arguments of the compiled program.

In `consyn-train` they are constants. In a study of `consyn-tune`, trials with different numbers
share a program, and the numbers are its arguments.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
from jaxtyping import Array, Float

Number = float | Float[Array, ""]  # a constant of the program, or one of its arguments


def is_used(number: Number) -> bool:
    """Whether a number enables its feature: a constant 0 does not; a traced value always does.

    >>> is_used(0.0), is_used(0.1), is_used(jax.numpy.zeros(()))
    (False, True, True)
    """
    return isinstance(number, jax.Array) or bool(number)


class Extras(NamedTuple):
    """Terms that training adds to the loss of each token; a constant 0 turns a term off.

    Attributes:
        label_smoothing: Fraction of the target probability that is spread evenly over the
            vocabulary, including the label (Szegedy et al., 2016), as in torch.nn.CrossEntropyLoss.
        z_loss: Weight of log(Z)^2, which keeps the normaliser Z near 1 (Chowdhery et al., 2022).
    """

    label_smoothing: Number = 0.0
    z_loss: Number = 0.0

    @property
    def are_used(self) -> bool:
        """Whether any term is on."""
        return any(map(is_used, self))

    @property
    def arguments(self) -> dict[str, jax.Array]:
        """The weights that are arguments of the program."""
        return {name: x for name, x in self._asdict().items() if isinstance(x, jax.Array)}

    @property
    def constants(self) -> Extras:
        """All weights, with 0 in place of those that are arguments of the program."""
        return self._replace(**dict.fromkeys(self.arguments, 0.0))
