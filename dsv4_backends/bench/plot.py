"""Draw a benchmark's result: a roofline for each op. Needs matplotlib, the extra ``plot``."""

from __future__ import annotations

import math
import re
from collections import Counter
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from ..errors import PolicyError
from .results import Result, Row

SUFFIXES = (".svg", ".png", ".pdf")
COLOURS = ("#0b6e99", "#d1672b", "#4c8c3b", "#8a4fa3", "#6b6b6b")
MARKERS = ("o", "s", "^", "D", "v")


def require(path: str | Path) -> None:
    """Check that a figure can be drawn, before an hour of measuring.

    Raises:
        PolicyError: matplotlib does not import, or the suffix is not one of a format.
    """
    if Path(path).suffix.lower() not in SUFFIXES:
        raise PolicyError(f"plot: expected a file that ends with {', '.join(SUFFIXES)}, got {str(path)!r}")
    try:
        from matplotlib import pyplot  # noqa: F401
    except Exception as error:  # built for another NumPy it may raise anything
        found = f"{type(error).__name__}: {error}"
        raise PolicyError(f"plot: needs matplotlib (pip install matplotlib): {found}") from error


def plot(result: Result, path: str | Path) -> None:
    """Write a figure with a panel for each op; the suffix of ``path`` decides the format.

    A panel has TFLOP/s across (logarithmic), a line for each row, a mark for each provider, and as a bar the roof at
    the row's arithmetic intensity. The distance from a mark to the bar is the possible gain. There is no axis of
    intensity: the rows of an op have similar intensities and would hide each other.

    Raises:
        PolicyError: matplotlib is not installed, another suffix, or no row has a time.
    """
    require(path)
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    rows = [row for row in result.rows if row.timed]
    ops = list(dict.fromkeys(row.op for row in rows))
    if not ops:
        raise PolicyError("--plot: no row has a time")
    panels = [[row for row in rows if row.op == op] for op in ops]
    columns = 2 if len(ops) > 1 else 1
    tall = [max(map(len, panels[i : i + columns])) + 3 for i in range(0, len(ops), columns)]
    names = list(dict.fromkeys(timing.label for row in rows for timing in row.timings))
    with matplotlib.rc_context({"svg.hashsalt": "dsv4-backends", "svg.fonttype": "none", "font.size": 9}):
        size = (7.5 * columns, 0.24 * sum(tall) + 0.9)
        figure, axes = pyplot.subplots(len(tall), columns, figsize=size, squeeze=False, height_ratios=tall)
        for axis in axes.flat[len(ops) :]:
            axis.set_axis_off()
        for axis, panel in zip(axes.flat, panels, strict=False):
            _panel(axis, panel, names, result)
        shown: dict[str, Any] = {}
        for axis in axes.flat:
            handles, labels = axis.get_legend_handles_labels()
            shown.update(zip(labels, handles, strict=True))
        order = [name for name in (*names, *_ROOFS) if name in shown]
        figure.legend([shown[name] for name in order], order, loc="upper right", ncols=len(order), frameon=False)
        packages = ", ".join(f"{name} {version}" for name, version in result.machine.packages.items())
        figure.suptitle(f"{result.device.name}, {result.date}\n{packages}", x=0.01, ha="left", fontsize=9)
        figure.tight_layout(rect=(0, 0, 1, 0.99))
        svg = Path(path).suffix.lower() == ".svg"
        figure.savefig(path, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")) if svg else None, dpi=100)
        pyplot.close(figure)
        if svg:
            _shrink(Path(path))


_SVG = "{http://www.w3.org/2000/svg}"
_NUMBERS = ("d", "height", "transform", "viewBox", "width", "x", "y")


def _shrink(path: Path) -> None:
    """Rewrite matplotlib's SVG in a third of its bytes: a class for each style, no names, 1/100 of a point."""
    ElementTree.register_namespace("", _SVG[1:-1])
    ElementTree.register_namespace("xlink", "http://www.w3.org/1999/xlink")
    root = ElementTree.parse(path).getroot()
    styles = Counter(style for element in root.iter() if (style := element.get("style")))
    classes = {style: f"s{index}" for index, (style, count) in enumerate(styles.items()) if count > 1}
    for element in root.iter():
        if element.tag == f"{_SVG}g":
            element.attrib.pop("id", None)
        if (style := element.get("style")) in classes:
            del element.attrib["style"]
            element.set("class", classes[style])
        for name in _NUMBERS:
            if value := element.get(name):
                rounded = re.sub(r"-?\d+\.\d+", lambda m: f"{float(m[0]):.2f}".rstrip("0").rstrip("."), value)
                element.set(name, " ".join(rounded.split()))
        if not (element.text or "").strip():
            element.text = None
        element.tail = "\n"
    _flatten(root)
    sheet = root.find(f".//{_SVG}style")
    assert sheet is not None, "matplotlib writes one"
    sheet.text = "\n".join([sheet.text or "", *(f".{name}{{{style}}}" for style, name in classes.items())])
    ElementTree.ElementTree(root).write(path, encoding="utf-8", xml_declaration=True)


def _flatten(parent: ElementTree.Element) -> None:
    """Replace a group without attributes by its children."""
    children: list[ElementTree.Element] = []
    for child in parent:
        _flatten(child)
        children += child if child.tag == f"{_SVG}g" and not child.attrib else [child]
    parent[:] = children


_ROOFS = {"roof: memory": "#8c8c8c", "roof: arithmetic": "black"}


def _panel(axis: Any, rows: list[Row], names: list[str], result: Result) -> None:
    from matplotlib import ticker

    places = range(len(rows))
    roofs = [row.flops / result.floor_us(row) / 1e6 for row in rows]
    for place, row, roof in zip(places, rows, roofs, strict=True):
        best = max(row.flops / us / 1e6 for us in row.timed.values())
        axis.plot([best, roof], [place, place], color="#dddddd", linewidth=1, zorder=1)
    by_memory = [math.isclose(result.floor_us(row), row.bytes / result.rates.memory_gbps / 1e3) for row in rows]
    for label, colour in _ROOFS.items():
        at = [place for place in places if by_memory[place] == (label == "roof: memory")]
        axis.scatter([roofs[i] for i in at], at, marker="|", s=120, linewidths=2.2, color=colour, label=label, zorder=2)
    for index, name in enumerate(names):
        points = [(row.flops / row.timed[name] / 1e6, i) for i, row in enumerate(rows) if name in row.timed]
        if points:
            axis.scatter(
                *zip(*points, strict=True),
                s=30,
                marker=MARKERS[index % len(MARKERS)],
                color=COLOURS[index % len(COLOURS)],
                label=name,
                linewidths=0,
                alpha=0.9,
                zorder=3,
            )
    axis.set_yticks(places, [row.name for row in rows], fontsize=8)
    axis.set_ylim(len(rows) - 0.4, -0.6)
    axis.set(xscale="log", xlabel="TFLOP/s")
    lowest = min(row.flops / max(row.timed.values()) / 1e6 for row in rows)
    span = max(roofs) / lowest
    steps = (1, 1.5, 2, 3, 5, 7) if span < 4 else (1, 2, 5) if span < 50 else (1,)
    axis.xaxis.set_major_locator(ticker.LogLocator(subs=steps))
    axis.xaxis.set_major_formatter("{x:g}")
    axis.xaxis.set_minor_locator(ticker.NullLocator())
    axis.set_title(rows[0].op, loc="left", fontsize=10, fontweight="bold")
    axis.grid(True, axis="x", which="major", color="#eeeeee", linewidth=0.8, zorder=0)
    axis.spines[["top", "right", "left"]].set_visible(False)
    axis.tick_params(axis="y", length=0)
