"""`dalle-fast sample`: many pictures of many prompts, the best of them kept, in a folder that goes on when killed."""

from __future__ import annotations

from typing import Any

import click
from click.core import ParameterSource

from dalle_fast.cli.sample_options import PARAMETERS, GroupedCommand, SampleOptions
from dalle_fast.cli.sentences import in_sentences

_INTERRUPTED = 130  # exit code of a command that Ctrl-C ended


@click.command("sample", cls=GroupedCommand, params=PARAMETERS)
@click.pass_context
def sample(ctx: click.Context, **values: Any) -> None:
    """Draw many pictures of PROMPTS into a folder: codes and scores of all, the best as PNGs, a gallery a prompt.

    \b
    dalle-fast sample "a red apple"
    dalle-fast sample --prompts prompts.txt --images-per-prompt 512 --rank clip/ --keep 32

    What is in the folder is never drawn again. After Ctrl-C, kill -9 or a full disk the same command goes on, and ends
    in the same bytes.
    """
    options = SampleOptions(**values)
    # null and "auto" leave it to the command.
    decided = [name for name, value in values.items() if value not in (None, "auto", ())]
    given = frozenset(name for name in decided if ctx.get_parameter_source(name) is not ParameterSource.DEFAULT)
    options.check(given)
    try:
        with in_sentences():
            from dalle_fast.cli import sample_run  # at call time: it imports torch, which --help does not need

            if options.from_manifest is not None:
                report = sample_run.redraw_sample(options)
            else:
                report = sample_run.draw_job(options, given)
    except KeyboardInterrupt:
        click.echo(f"sample: interrupted. What was drawn stays in {options.out}; the same command goes on.", err=True)
        ctx.exit(_INTERRUPTED)
    report.tell(as_json=options.json, quiet=options.quiet)
