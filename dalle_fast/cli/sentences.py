"""Errors of a user's input end a command with a sentence."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import click
from click.exceptions import Abort, Exit


@contextmanager
def in_sentences() -> Iterator[None]:
    """Turns what input, memory and disks raise into click's errors, without a traceback."""
    try:
        yield
    except (click.ClickException, Exit, Abort):
        raise
    except MemoryError as error:
        raise click.ClickException(str(error) or "sample: there is not enough memory. Take a smaller batch.") from None
    except OSError as error:
        if error.filename is None or error.strerror is None:
            raise click.ClickException(str(error)) from None
        raise click.ClickException(f"{error.filename}: {error.strerror}. Name a path you can use.") from None
    except (ValueError, TypeError, RuntimeError) as error:
        raise click.ClickException(str(error)) from None
