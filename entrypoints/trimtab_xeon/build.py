"""Compiles src/*.cpp into one library and makes the wheel of it: `python build.py` also installs it into this Python.

It is also the build backend that pyproject.toml names (PEP 517), so `pip wheel --no-build-isolation .` works. Object files are kept in
build/ and compiled again when their source, a header, the compiler, its flags or torch changed.

    python build.py                 compile what changed, make the wheel, install it
    python build.py --wheel FOLDER  the wheel only
        ... --emulate-tiles         that computes AMX's instructions in plain C++: for tests where there is no AMX, and slow

Exits with 3 where this machine has no compiler for them, is none that they are for, or nothing can be written here; with 1 where the
build failed.
"""

from __future__ import annotations

import argparse
import base64
import concurrent.futures
import fcntl
import hashlib
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
BUILD = HERE / "build"
CANNOT = 3  # exit code where this machine cannot build them at all, which trimtab gets along with
FLAGS = [
    *("-std=c++20", "-O3", "-fPIC", "-ffunction-sections", "-fvisibility=hidden", "-fvisibility-inlines-hidden", "-fno-gnu-unique"),
    *("-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"),  # no result changes by these; products are not fused into sums
    *("-march=x86-64", "-mtune=sapphirerapids", "-Wall", "-Wextra"),
    *("-Wno-maybe-uninitialized", "-Wno-uninitialized"),  # gcc 12 finds them in its own intrinsics
    "-DTORCH_TARGET_VERSION=0x020a000000000000",  # 2.10: what later versions added is not used
]
# libgcc stays shared: torch needs it too, and a static one would ask for the glibc of the machine that built it (_dl_find_object);
# of libstdc++ only what is called is kept, for the same reason
LINK = [
    *("-shared", "-static-libstdc++", "-Wl,--gc-sections", "-Wl,--exclude-libs,ALL", "-Wl,--no-undefined", "-Wl,--as-needed"),
    *("-Wl,-O1", "-Wl,--strip-debug"),
]

EMULATED = {source: ["-DXEON_EMULATED_TILES"] for source in ("attention", "attention_backward", "path")}  # which of src/ know tiles


class BuildError(RuntimeError):
    """Says what could not be built, and what to do."""


class CannotBuild(BuildError):
    """This machine lacks what any build of the kernels needs."""


def torch_folder() -> Path:
    """Where torch is installed, without importing it."""
    found = importlib.util.find_spec("torch")
    if found is None or found.origin is None or not (Path(found.origin).parent / "include").is_dir():
        raise CannotBuild("torch's headers are needed and are not here: pip install 'torch>=2.10', then build without isolation")
    return Path(found.origin).parent


def compiler() -> list[str]:
    """The C++ compiler's command: $CXX, or the first there is. Raises CannotBuild where none links, or for another machine."""
    if os.uname().machine != "x86_64" or sys.platform != "linux":
        raise CannotBuild(f"the kernels are for Linux on x86-64 and this is {sys.platform} on {os.uname().machine}")
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "clang++", "c++"]
    commands = [shlex.split(name) for name in names]  # such as CXX="ccache g++"
    found = next((command for command in commands if command and shutil.which(command[0])), None)
    if found is None:
        raise CannotBuild(f"there is no C++ compiler ({', '.join(names)}): install one (Debian: apt-get install g++), or name it in CXX")
    check = subprocess.run([*found, *FLAGS, "-xc++", "-fsyntax-only", os.devnull], capture_output=True, text=True, check=False)
    if check.returncode:
        raise CannotBuild(f"{found[0]} is too old ({check.stderr.strip()}): install g++ 11 or later, or name one in CXX")
    check = subprocess.run([*found, "-xc++", os.devnull, *LINK, "-o", os.devnull], capture_output=True, text=True, check=False)
    if check.returncode:
        raise CannotBuild(f"{found[0]} does not link ({check.stderr.strip()}): install its static C++ library (Fedora: libstdc++-static)")
    return found


def run(command: list[str]) -> None:
    """Raises BuildError with the first of what the command said; warnings are shown."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    said = "".join((done.stdout + done.stderr).splitlines(keepends=True)[:60])
    if done.returncode:
        raise BuildError(f"this failed:\n{' '.join(command)}\n{said}")
    sys.stderr.write(said)


def compile_library(emulate_tiles: bool = False) -> Path:
    """build/kernels.so from what changed, or build/emulated.so. Raises BuildError with the compiler's own words."""
    cxx, torch = compiler(), torch_folder()
    BUILD.mkdir(exist_ok=True)
    known = hashlib.sha256()
    known.update(subprocess.run([*cxx, "--version"], capture_output=True, check=True).stdout)
    known.update(repr((FLAGS, LINK, EMULATED)).encode() + (torch / "version.py").read_bytes())
    for header in sorted((HERE / "src").glob("*.h")):
        known.update(header.read_bytes())
    includes = [f"-isystem{torch / 'include'}"]
    wanted: list[tuple[Path, list[str], Path]] = []
    objects = []
    for source in sorted((HERE / "src").glob("*.cpp")):
        digest = known.copy()
        digest.update(source.read_bytes())
        more = EMULATED.get(source.stem, []) if emulate_tiles else []
        stem = f"{source.stem}{'.emulated' if more else ''}"
        compiled = BUILD / f"{stem}-{digest.hexdigest()[:16]}.o"
        objects.append(compiled)
        if not compiled.is_file():
            wanted.append((source, more, compiled))

    def one(asked: tuple[Path, list[str], Path]) -> None:
        source, more, compiled = asked
        aside = compiled.with_suffix(f".{os.getpid()}.tmp")
        run([*cxx, *FLAGS, *more, f"-ffile-prefix-map={HERE}=trimtab_xeon", *includes, "-c", str(source), "-o", str(aside)])
        for older in BUILD.glob(f"{compiled.stem.rpartition('-')[0]}-*.o"):
            older.unlink()
        aside.rename(compiled)

    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(one, wanted))
    library = BUILD / ("emulated.so" if emulate_tiles else "kernels.so")
    run([*cxx, *(str(path) for path in objects), *LINK, f"-L{torch / 'lib'}", "-ltorch_cpu", "-o", str(library)])
    return library


def platform_of(library: Path) -> str:
    """The wheel's platform, by the newest glibc of whose symbols the library uses any (PEP 600)."""
    try:
        table = subprocess.run(["objdump", "-T", str(library)], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as exc:
        raise CannotBuild(f"objdump did not read the library ({exc}): install binutils") from exc
    versions = [int(minor) for minor in re.findall(r"GLIBC_2\.(\d+)", table)]
    return f"manylinux_2_{max([17, *versions])}_x86_64"


def _record(data: bytes) -> str:
    return "sha256=" + base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()


def make_wheel(folder: Path, emulate_tiles: bool = False) -> Path:
    """Compile and write the wheel into `folder`; the same sources give the same bytes but for the compiler's."""
    project = tomllib.loads((HERE / "pyproject.toml").read_text())["project"]
    name, version = re.sub(r"[-.]+", "_", project["name"]), project["version"] + ("+emulated" if emulate_tiles else "")
    metadata = [
        *("Metadata-Version: 2.4", f"Name: {project['name']}", f"Version: {version}", f"Summary: {project['description']}"),
        *(f"License-Expression: {project['license']}", f"Requires-Python: {project['requires-python']}"),
        *(f"Requires-Dist: {needed}" for needed in project["dependencies"]),
        *("Description-Content-Type: text/markdown", "", (HERE / "README.md").read_text()),
    ]
    library = compile_library(emulate_tiles)
    tag = f"py3-none-{platform_of(library)}"
    package = HERE / "trimtab_xeon"
    files = {f"trimtab_xeon/{path.name}": path.read_bytes() for path in (package / "__init__.py", package / "py.typed")}
    files["trimtab_xeon/kernels.so"] = library.read_bytes()
    info = f"{name}-{version}.dist-info"
    files[f"{info}/METADATA"] = "\n".join(metadata).encode()
    files[f"{info}/WHEEL"] = f"Wheel-Version: 1.0\nGenerator: trimtab_xeon/build.py\nRoot-Is-Purelib: false\nTag: {tag}\n".encode()
    rows = [f"{path},{_record(data)},{len(data)}" for path, data in files.items()]
    files[f"{info}/RECORD"] = "\n".join([*rows, f"{info}/RECORD,,", ""]).encode()
    folder.mkdir(parents=True, exist_ok=True)
    wheel = folder / f"{name}-{version}-{tag}.whl"
    aside = wheel.with_suffix(f".{os.getpid()}.tmp")
    try:
        with zipfile.ZipFile(aside, "w", zipfile.ZIP_DEFLATED) as archive:
            for path, data in files.items():
                entry = zipfile.ZipInfo(path, (1980, 1, 1, 0, 0, 0))
                entry.external_attr = (0o755 if path.endswith(".so") else 0o644) << 16
                archive.writestr(entry, data, zipfile.ZIP_DEFLATED)
        for older in folder.glob(f"{name}-*.whl"):
            if ("+emulated" in older.name) == emulate_tiles:
                older.unlink()
        aside.rename(wheel)
    finally:
        aside.unlink(missing_ok=True)  # of a full disk; it has its name by now where all went well
    return wheel


def build_wheel(wheel_directory: str, config_settings: object = None, metadata_directory: str | None = None) -> str:
    """PEP 517."""
    return make_wheel(Path(wheel_directory)).name


def build_sdist(sdist_directory: str, config_settings: object = None) -> str:
    """PEP 517; there is none: the sources live in trimtab's repository."""
    raise BuildError("trimtab-xeon has no source distribution: build the wheel from the repository")


def install(wheel: Path) -> None:
    """Into the Python that runs this, offline: what it depends on is there, or it could not have been built."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "-q", "--no-index", "--no-deps", "--force-reinstall"]
    run([*command, str(wheel)])


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--wheel", type=Path, metavar="FOLDER", help="write the wheel there and install nothing")
    parser.add_argument("--emulate-tiles", action="store_true", help="compute AMX's instructions in plain C++, for tests; with --wheel")
    asked = parser.parse_args()
    folder = asked.wheel
    if asked.emulate_tiles and folder is None:
        parser.error("--emulate-tiles is for tests alone, so it is not installed: say --wheel FOLDER")
    try:
        BUILD.mkdir(exist_ok=True)
        held = (BUILD / "lock").open("w")
    except OSError as failed:
        print(f"trimtab-xeon: {failed}: nothing can be built here; take a checkout that is yours", file=sys.stderr)
        return CANNOT
    with held as lock:  # two builds at once would take each other's objects away
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            wheel = make_wheel(folder or BUILD, asked.emulate_tiles)
            if folder is None:
                install(wheel)
        except BuildError as failed:
            print(f"trimtab-xeon: {failed}", file=sys.stderr)
            return CANNOT if isinstance(failed, CannotBuild) else 1
        except OSError as failed:
            print(f"trimtab-xeon: {failed}: free some room, or name a folder that is yours with --wheel", file=sys.stderr)
            return 1
    print(f"trimtab-xeon: {wheel.name}" + (" installed" if folder is None else f" in {folder}"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
