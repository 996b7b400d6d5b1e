"""Support file names and terminals in encodings other than UTF-8."""

from __future__ import annotations

import io
import os
import sys

UTF8_MODE = ["-X", "utf8"]


def start_in_utf8() -> None:
    """Restart this command in Python's UTF-8 mode, unless file names are in UTF-8 already.

    In the locale C without UTF-8 mode (`LC_ALL=C PYTHONUTF8=0`), Python cannot pass file names with
    non-ASCII characters to JAX and other libraries. The process keeps its id.
    """
    if sys.getfilesystemencoding().lower() in ("utf-8", "utf8"):
        return
    if sys.orig_argv[1:3] == UTF8_MODE or not sys.executable:
        return  # already restarted, without success
    os.environ["PYTHONUTF8"] = "1"  # for the processes that this one starts
    os.execv(sys.executable, [sys.executable, *UTF8_MODE, *sys.orig_argv[1:]])


def escape_unprintable() -> None:
    """Make stdout and stderr escape characters that their encoding lacks, instead of raising."""
    for stream in (sys.stdout, sys.stderr):
        if not isinstance(stream, io.TextIOWrapper):
            continue  # replaced by a caller, such as a notebook
        is_utf8 = stream.encoding.lower() in ("utf-8", "utf8")
        if stream.errors == "strict" or not is_utf8:
            stream.reconfigure(errors="backslashreplace")
