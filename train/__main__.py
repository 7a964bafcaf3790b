"""The command: `python -m train configs/<name>.py [--smoke] [--set path=value] [--workdir DIR] [--devices N]`.

It ends with 0 when the run is complete, 130 after Ctrl-C, 143 after SIGTERM and 138 after SIGUSR1 (saved; the same
command resumes), 2 when the settings cannot work, and 1 when training failed.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

# JAX is imported in `main`, after the arguments: --devices must set the platform before.

HUGE_PAGES = "glibc.malloc.hugetlb=1"
"""Asks the C library for huge pages, which it reads when a process starts. XLA allocates the memory between a step's
first and last operation anew for each step, and on a CPU every page of it costs a fault."""


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    result = argparse.ArgumentParser(
        prog="python -m train",
        description="Train a config. Run the same command again and it resumes from the newest good checkpoint.",
        epilog="Exit codes: 0 complete; 130 Ctrl-C, 143 SIGTERM, 138 SIGUSR1 (saved, run again to resume); "
        "2 bad settings; 1 training failed.",
    )
    result.add_argument("config", type=Path, help="a file that defines config(smoke=False) -> Config")
    result.add_argument("--smoke", action="store_true", help="the config's one-minute version")
    result.add_argument(
        "--set",
        dest="overrides",
        metavar="PATH=VALUE",
        action="append",
        default=[],
        help="replace one field, e.g. --set optim.learning_rate=3e-4 --set 'model.depths=(2,2)'; repeatable",
    )
    result.add_argument("--workdir", type=Path, help="checkpoints, metrics and report (default: runs/<config>)")
    result.add_argument("--devices", type=int, metavar="N", help="run on N virtual CPU devices")
    result.add_argument("--print", dest="show", action="store_true", help="print every field of the config and stop")
    result.add_argument("--profile", type=step_range, metavar="A:B", help="trace steps A to B into <workdir>/profile")
    result.add_argument("--wandb", metavar="PROJECT", help="send the metrics to Weights & Biases too")
    result.add_argument(
        "--find-rate", action="store_true", help="try rising learning rates for 100 steps, suggest one, and stop"
    )
    several = result.add_argument_group("several processes (start the same command on each host)")
    several.add_argument(
        "--distributed",
        action="store_true",
        help="find the others by the cluster (SLURM, Cloud TPU, ...) or JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and "
        "JAX_PROCESS_ID",
    )
    several.add_argument("--coordinator", metavar="HOST:PORT", help="address of process 0")
    several.add_argument("--num-processes", type=int, metavar="N")
    several.add_argument("--process-id", type=int, metavar="I")
    several.add_argument(
        "--heartbeat-seconds",
        type=int,
        default=100,
        metavar="S",
        help="a process without a sign of life for so long is given up, and the others end (default: 100)",
    )
    return result


def step_range(text: str) -> tuple[int, int]:
    """Return the two steps of `"10:20"`."""
    first, colon, last = text.partition(":")
    if not (colon and first.isdecimal() and last.isdecimal() and 1 <= int(first) <= int(last)):
        raise argparse.ArgumentTypeError(f"{text!r} must be two steps in order, as 10:20")
    return int(first), int(last)


def ask_for_huge_pages() -> None:
    """Start this process again, as itself, with memory in huge pages, unless `GLIBC_TUNABLES` says what to do."""
    if sys.platform == "linux" and sys.executable and "GLIBC_TUNABLES" not in os.environ:
        os.environ["GLIBC_TUNABLES"] = HUGE_PAGES
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def use_virtual_devices(count: int) -> None:
    """Make JAX, which must not be imported yet, see `count` CPU devices."""
    flag = "--xla_force_host_platform_device_count"
    kept = [word for word in os.environ.get("XLA_FLAGS", "").split() if not word.startswith(f"{flag}=")]
    os.environ["XLA_FLAGS"] = " ".join([*kept, f"{flag}={count}"])
    os.environ["JAX_PLATFORMS"] = "cpu"


def join_processes(
    coordinator: str | None, num_processes: int | None, process_id: int | None, heartbeat_seconds: int = 100
) -> None:
    """Start `jax.distributed`; what is `None` is taken from the environment.

    These are JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID, else what the cluster sets.
    """
    import jax

    def from_environment(name: str) -> int | None:
        return int(os.environ[name]) if os.environ.get(name) else None

    jax.distributed.initialize(
        coordinator,  # JAX itself reads its variable
        from_environment("JAX_NUM_PROCESSES") if num_processes is None else num_processes,
        from_environment("JAX_PROCESS_ID") if process_id is None else process_id,
        heartbeat_timeout_seconds=heartbeat_seconds,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    options = parser().parse_args(arguments)
    explicit = (options.coordinator, options.num_processes, options.process_id)
    if any(one is not None for one in explicit) and any(one is None for one in explicit):
        return refuse("--coordinator, --num-processes and --process-id go together; give all three, or --distributed")
    if options.devices is not None:
        if options.devices < 1:
            return refuse(f"--devices {options.devices} must be at least 1")
        use_virtual_devices(options.devices)
    if options.distributed or options.coordinator is not None:
        join_processes(*explicit, options.heartbeat_seconds)

    from train import config as configs
    from train import find_rate, loop
    from train.checkpoint import SaveError

    name = options.config.stem + ("_smoke" if options.smoke else "")
    workdir = options.workdir or Path("runs") / name
    with loop.Interrupt() as interrupt:
        try:
            config = configs.override(configs.load(options.config, smoke=options.smoke), options.overrides)
            if options.show:
                print(configs.describe(config), end="")
                return 0
            if options.find_rate:
                found = find_rate.find_rate(config)
                print(f"optim.learning_rate={found.suggestion:.2g} ({find_rate.write(found, workdir)})")
                return 0
            result = loop.train(config, workdir, stop=interrupt, profile=options.profile, wandb=options.wandb)
        except (ValueError, FileNotFoundError) as error:  # a dataset that is missing says how to prepare it
            return refuse(str(error))
        except (FloatingPointError, SaveError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
    return 128 + result.signal if result.signal else 0


def refuse(reason: str) -> int:
    """Say why the settings cannot work; return the exit code for it."""
    print(f"error: {reason}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    ask_for_huge_pages()
    sys.exit(main())
