"""Errors of a user's input end a command with a sentence."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import click
from click.exceptions import Abort, Exit


class _Sentence(click.ClickException):
    """Says nothing to the terminal but characters: a file's names may be in it."""

    def __init__(self, message: str) -> None:
        super().__init__("".join(c if c.isprintable() or c in "\n\t" else "?" for c in message))


@contextmanager
def in_sentences() -> Iterator[None]:
    """Turns what input, memory and disks raise into click's errors, without a traceback."""
    try:
        yield
    except (click.ClickException, Exit, Abort):
        raise
    except MemoryError as error:
        said = "there is not enough memory. Close other programs, or take a smaller batch."
        raise _Sentence(str(error) or f"dalle-fast: {said}") from None
    except OSError as error:
        if error.filename is None or error.strerror is None:
            raise _Sentence(str(error)) from None
        raise _Sentence(f"{error.filename}: {error.strerror}. Name a path you can use.") from None
    except (ValueError, TypeError, RuntimeError) as error:
        raise _Sentence(str(error)) from None
