"""The list of options: whole, as the configuration declares them, and found by a word."""

from pathlib import Path

import pytest

from tests.experiments.commands import error_of, output_of
from twotower.commands import options
from twotower.config import Config, defaults

PAGE = Path(__file__).parents[2] / "experiments" / "guides" / "options.md"


def leaves(values, prefix=""):
    """Yields the dotted name of each option; one that is a mapping itself ends a name."""
    for name, value in values.items():
        if hasattr(value, "items") and len(value):
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def listed():
    """Returns the options by name, those of a shared class for each of its sections."""
    found = {}
    for section in options.read_sections():
        for option in section.options:
            tail = option.name.removeprefix(section.names[0])
            found |= {f"{name}{tail}".lstrip("."): option for name in section.names}
    return found


def test_every_option_is_listed_with_a_meaning():
    assert set(listed()) == set(leaves(defaults()))
    assert all(option.meaning and option.type for option in listed().values())


def test_an_option_is_shown_as_it_is_declared():
    option = listed()["training.steps"]
    assert option.default == str(Config().training.steps) and option.type == "whole number"
    assert "--config.training.steps=" in output_of("options", "training.steps")
    assert listed()["data.duplicates"].type == "one of all, first, last"
    assert listed()["model.user.layers"].type == "list of whole numbers"


def test_a_word_is_looked_for_in_names_and_meanings():
    printed = output_of("options", "Queue")
    assert "--config.objective.negatives.queue_warmup=" in printed and "cross-batch" in printed
    assert "training.steps=" not in printed
    # By the name of the second of two sections that share their options.
    assert "layers" in output_of("options", "config.model.item.layers")


def test_a_word_that_nothing_is_about_gets_the_nearest():
    assert "did you mean 'temperature'?" in error_of("options", "temprature")


@pytest.mark.parametrize("option", ["objective.los", "objective.lss.x"])
def test_an_option_of_the_command_line_that_is_not_there_gets_the_nearest(option):
    flags = ["--config=quickstart", "--workdir=nowhere", f"--config.{option}=x"]
    assert "config.objective has no option" in error_of("train", *flags)
    assert "did you mean 'loss'?" in error_of("train", *flags)


def test_the_page_of_the_documentation_is_up_to_date():
    page = output_of("options", "--markdown")
    message = f"write it anew: python -m experiments.options --markdown > {PAGE.name}"
    assert PAGE.read_text(encoding="utf-8") == page, message
