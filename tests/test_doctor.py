"""The examination of a machine: what is wrong is said in a sentence, what is absent is not wrong."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from asyncflow import doctor
from asyncflow.cli.bench import benchmarks
from asyncflow.cli.doctor import print_findings
from asyncflow.doctor import GIB, Finding
from asyncflow.engines.weights.owned import OwnedFolder, leftovers
from asyncflow.errors import ConfigError


def test_a_package_that_is_not_there_is_named_with_what_brings_it() -> None:
    found = doctor.examine_packages({"python": "3.11", "ray": None, "vllm": None, "pyarrow": None}, gpu=False)

    python, ray, vllm, pyarrow = found
    assert (python.text, python.problem) == ("3.11", None)
    assert "asyncflow[ray]" in ray.text
    assert ray.problem is None
    assert "asyncflow[cpu]" in vllm.text
    assert pyarrow.problem is not None, "AsyncFlow does not work without it"


def test_on_a_machine_with_a_gpu_the_packages_for_it_are_named() -> None:
    (vllm,) = doctor.examine_packages({"vllm": None}, gpu=True)

    assert "asyncflow[gpu]" in vllm.text


def test_vllm_is_found_under_both_names_of_its_package() -> None:
    versions = doctor.installed()

    assert versions["vllm"] is not None
    assert versions["asyncflow"] is not None


@pytest.mark.parametrize(
    ("cores", "quota", "says"),
    [
        ([0, 1], None, None),
        ([0, 1], 2.0, None),
        ([3], None, "two or more"),
        ([0, 1, 2, 3], 2.0, "pin it to 2 cores"),
        ([0, 1], 0.5, "pin it to 1 cores"),
    ],
)
def test_cores_are_wrong_when_two_sides_share_one_or_a_quota_is_below_them(
    cores: list[int], quota: float | None, says: str | None
) -> None:
    problem = doctor.examine_cores(cores, quota).problem

    assert problem is None if says is None else says in str(problem)


@pytest.mark.parametrize(("text", "quota"), [("max 100000\n", None), ("150000 100000\n", 1.5), ("nonsense", None)])
def test_the_quota_of_a_control_group_is_read_in_cores(tmp_path: Path, text: str, quota: float | None) -> None:
    (tmp_path / "cpu.max").write_text(text)

    assert doctor.cpu_quota(tmp_path / "cpu.max") == quota
    assert doctor.cpu_quota(tmp_path / "missing") is None


def test_memory_is_what_the_control_group_allows(tmp_path: Path) -> None:
    (tmp_path / "memory.max").write_text(f"{GIB}\n")

    total, available = doctor.memory(tmp_path / "memory.max")

    assert (total, available) == (GIB, GIB)
    assert "4.00 GiB" in str(doctor.examine_memory(total, available).problem)
    assert doctor.examine_memory(8 * GIB, 8 * GIB).problem is None


def test_a_machine_without_shared_memory_uses_another_folder(tmp_path: Path) -> None:
    assert doctor.examine_shared_memory(tmp_path / "missing").problem is None


def test_only_folders_whose_owner_is_dead_are_left_over(tmp_path: Path) -> None:
    alive = OwnedFolder("kind-", tmp_path)
    program = (
        "import os, sys; from pathlib import Path; from asyncflow.engines.weights.owned import OwnedFolder; "
        "f = OwnedFolder('kind-', Path(sys.argv[1])); print(f.path, flush=True); os._exit(0)"
    )
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, check=True)

    assert [str(path) for path in leftovers("kind-", tmp_path)] == [done.stdout.strip()]
    assert alive.path.exists()
    assert leftovers("kind-", tmp_path), "looking does not remove"
    alive.remove()


def test_the_size_of_the_runs_is_added_up(tmp_path: Path) -> None:
    (tmp_path / "runs" / "a").mkdir(parents=True)
    (tmp_path / "runs" / "a" / "big").write_bytes(b"0" * 12 * 2**20)

    assert doctor.examine_disk(tmp_path / "runs").text.startswith(f"1 in {tmp_path / 'runs'} with 0.01 GiB")


def test_a_small_run_works_here() -> None:
    finding = doctor.smoke_run("smoke run", ())

    assert finding.problem is None
    assert finding.text.startswith("finished after 3 steps")
    assert "admitted 48 = trained" in finding.text


def test_a_small_run_that_fails_says_why() -> None:
    finding = doctor.smoke_run("smoke run", ("rollout.engine=tests.failing_engine:DoesNotStart",))

    assert "the accelerator is on fire" in str(finding.problem)


def test_every_problem_is_printed_with_what_to_do_and_counted() -> None:
    out = io.StringIO()
    findings = [
        Finding(area="cores", text="0, 1"),
        Finding(area="memory", text="little", problem="buy " + "more " * 40),
    ]

    assert print_findings(findings, Console(file=out)) == 1
    lines = out.getvalue().splitlines()
    assert lines[0].startswith("ok  cores")
    assert lines[1].startswith("!!  memory")
    assert "buy more" in lines[2]
    assert lines[-1] == "1 problem"
    assert "\x1b" not in out.getvalue(), "no colour where there is no terminal"


def test_benchmarks_are_found_in_a_checkout_and_elsewhere_it_is_said_where_they_are(tmp_path: Path) -> None:
    assert callable(benchmarks().main)
    with pytest.raises(ConfigError, match="clone the repository"):
        benchmarks(tmp_path)
