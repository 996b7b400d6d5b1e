"""The settings of `consyn-prepare`; `CorpusOptions` are also settings of `consyn-train`."""

from __future__ import annotations

from dataclasses import dataclass

from consyn_jax.flags import flag

HELD_OUT = 0.01  # default share of the documents
HOLD_OUT = (  # advice for a run without evaluation data
    "Give --validation or a larger --validation_fraction; if --data is a token store, prepare it "
    "again with one of these flags."
)


@dataclass(frozen=True)
class CorpusOptions:
    """Options of `consyn-prepare` and `consyn-train` for turning documents into tokens."""

    data: tuple[str, ...] = flag(
        ("sample",),
        "files, directories and globs (paths, or s3:// and gs:// URLs), Hugging Face datasets "
        "(NAME[@REVISION][:CONFIG[:SPLIT]]), or 'sample'",
    )
    validation: tuple[str, ...] = flag((), "validation data, instead of a share of --data")
    validation_fraction: float = flag(
        HELD_OUT,
        "share of the documents held out for validation; from a single long text, the last part "
        "is held out",
    )
    dataset_type: str = flag(
        "auto",
        "format of --data; sharded: token stores and token files",
        choices=("auto", "text", "jsonl", "csv", "huggingface", "sharded"),
    )
    row_format: str = flag(
        "auto",
        "format of the rows; auto: recognised by their keys; preference: pairs of a chosen and a "
        "rejected answer, for --objective dpo",
        choices=(
            *("auto", "messages", "sharegpt", "alpaca", "prompt_completion", "text"),
            "preference",
        ),
    )
    chat_template: str = flag(
        "auto",
        "how conversations become text; auto: the chat template of --checkpoint or "
        "--tokenizer, otherwise plain; plain: plain-text role markers; FILE: a Jinja template",
    )
    text_key: str = flag(
        "text", "field with the text of a row; a.b means field b of the object in field a"
    )
    prompt_key: str | None = flag(
        None, "field with the prompt, which is not trained on; a,b joins two fields (prompt)"
    )
    completion_key: str | None = flag(
        None, "field with the completion, which is trained on (completion)"
    )
    messages_key: str = flag(
        "messages", "field with a conversation; only the assistant's turns are trained on"
    )
    document_separator: str | None = flag(
        None, r"text that separates the documents of a file, with \n for a newline (none)"
    )
    on_bad_rows: str = flag(
        "error",
        "error: stop at a malformed row; skip: leave malformed rows out and count them",
        choices=("error", "skip"),
    )
    invalid_utf8: str = flag(
        "error",
        "error: stop at bytes that are not UTF-8; replace: read them as U+FFFD and count them",
        choices=("error", "replace"),
    )
    normalize: str | None = flag(
        None,
        "Unicode normal form of the text (nfc; for rows with prompts: none)",
        choices=("nfc", "none"),
    )
    control_characters: str | None = flag(
        None,
        "what to do with control characters other than tab and line ends (remove; for rows with "
        "prompts: keep)",
        choices=("remove", "keep"),
    )
    min_chars: int = flag(1, "leave out documents with fewer characters")
    max_chars: int | None = flag(None, "leave out documents with more characters")
    deduplicate: bool | None = flag(
        None,
        "keep only the first of several documents with the same text (true; for rows with "
        "prompts: false)",
    )
    near_duplicates: float | None = flag(
        None,
        "leave out documents whose similarity to an earlier document, estimated by MinHash, is "
        "at least this; the bare flag means 0.8",
        const="0.8",
    )
    tokenizer: str | None = flag(
        None,
        "'default' (bundled, 49,152 tokens), 'bytes', 'train:SIZE' (trained on the data), or a "
        "path or URL. Without this flag: the tokenizer of the checkpoint or token store, otherwise "
        "'default'.",
    )
    num_workers: int | None = flag(
        None, "number of processes that clean and tokenise, besides the main process (one per core)"
    )


@dataclass(frozen=True)
class EngineOptions:
    """The processes that clean and tokenise documents."""

    engine: str = flag(
        "local",
        "where the workers run; local: processes of this machine; ray: tasks of a Ray cluster",
        choices=("local", "ray"),
    )
    ray_address: str | None = flag(
        None,
        "HOST:PORT of a Ray cluster's head node; auto: the cluster that this machine belongs to. "
        "Without this flag: the environment variable RAY_ADDRESS, otherwise a new Ray instance on "
        "this machine.",
    )
    shared_directory: str | None = flag(
        None,
        "with --engine ray: directory on storage that all nodes share. All nodes then write the "
        "store, not only this process. --data and --output must also be on shared storage.",
    )


@dataclass(frozen=True)
class StoreOptions:
    """The token store and its test split."""

    output: str = flag("./tokens", "directory of the token store", aliases=("output_dir",))
    test_fraction: float = flag(0.0, "share of the documents held out as a test split")
    overwrite: bool = flag(False, "delete the token store in --output and start a new one")
    quiet: bool = flag(False, "show no progress; print only the command that trains on the store")


@dataclass(frozen=True)
class PrepareConfig:
    """All settings of one `consyn-prepare` command."""

    data: CorpusOptions = CorpusOptions()
    store: StoreOptions = StoreOptions()
    workers: EngineOptions = EngineOptions()
