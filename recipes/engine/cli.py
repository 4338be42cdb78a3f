"""The command lines: of every recipe, from :class:`recipes.config.Config`, and of the studies."""

from __future__ import annotations

import sys
import typing
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

import docstring_parser
from jsonargparse import ActionYesNo, ArgumentParser, auto_cli

from qsnn_ext.errors import ConfigError, QSNNError
from recipes.config import Config, flag

Recipe = Callable[..., Config]

# First field of each group in the help, in the order of the dataclass.
GROUPS = {
    "data": "data",
    "network": "network",
    "wsdr": "weight-spike dual regulation",
    "sign_gradient": "improvements on the paper's method",
    "epochs": "optimization",
    "seed": "machine",
    "out": "run",
}


def field_help(cls: type = Config) -> dict[str, str]:
    """What the string under each field of a dataclass says."""
    described = docstring_parser.parse_from_object(cls).params
    return {p.arg_name: " ".join((p.description or "").split()) for p in described}


def build_parser(defaults: Config, description: str | None) -> ArgumentParser:
    """A parser whose options, types and help are the fields of the configuration.

    Args:
        defaults: The recipe's configuration; its values become the options' defaults.
        description: Text above the options.

    """
    parser = ArgumentParser(description=description, exit_on_error=True)
    parser.add_argument("--config", action="config", help="YAML file with any of these options")
    texts, types = field_help(), typing.get_type_hints(Config)
    group: Any = parser
    for field in fields(Config):
        if field.name in GROUPS:
            group = parser.add_argument_group(GROUPS[field.name])
        if field.name == "recipe":
            continue
        value, kind = getattr(defaults, field.name), types[field.name]
        text, option = texts[field.name], flag(field.name)
        if kind is bool:
            switch = ActionYesNo(yes_prefix="", no_prefix="no-")
            group.add_argument(option, action=switch, default=value, help=text)
        else:
            group.add_argument(option, type=kind, default=value, help=text)
    return parser


def parse(recipe: Recipe, argv: Sequence[str] | None = None, text: str | None = None) -> Config:
    """The configuration a command line asks for.

    The data set and ``--as-published`` choose the recipe's defaults, so they are read first, be
    they on the command line or in a file.

    Args:
        recipe: Function of a recipe file, called with ``data`` and ``as_published``.
        argv: Arguments without the program's name; none takes the process's own.
        text: Description shown by ``--help``.

    """
    argv = list(sys.argv[1:] if argv is None else argv)
    # Help is left to the second parser, which shows the right defaults.
    silent = [a for a in argv if a not in ("-h", "--help")]
    first = build_parser(recipe(), text).parse_args(silent)
    defaults = recipe(data=first.data, as_published=first.as_published)
    given = build_parser(defaults, text).parse_args(argv)
    values = {f.name: given[f.name] for f in fields(Config) if f.name != "recipe"}
    return defaults.but(**values)


def main(recipe: Recipe, argv: Sequence[str] | None = None, text: str | None = None) -> None:
    """Run a recipe from the command line; deliberate errors end it with one clear line."""
    with errors_in_one_line():
        config = parse(recipe, argv, text)
        from recipes.engine.run import train  # takes seconds to import, which --help need not

        train(config)


def call(function: Callable[..., object]) -> None:
    """Call a function with its arguments from the command line, and end errors likewise.

    Options may be spelled as those of the recipes are: ``--data-dir`` is ``data_dir``.
    """
    with errors_in_one_line():
        auto_cli(function, args=[_spelled(word) for word in sys.argv[1:]], as_positional=False)


def _spelled(word: str) -> str:
    """An option's name with underscores, as the function's parameter has it."""
    if not word.startswith("--"):
        return word
    option, equals, value = word[2:].partition("=")
    return f"--{option.replace('-', '_')}{equals}{value}"


@contextmanager
def errors_in_one_line() -> Iterator[None]:
    """Let a deliberate error end the process with its message: status 2 for bad options, else 1."""
    try:
        yield
    except QSNNError as error:
        kind = "usage" if isinstance(error, ConfigError) else "stopped"
        print(f"{kind}: {error}", file=sys.stderr)
        raise SystemExit(2 if kind == "usage" else 1) from error
