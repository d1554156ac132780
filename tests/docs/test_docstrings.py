"""Docstrings of public names have one form, name each argument, and their examples run."""

import doctest
import inspect
import re

import pytest

import iada
import iada_kernels
from iada.models import split_classifier
from iada.sklearn import IADAClassifier

PUBLIC = {
    f"{module.__name__}.{name}": getattr(module, name)
    for module in (iada, iada_kernels)
    for name in module.__all__
    if callable(getattr(module, name)) and name != "SlowBackendWarning"  # which has no signature
} | {
    "iada.sklearn.IADAClassifier": IADAClassifier,
    "iada.models.split_classifier": split_classifier,
}
SECTION = re.compile(r"^(Args|Attributes|Examples|Returns|Raises):$")
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


def documented(thing, section="Args"):
    """The names under a section of the docstring."""
    names, inside = [], False
    for line in inspect.cleandoc(thing.__doc__ or "").split("\n"):
        if SECTION.match(line):
            inside = line == f"{section}:"
        elif line and not line.startswith(" "):
            inside = False
        elif inside and (entry := re.match(r"    (\S[^:]*):", line)):
            names.append(entry[1])
    return names


def parts(name, thing):
    """A function; or a class and what it defines itself for callers."""
    yield name, thing
    if inspect.isclass(thing):
        for key, value in vars(thing).items():
            if inspect.isfunction(value) and not key.startswith("_") and value.__doc__:
                yield f"{name}.{key}", value


PARTS = dict(part for name, thing in PUBLIC.items() for part in parts(name, thing))


@pytest.mark.parametrize("name", PARTS)
def test_arguments_are_documented_one_by_one(name):
    thing = PARTS[name]
    takes = [*inspect.signature(thing).parameters]
    told = documented(thing)
    assert set(told) <= set(takes), "an argument that is not there"
    if inspect.isclass(thing):
        sections = ("Args", "Attributes")  # a record's fields are told as attributes
        told = {
            name for base in thing.__mro__ for part in sections for name in documented(base, part)
        }
        assert set(takes) <= told, "a class, or its base, says what each argument is"
    for line in (thing.__doc__ or "").splitlines():
        assert not re.match(r"\s*(Raises|Returns) [A-Z\w]", line), "write a section: " + line
    for error in documented(thing, "Raises"):
        assert re.fullmatch(r"\w+(Error|Interrupt)", error)


@pytest.mark.parametrize("name", PARTS)
def test_examples_have_their_section(name):
    """Elsewhere the reference would not know them for what they are."""
    section = ""
    for line in inspect.cleandoc(PARTS[name].__doc__ or "").split("\n"):
        section = line if line and not line.startswith(" ") else section
        assert ">>>" not in line or section == "Examples:", line


EXAMPLES = [name for name, thing in PARTS.items() if ">>>" in (thing.__doc__ or "")]


@pytest.mark.usefixtures("one_thread", "alone")
@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_of_docstrings(name, example_names):
    text = inspect.cleandoc(PARTS[name].__doc__)
    example = doctest.DocTestParser().get_doctest(text, example_names, name, None, None)
    told = []
    runner = doctest.DocTestRunner(optionflags=FLAGS)
    runner.run(example, out=told.append)
    assert runner.summarize(verbose=False).failed == 0, "".join(told)


def test_most_public_names_have_an_example():
    assert len(EXAMPLES) >= 15
