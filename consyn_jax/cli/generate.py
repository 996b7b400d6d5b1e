"""`consyn-generate`: continue prompts with a trained model, or talk with it."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from consyn_jax.cli.arguments import build_parser, parse
from consyn_jax.cli.exit_codes import exit_code
from consyn_jax.cli.text_encoding import start_in_utf8
from consyn_jax.errors import UserError, counted
from consyn_jax.inference.text_generation.generation_options import (
    GenerateConfig,
    validate_generation,
)
from consyn_jax.resolve import resolve_flags

if TYPE_CHECKING:
    from consyn_jax.inference.text_generation.continuations import Update, Wish
    from consyn_jax.inference.text_generation.prompts import EncodedPrompt, PromptEncoder
    from consyn_jax.inference.text_generation.ready_model import Runtime
    from consyn_jax.inference.text_generation.sampling_choice import SamplingChoice

DESCRIPTION = """\
Continue prompts with a trained model, or chat with it. Generated text goes to
standard output or --output; all other messages go to standard error."""
USAGE = "MODEL --prompt TEXT|--file FILE|--interactive [FLAG ...]"
COMMON = (  # the flags of a short --help
    "model",
    "prompt",
    "file",
    "interactive",
    "batch_size",
    "max_tokens",
    "temperature",
    "top_k",
    "top_p",
    "repetition_penalty",
    "seed",
    "num_return_sequences",
    "stop",
    "output",
    "stream",
)
EPILOG = """\
examples:
  consyn-generate runs/verse --prompt "Once upon a time" --temperature 0.8
  consyn-generate runs/verse --file prompts.jsonl --output texts.jsonl
  consyn-generate Qwen/Qwen3-0.6B --interactive
  consyn-generate runs/verse --prompt "2 + 2 =" --max_tokens 8 --stop ";"

Defaults are in brackets. If a flag is given twice, the last one counts.
Exit codes: 0 done, 2 wrong input, 130 and 143 interrupted."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    if argv is None:
        start_in_utf8()
    return exit_code("consyn-generate", lambda: run(sys.argv[1:] if argv is None else argv))


def run(argv: Sequence[str]) -> None:
    """Run the command line `argv`."""
    generate(read_arguments(argv))


def read_arguments(argv: Sequence[str]) -> GenerateConfig:
    """Parse a command line; a first word that is not a flag names the model.

    Raises:
        UserError: an unknown flag or an invalid value.
    """
    if argv and not argv[0].startswith("-"):
        argv = ["--model", *argv]
    parser = build_parser("consyn-generate", DESCRIPTION, USAGE, EPILOG, GenerateConfig, COMMON)
    config = resolve_flags(GenerateConfig, parse(parser, argv))
    validate_generation(config)
    return config


def generate(config: GenerateConfig) -> None:
    """Check the prompts and all other input, load the model, and continue the prompts.

    Raises:
        UserError: the model, a prompt or `--output` cannot be used.
    """
    from consyn_jax.inference.model_source import find_source
    from consyn_jax.inference.text_generation.prompts import (
        PromptEncoder,
        check_lengths,
        given_prompts,
        unread_keys,
    )
    from consyn_jax.inference.text_generation.ready_model import known_tokenizer, load_runtime
    from consyn_jax.inference.text_generation.sampling_choice import choose_sampling, described
    from consyn_jax.training.runtime.compilation_cache import enable_compilation_cache

    given = given_prompts(config.prompts.prompt, config.prompts.file)
    assert config.model.model is not None
    source = find_source(config.model.model, config.model.step)
    encoder = PromptEncoder(known_tokenizer(source), source.chat_template)
    prompts = [encoder.encode(prompt) for prompt in given]
    check_lengths(prompts, source.config.context)
    choice = choose_sampling(config.sampling, source.generation_defaults)
    enable_compilation_cache()
    with _output(config, source.directory) as results:
        runtime = load_runtime(source, config.model)
        _say(f"{source.taken}: {runtime.description}; {described(choice.sampling)}")
        for note in (*choice.notes, *unread_keys(given)):
            _say(note)
        is_chat = config.prompts.interactive or any(p.given.messages for p in prompts)
        if is_chat and encoder.is_plain:
            _say(
                "The model has no chat template, so conversations are formatted with "
                "plain-text role markers."
            )
        if config.prompts.interactive:
            _talk(config, runtime, choice, encoder)
        else:
            _continue(config, runtime, choice, prompts, results)


def _output(config: GenerateConfig, model: Path) -> Any:
    from consyn_jax.inference.text_generation.results_file import results_file

    if (name := config.results.output) is None:
        return nullcontext()
    path = Path(name)
    if path.exists() and path.resolve().is_relative_to(model.resolve()):
        what = "the directory" if path.is_dir() else "a file"
        raise UserError(f"--output {path} is {what} of the model. Give another file.")
    return results_file(path)


def _wish(config: GenerateConfig, choice: SamplingChoice, streams: bool) -> Wish:
    from consyn_jax.inference.text_generation.continuations import Wish

    stop = tuple(text.replace("\\n", "\n").replace("\\t", "\t") for text in config.sampling.stop)
    return Wish(choice.max_tokens, config.sampling.num_return_sequences, stop, streams)


def _continue(
    config: GenerateConfig,
    runtime: Runtime,
    choice: SamplingChoice,
    prompts: Sequence[EncodedPrompt],
    results: Any,
) -> None:
    """Continue the prompts; print the texts in prompt order, or write them to `--output`."""
    from consyn_jax.inference.text_generation.continuations import continuations
    from consyn_jax.inference.text_generation.printing import OrderedPrinter

    number = len(prompts) * config.sampling.num_return_sequences
    streams = config.results.stream
    if streams is None:
        streams = results is None and number == 1 and sys.stdout.isatty()
    wish, begins = _wish(config, choice, streams), config.results.include_prompt
    shows = results is None or streams
    printer = OrderedPrinter(sys.stdout, prompts, wish, begins) if shows else None
    engine = runtime.engine(min(config.model.batch_size, number), choice.sampling)
    began, tokens, ends = time.monotonic(), 0, dict[str, int]()
    for update in continuations(engine, runtime.tokenizer, prompts, wish):
        if printer is not None:
            printer.add(update)
        if update.ends:
            tokens += update.tokens
            ends[update.ends] = ends.get(update.ends, 0) + 1
            if results is not None:
                place = update.prompt * wish.sequences + update.sequence
                results.add(place, _row(prompts[update.prompt], update, begins))
    seconds = time.monotonic() - began
    _say(
        f"{counted(number, 'text')} with {counted(tokens, 'token')} in {seconds:.1f} s; "
        f"ended by {', '.join(f'{ENDS[end]}: {count}' for end, count in sorted(ends.items()))}"
        + (f"; written to {results.path}" if results is not None else "")
    )


ENDS = {
    "eos": "the model",
    "stop": "--stop",
    "length": "--max_tokens",
    "context": "the end of the model's context",
}


def _row(prompt: EncodedPrompt, update: Update, include_prompt: bool) -> dict[str, Any]:
    """One row of `--output`, as a JSON object."""
    given = prompt.given
    row: dict[str, Any] = (
        {"prompt": given.text} if given.messages is None else {"messages": given.messages}
    )
    if given.tools is not None:
        row["tools"] = given.tools
    text = prompt.text + update.text if include_prompt else update.text
    numbers = {"sequence": update.sequence, "tokens": update.tokens, "ends": update.ends}
    return {**row, "text": text, **numbers}


def _talk(
    config: GenerateConfig, runtime: Runtime, choice: SamplingChoice, encoder: PromptEncoder
) -> None:
    """Chat with the user for `--interactive`: answer each line of standard input."""
    from consyn_jax.inference.text_generation.chat_session import HELP, ChatSession
    from consyn_jax.inference.text_generation.printing import shown

    def say(text: str) -> None:
        print(shown(text, sys.stdout), end="", flush=True)

    engine = runtime.engine(1, choice.sampling)
    engine.reserve(min(runtime.config.context, CHAT_TOKENS))
    session = ChatSession(
        engine, runtime.tokenizer, encoder, _wish(config, choice, streams=True), say
    )
    _say(HELP)
    while (line := _asked()) is not None and line != "/exit":
        if line == "/reset":
            session.reset()
            _say("The conversation is forgotten.")
        elif line:
            try:
                ends = session.answer(line)
            except UserError as error:
                _say(str(error))
                continue
            say("\n")
            if ends in ("length", "context", "interrupted"):
                why = {"interrupted": "Ctrl-C"}.get(ends) or ENDS[ends]
                _say(f"The answer was cut off by {why}.")


# Reserve this many tokens of KV cache from the start: each enlargement needs a compilation.
CHAT_TOKENS = 4096


def _asked() -> str | None:
    """Read the next line of standard input; None at the end of the input."""
    if sys.stdin.isatty():
        print("> ", end="", file=sys.stderr, flush=True)
    line = sys.stdin.readline()
    return line.strip() if line else None


def _say(text: str) -> None:
    """Print a line to standard error."""
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
