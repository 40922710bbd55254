"""Settings that are declared once, as fields of a dataclass.

From one table come the options of a command (``gisting.cli.options``), the keys of a YAML file (:meth:`Settings.load`)
and the keyword arguments of a function (:func:`takes_keywords_of`). A setting is added with one line::

    @dataclass(frozen=True, kw_only=True)
    class Training(Settings):
        seed: int = setting(WHOLE, 42, "Seed of the data order.")

Place in the flow: below every module that has settings. Independent of particular settings and commands.
"""

from __future__ import annotations

import difflib
import functools
import inspect
import numbers
import re
import warnings
from collections.abc import Callable, Collection, Mapping
from dataclasses import Field, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar

from gisting.errors import GistError

__all__ = [
    "COUNT",
    "FLAG",
    "NOT_NEGATIVE",
    "PATH",
    "POSITIVE",
    "TEXT",
    "TEXTS",
    "WHOLE",
    "Kind",
    "Setting",
    "Settings",
    "checked",
    "choice",
    "declared",
    "is_whole",
    "keywords_for",
    "number",
    "read_yaml",
    "setting",
    "takes_keywords_of",
]

_Function = TypeVar("_Function", bound=Callable[..., Any])
# Plain scalars of YAML 1.2 (its core schema). PyYAML reads 1.1, in which 1:10 is the number 70, 2e-5 is a text and no
# is a boolean.
_SCALARS = {
    "null": r"null|Null|NULL|~|",
    "bool": r"true|True|TRUE|false|False|FALSE",
    "int": r"[-+]?(0|[1-9][0-9]*)",
    "float": r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
}


@dataclass(frozen=True)
class Kind:
    """The values that a setting takes.

    Args:
        expected: these values in words, such as "a number above 0"; or a function that returns the words, if they take
            an import.
        read: returns a value in the form in which it is kept; raises ValueError or TypeError if it is of another kind.
        option: type of the command's option, such as ``int`` or ``list[str]``.
        parse: turns the option's value into one that ``read`` takes.
        write: turns a value into one that YAML and help texts show.
    """

    expected: str | Callable[[], str]
    read: Callable[[Any], Any]
    option: Any = str
    parse: Callable[[Any], Any] = lambda value: value
    write: Callable[[Any], Any] = lambda value: value


def choice(*names: str | Callable[[], Collection[str]]) -> Kind:
    """Return the kind of a setting that is one of some names.

    Args:
        *names: the names; or functions that return some, if they take an import.
    """

    def every() -> list[str]:
        return [name for each in names for name in ([each] if isinstance(each, str) else each())]

    return Kind(lambda: f"one of {', '.join(every())}", lambda value: checked(value, value in every()))


def checked(value: Any, is_right: bool) -> Any:
    """Return a value, after a check.

    Args:
        value: anything.
        is_right: the result of the check.

    Raises:
        ValueError: the check failed.
    """
    if not is_right:
        raise ValueError
    return value


def number(value: Any, low: float, *, or_equal: bool = False) -> float:
    """Return a finite number above a limit, as a float.

    Args:
        value: a number, and not a boolean.
        low: the limit.
        or_equal: whether the limit itself is allowed.

    Raises:
        ValueError: it is not one.
    """
    found = float(checked(value, isinstance(value, int | float) and not isinstance(value, bool)))
    return checked(found, low < found < float("inf") or (or_equal and found == low))


def is_whole(value: Any) -> bool:
    """Return whether a value is a whole number.

    Args:
        value: anything; booleans are not numbers.
    """
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _texts(value: Any) -> tuple[str, ...]:
    items = (value,) if isinstance(value, str) else tuple(checked(value, isinstance(value, list | tuple)))
    return checked(items, all(isinstance(item, str) and item for item in items))


TEXT = Kind("a text", lambda value: checked(value, isinstance(value, str) and bool(value)))
TEXTS = Kind("a list of texts", _texts, list[str], write=list)
PATH = Kind("a path", lambda value: str(checked(value, isinstance(value, str | Path) and bool(str(value)))))
COUNT = Kind("a whole number of at least 1", lambda value: int(checked(value, is_whole(value) and value >= 1)), int)
WHOLE = Kind("a whole number of at least 0", lambda value: int(checked(value, is_whole(value) and value >= 0)), int)
POSITIVE = Kind("a number above 0", lambda value: number(value, 0), float)
NOT_NEGATIVE = Kind("a number of at least 0", lambda value: number(value, 0, or_equal=True), float)
FLAG = Kind("true or false", lambda value: checked(value, isinstance(value, bool)), bool)


@dataclass(frozen=True)
class Setting:
    """What a field of a table declares besides its type and default.

    Args:
        kind: the values that it takes.
        help: what it means.
        flags: names of the command's option, if they are not ``--`` and the field's name.
        shown_default: the default in words, for a setting whose default depends on others.
        is_argument: whether the command takes it by its position.
    """

    kind: Kind
    help: str
    flags: tuple[str, ...] = ()
    shown_default: str | None = None
    is_argument: bool = False


def setting(kind: Kind, default: Any, help: str, *flags: str, **more: Any) -> Any:
    """Declare a field of a table.

    Args:
        kind: the values that it takes; None is allowed where it is the default.
        default: the value where none is given.
        help: what it means, in a sentence.
        *flags: names of the command's option, if they are not ``--`` and the field's name.
        **more: ``shown_default`` and ``is_argument`` of :class:`Setting`.
    """
    return field(default=default, metadata={"setting": Setting(kind, help, flags, **more)})


@dataclass(frozen=True, kw_only=True)
class Settings:
    """A table of settings: subclasses are frozen dataclasses whose fields are made with :func:`setting`.

    Raises:
        GistError: a value is not of its setting's kind.
    """

    #: Keys of older files, with the settings that they have become.
    old_names: ClassVar[Mapping[str, str]] = {}

    def __post_init__(self) -> None:
        for each in fields(self):
            value, kind = getattr(self, each.name), declared(each).kind
            if value is None and each.default is None:
                continue
            try:
                object.__setattr__(self, each.name, kind.read(value))
            except (TypeError, ValueError) as error:
                if isinstance(error, GistError):
                    raise
                expected = kind.expected if isinstance(kind.expected, str) else kind.expected()
                raise GistError(f"{each.name} must be {expected}, got {value!r}") from None

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read settings from a YAML file that maps names to values; ``null`` means not given.

        Args:
            path: the file, in UTF-8.

        Returns:
            The settings; those that the file does not name have their defaults.

        Raises:
            GistError: the file is not such a mapping, or a key or value is wrong; file, line and key are named.
            OSError: the file cannot be read.
        """
        found, lines = read_yaml(path)
        names = [each.name for each in fields(cls)]
        values: dict[str, Any] = {}
        for name, value in found.items():
            new = cls.old_names.get(name, name)
            if new != name:
                warnings.warn(f"{path}: {name} is now called {new}", DeprecationWarning, stacklevel=2)
            if new not in names:
                near = difflib.get_close_matches(str(name), names, n=1)
                hint = f"did you mean {near[0]}?" if near else f"choose from {', '.join(names)}"
                raise GistError(f"{path}, line {lines[name]}: there is no setting {name!r}; {hint}")
            if new in values:
                raise GistError(f"{path}, line {lines[name]}: {new} is given twice, also by its old name; remove one")
            values[new], lines[new] = value, lines[name]
        try:
            return cls(**{name: value for name, value in values.items() if value is not None})
        except GistError as error:
            line = lines.get(str(error).partition(" ")[0])
            raise GistError(f"{path}, line {line}: {error}" if line else f"{path}: {error}") from None

    def updated(self, **changes: Any) -> Self:
        """Return the settings with some of them changed.

        Args:
            **changes: new values; None changes nothing.
        """
        return replace(self, **{name: value for name, value in changes.items() if value is not None})

    def written(self, always: Collection[str] = ()) -> dict[str, Any]:
        """Return the settings that differ from their defaults, as :meth:`load` reads them.

        Args:
            always: settings to return even if they have their default values.
        """
        defaults = type(self)()
        return {
            each.name: declared(each).kind.write(value)
            for each in fields(self)
            if (value := getattr(self, each.name)) != getattr(defaults, each.name) or each.name in always
        }


def declared(one: Field[Any]) -> Setting:
    """Return what a field of a table declares.

    Args:
        one: made with :func:`setting`.
    """
    return one.metadata["setting"]


def takes_keywords_of(table: type[Settings]) -> Callable[[_Function], _Function]:
    """Decorate a function whose ``**settings`` make a ``table``: its signature names every setting.

    Args:
        table: the settings that the function makes of its keyword arguments.
    """

    def decorate(function: Any) -> Any:
        signature = inspect.signature(function)
        own = [item for item in signature.parameters.values() if item.kind is not inspect.Parameter.VAR_KEYWORD]
        more = [
            inspect.Parameter(each.name, inspect.Parameter.KEYWORD_ONLY, default=each.default, annotation=each.type)
            for each in fields(table)
        ]
        names = {item.name for item in own + more}

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            for name in kwargs.keys() - names:
                near = difflib.get_close_matches(name, names, n=1)
                hint = f"; did you mean {near[0]}?" if near else ""
                raise TypeError(f"{function.__name__}() got an unexpected keyword argument {name!r}{hint}")
            return function(*args, **kwargs)

        vars(call)["__signature__"] = signature.replace(parameters=own + more)
        return call

    return decorate


def keywords_for(
    function: Callable[..., Any], settings: Settings, table: type[Settings] | None = None
) -> dict[str, Any]:
    """Return the settings that a function has optional parameters for, without those that are None.

    Args:
        function: a function or class to call.
        settings: values of a table.
        table: a part of that table whose settings alone are wanted; None for all of it.
    """
    parameters = inspect.signature(function).parameters.values()
    names = {each.name for each in fields(table or settings)} & {
        parameter.name for parameter in parameters if parameter.default is not inspect.Parameter.empty
    }
    return {name: getattr(settings, name) for name in names if getattr(settings, name) is not None}


def read_yaml(path: str | Path) -> tuple[dict[Any, Any], dict[Any, int]]:
    """Read a YAML mapping, by the rules of YAML 1.2.

    Args:
        path: the file, in UTF-8.

    Returns:
        The mapping, and the line in which each key is.

    Raises:
        GistError: the file is not a YAML mapping, or has a key twice.
        OSError: it cannot be read.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        yaml_implicit_resolvers = {}  # noqa: RUF012

    for name, pattern in _SCALARS.items():
        Loader.add_implicit_resolver(f"tag:yaml.org,2002:{name}", re.compile(f"(?:{pattern})$"), None)
    try:
        text = Path(path).read_text(encoding="utf-8")
        root, values = yaml.compose(text, Loader=Loader), yaml.load(text, Loader=Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise GistError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict) or not isinstance(root, yaml.MappingNode):
        raise GistError(f"{path} must hold one 'name: value' per line, got {type(values).__name__}")
    first: dict[str, int] = {}
    for key, _ in root.value:
        line = key.start_mark.line + 1
        if first.setdefault(key.value, line) != line:
            raise GistError(
                f"{path}, line {line}: {key.value} is given twice, first in line {first[key.value]}; remove one"
            )
    return values, dict(zip(values, first.values(), strict=True))
