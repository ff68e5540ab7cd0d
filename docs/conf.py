"""Sphinx configuration: `sphinx-build -W -b html docs docs/_build/html`, on two cores in a few minutes.

The tutorial and the gallery are run by the build. The pages of the API are written by it, from the lists below and
what the package names as public, so that no public name can be forgotten. Nothing is fetched, unless the environment
has FISHEROP_DOCS_ONLINE=1: then names of other projects are links to their documentation (intersphinx).
"""

import importlib
import inspect
import os
import shutil
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

from docutils import nodes

import fisherop

HERE = Path(__file__).parent
GENERATED = HERE / "generated"  # not under version control

project = "fisherop"
author = "The fisherop developers"
copyright = author
release = version = fisherop.__version__

extensions = [
    "myst_parser",
    "numpydoc",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.intersphinx",
    "sphinx.ext.mathjax",
    "sphinx.ext.viewcode",
    "sphinx_gallery.gen_gallery",
]
exclude_patterns = ["_build", "upstream", "generated/start/index.*", "**/README.*", "**/GALLERY_HEADER.*"]
templates_path = ["_templates"]
default_role = "py:obj"
# Names with a role must be found; those in plain backquotes may be parameters. Other projects' need a network.
nitpicky = True
nitpick_ignore_regex = [("py:obj", ".*"), ("py:.*", r"(torch|numpy|scipy|matplotlib)\..*")]

myst_enable_extensions = ["amsmath", "attrs_inline", "colon_fence", "dollarmath"]
myst_heading_anchors = 3

html_theme = "pydata_sphinx_theme"
html_title = f"fisherop {version}"
html_static_path = ["_static"]
html_css_files = ["house.css"]
html_show_sourcelink = False
html_sidebars = {page: [] for page in ("index", "generated/start/tutorial", "performance", "mathematics", "design")}
html_theme_options = {
    "navigation_with_keys": False,
    "secondary_sidebar_items": ["page-toc"],
    "footer_start": ["copyright"],
    "footer_end": [],
    "show_toc_level": 2,
}

intersphinx_mapping = (
    {
        "matplotlib": ("https://matplotlib.org/stable/", None),
        "numpy": ("https://numpy.org/doc/stable/", None),
        "python": ("https://docs.python.org/3/", None),
        "scipy": ("https://docs.scipy.org/doc/scipy/", None),
        "torch": ("https://docs.pytorch.org/docs/stable/", None),
    }
    if os.environ.get("FISHEROP_DOCS_ONLINE") == "1"
    else {}
)

numpydoc_show_class_members = False
numpydoc_attributes_as_param_list = True
autodoc_typehints = "none"  # the docstrings say it with shapes and units

sphinx_gallery_conf = {
    "examples_dirs": [str(GENERATED / "tutorial"), "gallery"],
    "gallery_dirs": ["generated/start", "generated/gallery"],
    "filename_pattern": r"\.py$",
    "ignore_pattern": r"__init__",
    "within_subsection_order": "FileNameSortKey",
    "download_all_examples": False,
    "image_scrapers": ("matplotlib",),
    "plot_gallery": "True",
    "abort_on_example_error": True,
    "remove_config_comments": True,
    "show_signature": False,
    "ignore_repr_types": r"matplotlib",
    "min_reported_time": 10**6,
    "write_computation_times": False,
}

# ------------------------------------------------------------------------------------------------------- what is built

NAMES = {
    "Operators": ["FisherOperator", "JacobianOperator", "sum_fisher", "mean_fisher"],
    "Eigendistortions": [
        "eigendistortions",
        "eigendistortions_many",
        "Eigendistortions",
        "ConvergenceWarning",
        "project_to_null",
        "NullProjection",
    ],
    "Models": ["Layer", "LN", "LG", "LGG", "OnOff"],
    "Comparing models": [
        "generalized_eigendistortions",
        "principal_distortions",
        "PrincipalDistortions",
        "discriminability",
        "thresholds",
        "threshold_table",
        "ThresholdTable",
    ],
    "The whole spectrum": [
        "trace",
        "logdet",
        "count",
        "effective_dimension",
        "spectral_density",
        "SpectralDensity",
        "sensitivity_map",
        "Estimate",
    ],
    "Surveys": ["survey", "Survey"],
}
MODULES = ["noise", "restrict", "images", "models", "plot", "spectrum", "plenoptic", "testing", "testing.strategies"]


def entries(prefix, names):
    """Return an autosummary of public names, each with a page of its own."""
    lines = [f".. currentmodule:: {prefix}", "", ".. autosummary::", "   :toctree: .", "   :nosignatures:", ""]
    return "\n".join(lines + [f"   {name}" for name in names]) + "\n\n"


def heading(title, line):
    """Return a title, underlined."""
    return f"{title}\n{line * len(title)}\n\n"


def public(module):
    """Return the public names of a module, without what the top of the package has as well."""
    found = {name: getattr(module, name) for name in module.__all__}
    return [name for name, x in found.items() if x is not getattr(fisherop, name, None) and not inspect.ismodule(x)]


def write_reference(folder):
    """Write the page of every public module, and the index of them all."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    top = [name for name in fisherop.__all__ if not inspect.ismodule(getattr(fisherop, name))]
    known = {name for names in NAMES.values() for name in names}
    groups = {title: [name for name in names if name in top] for title, names in NAMES.items()}
    groups["More"] = [name for name in top if name not in known]
    text = heading("API reference", "=") + "Everything public, by ``import fisherop as fo``.\n\n"
    for title, names in groups.items():
        if names:
            text += heading(title, "-") + entries("fisherop", names)
    text += heading("Modules", "-") + ".. toctree::\n   :maxdepth: 1\n\n"
    for name in MODULES:
        try:
            module = importlib.import_module(f"fisherop.{name}")
        except ModuleNotFoundError as error:
            if not (error.name or "").startswith("fisherop"):
                raise
            continue
        text += f"   fisherop.{name} <module-{name}>\n"
        page = heading(f"fisherop.{name}", "=") + f".. automodule:: fisherop.{name}\n\n"
        (folder / f"module-{name}.rst").write_text(page + entries(f"fisherop.{name}", public(module)))
    (folder / "index.rst").write_text(text)


def copy_tutorial():
    """Put the tutorial, which lies beside this file, into a folder of its own, as sphinx-gallery wants it."""
    folder = GENERATED / "tutorial"
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(HERE / "tutorial.py", folder)
    (folder / "GALLERY_HEADER.rst").write_text(heading("Tutorial", "="))


copy_tutorial()
write_reference(GENERATED / "api")
autosummary_generate = [str(path) for path in (GENERATED / "api").glob("*.rst")]

# Where the names of a class and a function differ in case only, their pages must not be one file on a Mac.
autosummary_filename_map = {
    f"fisherop.{name}": f"fisherop.{name}-function"
    for name in fisherop.__all__
    if name.islower() and any(name == other.lower() != other for other in fisherop.__all__)
}


def class_signature(app, what, name, obj, options, signature, returned):
    """Show how a class is called: by its __init__, where a SciPy operator's __new__ takes anything."""
    if what != "class" or "__init__" not in vars(obj):
        return None
    found = inspect.signature(obj.__init__)
    plain = [p.replace(annotation=p.empty) for p in list(found.parameters.values())[1:]]
    return str(found.replace(parameters=plain, return_annotation=found.empty)), None


def end_code_at_its_end(app, doctree):
    """Drop the empty line that ends an example on a page, which doctest needs."""
    for block in doctree.findall(nodes.literal_block):
        block.rawsource = block.astext().rstrip()  # code is highlighted where it equals the text
        block.children = [nodes.Text(block.rawsource)]


def setup(app):
    """Connect the two."""
    app.connect("autodoc-process-signature", class_signature)
    app.connect("doctree-read", end_code_at_its_end)
