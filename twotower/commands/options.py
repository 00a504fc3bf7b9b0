"""Lists the options of an experiment: name, type, default and meaning, all or those about a word.

    twotower options
    twotower options history
    twotower options --markdown > options.md

An option is set in an experiment file (`config.training.steps = 500`) or on the command line
(--config.training.steps=500).
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import typing
from collections.abc import Iterator, Mapping

from absl import flags

FLAGS = flags.FlagValues()
POSITIONAL = "word"  # the flag that an argument without a name sets
_WORD = flags.DEFINE_string(
    "word", "", "Text to look for in names and meanings.", flag_values=FLAGS
)
_MARKDOWN = flags.DEFINE_bool(
    "markdown", False, "Print tables for a page of documentation.", flag_values=FLAGS
)

# In words: most who read this page know no annotations of Python.
_TYPE_NAMES = {
    bool: "true or false",
    float: "number",
    int: "whole number",
    str: "text",
    tuple: "list",
}


@dataclasses.dataclass(frozen=True)
class Option:
    """An option of the configuration.

    Attributes:
        name: Name with its sections, such as "training.steps".
        type: Type in words.
        default: Default as it is written in Python.
        meaning: Description, one paragraph.
    """

    name: str
    type: str
    default: str
    meaning: str


@dataclasses.dataclass(frozen=True)
class Section:
    """Options of one dataclass, which several sections of the configuration may share.

    Attributes:
        names: Names of the sections, such as ("model.user", "model.item").
        summary: Description of the section.
        options: Options of the first of these sections.
    """

    names: tuple[str, ...]
    summary: str
    options: tuple[Option, ...]


def main() -> None:
    from twotower.core.errors import ConfigError

    sections = read_sections()
    word = _WORD.value
    if word:
        sections = list(filter_sections(sections, word))
    if not sections:
        raise ConfigError(f"No option is about {word!r}{nearest_option(word)}")
    print(format_markdown(sections) if _MARKDOWN.value else format_text(sections))


def read_sections() -> list[Section]:
    """Returns the sections of the configuration in the order of their definition."""
    from twotower.config import Config

    names: dict[type, list[str]] = {}
    for cls, name in _walk(Config, ""):
        # By dataclass: the towers of users and items have the same options, which are told once.
        names.setdefault(cls, []).append(name)
    sections = []
    for cls, sections_of_class in names.items():
        options = _read_options(cls, sections_of_class[0])
        # The whole configuration has none of its own, unless an option lies beside its sections.
        if options:
            summary, _, _ = (inspect.getdoc(cls) or "").partition("\n\n")
            summary = " ".join(summary.split())
            sections.append(Section(tuple(sections_of_class), summary, options))
    return sections


def filter_sections(sections: list[Section], word: str) -> Iterator[Section]:
    """Yields the sections with those of their options whose name or meaning holds a word."""
    word = word.lower().removeprefix("config.")
    for section in sections:
        found = []
        for option in section.options:
            # Under the names of all its sections: "model.item.layers" is found too.
            tail = option.name.removeprefix(section.names[0])
            names = [f"{name}{tail}" for name in section.names]
            texts = [*names, option.meaning]
            if any(word in text.lower() for text in texts):
                found.append(option)
        if found:
            yield dataclasses.replace(section, options=tuple(found))


def nearest_option(word: str) -> str:
    """Returns the end of a sentence that offers the option whose name is most like a word."""
    from twotower.core.errors import did_you_mean

    names = []
    for section in read_sections():
        names += [option.name.rpartition(".")[2] for option in section.options]
    return did_you_mean(word.rpartition(".")[2], names)


def format_text(sections: list[Section]) -> str:
    """Returns the options as they are set on the command line, each with its meaning below."""
    lines = []
    for section in sections:
        title = ", ".join(name or "config" for name in section.names)
        lines += [f"{title}: {section.summary}", ""]
        for option in section.options:
            lines.append(f"  --config.{option.name}={option.default}  ({option.type})")
            lines.append(flags.text_wrap(option.meaning, length=88, indent="      "))
        lines.append("")
    return "\n".join(lines).rstrip()


def format_markdown(sections: list[Section]) -> str:
    """Returns the options as tables, one a section, for the page of documentation."""
    lines = ["# Options", "", _PAGE_HEAD]
    for section in sections:
        title = ", ".join(f"`config.{name}`".replace(".`", "`") for name in section.names)
        lines += ["", f"## {title}", "", section.summary, ""]
        lines += ["| option | type | default | meaning |", "|---|---|---|---|"]
        for option in section.options:
            name = option.name.rpartition(".")[2]
            cells = [f"`{name}`", option.type, f"`{option.default}`", option.meaning]
            # A bar in a cell would end it.
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines)


_PAGE_HEAD = """Every option with its type, default and meaning, as `twotower options` prints them.
An option is set in an experiment file (`config.training.steps = 500`) or on the command line
(`--config.training.steps=500`). This page is written by `twotower options --markdown`."""


def _walk(cls: type, name: str) -> Iterator[tuple[type, str]]:
    """Yields a dataclass and those of its fields, with their names, in their order."""
    yield cls, name
    for field, hint in typing.get_type_hints(cls).items():
        if dataclasses.is_dataclass(hint):
            yield from _walk(typing.cast(type, hint), f"{name}.{field}".lstrip("."))


def _read_options(cls: type, location: str) -> tuple[Option, ...]:
    """Returns the options of a dataclass that are no sections themselves."""
    hints = typing.get_type_hints(cls)
    # From the docstrings of the configuration: what the code says is what the page says.
    meanings = read_attributes(cls)
    options = []
    for field in dataclasses.fields(cls):
        hint = hints[field.name]
        if dataclasses.is_dataclass(hint):
            continue
        default = field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        name = f"{location}.{field.name}".lstrip(".")
        meaning = meanings.get(field.name, "")
        options.append(Option(name, describe_type(hint), f"{default!r}", meaning))
    return tuple(options)


def read_attributes(cls: type) -> dict[str, str]:
    """Returns the meanings in the section "Attributes:" of a docstring by the name they are of."""
    _, _, text = (inspect.getdoc(cls) or "").partition("Attributes:\n")
    meanings: dict[str, str] = {}
    names: list[str] = []
    for line in text.split("\n"):
        entry = re.match(r"    (\w+(?:, \w+)*): (.*)", line)
        if entry:
            names = entry[1].split(", ")
            meanings |= dict.fromkeys(names, entry[2])
        elif line.startswith("        "):
            # A description that goes on in the next line, of one name or of several.
            for name in names:
                meanings[name] += f" {line.strip()}"
        elif line.strip():
            break  # another section of the docstring
    return meanings


def describe_type(hint: typing.Any) -> str:
    """Returns the type of an option in words."""
    origin = typing.get_origin(hint)
    if origin is typing.Literal:
        return "one of " + ", ".join(map(str, typing.get_args(hint)))
    # Lists of the configuration are tuples, since a configuration is frozen and hashed.
    if origin is tuple:
        inner = typing.get_args(hint)[0]
        return f"list of {_TYPE_NAMES.get(inner, 'list')}s"
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return "mapping"
    return _TYPE_NAMES.get(hint, str(hint))
