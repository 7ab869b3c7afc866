"""What an image is built from: three things, the same bytes on every machine, so that their digest can be its name.

Dockerfile         how, from containers/<device>/<target>
requirements.txt   with what: every package by its exact version, from the same folder
trimtab-*.whl      us: a wheel packed from the files of the packages that run here, be they a checkout or installed;
                   in xeon's train image the compiled kernels beside it, trimtab_xeon-*.whl, where they are installed here
"""

from __future__ import annotations

import base64
import csv
import hashlib
import importlib.metadata
import importlib.util
import io
import json
import tarfile
import tomllib
import zipfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path

from trimtab.errors import BackendUnavailable

DEVICES = ("xeon", "gpu")
TARGETS = ("train", "serve")
PACKAGES = ("trimtab", "trimtab_runtime")
KERNELS = "trimtab-xeon"  # a distribution of its own, since it is compiled (entrypoints/trimtab_xeon)

_KEPT = {".py", ".toml", ".txt"}
_EPOCH = (1980, 1, 1, 0, 0, 0)  # the first time that a zip file can tell


@cache
def version() -> str:
    """This trimtab's version: of the installed distribution, in a bare checkout what pyproject.toml says."""
    try:
        return importlib.metadata.version("trimtab")
    except importlib.metadata.PackageNotFoundError:
        project = _folder_of("trimtab").parents[1] / "pyproject.toml"
        return str(tomllib.loads(project.read_text(encoding="utf-8"))["project"]["version"])


def context(device: str, target: str = "train") -> dict[str, bytes]:
    """The files of the build context of an image, by name. What one target's image holds leaves the other's as it is.

    Raises BackendUnavailable when a part of this installation is missing.
    """
    home = _container_folder(device, target)
    name, wheel = pack_wheel({package: _folder_of(package) for package in PACKAGES}, version())
    files = {"Dockerfile": (home / "Dockerfile").read_bytes(), "requirements.txt": (home / "requirements.txt").read_bytes(), name: wheel}
    kernels = pack_kernels() if (device, target) == ("xeon", "train") else None
    return files if kernels is None else files | dict([kernels])


def digest(files: Mapping[str, bytes], arguments: Mapping[str, str] | None = None) -> str:
    """sha256 of the files' names and contents and of the build arguments: what two equal images have in common."""
    sums = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    return hashlib.sha256(json.dumps([sums, dict(arguments or {})], sort_keys=True).encode()).hexdigest()


def archive(files: Mapping[str, bytes]) -> io.BytesIO:
    """The context as the tar file that an engine takes."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, content in sorted(files.items()):
            entry = tarfile.TarInfo(name)
            entry.size, entry.mode = len(content), 0o644
            tar.addfile(entry, io.BytesIO(content))
    buffer.seek(0)
    return buffer


def pack_wheel(packages: Mapping[str, Path], version: str) -> tuple[str, bytes]:
    """A wheel of some packages' folders, its name and its bytes: equal files give equal bytes.

    Its format is the "Binary distribution format" specification of packaging.python.org. It names no dependencies: requirements.txt does.
    """
    info = f"trimtab-{version}.dist-info"
    files = {
        f"{package}/{path.relative_to(folder).as_posix()}": path.read_bytes()
        for package, folder in packages.items()
        for path in folder.rglob("*")
        if path.suffix in _KEPT and not {"__pycache__", "containers"} & set(path.relative_to(folder).parts)
    }
    files = dict(sorted(files.items())) | {
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: trimtab\nVersion: {version}\nRequires-Python: >=3.11\n".encode(),
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: trimtab\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    return f"trimtab-{version}-py3-none-any.whl", _zipped(files, info)


def pack_kernels() -> tuple[str, bytes] | None:
    """The wheel of the compiled kernels, its name and its bytes, packed from what is installed here; None where they are not."""
    try:
        installed = importlib.metadata.distribution(KERNELS)
    except importlib.metadata.PackageNotFoundError:
        return None
    tag = next(line.removeprefix("Tag: ") for line in (installed.read_text("WHEEL") or "").splitlines() if line.startswith("Tag: "))
    name = f"{KERNELS.replace('-', '_')}-{installed.version}"
    files = {
        file.as_posix(): Path(str(installed.locate_file(file))).read_bytes()
        for file in sorted(installed.files or ())
        if "__pycache__" not in file.parts and (not file.parts[0].endswith(".dist-info") or file.name in ("METADATA", "WHEEL"))
    }
    return f"{name}-{tag}.whl", _zipped(files, f"{name}.dist-info")


def said_of_kernels(files: Mapping[str, bytes]) -> str:
    """Whether a context of xeon's train image holds the compiled kernels, and what to do where it does not."""
    held = next((name for name in files if name.startswith("trimtab_xeon-")), None)
    if held is not None:
        return f"with the compiled kernels, {held}"
    return "WITHOUT the compiled kernels, so plain torch computes: trimtab-xeon is not installed here (entrypoints/trimtab_xeon/README.md)"


def _zipped(files: Mapping[str, bytes], info: str) -> bytes:
    """A wheel's bytes: its files, and the record of them in `info`."""
    rows = io.StringIO()
    record = csv.writer(rows, lineterminator="\n")
    for name, content in files.items():
        sha = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
        record.writerow([name, f"sha256={sha}", len(content)])
    record.writerow([f"{info}/RECORD", "", ""])
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as wheel:  # not deflated: libraries differ in what they make of the same bytes
        for name, content in [*files.items(), (f"{info}/RECORD", rows.getvalue().encode())]:
            entry = zipfile.ZipInfo(name, _EPOCH)
            entry.create_system, entry.external_attr = 3, 0o100644 << 16
            wheel.writestr(entry, content)
    return buffer.getvalue()


def _container_folder(device: str, target: str) -> Path:
    """`containers/<device>/<target>`: inside the installed package, or at the top of a checkout."""
    package = _folder_of("trimtab")
    for home in (package / "containers" / device / target, package.parents[1] / "containers" / device / target):
        if (home / "Dockerfile").is_file():
            return home
    raise BackendUnavailable(
        f"this trimtab has no Dockerfile for {device} {target}: devices are {' and '.join(DEVICES)}, targets {' and '.join(TARGETS)}; "
        "install it again with  pip install --force-reinstall trimtab"
    )


def _folder_of(package: str) -> Path:
    found = importlib.util.find_spec(package)  # imports no runtime
    if found is None or found.origin is None:
        raise BackendUnavailable(f"{package}, which goes into the image, is not there:  pip install --force-reinstall trimtab")
    return Path(found.origin).parent
