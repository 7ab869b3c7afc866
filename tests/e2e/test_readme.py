"""What the README and docs/ say is run: Python blocks as one program, `trimtab` lines through the console script, the rest looked up."""

from __future__ import annotations

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
PAGES = [README, *sorted(page for page in (ROOT / "docs").glob("*.md") if page.name != "help.md")]  # of that, test_help.py sees


@dataclass(frozen=True)
class Block:
    """What stands between fences; `line` is the page's line, from 1, on which its first line stands."""

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


def blocks_in(language: str) -> list[Block]:
    """Of the README, then of docs/."""
    found = [block for page in PAGES for block in blocks_of(page.read_text(encoding="utf-8")) if block.language == language]
    assert found, f"no page has a {language} block: nothing was tested"
    return found


def shell_lines(program: str) -> list[str]:
    found = [line for block in blocks_in("sh") for line in block.lines if line.split()[:1] == [program]]
    assert found, f"no sh block runs {program}"
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
    for block in blocks_of(README.read_text(encoding="utf-8")):
        if block.language != "python":
            continue
        lines += [""] * (block.line - 1 - len(lines)) + list(block.lines)  # a traceback names the README's lines
    assert lines
    program = tmp_path / "README.py"
    program.write_text("\n".join(lines) + "\n", encoding="utf-8")
    process = subprocess.run([sys.executable, program], cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)
    assert process.returncode == 0, process.stderr
    assert "Traceback" not in process.stderr


def run_in_order(blocks: list[Block]) -> None:
    """The `trimtab` lines of blocks; HANDLE is the run that the last `fit` printed, ENDPOINT the endpoint that the last `deploy` did."""
    printed: dict[str, str] = {}
    for line in (line for block in blocks for line in block.lines if line.startswith("trimtab ")):
        words = [printed.get(word, word) for word in shlex.split(line, comments=True)[1:]]
        said = trimtab(*words).strip()
        assert said or words[0] == "close", f"{line} printed nothing"
        if name := {"fit": "HANDLE", "deploy": "ENDPOINT"}.get(words[0]):
            printed[name] = said.splitlines()[-1]
            assert re.fullmatch(r"[a-z]+://[\w-]+", printed[name]), f"{line} ends with {printed[name]!r}, which is no handle"


def on_sagemaker(block: Block) -> bool:
    return any("sagemaker" in line for line in block.lines)


def test_the_trimtab_lines_run_in_order() -> None:
    run_in_order([block for block in blocks_in("sh") if not on_sagemaker(block)])


def test_the_lines_for_sagemaker_run_in_order(amazon, xeon_image, xeon_serve_image, base_image, monkeypatch) -> None:
    monkeypatch.setenv("TRIMTAB_BASE_IMAGE", base_image)  # the image's tag says on which base it was built
    blocks = [block for block in blocks_in("sh") if on_sagemaker(block)]
    assert blocks
    run_in_order(blocks)


def test_make_lines_name_targets_and_variables_of_the_makefile() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([\w-]+):", makefile, re.MULTILINE))
    said = [shlex.split(line, comments=True)[1:] for line in shell_lines("make")]
    said += [match.split() for page in PAGES for match in re.findall(r"`make ([^`]+)`", page.read_text(encoding="utf-8"))]
    for target, *assignments in said:
        assert target in targets, f"a page says make {target}; the Makefile has {', '.join(sorted(targets))}"
        for assignment in assignments:
            assert f"$({assignment.partition('=')[0]})" in makefile, f"the Makefile does not know {assignment}"


def test_json_blocks_are_probe_files_that_can_be_read(tmp_path: Path) -> None:
    for block in blocks_in("json"):
        (tmp_path / "probes.json").write_text("\n".join(block.lines), encoding="utf-8")
        assert all(probes.load(tmp_path / "probes.json").values())


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_paths_lead_to_files(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)#\s]+)(?:#[\w-]*)?\)", text) if "://" not in link]
    paths = re.findall(r"\b(?:sdk|entrypoints|benchmarks|containers|tests)/[\w./-]*\w", text)
    assert links or paths or page.stem in ("errors", "interruptions", "models")
    assert [name for name in links if not (page.parent / name).exists()] == []
    assert [name for name in paths if not (ROOT / name).exists()] == []
