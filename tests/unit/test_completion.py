"""Shell completion, by a bash that runs the script: commands, options, handles with their colon, models, recipes, files."""

from __future__ import annotations

import json
import os
import pty
import select
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from trimtab.cli import COMMANDS, main
from trimtab.recipes import recipes

BIN = Path(sys.executable).parent
CALL = 'complete_line() { COMP_LINE="$1" COMP_POINT=${#1}; _trimtab_completion trimtab; printf "%s\\n" "${COMPREPLY[@]}" --; }'


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A home with two runs, one that is damaged, and an endpoint."""
    for place, name, record in [
        ("runs/trim-aaaa0001", "run.json", {"request": {"handle": "process://trim-aaaa0001"}}),
        ("runs/trim-bbbb0002", "run.json", {"request": {"handle": "docker://trim-bbbb0002"}}),
        ("runs/trim-cccc0003", "run.json", "cut off"),
        ("endpoints/trim-ep-1", "record.json", {"handle": "process://trim-ep-1"}),
    ]:
        folder = tmp_path / place
        folder.mkdir(parents=True)
        (folder / name).write_text(json.dumps(record))
    monkeypatch.setenv("TRIMTAB_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", f"{BIN}{os.pathsep}{os.environ['PATH']}")
    return tmp_path


@pytest.fixture
def script(tmp_path, capsys):
    assert main(["completion", "bash"]) == 0
    file = tmp_path / "completion.bash"
    file.write_text(capsys.readouterr().out)
    return file


def test_bash_completes_commands_options_handles_and_names(home, script):
    expected = {
        "trimtab ": sorted(COMMANDS),
        "trimtab st": ["status", "stop"],
        "trimtab image p": ["prune", "push"],
        "trimtab status --b": ["--backend-option"],
        # bash breaks words at colons and equals signs, so what it takes begins behind the last of them
        "trimtab status pro": ["process://trim-aaaa0001"],
        "trimtab status process:": ["//trim-aaaa0001"],
        "trimtab logs -f docker://trim-b": ["//trim-bbbb0002"],
        "trimtab compare tuned=process://trim-a": ["//trim-aaaa0001"],
        "trimtab close ": ["process://trim-ep-1"],
        "trimtab fit x --model smollm2-135m-i": ["smollm2-135m-instruct"],
        "trimtab fit x --model=smollm2-135m-i": ["smollm2-135m-instruct"],
        "trimtab fit x --recipe ": list(recipes()),
        "trimtab list --backend d": ["docker"],
        "trimtab status nowhere": [],
        "trimtab fit notes": [],  # files, which bash adds by itself
    }
    words = "\n".join(f"complete_line {json.dumps(line)}" for line in expected)
    bash = ["bash", "--norc", "--noprofile", "-c", f"source {script}\ncompopt() {{ :; }}\n{CALL}\n{words}"]
    done = subprocess.run(bash, capture_output=True, text=True, timeout=120, check=False)
    assert done.stderr == ""
    found = [part.split() for part in done.stdout.split("--\n")[:-1]]
    assert {line: sorted(each) for line, each in zip(expected, found, strict=True)} == {
        line: sorted(each) for line, each in expected.items()
    }


def test_a_person_at_a_bash_gets_the_whole_handle_and_files_for_data(home, script):
    (home / "my-notes").mkdir()
    person, terminal = pty.openpty()
    environment = {**os.environ, "PS1": "ready> ", "TERM": "dumb", "HISTFILE": "", "COLUMNS": "200"}
    command = ["bash", "--norc", "--noprofile", "-i"]
    bash = subprocess.Popen(command, stdin=terminal, stdout=terminal, stderr=terminal, cwd=home, env=environment, start_new_session=True)
    os.close(terminal)
    seen = b""

    def until(word: bytes) -> None:
        nonlocal seen
        end = time.monotonic() + 60
        while word not in seen:
            assert select.select([person], [], [], max(0.0, end - time.monotonic()))[0], f"no {word!r} in {seen!r}"
            seen += os.read(person, 4096)

    try:
        os.write(person, f"source {script}\n".encode())
        os.write(person, b"trimtab status process://trim-a\t")
        until(b"process://trim-aaaa0001 ")
        os.write(person, b"\x15trimtab fit my-no\t")
        until(b"my-notes/")
        os.write(person, b"\x15exit\n")
        assert bash.wait(20) == 0
    finally:
        bash.kill()
        bash.wait()
        os.close(person)


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_the_other_shells_take_their_script(shell, capsys, tmp_path):
    assert main(["completion", shell]) == 0
    text = capsys.readouterr().out
    assert "_TRIMTAB_COMPLETE" in text
    (tmp_path / "script").write_text(text)
    if shutil.which(shell):
        subprocess.run([shell, "-n", str(tmp_path / "script")], check=True, timeout=20)


def test_a_completion_loads_nothing_heavy():
    code = "import sys, trimtab.cli, trimtab.run_cli, trimtab.chat_cli; print(*sorted({'pydantic', 'rich'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split() == []
