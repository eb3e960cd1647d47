"""The `ctp` command. Imports no torch, so that help is instant."""

import logging
import os
from typing import Annotated

import typer

from ctp_cli import __version__
from ctp_cli.commands import bench, compress, convert, eval, learn, run, stitch, unstitch
from ctp_cli.commands.common import DEBUG_VARIABLE, INTERRUPTED
from ctp_cli.console import Console

app = typer.Typer(
    name="ctp",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Compress a language model, then win the lost accuracy back with a learned prompt.",
)


def _version(asked: bool) -> None:
    if asked:
        Console().result(f"ctp {__version__}")
        raise typer.Exit


@app.callback()
def _global(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
    verbose: Annotated[bool, typer.Option("-v", "--verbose", help="Say more on stderr.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Tracebacks for bugs.")] = False,
) -> None:
    if debug:
        os.environ[DEBUG_VARIABLE] = "1"
    Console().configure_logging(verbose=verbose, debug=debug)
    logging.captureWarnings(True)


app.command("compress")(compress.compress)
app.command("learn")(learn.learn)
app.command("stitch")(stitch.stitch)
app.command("unstitch")(unstitch.unstitch)
app.command("eval")(eval.evaluate)
app.command("bench")(bench.bench)
app.command("convert")(convert.convert)
app.command("run")(run.run)


def main() -> None:
    """Entry point of the `ctp` executable."""
    try:
        app()
    except KeyboardInterrupt:  # before a command began or after it ended
        raise SystemExit(INTERRUPTED) from None
