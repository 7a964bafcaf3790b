"""Say clearly when the interpreter is too old, or find the newest supported one (`--newest`)."""

import pathlib
import shutil
import subprocess
import sys

OLDEST, NEWEST = (3, 11), (3, 13)


def newest() -> str:
    """Return the newest supported interpreter that starts on this machine."""
    for minor in range(NEWEST[1], OLDEST[1] - 1, -1):
        name = f"python3.{minor}"
        # Version managers put stand-ins on the path that start only when their version is switched on.
        managed = sorted((pathlib.Path.home() / ".pyenv" / "versions").glob(f"3.{minor}.*/bin/{name}"))
        for candidate in [shutil.which(name), *map(str, managed)]:
            if candidate and subprocess.run([candidate, "-c", ""], capture_output=True, check=False).returncode == 0:
                return candidate
    return sys.executable


if __name__ == "__main__":
    if "--newest" in sys.argv:
        print(newest())
    elif sys.version_info[:2] < OLDEST:
        wanted, found = (".".join(map(str, version[:2])) for version in (OLDEST, sys.version_info))
        sys.exit("jaxlayers needs Python {} or newer; this is {} (set PYTHON)".format(wanted, found))  # noqa: UP032
