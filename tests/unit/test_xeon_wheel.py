"""The kernels' distribution: its wheel is what it says, it asks torch for stable symbols alone, and a missing compiler is told."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
HOME = ROOT / "entrypoints" / "trimtab_xeon"
STABLE = ("torch/csrc/stable/c/shim.h", "torch/csrc/inductor/aoti_torch/c/shim.h")  # torch's C functions that stay


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from the sources as they are; what `make setup` compiled is not compiled again."""
    folder = tmp_path_factory.mktemp("wheel")
    built = subprocess.run([sys.executable, HOME / "build.py", "--wheel", folder], capture_output=True, text=True, check=False)
    if built.returncode == 3:
        pytest.skip(built.stderr.strip())
    assert built.returncode == 0, built.stderr
    assert built.stderr == ""  # no warning of the compiler
    (found,) = folder.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def library(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("library")
    return Path(zipfile.ZipFile(wheel).extract("trimtab_xeon/kernels.so", folder))


def said(*command: str | Path) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_the_tag_is_what_auditwheel_finds(wheel: Path) -> None:
    """It calls torch's own library, which every user has and no wheel may hold, so auditwheel's verdict is that of the symbols."""
    found = re.search(r'constrains\s+the\s+platform\s+tag\s+to\s+"(\w+)"', said(sys.executable, "-m", "auditwheel", "show", wheel))
    assert found is not None
    assert wheel.name == f"trimtab_xeon-{project()['version']}-py3-none-{found[1]}.whl"
    assert f"Tag: py3-none-{found[1]}\n" in zipfile.ZipFile(wheel).read(f"trimtab_xeon-{project()['version']}.dist-info/WHEEL").decode()


def test_torch_is_asked_for_its_stable_symbols_alone(library: Path) -> None:
    needed = set(re.findall(r"NEEDED\s+(\S+)", said("objdump", "-p", library)))
    assert needed <= {
        "libtorch_cpu.so",
        "libm.so.6",
        "libgcc_s.so.1",
        "libc.so.6",
        "ld-linux-x86-64.so.2",
    }  # no OpenMP of its own, no libstdc++
    headers = "".join((Path(torch.__file__).parent / "include" / name).read_text() for name in STABLE)
    undefined = re.findall(r"^\s+U (\S+)$", said("nm", "-D", "--undefined-only", library), re.MULTILINE)
    of_torch = [name for name in undefined if "@" not in name]  # glibc's and libgcc's have versions
    assert len(of_torch) > 20
    assert [name for name in of_torch if not re.search(rf"\b{name}\b", headers)] == []


def test_no_operator_needs_another_python_or_brings_python_symbols(library: Path) -> None:
    assert "Py" not in {name[:2] for name in re.findall(r"\b[Uw] (\w+)", said("nm", "-D", library))}


def project() -> dict[str, str]:
    found: dict[str, str] = tomllib.loads((HOME / "pyproject.toml").read_text())["project"]
    return found


def test_both_distributions_have_one_version() -> None:
    assert project()["version"] == tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert "trimtab-xeon" not in (ROOT / "pyproject.toml").read_text()  # which installs without a compiler and without torch


@pytest.mark.parametrize(
    ("environment", "message"),
    [({"PATH": "/nonexistent"}, r"there is no C\+\+ compiler .*apt-get install g\+\+"), ({"CXX": "/bin/false"}, "/bin/false is too old")],
    ids=["none", "too old"],
)
def test_a_machine_that_cannot_build_them_is_told_apart_from_a_build_that_fails(environment: dict[str, str], message: str) -> None:
    kept = {key: value for key, value in os.environ.items() if key != "CXX"}
    done = subprocess.run([sys.executable, HOME / "build.py"], env=kept | environment, capture_output=True, text=True, check=False)
    assert done.returncode == 3
    assert re.search(message, done.stderr)


def test_a_checkout_in_which_nothing_can_be_written_cannot_build_them(tmp_path: Path) -> None:
    shutil.copy(HOME / "build.py", tmp_path)
    (tmp_path / "build").write_text("in the folder's place", encoding="utf-8")
    done = subprocess.run([sys.executable, tmp_path / "build.py"], capture_output=True, text=True, check=False)
    assert done.returncode == 3
    assert re.fullmatch(r"trimtab-xeon: .*/build.*: nothing can be built here; take a checkout that is yours\n", done.stderr)


def test_a_folder_that_cannot_be_written_is_named(wheel: Path, tmp_path: Path) -> None:
    taken = tmp_path / "taken"
    taken.write_text("in the folder's place", encoding="utf-8")
    done = subprocess.run([sys.executable, HOME / "build.py", "--wheel", taken], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert re.fullmatch(r"trimtab-xeon: .*File exists: .*/taken'.*name a folder that is yours with --wheel\n", done.stderr)
    assert [*tmp_path.iterdir()] == [taken]


def test_one_module_alone_knows_the_kernels() -> None:
    """The runtime's door to them; the SDK asks only whether the distribution is installed."""
    sources = [*(ROOT / "sdk" / "trimtab").rglob("*.py"), *(ROOT / "entrypoints" / "trimtab_runtime").rglob("*.py")]
    loading = re.compile(r"import trimtab_xeon|from trimtab_xeon|import_module\(.trimtab_xeon|ops\.trimtab_xeon")
    found = [str(path.relative_to(ROOT)) for path in sources if loading.search(path.read_text(encoding="utf-8"))]
    assert found == ["entrypoints/trimtab_runtime/xeon/kernels.py"]
