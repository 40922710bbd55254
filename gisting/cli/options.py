"""Options of a command that come from a table of settings (:mod:`gisting.settings`)."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import Field, fields
from pathlib import Path
from typing import Annotated, Any

import typer

from gisting.settings import Settings, declared

__all__ = ["takes_settings"]


def takes_settings(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command a ``--recipe`` option and one option for every setting of a table.

    The table is the annotation of the command's parameter ``settings``, which the options replace. The command is
    called with the settings of the recipe file, overridden by the options.

    Raises:
        GistError: as :class:`Settings` and :meth:`Settings.load` do.
    """
    signature = inspect.signature(command, eval_str=True)
    table: type[Settings] = signature.parameters["settings"].annotation
    options = {each.name: _option(each) for each in fields(table)}

    @functools.wraps(command)
    def call(*, recipe: Path | None, **values: Any) -> None:
        given = {name: values.pop(name) for name in options}
        # Click gives an empty list for an option that may be repeated and is not there.
        given = {name: value for name, value in given.items() if value is not None and value != []}
        given = {each.name: declared(each).kind.parse(given[each.name]) for each in fields(table) if each.name in given}
        base = table() if recipe is None else table.load(recipe)
        command(settings=base.updated(**given), **values)

    parameters: list[inspect.Parameter] = []
    for name, parameter in signature.parameters.items():
        parameters += [_RECIPE, *options.values()] if name == "settings" else [parameter]
    parameters = [one.replace(kind=inspect.Parameter.KEYWORD_ONLY) for one in parameters]
    # Typer reads both.
    call.__signature__ = signature.replace(parameters=parameters)  # pyright: ignore[reportAttributeAccessIssue]
    call.__annotations__ = {one.name: one.annotation for one in parameters}
    return call


def _option(each: Field[Any]) -> inspect.Parameter:
    one = declared(each)
    default = one.shown_default
    if default is None and each.default is not None and each.default is not False and each.default != ():
        default = f"{each.default:g}" if isinstance(each.default, float) else str(one.kind.write(each.default))
    help = one.help if default is None else f"{one.help} [default: {default}]"
    info = typer.Argument(help=help) if one.is_argument else typer.Option(*one.flags, help=help)
    kind = inspect.Parameter.KEYWORD_ONLY
    return inspect.Parameter(each.name, kind, default=None, annotation=Annotated[one.kind.option | None, info])


_RECIPE = inspect.Parameter(
    "recipe",
    inspect.Parameter.KEYWORD_ONLY,
    default=None,
    annotation=Annotated[
        Path | None,
        typer.Option(help="YAML file with the settings of the run; options given here override it."),
    ],
)
