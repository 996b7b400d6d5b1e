"""The settings of `consyn-prepare`; those of documents are also settings of `consyn-train`."""

from __future__ import annotations

from dataclasses import dataclass

from consyn_jax.flags import flag


@dataclass(frozen=True)
class CorpusOptions:
    """Options of `consyn-prepare` and `consyn-train` for turning documents into tokens."""

    data: tuple[str, ...] = flag(
        ("sample",),
        "files, directories, globs, s3:// and gs:// URLs of them, Hugging Face datasets "
        "(NAME[@REVISION][:CONFIG[:SPLIT]]), or 'sample'",
    )
    validation: tuple[str, ...] = flag((), "data to validate on, instead of a share of --data")
    validation_fraction: float = flag(
        0.01, "share of the documents to hold out (of one long text: its last part)"
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
        "how conversations are written; auto: with the template of --checkpoint or --tokenizer, "
        "otherwise plain; plain: with plain-text markers; or a Jinja file",
    )
    text_key: str = flag("text", "field with the text of a row; a.b reaches into objects")
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
        None, r"text between the documents of a file, with \n for a newline (none)"
    )
    on_bad_rows: str = flag(
        "error",
        "error: stop at a broken row; skip: leave it out and count it",
        choices=("error", "skip"),
    )
    invalid_utf8: str = flag(
        "error",
        "error: stop at bytes that are not UTF-8; replace: count them and read U+FFFD instead",
        choices=("error", "replace"),
    )
    normalize: str | None = flag(
        None,
        "Unicode normal form of the text (nfc; none for rows with prompts)",
        choices=("nfc", "none"),
    )
    control_characters: str | None = flag(
        None,
        "what to do with control characters other than tab and line ends (remove; keep in rows "
        "with prompts)",
        choices=("remove", "keep"),
    )
    min_chars: int = flag(1, "leave out documents with fewer characters")
    max_chars: int | None = flag(None, "leave out documents with more characters")
    deduplicate: bool | None = flag(
        None,
        "keep only the first of several documents with the same text (true; false for rows with "
        "prompts)",
    )
    near_duplicates: float | None = flag(
        None,
        "leave out documents at least this similar to an earlier one, by MinHash; the bare flag "
        "means 0.8",
        const="0.8",
    )
    tokenizer: str | None = flag(
        None,
        "'default' (bundled, 49,152 tokens), 'bytes', 'train:SIZE' (trained on the data), or a "
        "path or URL. If not given: that of the checkpoint or token store, or else 'default'.",
    )
    num_workers: int | None = flag(
        None, "processes that clean and tokenise, besides the main one (one per core)"
    )


@dataclass(frozen=True)
class StoreOptions:
    """The token store and its test split."""

    output: str = flag("./tokens", "directory of the token store", aliases=("output_dir",))
    test_fraction: float = flag(0.0, "share of the documents to keep for a test split")
    overwrite: bool = flag(False, "delete the token store in --output and start anew")
    quiet: bool = flag(False, "show no progress; print only how to train on the store")


@dataclass(frozen=True)
class PrepareConfig:
    """All settings of one `consyn-prepare` command."""

    data: CorpusOptions = CorpusOptions()
    store: StoreOptions = StoreOptions()
