"""What the site needs beside Markdown: a hook of MkDocs for pages, an extension of Griffe for docstrings.

Pages are written to be read as files of the repository too, and docstrings to be read in a terminal. Here links that
leave docs/ become the names of what they lead to, for the repository has no address to link to; and docstrings' roles
(``:func:`compress```) become references, and their drawings Markdown. Nothing here knows what the library computes.
"""

from __future__ import annotations

import posixpath
import re
from typing import Any

import griffe

_FENCE = re.compile(r"^( *)(```|~~~).*?^\1\2[ \t]*$", re.M | re.S)
_LINK = re.compile(r"(?<!!)\[([^\]]*)\]\(\s*([^)\s#]+)(#[^)\s]*)?\s*\)")
_COMMENT = re.compile(r"^( *<!--.*?-->)$", re.M)
_ROLE = re.compile(r":(?:py:)?(?:attr|class|data|func|meth|mod):`(~?)([\w.]+)`")
_LITERAL = re.compile(r"::(?=\n\n[ ]+\S)")


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """MkDocs' event: the text of a page, before it is Markdown."""
    if "<!-- commands -->" in markdown:
        from typer.main import get_command

        from gisting.cli import app

        markdown = markdown.replace("<!-- commands -->", "\n\n".join(described(get_command(app), "gisting")))
    return as_page(markdown, page.file.src_uri)


def described(command: Any, name: str) -> list[str]:
    """A command of the command line and those below it as Markdown: help, options, examples.

    Args:
        command: as typer's ``get_command`` makes it of an app.
        name: what is typed for it.

    Returns:
        Paragraphs, tables and fences.
    """
    if hasattr(command, "commands"):
        below = command.commands.items()
        return [part for word, inner in below for part in described(inner, f"{name} {word}")]
    rows = ["| | |", "|---|---|"]
    for option in command.params:
        if option.hidden:
            continue
        is_option = option.param_type_name == "option"
        words = ", ".join([*option.opts, *option.secondary_opts]) if is_option else option.name.upper()
        told = [option.help or ""]
        if option.required:
            told.append("Required." if is_option else "")
        elif option.show_default and not (option.default in (None, (), []) or isinstance(option.default, bool)):
            told.append(f"[default: {option.default}]")
        rows.append(f"| `{words}` | {_in_a_cell(' '.join(filter(None, told)))} |")
    parts = [f"## {name}", _as_text(command.help or "")]
    if len(rows) > 2:
        parts.append("\n".join(rows))
    if command.epilog:
        lines = [line.strip() for line in command.epilog.splitlines() if line.startswith("  ")]
        parts.append("\n".join(["```bash", *lines, "```"]))
    return parts


def _as_text(text: str) -> str:
    """A help as Markdown: what looks like a tag is shown."""
    return text.replace("<", "&lt;")


def _in_a_cell(text: str) -> str:
    return _as_text(" ".join(text.split())).replace("|", "\\|")


def as_page(markdown: str, path: str) -> str:
    """A page as the site takes it.

    Args:
        markdown: the page as it is in the repository.
        path: where it lies, relative to docs/.

    Returns:
        The same text with links out of docs/ replaced by names and an empty line around comments, without which
        Python-Markdown takes no table beside them. Fences stay as they are.
    """
    parts, end = [], 0
    for fence in _FENCE.finditer(markdown):
        parts += [_outside_fences(markdown[end : fence.start()], path), fence.group()]
        end = fence.end()
    return "".join([*parts, _outside_fences(markdown[end:], path)])


def _outside_fences(text: str, path: str) -> str:
    def named(link: re.Match[str]) -> str:
        label, target = link[1], link[2]
        where = posixpath.normpath(posixpath.join(posixpath.dirname(path), target))
        if re.match(r"[a-z]+:", target) or not where.startswith("../"):
            return link[0]
        where = where.removeprefix("../") + ("/" if target.endswith("/") else "")
        plain = label.replace("`", "").rstrip("/")
        return f"`{where}`" if where.rstrip("/").endswith(plain) else f"{label} (`{where}`)"

    return _COMMENT.sub(r"\n\1\n", _LINK.sub(named, text))


class Docstrings(griffe.Extension):
    """Docstrings as Markdown: roles become references where the site shows what they name, and code elsewhere. The
    docstring of a constant in ``__all__`` is the comment above it.
    """

    def on_object(self, *, obj: griffe.Object, loader: griffe.GriffeLoader, **kwargs: Any) -> None:
        """Griffe's event: an object with its members is there."""
        if obj.docstring is None and obj.is_attribute and obj.lineno and obj.name in (obj.module.exports or ()):
            comment = _comment_above(obj.module.lines, obj.lineno)
            obj.docstring = griffe.Docstring(comment, parent=obj) if comment else None
        if obj.docstring is not None:
            text = _ROLE.sub(lambda role: _reference(obj, role), obj.docstring.value)
            obj.docstring.value = _LITERAL.sub(":", text)

    def on_class(self, *, cls: griffe.Class, loader: griffe.GriffeLoader, **kwargs: Any) -> None:
        """Griffe's event: a class with its members is there. That of a named tuple gets the parameters that its fields
        are; dataclasses have theirs from Griffe.
        """
        if "NamedTuple" in map(str, cls.bases):
            kind = griffe.ParameterKind.positional_or_keyword
            members = [member for member in cls.members.values() if isinstance(member, griffe.Attribute)]
            fields = [member for member in members if "property" not in member.labels]
            parameters = [
                griffe.Parameter(field.name, annotation=field.annotation, kind=kind, default=field.value)
                for field in fields
            ]
            init = griffe.Function(
                "__init__", parameters=griffe.Parameters(griffe.Parameter("self", kind=kind), *parameters)
            )
            cls.set_member("__init__", init)


def _comment_above(lines: list[str], number: int) -> str:
    """The comment that ends in the line before ``number``, which counts from 1; empty where there is none."""
    found: list[str] = []
    for line in reversed(lines[: number - 1]):
        if not line.startswith("#"):
            break
        found.insert(0, line.lstrip("#: "))
    return "\n".join(found)


def _reference(obj: griffe.Object, role: re.Match[str]) -> str:
    name = role[2]
    shown = name.rpartition(".")[2] if role[1] else name
    return f'<autoref identifier="{_path_of(obj, name)}" optional><code>{shown}</code></autoref>'


def _path_of(obj: griffe.Object, name: str) -> str:
    """The whole dotted path of a name as a docstring writes it: of a member of the class, of the module, or whole."""
    first, _, rest = name.partition(".")
    scope: Any = obj
    while scope is not None:
        if first in scope.members:
            return ".".join(filter(None, (scope.path, first, rest)))
        scope = scope.parent
    return name
