"""Show a plan: on the terminal, as JSON, and as one HTML page with pictures drawn in SVG (nothing is loaded)."""

import html
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

COLOURS = ("#4477aa", "#66ccee", "#228833", "#ccbb44", "#ee6677", "#aa3377", "#bbbbbb", "#999933", "#882255")


# Words ----------------------------------------------------------------------------------------------------------------


def size(number: float) -> str:
    """Return bytes in words: `1.50 GiB`."""
    for unit, power in (("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if abs(number) >= 2**power:
            return f"{number / 2**power:,.2f} {unit}"
    return f"{number:,.0f} B"


def amount(number: float) -> str:
    """Return a count in words: `4.5 T`."""
    for unit, power in (("P", 15), ("T", 12), ("G", 9), ("M", 6), ("k", 3)):
        if abs(number) >= 10**power:
            return f"{number / 10**power:,.1f} {unit}"
    return f"{number:,.0f}"


def duration(seconds: float) -> str:
    """Return seconds in words: `12.3 ms`."""
    for unit, power in (("s", 0), ("ms", -3), ("µs", -6)):
        if seconds >= 10.0**power:
            return f"{seconds / 10.0**power:,.3g} {unit}"
    return f"{seconds * 1e9:,.3g} ns"


def mesh_words(mesh: Mapping[str, int]) -> str:
    """Return the axes that split something: `data=64, fsdp=4`."""
    return ", ".join(f"{name}={length}" for name, length in mesh.items() if length > 1) or "one device"


def verdict(report: Mapping[str, Any]) -> str:
    """Return whether it fits, and by how much."""
    memory = report["memory"]
    word = "fits" if memory["fits"] else "DOES NOT FIT"
    much = f"{size(abs(memory['spare']))} {'to spare' if memory['spare'] >= 0 else 'too much'}"
    sure = "" if memory["exact"] or memory["refused"] else " (estimate)"
    if memory["refused"] and memory["spare"] >= 0:
        much = "the compiler does not say by how much"
    return f"{word}: {size(memory['needed'])} of {size(memory['limit'])} a device, {much}{sure}"


def heading(report: Mapping[str, Any]) -> str:
    """Return what is planned, in a line."""
    place = report["topology"]
    pieces = f", in {report['accumulate']} pieces" if report["accumulate"] > 1 else ""
    how = "" if report["by_libtpu"] else ", not compiled" if not report["compiled"] else ", ESTIMATE"
    return (
        f"{report['title'] or report['config']} on {place['name']} ({place['devices']} devices{how}): "
        f"{mesh_words(report['mesh'])}; batch {report['batch_size']:,} ({report['batch_per_device']:g} a device)"
        f"{pieces}, remat {report['remat']}"
    )


def _shares(cycles: Mapping[str, int], total: int) -> str:
    """Return the share of each, largest first: `product 50.0%, copy 10.0%`."""
    order = sorted(cycles.items(), key=lambda pair: -pair[1])
    return ", ".join(f"{name} {each / max(1, total):.1%}" for name, each in order)


def lines(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the figures of a report as names and words."""
    work, time = report["work"], report["time"]
    moved = work["bytes_per_device"]
    found = [
        ("parameters", f"{report['parameters']:,}"),
        ("memory", verdict(report)),
        (
            "operations of a step",
            f"{amount(work['model_flops'])}FLOP, with recomputation {amount(work['program_flops'])}FLOP",
        ),
    ]
    if moved:
        bound = "arithmetic" if work["intensity"] >= work["balance"] else "memory"
        found.append(
            (
                "HBM traffic a device",
                f"{size(moved)}: {work['intensity']:,.0f} FLOP a byte; the chip balances at {work['balance']:,.0f} "
                f"({bound})",
            )
        )
    if time and not report["compiled"]:
        found.append(("step, were products at half of the peak", f"{duration(time['step'])} (nothing was compiled)"))
    elif time:
        kind = "estimate" if time["estimate"] else "by the compiler's cycles"
        found += [
            (
                "predicted step",
                f"{duration(time['step'])} ({kind}; {duration(time['least'])} if collectives cost nothing, "
                f"{duration(time['most'])} if nothing overlaps)",
            ),
            ("MFU", f"{time['mfu']:.1%}"),
            (
                "examples a second",
                f"{time['examples_per_second']:,.0f}, {time['examples_per_second_per_chip']:,.1f} a chip",
            ),
            (
                "computing, HBM, collectives",
                f"{duration(time['computing'])}, {duration(time['memory'])}, {duration(time['collectives'])} "
                f"({duration(time['exposed'])} exposed)",
            ),
        ]
    if report["cycles"] and report["by_libtpu"]:
        found.append(("cycles", _shares(report["cycles"]["by_kind"], report["cycles"]["total"])))
        if report["cycles"]["by_kernel"]:
            found.append(("of kernels", _shares(report["cycles"]["by_kernel"], report["cycles"]["total"])))
    tested = report["evaluation"]
    if tested:
        fits = "fits" if tested["fits"] else "DOES NOT FIT"
        rest = (
            f", {duration(tested['step'])}, {tested['examples_per_second']:,.0f} examples a second"
            if tested["step"]
            else ""
        )
        found.append(("evaluation step", f"batch {tested['batch_size']:,} {fits}{rest}"))
    if report["compile_seconds"]:
        found.append(("compiled in", duration(report["compile_seconds"])))
    return found


# Terminal -------------------------------------------------------------------------------------------------------------


def terminal(report: Mapping[str, Any], *, heaviest: int = 8, modules: int = 12) -> Group:
    """Return a report for `rich`."""
    parts: list[Any] = [Text(heading(report), style="bold")]
    figures = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for name, words in lines(report):
        figures.add_row(name, Text(words, style="red" if "DOES NOT FIT" in words else ""))
    parts.append(figures)
    memory = Table("memory of a device", "bytes", "share", header_style="bold")
    for name, value in report["memory"]["kinds"].items():
        memory.add_row(name, size(value), f"{value / max(1.0, report['memory']['limit']):.1%}")
    parts.append(memory)
    if report["collectives"]:
        sent = Table("collective", "axes", "times", "bytes", "alone", header_style="bold")
        for each in report["collectives"]:
            sent.add_row(
                each["kind"],
                ", ".join(each["axes"]),
                str(each["count"]),
                size(each["bytes"]),
                duration(each["seconds"]),
            )
        parts.append(sent)
    if report["modules"]:
        what = "cycles" if report["compiled"] else "operations"
        where = Table(f"module ({what})", "forward", "backward", "share", header_style="bold")
        for each in report["modules"][:modules]:
            where.add_row(each["module"], f"{each['forward']:.1%}", f"{each['backward']:.1%}", f"{each['share']:.1%}")
        parts.append(where)
    if report["heaviest"] and report["by_libtpu"]:
        heavy = Table("heaviest", "kind", "layer", "operation", "share", header_style="bold")
        for each in report["heaviest"][:heaviest]:
            layer = f"{each['module']}{' (gradient)' if each['backward'] else ''}"
            heavy.add_row(each["name"], each["kind"], layer, each["what"], f"{each['share']:.1%}")
        parts.append(heavy)
    parts.append(Text("\n".join(f"- {line}" for line in report["assumptions"]), style="dim"))
    return Group(*parts)


def ranking(reports: Sequence[Mapping[str, Any]]) -> Table:
    """Return the rows of a search, best first, for `rich`."""
    table = Table("mesh", "batch", "pieces", "remat", "memory", "step", "MFU", "examples/s", "", header_style="bold")
    for each in reports:
        if "error" in each:
            table.add_row(mesh_words(each["mesh"]), "", "", "", "", "", "", "", f"failed: {each['error'][:60]}")
            continue
        time = each["time"]
        table.add_row(
            mesh_words(each["mesh"]),
            f"{each['batch_size']:,}",
            str(each["accumulate"]),
            each["remat"],
            size(each["memory"]["needed"]),
            duration(time["step"]) if time else "",
            f"{time['mfu']:.1%}" if time else "",
            f"{time['examples_per_second']:,.0f}" if time else "",
            "fits" if each["memory"]["fits"] else "does not fit",
        )
    return table


def show(report: Mapping[str, Any], console: Console | None = None) -> None:
    """Print a report."""
    (console or Console()).print(terminal(report))


# Files ----------------------------------------------------------------------------------------------------------------


def write(report: Mapping[str, Any], folder: Path, others: Sequence[Mapping[str, Any]] = ()) -> Path:
    """Write `plan.json` and `plan.html` into a folder, with the other candidates of a search; return the page."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"plan": report, "others": list(others)}, indent=2)
    (folder / "plan.json").write_text(text + "\n")
    path = folder / "plan.html"
    path.write_text(page(report, others))
    return path


def page(report: Mapping[str, Any], others: Sequence[Mapping[str, Any]] = ()) -> str:
    """Return a report as an HTML page of its own."""
    parts = [f"<h1>{html.escape(heading(report))}</h1>", _table(("", ""), lines(report))]
    memory = report["memory"]
    parts += [
        "<h2>Memory of a device</h2>",
        stack(memory["kinds"], memory["limit"], size),
        _table(("kind", "bytes"), [(name, size(value)) for name, value in memory["kinds"].items()]),
    ]
    if report["time"] and report["compiled"]:
        time = report["time"]
        parts += [
            "<h2>Time of a step</h2>",
            bars({name: time[name] for name in ("computing", "memory", "collectives", "exposed")}, duration),
        ]
    if report["cycles"] and report["by_libtpu"]:
        total = max(1, report["cycles"]["total"])
        shares = {name: cycles / total for name, cycles in report["cycles"]["by_kind"].items()}
        parts += ["<h2>Cycles by kind</h2>", stack(shares, 1.0, lambda share: f"{share:.1%}")]
    if report["modules"]:
        shares = {each["module"]: each["share"] for each in report["modules"][:20]}
        word = "cycles" if report["compiled"] else "operations of the forward pass"
        parts += [f"<h2>Where the {word} go</h2>", bars(shares, lambda share: f"{share:.1%}")]
    if report["collectives"]:
        rows = [
            (each["kind"], ", ".join(each["axes"]), each["count"], size(each["bytes"]), duration(each["seconds"]))
            for each in report["collectives"]
        ]
        parts += ["<h2>Collectives of a step</h2>", _table(("kind", "axes", "times", "bytes", "alone"), rows)]
    if report["heaviest"] and report["by_libtpu"]:
        rows = [
            (e["name"], e["kind"], e["module"] + " (gradient)" * e["backward"], e["what"], f"{e['share']:.1%}")
            for e in report["heaviest"]
        ]
        parts += ["<h2>Heaviest instructions</h2>", _table(("name", "kind", "layer", "operation", "share"), rows)]
    good = [each for each in others if "error" not in each]
    if good:
        rows = [
            (
                mesh_words(each["mesh"]),
                each["batch_size"],
                each["accumulate"],
                each["remat"],
                verdict(each),
                duration(each["time"]["step"]) if each["time"] else "",
                f"{each['time']['mfu']:.1%}" if each["time"] else "",
            )
            for each in good
        ]
        head = ("mesh", "batch", "pieces", "remat", "memory", "step", "MFU")
        parts += ["<h2>Candidates of the search</h2>", _table(head, rows)]
    items = "".join(f"<li>{html.escape(line)}</li>" for line in report["assumptions"])
    parts += ["<h2>What this rests on</h2>", f"<ul>{items}</ul>"]
    style = (
        "body{font:15px/1.45 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#222}"
        "h1{font-size:1.3rem}h2{font-size:1.05rem;margin-top:2rem}table{border-collapse:collapse}"
        "td,th{padding:.2rem .8rem .2rem 0;text-align:left;border-bottom:1px solid #ddd;vertical-align:top}"
        "svg text{font:12px system-ui,sans-serif}"
    )
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(report["title"])}</title>'
        f"<style>{style}</style></head><body>{''.join(parts)}</body></html>\n"
    )


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    first = "".join(f"<th>{html.escape(each)}</th>" for each in head)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(str(cell))}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><tr>{first}</tr>{body}</table>"


def bars(values: Mapping[str, float], words: Any, width: int = 640) -> str:
    """Return horizontal bars as SVG, a row each."""
    largest = max([*values.values(), 1e-30])
    rows = []
    for index, (name, value) in enumerate(values.items()):
        y, length = 22 * index, (width - 320) * value / largest
        rows.append(
            f'<text x="190" y="{y + 15}" text-anchor="end">{html.escape(name[-30:])}</text>'
            f'<rect x="200" y="{y + 3}" width="{max(length, 0.5):.1f}" height="16" fill="{COLOURS[0]}"/>'
            f'<text x="{206 + length:.1f}" y="{y + 15}">{html.escape(words(value))}</text>'
        )
    return f'<svg viewBox="0 0 {width} {22 * len(values) + 4}" width="{width}" role="img">{"".join(rows)}</svg>'


def stack(values: Mapping[str, float], limit: float, words: Any, width: int = 640) -> str:
    """Return one bar of parts as SVG, with a line at the limit and a legend."""
    scale = (width - 20) / max(sum(values.values()), limit, 1e-30)
    x, rects, legend = 10.0, [], []
    for index, (name, value) in enumerate(values.items()):
        colour = COLOURS[index % len(COLOURS)]
        rects.append(f'<rect x="{x:.1f}" y="8" width="{value * scale:.1f}" height="30" fill="{colour}"/>')
        x += value * scale
        y = 62 + 18 * index
        legend.append(
            f'<rect x="10" y="{y - 10}" width="12" height="12" fill="{colour}"/>'
            f'<text x="28" y="{y}">{html.escape(name)}: {html.escape(words(value))}</text>'
        )
    end = 10 + limit * scale
    line = f'<line x1="{end:.1f}" x2="{end:.1f}" y1="2" y2="44" stroke="#c00" stroke-width="2"/>'
    height = 62 + 18 * len(values)
    return (
        f'<svg viewBox="0 0 {width} {height}" width="{width}" role="img">{"".join(rects)}{line}{"".join(legend)}</svg>'
    )
