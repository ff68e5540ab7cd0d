"""One page of a survey, complete in itself: curves over layers, spectra, pictures, a table, failures.

Pictures are PNG at the image's own resolution, magnified by the browser without interpolation; figures are SVG.
"""

# ruff: noqa: RUF001 - the page speaks of λ, α, ± and ×

from __future__ import annotations

import base64
import errno
import html
import io
import json
import math
import os
import time
import uuid
import warnings
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fisherop.surveys.cells import OUTPUT
from fisherop.surveys.comparison import compare
from fisherop.surveys.store import Damaged

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from fisherop.result import Eigendistortions
    from fisherop.surveys.opened import Record, Survey

ROWS = 2000
"""Rows of the table; the rest is left to `Survey.table`."""

NAME_LENGTH = 32
"""Letters of a name in a figure; the rest of the page has all of them."""

DECADES = 12
"""How far below the largest eigenvalue of all others are drawn."""

SHOWN = 160
"""Pixels of the screen that a picture is magnified to at least."""


def write(survey: Survey, path: Path, title: str, pictures: int) -> None:
    """Write the page, whole or not at all."""
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, "a page is written to a file, and this is a folder", str(path))
    sections = [_summary(survey), *_by_settings(survey, pictures), _failures(survey)]
    page = Template(PAGE).substitute(
        title=html.escape(title),
        when=time.strftime("%d %B %Y, %H:%M"),
        body="\n".join(section for section in sections if section),
    )
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        partial.write_text(page, encoding="utf-8", errors="backslashreplace")
        os.replace(partial, path)
    except OSError as error:  # which would name a file that nobody asked for
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


def _by_settings(survey: Survey, pictures: int) -> Iterator[str]:
    """Yield the sections of every group of cells with the same settings."""
    groups = sorted({record.settings for record in survey.records if record.done})
    for settings in groups:
        members = [record for record in survey.records if record.settings == settings and record.done]
        part = type(survey)(survey._store, members)
        if len(groups) > 1:
            yield f"<h2 class=group>{_asked(json.loads(settings))}</h2>"
        yield _curves(part)
        yield _spectra(part)
        yield _pictures(part, pictures)
        yield _table(part)


def _escaped(x: Any) -> str:
    return html.escape(str(x))


def _drawn(name: str) -> str:
    """Return a name as matplotlib draws it: no formula, nothing that ends a line, and not out of all proportion."""
    spelled = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in name)
    shown = spelled if len(spelled) <= NAME_LENGTH else spelled[: NAME_LENGTH - 1] + "…"
    return (" " if shown.startswith("_") else "") + shown.replace("$", r"\$")  # legends leave names out that begin so


def _observer(record: Record) -> str:
    return record.model if record.layer == OUTPUT else f"{record.model} {record.layer}"


def _asked(settings: dict[str, Any]) -> str:
    known = {"k": "k", "which": "which", "method": "method", "noise": "noise", "tol": "tol", "seed": "seed"}
    words = [f"{name} = {settings[key]}" for key, name in known.items() if settings[key] is not None]
    return _escaped(", ".join(words))


# ------------------------------------------------------------------------------------------------------------- summary


def _summary(survey: Survey) -> str:
    done = [record for record in survey.records if record.done]
    pairs = sum(len(record.pairs) for record in done if record.pairs is not None)
    short = sum(int((record.pairs[:, 3] == 0).sum()) for record in done if record.pairs is not None)
    failed = len(survey) - len(done)
    tiles = [
        (len(survey.images), "image" if len(survey.images) == 1 else "images"),
        (len(survey.models), "model" if len(survey.models) == 1 else "models"),
        (len(survey.layers), "layer" if len(survey.layers) == 1 else "layers"),
        (len(done), "cells done"),
        (failed, "failed"),
        (f"{pairs - short} of {pairs}", "pairs converged"),
    ]
    boxes = "".join(
        f'<div class="tile{" bad" if words == "failed" and failed else ""}"><b>{value}</b>{words}</div>'
        for value, words in tiles
    )
    asked = "".join(f"<li>{_asked(json.loads(text))}</li>" for text in sorted({r.settings for r in survey.records}))
    versions = sorted({record.versions for record in done})
    made = "; ".join(", ".join(f"{name} {v}" for name, v in json.loads(text).items()) for text in versions)
    seconds = sum(record.seconds for record in done)
    spent = f"{seconds / 3600:.1f} h" if seconds > 3600 else f"{seconds:.1f} s"
    notes = dict.fromkeys(note for record in done for note in record.notes)
    listed = "".join(f"<li>{_escaped(note)}</li>" for note in list(notes)[:12])
    more = f"<li>and {len(notes) - 12} more</li>" if len(notes) > 12 else ""
    return (
        f'<div class="tiles">{boxes}</div>'
        f"<p>Asked of every cell:</p><ul>{asked}</ul>"
        f"<p class=quiet>{_escaped(made)}. Time of all cells together: {spent}.</p>"
        + (f"<h3>To be known</h3><ul>{listed}{more}</ul>" if notes else "")
    )


def _failures(survey: Survey) -> str:
    failures = survey.failures()
    if not failures:
        return ""
    items = "".join(
        f"<details><summary>{_escaped(failure)}</summary><pre>{_escaped(failure.traceback)}</pre></details>"
        for failure in failures[:200]
    )
    rest = f"<p>and {len(failures) - 200} more</p>" if len(failures) > 200 else ""
    return f"<h2>Failed</h2>{items}{rest}"


# ------------------------------------------------------------------------------------------------------------- figures


def _curves(survey: Survey) -> str:
    """Return the figure of largest and smallest eigenvalue and D, over layers, with the error across images."""
    found = compare(survey, None, None, angles=False).curves
    quantities = {
        "log10_most": "largest eigenvalue, log₁₀ λ",
        "log10_least": "smallest one found, log₁₀ λ",
        "D": "D, log threshold least − most",
    }
    panels = [name for name in quantities if found[found.quantity == name]["mean"].notna().any()]
    if not panels:
        return ""
    fig = _figure(4.1 * len(panels), 3.4)
    axes = fig.subplots(1, len(panels), squeeze=False)[0]
    for ax, quantity in zip(axes, panels, strict=True):
        for model in survey.models:
            rows = found[(found.model == model) & (found.quantity == quantity)]
            x = [survey.layers.index(layer) for layer in rows.layer]
            ax.errorbar(
                x, rows["mean"], rows["error"].fillna(0), marker="o", markersize=4, capsize=2, label=_drawn(model)
            )
        ax.set_title(quantities[quantity], loc="left", fontsize=10)
        layers = [_drawn(layer) for layer in survey.layers]
        ax.set_xticks(range(len(layers)), layers, rotation=45 if len(layers) > 4 else 0, fontsize=8)
        ax.margins(x=0.15)
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].legend(frameon=False, fontsize=8)
    words = "Mean across images; bars are its standard error. Infinite values are left out."
    return f"<h2>Layers</h2><figure>{_svg(fig)}<figcaption>{words}</figcaption></figure>"


def _spectra(survey: Survey) -> str:
    """Return the figure of eigenvalues over their index: those found, or the whole spectrum where it was kept."""
    columns = min(3, len(survey.models))
    lines = math.ceil(len(survey.models) / columns)
    fig = _figure(4.1 * columns, 3.2 * lines)
    axes = fig.subplots(lines, columns, squeeze=False, sharey=True).ravel()
    limits = _limits([_positive(record)[1] for record in survey.records if record.pairs is not None])
    for ax, model in zip(axes, survey.models, strict=False):
        ax.set(xscale="log", yscale="log", ylim=limits)  # given, for panels that share an axis also share its range
        drawn = False
        for number, layer in enumerate(survey.layers):
            cells = [r for r in survey.records if (r.model, r.layer) == (model, layer) and r.pairs is not None]
            for i, record in enumerate(cells):
                position, values = _positive(record)
                line: dict[str, Any] = {"linewidth": 1} if _whole(record) else {"marker": "o", "ls": "", "ms": 4}
                alpha, label = 0.25 + 0.75 / len(cells), _drawn(layer) if i == 0 else None
                ax.plot(position, values, color=f"C{number % 10}", alpha=alpha, label=label, **line)
                drawn |= bool((values >= limits[0]).any())
        if not drawn:
            none = not any(len(_positive(r)[1]) for r in survey.records if r.model == model and r.pairs is not None)
            ax.text(0.5, 0.5, "zero" if none else "below this range", transform=ax.transAxes, ha="center")
        ax.set_title(_drawn(model), loc="left", fontsize=10)
        ax.set_xlabel("position in the spectrum, from 1", fontsize=8)
        ax.spines[["top", "right"]].set_visible(False)
        ax.legend(frameon=False, fontsize=7)
    for ax in axes[len(survey.models) :]:
        ax.set_visible(False)
    axes[0].set_ylabel("eigenvalue λ", fontsize=9)
    words = "whole spectra" if any(map(_whole, survey.records)) else "the eigenvalues found"
    return (
        f"<h2>Spectra</h2><figure>{_svg(fig)}<figcaption>One line or set of dots for every image: {words}. What is "
        f"zero, or more than {DECADES} decades below the largest of all, is not drawn.</figcaption></figure>"
    )


def _whole(record: Record) -> bool:
    return "eigenvalues" in (record.spectrum or {})


def _positive(record: Record) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return positions, from 1, and eigenvalues of a cell, of the whole spectrum where it was kept, but for zeros."""
    if record.spectrum and _whole(record):
        index, values = np.array(record.spectrum["index"]), np.array(record.spectrum["eigenvalues"])
    else:
        assert record.pairs is not None
        values, index = record.pairs[:, :2].T
    return index[values > 0] + 1, values[values > 0]


def _limits(values: list[NDArray[np.float64]]) -> tuple[float, float]:
    """Return the ends of the axis of eigenvalues, which all panels share."""
    together = np.concatenate(values)
    if not len(together):
        return 0.1, 10.0
    high = float(together.max())
    low = float(together[together >= high * 10.0**-DECADES].min())
    room = max(3.0, (high / low) ** 0.05)
    return low / room, high * room


def _figure(width: float, height: float) -> Figure:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('a report has figures, drawn with matplotlib: pip install "fisherop[plot]"') from error
    return Figure(figsize=(width, height), layout="constrained")


def _svg(fig: Figure) -> str:
    from matplotlib import rc_context

    buffer = io.StringIO()
    settings: Any = {"svg.fonttype": "none", "font.family": "sans-serif", "svg.hashsalt": "fisherop"}
    with rc_context(settings), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # the browser draws the text, with fonts of its own
        fig.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]


# ------------------------------------------------------------------------------------------------------------ pictures


def _pictures(survey: Survey, count: int) -> str:
    """Return the first images, each with the most and the least noticeable distortion of every model and layer."""
    sections = []
    for image in survey.images[:count]:
        cells = [record for record in survey.records if record.image == image]
        cards = [card for record in cells if (card := _card(survey, record))]
        if cards:
            sections.append(f"<h3>{_escaped(image)}</h3><div class=cards>{''.join(cards)}</div>")
    left = len(survey.images) - count
    rest = f"<p class=quiet>{left} more images are in the store: ask for them with report(pictures=…).</p>"
    if not sections:
        return ""
    return (
        "<h2>Distortions</h2><p>Of each model and layer what it notices most, and least: added to the image, all at "
        "the same norm (5 % of the pixel range, root mean square), and below it alone, scaled to be seen. Pixels range "
        "from 0 to 1, or, where an image has others, from its least to its largest.</p>"
        + "".join(sections)
        + (rest if left > 0 else "")
    )


def _card(survey: Survey, record: Record) -> str:
    """Return the pictures of a cell, or nothing where it is no image that can be seen."""
    from fisherop.plot.panels import clipped, panels_of
    from fisherop.plot.sizes import norm

    head = f"<h4>{_escaped(_observer(record))}</h4>"
    try:
        result = survey.read(record)
        picture, distortions = panels_of(result, None, None)
    except Damaged as error:
        return f"<div class=card>{head}<p class=bad>{_escaped(error)}</p></div>"
    except ValueError:
        return ""
    if picture.ndim != 3 or not np.isfinite(picture).all():
        return ""
    low, high = _range(picture)
    alpha = norm(picture.size, picture, (low, high))
    ends = [0, len(result) - 1] if len(result) > 1 else [0]
    columns = []
    for i in ends:
        place = {0: "noticed most", record.fact("n") - 1: "noticed least"}.get(int(result.index[i]), "")
        v = distortions[i]
        distorted, share = clipped(picture + alpha * v, (low, high))
        distorted = (distorted - low) / (high - low)
        alone = 0.5 + 0.5 * v / (np.abs(v).max() or 1.0)
        columns.append(
            f"<div><p>{place}</p>{_img(distorted, f'{record.image} distorted')}{_img(alone, 'the distortion alone')}"
            f"<p>{_words(result, record, i)}{f'; {100 * share:.2g} % clipped' if share else ''}</p></div>"
        )
    unusual = "" if (low, high) == (0.0, 1.0) else f"<p class=quiet>black is {low:.3g}, white {high:.3g}</p>"
    return f"<div class=card>{head}{unusual}<div class=ends>{''.join(columns)}</div></div>"


def _range(picture: NDArray[np.float64]) -> tuple[float, float]:
    """Return black and white: 0 and 1, or the ends of an image that has values beyond these."""
    low, high = float(picture.min()), float(picture.max())
    if low >= 0 and high <= 1:
        return 0.0, 1.0
    return (low, high) if low < high else (low - 0.5, low + 0.5)


def _words(result: Eigendistortions, record: Record, i: int) -> str:
    threshold = record.thresholds[i]
    size = f"threshold {threshold:.3g}" if np.isfinite(threshold) else "never noticed"
    state = "" if result.converged[i] else " <b class=bad>not converged</b>"
    return f"index {int(result.index[i])}, λ = {result.eigenvalues[i]:.3g}, {size}{state}"


def _img(pixels: NDArray[np.float64], words: str) -> str:
    from matplotlib.image import imsave

    array = np.round(pixels.clip(0, 1) * 255).astype(np.uint8)
    if array.shape[-1] == 1:
        array = array.repeat(3, axis=-1)
    buffer = io.BytesIO()
    imsave(buffer, array, format="png")
    zoom = max(1, math.ceil(SHOWN / max(array.shape[:2])))
    height, width = (zoom * side for side in array.shape[:2])
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img src="data:image/png;base64,{data}" width="{width}" height="{height}" alt="{_escaped(words)}">'


# --------------------------------------------------------------------------------------------------------------- table


def _table(survey: Survey) -> str:
    names = ["image", "model", "layer", "index", "λ", "threshold", "residual", "converged", "method", "products"]
    rows = []
    for record in survey.records:
        if record.pairs is None:
            continue
        for pair, threshold in zip(record.pairs, record.thresholds, strict=True):
            cells = [
                *(_escaped(name) for name in (record.image, record.model, record.layer)),
                f"{pair[1]:.0f}",
                f"{pair[0]:.4g}",
                f"{threshold:.4g}" if math.isfinite(threshold) else "∞",
                f"{pair[2]:.1e}",
                "yes" if pair[3] else "<b class=bad>no</b>",
                _escaped(record.fact("method")),
                f"{record.fact('n_matvec')}",
            ]
            rows.append(f"<tr>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>")
    head = "".join(f"<th>{name}</th>" for name in names)
    left = len(rows) - ROWS
    more = f"<p class=quiet>{left} more rows are left to Survey.table().</p>" if left > 0 else ""
    return (
        f"<h2>Table</h2><p class=quiet>A click on a heading sorts by it.</p><div class=wide><table><thead>"
        f"<tr>{head}</tr></thead><tbody>{''.join(rows[:ROWS])}</tbody></table></div>{more}"
    )


PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>
body { font: 16px/1.5 system-ui, sans-serif; color: #1c1c1c; background: #fff; max-width: 1240px; margin: 2rem auto;
  padding: 0 1.5rem; }
h1 { margin-bottom: 0; font-weight: 600; }
h2 { margin-top: 2.5rem; border-bottom: 1px solid #ddd; font-weight: 600; }
h3, h4 { margin: 1.2rem 0 .4rem; font-weight: 600; }
h4 { margin-top: 0; font-size: .95rem; }
.group { background: #eef2f7; padding: .3rem .6rem; border: 0; }
.quiet, figcaption { color: #666; font-size: .9rem; }
.bad, .tile.bad b { color: #b22222; }
.tiles { display: flex; flex-wrap: wrap; gap: 1rem; margin: 1.2rem 0; }
.tile { border: 1px solid #ddd; border-radius: 6px; padding: .5rem 1.1rem; color: #555; }
.tile b { display: block; font-size: 1.5rem; color: #1c1c1c; font-weight: 600; }
figure { margin: 1rem 0; }
figure svg { max-width: 100%; height: auto; }
.cards { display: flex; flex-wrap: wrap; gap: 1.2rem; }
.card { border: 1px solid #ddd; border-radius: 6px; padding: .7rem; }
.ends { display: flex; gap: .7rem; }
.ends img { display: block; margin-bottom: .35rem; image-rendering: pixelated; }
.ends p { font-size: .78rem; color: #444; margin: 0; max-width: 180px; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .2rem .8rem .2rem 0; border-bottom: 1px solid #eee; white-space: nowrap; }
th { cursor: pointer; position: sticky; top: 0; background: #fff; }
details { margin: .3rem 0; }
pre { background: #f6f6f6; padding: .6rem; overflow-x: auto; font-size: .8rem; }
</style>
</head>
<body>
<h1>$title</h1>
<p class="quiet">Eigendistortions: what models notice most and least of images. Written by fisherop on $when.</p>
$body
<script>
document.querySelectorAll("th").forEach(function (head) {
  head.addEventListener("click", function () {
    var body = head.closest("table").tBodies[0], place = head.cellIndex, down = head.dataset.down !== "1";
    head.dataset.down = down ? "1" : "0";
    var value = function (row) {
      var text = row.cells[place].textContent, number = text === "∞" ? Infinity : parseFloat(text);
      return isNaN(number) ? text : number;
    };
    Array.from(body.rows).sort(function (a, b) {
      var x = value(a), y = value(b);
      return (x < y ? -1 : x > y ? 1 : 0) * (down ? 1 : -1);
    }).forEach(function (row) { body.appendChild(row); });
  });
});
</script>
</body>
</html>
"""
