"""Hold the cost of training steps, as the TPU compiler estimates it: `python -m tools.cost_gate [--write] [WORD ...]`.

The training step of a named model of every family is compiled for one v5e chip, which needs no chip and has no
noise: operations, bytes to and from HBM, cycles and temporary memory are the same in every run. They are stored in
`tests/golden/costs/steps.txt`. A step that costs more than 3 % over what is stored, in any of the four, ends the
command with 1 and the numbers; `--write` stores what is found, so that a worse figure is accepted in the change that
brings it.

`make test-tpu` does it for those that compile within seconds (`--quick`), and `make test-tpu-all` for all. The former
does the same for the forward and backward pass of every case of the conformance suite (`tests/golden/costs/cases`).
Figures are of one version of JAX and libtpu, which the files name: another is refused.
"""

import argparse
import dataclasses
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tools import plan_compile, plan_read
from tools.plan import DEFAULT_PYTHON, MAKE, run_jobs

ROOT = Path(__file__).parents[1]
STORED = ROOT / "tests" / "golden" / "costs" / "steps.txt"
TOPOLOGY = "v5e:1x1"
TOLERANCE = 0.03
FIGURES = ("flops", "bytes", "cycles", "temporaries")
SLACK = {"temporaries": 2**16}
"""What a figure may grow by besides: small programs have hardly any temporary memory."""

# Steps that one process compiles.
_TOGETHER = 4


@dataclasses.dataclass(frozen=True)
class Entry:
    """A step that is held: of a variant, in bfloat16.

    Attributes:
      variant: its name.
      fields: of the model, as `python -m train --set` takes them.
      batch_size: examples of a step.
      side: of the pictures; `None` = the variant's own.
    """

    variant: str
    fields: tuple[str, ...] = ()
    batch_size: int = 2
    side: int | None = None

    @property
    def job(self) -> plan_compile.Job:
        """The step as `tools.plan_compile` takes it."""
        overrides = tuple(f"model.{field}" for field in self.fields)
        name = self.variant if self.side is None else f"{self.variant}:{self.side}"
        return plan_compile.Job(name, TOPOLOGY, overrides=overrides, batch_size=self.batch_size, calibrate=False)


# One of each family. Where a model is large its depths are cut, which changes how often a block is compiled, not what;
# where that is not enough, stages or widths too.
ENTRIES = (
    Entry("apen"),
    Entry("att_swin_unet", ("depths=(1,1)", "num_heads=(3,6)")),
    Entry("axial_resnet26_small", ("depths=(1,1)",)),
    Entry("axial_transformer_imagenet32", ("features=512", "encoder_depth=2", "outer_depth=2", "inner_depth=2")),
    Entry("canonical_gnn"),
    Entry("canonical_pointnet"),
    Entry("convnext_tiny", ("depths=(1,1)", "widths=(96,192)"), batch_size=8),
    Entry("crossvit_tiny_240", ("num_encoders=1", "depths=(1,1)")),
    Entry("cvt_13", ("depths=(1,1,1)",)),
    Entry("deeprc"),
    Entry("drct_x2", ("num_groups=1",)),
    Entry("egnn_nbody"),
    Entry("energy_transformer_base", ("num_steps=2",)),
    Entry("fernn_v1"),
    Entry("fit_640", ("layers='(1)1(1)'",)),
    Entry("fit_ar_64", ("layers='(1)1(1)'",)),
    Entry("fit_denoiser_64", ("layers='(1)1(1)'",)),
    Entry("frame_averaging_gnn"),
    Entry("frame_averaging_pointnet"),
    Entry("group_cnn_d4", ("depths=(1,1)", "widths=(12,24)")),
    Entry("hiera_tiny", ("depths=(1,1,1)",)),
    Entry("hopfield_memory"),
    Entry("hopfield_pooling_bag"),
    Entry("hopfield_prototypes_tabular"),
    Entry("hopular_small", ("depth=1",)),
    Entry("lie_decomposition_sl2"),
    Entry("lie_resnet_se2", ("features=(128,128)",)),
    # Each takes minutes: no other families have as many different convolutions.
    Entry("maxim_s1", ("num_scales=2", "depth=1", "bottleneck_depth=1"), side=64),
    Entry("maxvit_tiny", ("depths=(1,1)", "embed_dim=(64,128)")),
    Entry("moment_net_zernike"),
    Entry("octahedral_cnn_32", ("depths=(1,1)", "widths=(2,4)")),
    Entry("parot_modelnet40"),
    Entry("parot_shapenet_parts"),
    Entry("risurconv_modelnet40"),
    Entry("risurconv_shapenet_parts"),
    Entry("rmt_tiny", ("depths=(1,1,1,1)",)),
    Entry("s2lic", ("latent_features=64", "num_slices=2", "depths=(1,1,1)"), side=64),
    Entry("s_gcn"),
    Entry("scattering_net_28"),
    Entry("scene_transformer", ("depth=1", "decoder_depth=1"), batch_size=1),
    Entry("se3_assembly"),
    Entry("se3_classifier"),
    Entry("se3_particles"),
    Entry("shiftvit_tiny", ("depths=(1,1,1,1)",), batch_size=8),
    Entry("simmim_swin_base", ("encoder.depths=(1,1)", "encoder.num_heads=(4,8)")),
    Entry("styleswin_256", ("features=(512,256,128)", "num_heads=(16,8,4)", "depth=1")),
    Entry("styleswin_discriminator_256", ("features=(64,128,128,128,128,128)",), batch_size=4),
    Entry(
        "swin3d_small",
        (
            "depths=(1,1)",
            "embed_dim=(48,96)",
            "num_heads=(6,6)",
            "window_sizes=(5,7)",
            "strides=(3,)",
        ),
    ),
    Entry("swin_tiny", ("depths=(2,2)", "num_heads=(3,6)"), batch_size=8),
    Entry("swin_unetr_2d", ("depths=(1,1)", "num_heads=(3,6)")),
    Entry("swin_v2_tiny_window8_256", ("depths=(2,2)", "num_heads=(3,6)"), batch_size=8),
    Entry("swinface"),
    Entry("tinvnn_pointnet"),
    Entry("tnt_small", ("depth=2",), batch_size=8),
    Entry("turbovit_2427", ("depths=(1,1,1,1)",)),
    Entry("umereg"),
    Entry("vit_resnas_tiny"),
    Entry("vn_dgcnn"),
    Entry("vn_dgcnn_segmentation"),
    Entry("vn_pointnet"),
    Entry("vn_pointnet_segmentation"),
    Entry("vn_small"),
)


# Of these what compiles within some ten seconds.
QUICK = frozenset(
    {
        "apen",
        "canonical_gnn",
        "canonical_pointnet",
        "crossvit_tiny_240",
        "deeprc",
        "egnn_nbody",
        "energy_transformer_base",
        "hopfield_memory",
        "hopfield_pooling_bag",
        "hopfield_prototypes_tabular",
        "hopular_small",
        "moment_net_zernike",
        "s_gcn",
        "swin_tiny",
    }
)


def figures_of(program: Any) -> dict[str, int]:
    """Return what the compiler says of a compiled program for one chip."""
    import jax

    cost = program.cost_analysis() or {}
    cost = cost[0] if isinstance(cost, list) else cost
    reading = plan_read.reading(program.as_text(), jax.sharding.AbstractMesh((1,), ("data",)))
    return {
        "flops": int(cost.get("flops", 0)),
        "bytes": int(reading.bytes),
        "cycles": int(reading.cycles),
        "temporaries": int(program.memory_analysis().temp_size_in_bytes),
    }


def compared(step: str, found: Mapping[str, int], stored: Mapping[str, int]) -> tuple[list[str], list[str]]:
    """Return a line for each figure that is worse than what is stored, and for each that is better."""
    worse, better = [], []
    for name in FIGURES:
        ratio = found[name] / max(1, stored[name])
        line = f"{step}: {name} {stored[name]:,} -> {found[name]:,} ({ratio - 1:+.1%})"
        slack = SLACK.get(name, 0)
        if found[name] > stored[name] * (1 + TOLERANCE) + slack:
            worse.append(line)
        elif found[name] < stored[name] * (1 - TOLERANCE) - slack:
            better.append(line)
    return worse, better


def versions() -> str:
    """Return those of the compiler in this interpreter."""
    return ", ".join(f"{name} {version}" for name, version in plan_compile.versions().items())


def written(versions: str, steps: Mapping[str, Mapping[str, int]]) -> str:
    """Return the text of a file of costs."""
    width = max(map(len, steps), default=4)
    lines = [f"# {versions}", f"{'step':{width}} " + " ".join(f"{name:>15}" for name in FIGURES)]
    for step, figures in sorted(steps.items()):
        lines.append(f"{step:{width}} " + " ".join(f"{figures[name]:15d}" for name in FIGURES))
    return "\n".join(lines) + "\n"


def read(text: str) -> tuple[str, dict[str, dict[str, int]]]:
    """Return versions and figures by step of a file of costs.

    Raises:
      ValueError: if it is none.
    """
    head, names, *lines = text.splitlines() if text.count("\n") > 1 else ("", "")
    if not head.startswith("# ") or names.split()[1:] != list(FIGURES):
        raise ValueError("a file of costs must begin with versions and the names of figures; write it anew")
    rows = [line.split() for line in lines]
    return head.removeprefix("# "), {row[0]: dict(zip(FIGURES, map(int, row[1:]), strict=True)) for row in rows}


def measured(entries: Sequence[Entry], python: str, workers: int) -> Iterator[tuple[str, dict[str, int] | str, str]]:
    """Yield step, its figures (or why there are none) and the compiler's versions, in the order of the entries."""

    def told(entry: Entry, answer: Mapping[str, Any]) -> tuple[str, dict[str, int] | str, str]:
        if "error" in answer or "refused" in answer["train"]:
            return entry.variant, str(answer.get("error") or answer["train"]["refused"]), ""
        train = answer["train"]
        figures = {
            "flops": int(train["compiler_flops"]),
            "bytes": int(train["reading"]["bytes"]),
            "cycles": int(train["reading"]["cycles"]),
            "temporaries": int(train["memory"]["temp"]),
        }
        return entry.variant, figures, ", ".join(f"{name} {version}" for name, version in answer["versions"].items())

    def some(chosen: Sequence[Entry]) -> list[tuple[str, dict[str, int] | str, str]]:
        # A process takes seconds to start, and lets go of memory when it ends.
        answers = run_jobs([entry.job for entry in chosen], python)
        return [told(entry, answer) for entry, answer in zip(chosen, answers, strict=True)]

    with ThreadPoolExecutor(workers) as pool:
        for found in pool.map(
            some, [entries[first : first + _TOGETHER] for first in range(0, len(entries), _TOGETHER)]
        ):
            yield from found


def main(arguments: Sequence[str] | None = None) -> int:
    """Compile the steps and compare them; return 1 if one costs more, or cannot be compiled."""
    parser = argparse.ArgumentParser(prog="python -m tools.cost_gate", description=(__doc__ or "").split(":")[0])
    parser.add_argument("words", nargs="*", help="steps whose name has one of these (default: all)")
    parser.add_argument("--write", action="store_true", help="store what is found")
    parser.add_argument("--quick", action="store_true", help="of them those that compile within seconds")
    parser.add_argument("--workers", type=int, default=2, help="compilations at a time")
    parser.add_argument("--stored", type=Path, default=STORED, help="the file")
    parser.add_argument(
        "--python", default=os.environ.get("PLAN_PYTHON", DEFAULT_PYTHON), help=f"has libtpu; `{MAKE}` makes it"
    )
    given = parser.parse_args(arguments)
    known = [entry.variant for entry in ENTRIES]
    entries = [entry for entry in ENTRIES if not given.words or any(word in entry.variant for word in given.words)]
    entries = [entry for entry in entries if not given.quick or entry.variant in QUICK]
    if not entries or not Path(given.python).is_file():
        why = f"{given.python} must be an interpreter with libtpu; run `{MAKE}`"
        print(f"error: {why if entries else f'no step is called so; they are {known}'}", file=sys.stderr)
        return 2
    old, stored = read(given.stored.read_text()) if given.stored.is_file() else ("nothing", {})
    now = old
    wrong: list[str] = []
    found: dict[str, dict[str, int]] = {}
    for step, figures, compiler in measured(entries, given.python, given.workers):
        if isinstance(figures, str):
            wrong.append(f"{step}: {figures}")
            continue
        print(f"{step}: " + ", ".join(f"{figures[name]:,} {name}" for name in FIGURES), flush=True)
        found[step], now = figures, compiler
    if given.write and not wrong:
        kept = {step: figures for step, figures in stored.items() if step in known and old == now}
        given.stored.parent.mkdir(parents=True, exist_ok=True)
        given.stored.write_text(written(now, {**kept, **found}))
        print(given.stored)
        return 0
    better: list[str] = []
    if now != old:
        wrong.append(f"stored are figures of {old}, these are of {now}")
    else:
        for step in found:
            one, other = compared(step, found[step], stored[step]) if step in stored else ([f"{step}: is new"], [])
            wrong += one
            better += other
    wrong += [f"{step}: is stored and no longer compiled" for step in sorted(set(stored) - set(known))]
    if better:
        print("better than stored; keep it with --write:\n  " + "\n  ".join(better))
    if wrong:
        print("worse than stored, or not to be compared; accept it with --write:\n  " + "\n  ".join(wrong))
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
