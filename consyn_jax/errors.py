"""Errors and signals that commands turn into exit codes, and helpers that build error messages."""

from __future__ import annotations

import difflib
import errno
import json
import re
import signal
import sys
from collections.abc import Callable, Iterable, Sequence
from time import monotonic

LONGEST_MESSAGE = 1600  # characters
LONGEST_REASON = 200
# The end of a sentence: a full stop after a word, followed by a capital letter.
_NEXT_SENTENCE = re.compile(r"(?<=[\w)\]'`\"])[.!?] (?=[A-Z`(])")
# At a job's time limit Slurm sends SIGTERM twice, milliseconds apart. A second signal within this
# time is such a repeat, not a request to end at once.
REPEAT_S = 2.0
TOO_LONG = f"a number of more than {sys.get_int_max_str_digits():,} digits"  # for Python
# End of a message about a stopped run, for cases in which there may be no checkpoint.
CONTINUES = "continues from the last checkpoint, or from the beginning if there is none"
# `advised` adds "without --overwrite" to it.
AGAIN = "run the same command again"
_DIRECTIONS = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069\u2028\u2029"


_URLS: dict[str, str] = {}  # directories in the cache, each with the URL it was copied from
_COPIED = "copied to "  # before a directory that `with_urls` leaves as it is


def show_as_url(path: str, url: str) -> None:
    """Let `with_urls` replace the cached directory `path` by the URL of the original."""
    _URLS[path] = url


def with_urls(text: str) -> str:
    """Replace paths of cached copies by the URLs of the originals in a bucket.

    Users and records need the URLs, because the paths differ between machines.
    """
    for path, url in _URLS.items():
        text = url.join(re.split(f"(?<!{_COPIED}){re.escape(path)}", text))
    return text


def _with_copies(text: str) -> str:
    """Like `with_urls`, but also name the cached copies, so that a damaged copy can be deleted."""
    said = with_urls(text)
    if said == text:
        return text
    places = (f"{url} is {_COPIED}{path}" for path, url in _URLS.items() if path in text)
    new = [place for place in places if place not in text]
    return f"{said} ({', '.join(new)})" if new else said


class UserError(ValueError):
    """A mistake of the user, in one or two sentences: what is wrong, where, what to do.

    Commands exit with 2. If a message names the cached copy of an object in a bucket, it shows the
    URL of the object, and the path of the copy at the end. A long message, such as one that quotes
    a damaged file, is shortened in the middle.
    """

    def __init__(self, message: str) -> None:
        message = _with_copies(message)
        if len(message) > LONGEST_MESSAGE:
            message = f"{message[:800]} ... {message[-700:]}"
        super().__init__(message)


class Diverged(RuntimeError):
    """Loss or gradients stopped being finite. `consyn-train` exits with 3."""


class Interrupted(RuntimeError):
    """A signal ended the run after its state was saved; the same command continues it.

    `consyn-train` exits with 75.
    """


class Differs(RuntimeError):
    """A file or a repeated step differs from the record of a run. `consyn-train` exits with 4."""


class ProcessMissing(RuntimeError):
    """Another process of the run did not start in time.

    This need not be the user's mistake, and a new attempt may succeed: commands exit with 76.
    """


# Advice to continue with the same command, and not to begin anew with it.
_CONTINUES = re.compile("the same command(?: again)?(?! again| without| starts| to start)", re.I)
_overwrite_is_done = False


def leave_out_overwrite(is_done: bool = True) -> None:
    """Make `advised` add "without --overwrite" to advice to repeat the command.

    Call this after --overwrite has deleted the old run: if the flag were given again, it would
    delete the new run.

    Args:
        is_done: whether --overwrite has deleted the old run; False at the beginning of a command.
    """
    global _overwrite_is_done
    _overwrite_is_done = is_done


def advised(message: str) -> str:
    """Adapt a message before it is printed, so that its advice deletes nothing that was saved.

    >>> leave_out_overwrite()
    >>> advised("The disk is full. Free space, and run the same command again.")
    'The disk is full. Free space, and run the same command again without --overwrite.'
    >>> leave_out_overwrite(False)
    """
    return _CONTINUES.sub(r"\g<0> without --overwrite", message) if _overwrite_is_done else message


class Repeats:
    """Distinguishes a second signal from an automatic repeat of the first (see `REPEAT_S`)."""

    def __init__(self) -> None:
        self._first_s: float | None = None

    def place(self) -> str:
        """Classify a signal that arrives now: "first", "repeat" of the first, or "second"."""
        if self._first_s is None:
            self._first_s = monotonic()
            return "first"
        return "repeat" if monotonic() - self._first_s < REPEAT_S else "second"


class Unsaved(KeyboardInterrupt):
    """A signal that came before there was anything to save.

    It unwinds the stack like Ctrl-C, so that half-written files are removed. If a garbage-collector
    callback, a finalizer or a bare `except` swallows the exception, `dropped` is called, so that
    the signal is not lost.

    Args:
        dropped: called with the signal's number if the exception is destroyed before `settle`.
    """

    def __init__(self, number: int, dropped: Callable[[int], None] = lambda number: None) -> None:
        super().__init__()
        self.number = signal.Signals(number)
        self._dropped: Callable[[int], None] | None = dropped

    def settle(self) -> None:
        """Mark the signal as handled by the code that caught this exception."""
        self._dropped = None

    def __del__(self) -> None:
        """Call `dropped` unless `settle` was called."""
        if self._dropped is not None:
            self._dropped(self.number)


def settled(error: KeyboardInterrupt) -> str:
    """Mark the signal behind `error` as handled, and return its name."""
    if not isinstance(error, Unsaved):
        return signal.SIGINT.name
    error.settle()
    return error.number.name


def unsaved(error: KeyboardInterrupt) -> tuple[int, str]:
    """The exit code for a signal with nothing saved, and a sentence that names the signal.

    The code is 130 for Ctrl-C. Any other signal (SIGTERM, a closed terminal's SIGHUP, Slurm's
    warning SIGUSR1) gives 143.
    """
    number = error.number if isinstance(error, Unsaved) else signal.SIGINT
    ends = signal.SIGINT if number == signal.SIGINT else signal.SIGTERM
    return 128 + ends, f"{number.name} came before there was anything to save."


def brief(error: BaseException) -> str:
    """The first sentence of another library's message, on one line, without its full stop.

    Our message quotes only this sentence, so that the message has at most two sentences.

    >>> brief(ValueError("No footer. Either the file is damaged or it is something else."))
    'No footer'
    """
    text = _NEXT_SENTENCE.split(" ".join(str(error).split()), maxsplit=1)[0]
    return text.rstrip(".")[:LONGEST_REASON] or type(error).__name__


def visible(text: str) -> str:
    r"""Replace control characters by escapes, so that untrusted text cannot control the terminal.

    Characters that reverse the direction of text are replaced as well, because they can make one
    sentence look like another.

    >>> print(visible("a\x1b[2Jb\r\tc\u202ed"))
    a\x1b[2Jb\r    c\u202ed
    """
    # str.isprintable alone would also escape joiners and direction marks, which words contain in
    # many scripts.
    shown = (
        c
        if c == "\n"
        or c.isprintable()
        or (ord(c) > 0x9F and not 0xD800 <= ord(c) < 0xE000 and c not in _DIRECTIONS)
        else ascii(c)[1:-1]
        for c in text.replace("\t", "    ")
    )
    return "".join(shown)


def in_line(text: str) -> str:
    r"""Escape control characters and line breaks, so that a file name cannot add a line of output.

    >>> print(in_line("a\nagrees  b"))
    a\nagrees  b
    """
    return visible(text).replace("\n", r"\n")


def remedy(error: OSError) -> str:
    """Advice after a failed write, as the beginning of a sentence."""
    match error.errno:
        case errno.ENOSPC | errno.EDQUOT:
            return "Make room"
        case errno.EFBIG:
            return "Raise the limit on the size of files (ulimit -f)"
    return "Check the disk and the permissions"


def parse_fault(error: Exception, language: str = "JSON") -> str:
    """Describe why a text could not be parsed, as a clause that follows the file's name.

    Integers of thousands of digits are one reason: JSON and YAML allow them, Python refuses them.

    >>> parse_fault(RecursionError()), parse_fault(ValueError("no day 32"))
    ('is nested too deeply', 'is not JSON (no day 32)')
    >>> parse_fault(json.JSONDecodeError("Expecting value", '{"a": }', 6))
    'is not JSON (Expecting value, column 7)'
    """
    if isinstance(error, RecursionError):
        return "is nested too deeply"
    if isinstance(error, UnicodeDecodeError):
        return f"is not UTF-8 text (byte {error.start})"
    if "integer string conversion" in str(error):
        return f"has {TOO_LONG}"
    if isinstance(error, json.JSONDecodeError):
        line = f"line {error.lineno}, " if error.lineno > 1 else ""
        return f"is not {language} ({error.msg}, {line}column {error.colno})"
    told = getattr(error, "problem", None) or getattr(error, "reason", None)  # set by YAML errors
    return f"is not {language} ({told or brief(error)})"


def nearest(word: str, known: Iterable[str]) -> str:
    """The end of a sentence about an unknown `word`: the closest known word, or only a full stop.

    >>> nearest("cosin", ["linear", "cosine"]), nearest("exponential", ["linear", "cosine"])
    ('; did you mean cosine?', '.')
    """
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"; did you mean {close[0]}?" if close else "."


def counted(number: int, what: str) -> str:
    """Format a number with its noun; a plural s is added to the noun, before any " of ".

    >>> counted(1, "document"), counted(2_000, "file of JSON rows")
    ('1 document', '2,000 files of JSON rows')
    """
    noun, of, rest = what.partition(" of ")
    return f"{number:,} {noun}{'' if number == 1 else 's'}{of}{rest}"


def listed(names: Sequence[object], most: int = 3) -> str:
    """Join the first `most` names with commas, and count the rest.

    >>> listed(["a", "b"]), listed(["a", "b", "c", "d", "e"])
    ('a, b', 'a, b, c and 2 more')
    """
    rest = len(names) - most
    shown = (str(name).replace("\n", r"\n") for name in names[:most])
    return ", ".join(shown) + (f" and {rest:,} more" if rest > 0 else "")
