"""The report of a finished run: pictures and one Markdown page that shows them."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

__all__ = ["Curve", "write_report"]

_DPI = 120


class Curve(Protocol):
    """Symmetry errors over the size of the group element."""

    @property
    def magnitudes(self) -> np.ndarray:
        """Sizes of the group elements."""
        ...

    @property
    def errors(self) -> np.ndarray:
        """Relative errors at these sizes."""
        ...


def write_report(
    folder: str | Path,
    *,
    title: str,
    history: Sequence[Mapping[str, Any]],
    summary: Mapping[str, Any],
    confusion: np.ndarray | None = None,
    labels: Sequence[str] | None = None,
    symmetry: Mapping[str, Curve] | None = None,
    baselines: Mapping[str, float] | None = None,
) -> Path:
    """Writes `report.md` and its pictures into a folder.

    Args:
        folder: where to write; made if missing.
        title: the heading.
        history: one mapping a logged step, each with "step" and any numbers; names with the same last part
            ("train/loss", "test/loss", "loss") share a panel.
        summary: what the table lists, in this order.
        confusion: counts `[true class, predicted class]`.
        labels: the names of the classes.
        symmetry: error curves by name, drawn on logarithmic axes.
        baselines: results of other methods, listed below the summary.

    Returns:
        The path of `report.md`.

    Raises:
        ValueError: if the confusion counts are not square, or the labels do not fit them.
    """
    if confusion is not None:
        confusion = np.asarray(confusion)
        if confusion.ndim != 2 or confusion.shape[0] != confusion.shape[1]:
            raise ValueError(f"confusion must be square, got shape {confusion.shape}; count [true, predicted]")
        if labels is not None and len(labels) != len(confusion):
            raise ValueError(f"labels must name all {len(confusion)} classes, got {len(labels)}; pass one a class")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    text = [f"# {title}", "", _table(("", "result"), summary)]
    if baselines:
        text += ["", "## Baselines", "", _table(("method", "result"), baselines)]
    panels = _panels(history)
    if panels:
        _save(_draw_curves(panels), folder / "training_curves.png")
        text += ["", "## Training", "", "![training curves](training_curves.png)"]
    if confusion is not None:
        names = [str(name) for name in (labels if labels is not None else range(len(confusion)))]
        _save(_draw_confusion(confusion, names), folder / "confusion.png")
        text += ["", "## Confusion", "", "![confusion counts](confusion.png)", "", _mistakes(confusion, names)]
    if symmetry:
        _save(_draw_symmetry(symmetry), folder / "symmetry_error.png")
        worst = {name: float(np.max(np.asarray(curve.errors))) for name, curve in symmetry.items()}
        text += ["", "## Symmetry", "", "![symmetry error](symmetry_error.png)", ""]
        text += [_table(("curve", "largest relative error"), worst)]
    path = folder / "report.md"
    path.write_text("\n".join(text) + "\n", encoding="utf-8")
    return path


def _format(value: Any) -> str:
    """Writes a value for a table cell."""
    if isinstance(value, bool | np.bool_):
        return "yes" if value else "no"
    if isinstance(value, int | np.integer):
        return f"{int(value):,}"
    if isinstance(value, float | np.floating) or (hasattr(value, "shape") and value.shape == ()):
        number = float(value)
        return f"{number:.6g}" if math.isfinite(number) else str(number)
    return " ".join(str(value).replace("|", "\\|").split())


def _table(head: tuple[str, str], rows: Mapping[str, Any]) -> str:
    """Writes a Markdown table of two columns."""
    lines = [f"| {head[0]} | {head[1]} |", "|---|---|"]
    return "\n".join(lines + [f"| {_format(name)} | {_format(value)} |" for name, value in rows.items()])


def _mistakes(confusion: np.ndarray, names: Sequence[str]) -> str:
    """Says how many examples were right and which confusions were the most frequent."""
    total, right = int(confusion.sum()), int(np.trace(confusion))
    wrong = np.array(confusion)
    np.fill_diagonal(wrong, 0)
    order = np.argsort(-wrong, axis=None, kind="stable")[:3]
    pairs = [divmod(int(place), len(confusion)) for place in order]
    listed = [f"{names[true]} taken for {names[said]} ({int(wrong[true, said])})" for true, said in pairs]
    listed = [entry for entry, (true, said) in zip(listed, pairs, strict=True) if wrong[true, said] > 0]
    tail = f" Most frequent mistakes: {', '.join(listed)}." if listed else ""
    return f"{right:,} of {total:,} right.{tail}"


def _panels(history: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, tuple[np.ndarray, np.ndarray]]]:
    """Sorts the numbers of the history into panels of named curves."""
    curves: dict[str, list[tuple[float, float]]] = {}
    for place, row in enumerate(history):
        step = float(row.get("step", place))
        for name, value in row.items():
            if name in ("step", "time") or isinstance(value, str | bool) or np.ndim(value) != 0 or value is None:
                continue
            curves.setdefault(name, []).append((step, float(value)))
    panels: dict[str, dict[str, tuple[np.ndarray, np.ndarray]]] = {}
    for name, points in curves.items():
        steps, values = np.asarray(points, float).T
        panels.setdefault(name.rsplit("/", 1)[-1], {})[name] = (steps, values)
    return panels


def _draw_curves(panels: Mapping[str, Mapping[str, tuple[np.ndarray, np.ndarray]]]) -> Figure:
    """Draws one panel for each quantity."""
    columns = min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(4.2 * columns, 3.2 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).reshape(-1)
    for axis, (title, curves) in zip(axes, panels.items(), strict=False):
        for name, (steps, values) in curves.items():
            axis.plot(steps, values, label=name, linewidth=1.4, marker="." if len(steps) < 30 else None)
        everything = np.concatenate([values for _, values in curves.values()])
        finite = everything[np.isfinite(everything)]
        if title == "loss" and len(finite) and finite.min() > 0 and finite.max() > 20 * finite.min():
            axis.set_yscale("log")
        axis.set(title=title, xlabel="step")
        axis.grid(alpha=0.3)
        if len(curves) > 1:
            axis.legend(fontsize="small")
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    return figure


def _draw_confusion(confusion: np.ndarray, names: Sequence[str]) -> Figure:
    """Draws the counts as shares of each true class, with the counts written in where there is room."""
    count = len(confusion)
    side = min(12.0, 2.4 + 0.42 * count)
    figure = Figure(figsize=(side + 0.8, side), layout="constrained")
    axis = figure.subplots()
    shares = confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1)
    # A root brings out the few mistakes beside a diagonal near 1.
    picture = axis.imshow(np.sqrt(shares), cmap="Blues", vmin=0, vmax=1)
    if count <= 20:
        for true, said in np.argwhere(confusion):
            colour = "white" if shares[true, said] > 0.3 else "black"
            axis.text(said, true, f"{confusion[true, said]:g}", ha="center", va="center", color=colour, fontsize=8)
    if count <= 40:
        axis.set_xticks(range(count), names, rotation=90 if max(map(len, names)) > 2 else 0)
        axis.set_yticks(range(count), names)
    axis.set(xlabel="predicted", ylabel="true")
    bar = figure.colorbar(picture, ax=axis, shrink=0.8, label="share of the true class")
    bar.set_ticks([math.sqrt(share) for share in (0, 0.01, 0.1, 0.5, 1)], labels=["0", "0.01", "0.1", "0.5", "1"])
    return figure


def _draw_symmetry(symmetry: Mapping[str, Curve]) -> Figure:
    """Draws error curves on logarithmic axes."""
    figure = Figure(figsize=(6.4, 4.4), layout="constrained")
    axis = figure.subplots()
    positive = [error for curve in symmetry.values() for error in np.asarray(curve.errors, float).flat if error > 0]
    smallest = min(positive, default=1e-7) / 10  # stands for an error of exactly 0, which has no logarithm
    for name, curve in symmetry.items():
        magnitudes, errors = np.asarray(curve.magnitudes, float), np.asarray(curve.errors, float)
        order = np.argsort(magnitudes)
        shown = magnitudes[order] > 0
        axis.plot(magnitudes[order][shown], np.maximum(errors[order][shown], smallest), marker="o", label=name)
    axis.set(xscale="log", yscale="log", xlabel="size of the group element", ylabel="relative symmetry error")
    axis.grid(alpha=0.3, which="both")
    axis.legend(fontsize="small")
    return figure


def _save(figure: Figure, path: Path) -> None:
    """Renders without a display and without pyplot's global state."""
    FigureCanvasAgg(figure)
    figure.savefig(path, dpi=_DPI)
