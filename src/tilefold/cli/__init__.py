"""The command line: one file per command. Nothing here computes; it reads files, calls the library and shows.

`main` decides how a command ends: 0 done, 1 checked and found wrong, 2 one sentence about what was asked, 130 Ctrl-C.
A traceback is a bug of ours, never an answer to a user. Typer and Rich are imported only here.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from types import FrameType
from typing import NoReturn

NEEDS = "the command line needs typer and rich: pip install 'tilefold[cli]'"


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """The entry point `tilefold`."""
    signal.signal(signal.SIGTERM, _terminated)  # so that half-written files are removed
    try:
        code = _run(list(sys.argv[1:] if arguments is None else arguments))
        sys.stdout.flush()
    except KeyboardInterrupt:
        # Python ends by the signal itself if that fell into an exec(), of a dataclass say; a later one makes it forget.
        exec("")
        code = _say("interrupted", 130)
    except BrokenPipeError:  # the reader of our output has gone; Python would complain once more at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    except MemoryError as error:
        code = _say(f"not enough memory: {error}" if str(error) else "not enough memory")
    except (ValueError, TypeError, OSError) as error:
        code = _say(_sentence(error))
    sys.exit(code)


def _run(arguments: list[str]) -> int:
    try:
        from .app import run
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in ("typer", "rich", "click"):
            raise
        return _say(NEEDS)
    return run(arguments)


def _sentence(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename is not None else error.strerror
    return str(error) or type(error).__name__


def _say(sentence: str, code: int = 2) -> int:
    print(f"tilefold: {sentence}", file=sys.stderr)
    return code


def _terminated(number: int, frame: FrameType | None) -> NoReturn:
    sys.exit(128 + number)
