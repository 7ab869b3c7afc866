"""What the README says is run: Python blocks as one program, `trimtab` lines through the console script, targets and links looked up."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from trimtab import probes

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"


@dataclass(frozen=True)
class Block:
    """What stands between fences; `line` is the README's line, from 1, on which its first line stands."""

    language: str
    line: int
    lines: tuple[str, ...]


def blocks_of(text: str) -> list[Block]:
    found: list[Block] = []
    fence: tuple[str, int] | None = None
    lines = text.splitlines()
    for number, line in enumerate(lines, 1):
        if not line.startswith("```"):
            continue
        if fence is None:
            fence = line.removeprefix("```").strip(), number + 1
        else:
            found.append(Block(*fence, tuple(lines[fence[1] - 1 : number - 1])))
            fence = None
    assert fence is None, f"the block that begins before line {fence and fence[1]} has no end"
    return found


def readme_blocks(language: str) -> list[Block]:
    assert README.is_file(), f"{README} is not there"
    found = [block for block in blocks_of(README.read_text(encoding="utf-8")) if block.language == language]
    assert found, f"README.md has no {language} block: nothing of it was tested"
    return found


def shell_lines(program: str) -> list[str]:
    found = [line for block in readme_blocks("sh") for line in block.lines if line.split()[:1] == [program]]
    assert found, f"no sh block of README.md runs {program}"
    return found


def console_script() -> list[str]:
    """The installed `trimtab`; in a checkout that is only on the path, the same through -m."""
    script = shutil.which("trimtab", path=str(Path(sys.executable).parent))
    return [script] if script else [sys.executable, "-m", "trimtab"]


def trimtab(*arguments: str) -> str:
    process = subprocess.run([*console_script(), *arguments], cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)
    assert process.returncode == 0, f"trimtab {shlex.join(arguments)} ended with {process.returncode}:\n{process.stdout}{process.stderr}"
    return process.stdout


def test_blocks_are_found_with_their_lines() -> None:
    text = "# a\n```sh\nmake x\ntrimtab list\n```\nwords\n```python\n1\n```\n```\n2\n```\n"
    expected = [Block("sh", 3, ("make x", "trimtab list")), Block("python", 8, ("1",)), Block("", 11, ("2",))]
    assert blocks_of(text) == expected
    with pytest.raises(AssertionError, match="before line 2 has no end"):
        blocks_of("```sh\nmake x\n")


def test_the_python_blocks_are_a_program_that_runs(tmp_path: Path) -> None:
    lines: list[str] = []
    for block in readme_blocks("python"):
        lines += [""] * (block.line - 1 - len(lines)) + list(block.lines)  # a traceback names the README's lines
    program = tmp_path / "README.py"
    program.write_text("\n".join(lines) + "\n", encoding="utf-8")
    process = subprocess.run([sys.executable, program], cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)
    assert process.returncode == 0, process.stderr
    assert "Traceback" not in process.stderr


def run_in_order(blocks: list[Block], *place: str) -> None:
    """The `trimtab` lines of blocks; HANDLE is the newest run of that place, ENDPOINT its newest endpoint."""
    for line in (line for block in blocks for line in block.lines if line.startswith("trimtab ")):
        words = shlex.split(line, comments=True)[1:]
        if "HANDLE" in words:
            newest = json.loads(trimtab("list", "--json", *place))[0]["handle"]
            words = [newest if word == "HANDLE" else word for word in words]
        if "ENDPOINT" in words:
            newest = json.loads(trimtab("endpoints", "--json", *(place or ("--backend", "process"))))[0]["handle"]
            words = [newest if word == "ENDPOINT" else word for word in words]
        assert trimtab(*words).strip() or words[0] == "close", f"{line} printed nothing"


def on_sagemaker(block: Block) -> bool:
    return any("sagemaker" in line for line in block.lines)


def test_the_trimtab_lines_run_in_order() -> None:
    run_in_order([block for block in readme_blocks("sh") if not on_sagemaker(block)])


def test_the_lines_for_sagemaker_run_in_order(amazon, xeon_image, xeon_serve_image, base_image, monkeypatch) -> None:
    monkeypatch.setenv("TRIMTAB_BASE_IMAGE", base_image)  # the image's tag says on which base it was built
    blocks = [block for block in readme_blocks("sh") if on_sagemaker(block)]
    assert blocks
    run_in_order(blocks, "--backend", "sagemaker")


def test_make_lines_name_targets_and_variables_of_the_makefile() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([\w-]+):", makefile, re.MULTILINE))
    said = [shlex.split(line, comments=True)[1:] for line in shell_lines("make")]
    said += [match.split() for match in re.findall(r"`make ([^`]+)`", README.read_text(encoding="utf-8"))]
    for target, *assignments in said:
        assert target in targets, f"the README says make {target}; the Makefile has {', '.join(sorted(targets))}"
        for assignment in assignments:
            assert f"$({assignment.partition('=')[0]})" in makefile, f"the Makefile does not know {assignment}"


def test_json_blocks_are_probe_files_that_can_be_read(tmp_path: Path) -> None:
    for block in readme_blocks("json"):
        (tmp_path / "probes.json").write_text("\n".join(block.lines), encoding="utf-8")
        assert all(probes.load(tmp_path / "probes.json").values())


def test_links_and_paths_lead_to_files() -> None:
    text = README.read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)#\s]+)\)", text) if "://" not in link]
    paths = re.findall(r"\b(?:sdk|entrypoints|benchmarks|containers|tests)/[\w./-]*\w", text)
    assert links
    assert [name for name in (*links, *paths) if not (ROOT / name).exists()] == []
