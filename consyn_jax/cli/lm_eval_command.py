"""`python -m consyn_jax.cli.lm_eval_command`: run `lm_eval` with `--model consyn` registered.

Versions of lm_eval after 0.4.13 find the model by its entry point; 0.4.13 needs this registration.
The command takes the flags of lm_eval.
"""

from __future__ import annotations

import sys
from importlib import import_module

from consyn_jax.cli.exit_codes import exit_code
from consyn_jax.errors import UserError

NAME, CLASS = "consyn", "consyn_jax.inference.lm_eval_model:ConsynLM"


def main() -> int:
    """Run the command and return its exit code."""
    return exit_code("lm_eval", run)


def run() -> None:
    """Register the model, and run the command line of lm_eval.

    Raises:
        UserError: lm_eval is not installed.
    """
    try:
        import_module("lm_eval.models")  # importing it registers its own models
        from lm_eval.__main__ import cli_evaluate
        from lm_eval.api.registry import model_registry
    except ImportError as error:
        raise UserError(
            "lm_eval is not installed. Install it with pip install 'consyn_jax[lm_eval]'."
        ) from error
    if NAME not in model_registry:
        model_registry.register(NAME, target=CLASS)
    cli_evaluate()


if __name__ == "__main__":
    sys.exit(main())
