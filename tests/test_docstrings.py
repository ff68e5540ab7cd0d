"""Every public name says what it takes, in which shapes, what it returns and raises, and shows an example that runs.

The doctest collector runs the examples. All that numpydoc's validation can check is asked of functions and classes; of
methods and properties, that they say what they do, and name their parameters where there is more than one.
"""

import importlib
import inspect
import re
from functools import cache

import pytest

import fisherop

validate = pytest.importorskip("numpydoc.validate", reason="numpydoc is not installed").validate
Docstring = importlib.import_module("numpydoc.docscrape").NumpyDocString

MODULES = ["fisherop"]
MODULES += [f"fisherop.{name}" for name in ("images", "models", "noise", "plenoptic", "plot", "restrict")]
MODULES += ["fisherop.spectrum", "fisherop.testing", "fisherop.testing.strategies"]

FORM = {
    "GL01": "text starts on the first line",
    "GL03": "no double blank lines",
    "GL06": "known sections only",
    "GL08": "a docstring",
    "SS01": "a summary",
    "SS02": "that starts with a capital letter",
    "SS03": "that ends with a period",
    "SS04": "without leading spaces",
    "SS06": "on one line",
    "RT03": "returned values described",
    "YD01": "yielded values described",
}
PARAMETERS = {
    "PR02": "no parameter that is none",
    "PR07": "with a description",
    "PR10": "a space before the colon",
}
"""Types are not asked for (PR04): parameters that are those of another function are documented together, in a line."""


def public():
    """Yield the qualified name of everything public but modules and constants, members after their class."""
    for place in MODULES:
        module = importlib.import_module(place)
        for name in module.__all__:
            found = getattr(module, name)
            if inspect.isfunction(found) or inspect.isclass(found):
                yield f"{place}.{name}", found
                yield from members(f"{place}.{name}", found) if inspect.isclass(found) else ()


def members(place, kind):
    """Yield the public methods and properties that a class has from this package."""
    seen = set()
    for base in kind.__mro__:
        for name, found in vars(base).items() if base.__module__.startswith("fisherop") else ():
            inner = getattr(found, "__func__", found)
            if not name.startswith("_") and name not in seen and isinstance(inner, property | type(members)):
                seen.add(name)
                yield f"{place}.{name}", inner


NAMES = dict(public())
STRATEGIES = [name for name in NAMES if name.startswith("fisherop.testing.strategies")]
WHOLE = [name for name, found in NAMES.items() if name.rpartition(".")[0] in MODULES]
FUNCTIONS = [name for name in WHOLE if inspect.isfunction(NAMES[name]) and name not in STRATEGIES]
PARTS = [name for name in NAMES if name not in WHOLE]


@cache
def errors(name):
    try:
        return dict(validate(name)["errors"])
    except OSError:  # a strategy: Hypothesis makes its function anew, and it has no source
        return {}


def documented(found):
    """Return the names that a docstring's parameters and attributes have."""
    text = Docstring(inspect.getdoc(found) or "")
    return {part.lstrip("*") for entry in (*text["Parameters"], *text["Attributes"]) for part in entry.name.split(", ")}


def parameters(found):
    try:
        signature = inspect.signature(found.__init__ if inspect.isclass(found) else found)
    except (TypeError, ValueError):
        return set()
    return set(signature.parameters) - {"self", "cls", "args", "kwargs"}


@pytest.mark.parametrize("name", NAMES)
def test_docstring_is_well_formed(name):
    assert not {code: text for code, text in errors(name).items() if code in FORM}


@pytest.mark.parametrize("name", WHOLE)
def test_parameters_are_those_of_the_signature(name):
    """A class that has attributes and no parameters is made by functions, not by users."""
    found = NAMES[name]
    text = Docstring(inspect.getdoc(found))
    if not inspect.isclass(found) or text["Parameters"] or not text["Attributes"]:
        assert parameters(found) <= documented(found)
    assert not {code: message for code, message in errors(name).items() if code in PARAMETERS}


@pytest.mark.parametrize("name", PARTS)
def test_methods_name_their_parameters(name):
    """One argument may be told of in the summary, in its shape or by its name; more need a list."""
    found = NAMES[name]
    taken = parameters(found) if inspect.isfunction(found) else set()
    assert len(taken) <= 1 or taken <= documented(found)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_function_says_what_it_returns(name):
    found = NAMES[name]
    if inspect.signature(found).return_annotation not in (None, "None", inspect.Signature.empty):
        text = Docstring(inspect.getdoc(found))
        assert text["Returns"] or text["Yields"]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_errors_raised_here_are_listed(name):
    raised = set(re.findall(r"raise (\w+Error)\b", inspect.getsource(NAMES[name])))
    entries = Docstring(inspect.getdoc(NAMES[name]))["Raises"]
    assert raised <= {kind for entry in entries for kind in re.findall(r"\w+Error", f"{entry.name} {entry.type}")}


@pytest.mark.parametrize("name", WHOLE)
def test_example_is_given(name):
    found = NAMES[name]
    protocol = getattr(found, "_is_protocol", False)
    assert protocol or ">>> " in (found.__doc__ or "")


def test_every_public_module_is_looked_at():
    listed = {f"fisherop.{name}" for name in fisherop.__all__ if inspect.ismodule(getattr(fisherop, name))}
    assert listed <= set(MODULES)
