"""Python code that a model's author wrote and its config.json names: run only where the very revision was allowed by name."""

from __future__ import annotations

import importlib
import json
import os
import re
from pathlib import Path

from trimtab import hub
from trimtab.errors import SpecError, WeightsError
from trimtab.weights import BaseModel

_PINNED = re.compile(r"[\w.-]+/[\w.-]+@[0-9a-f]{40}")


def allowed(named: str, base: BaseModel) -> bool:
    """Whether the model's own code may run: not unless `named` is what is served, "owner/name@<commit>".

    Raises SpecError where it names something else.
    """
    if not named:
        return False
    if not _PINNED.fullmatch(named):
        raise SpecError(f"trust_remote_code={named!r} names no revision: write owner/name@COMMIT, the commit with all its 40 digits")
    served = f"{base.hub_id}@{base.revision}" if base.hub_id and base.revision else f"{base.folder} ({base.source})"
    if named != served:
        raise SpecError(f"trust_remote_code names {named}, and what is served is {served}: read that revision's code, and name it")
    return True


def code_of(base: BaseModel) -> dict[str, Path]:
    """The Python files of an allowed revision, by their names beside config.json; none where config.json asks for none.

    Weights are fetched without code, so it comes from the hub now, or from Hugging Face's own cache. Raises WeightsError where neither has
    it.
    """
    config = json.loads((base.folder / "config.json").read_text(encoding="utf-8"))
    if "auto_map" not in config:
        return {}
    try:
        library = importlib.import_module("huggingface_hub")
        errors = importlib.import_module("huggingface_hub.errors")
    except ImportError as exc:
        raise WeightsError(f"{exc.name} is needed to fetch a model's code:  {hub.REMEDY}") from exc
    try:
        folder = Path(
            library.snapshot_download(
                base.hub_id,
                revision=base.revision,
                allow_patterns=["*.py"],
                endpoint=os.environ.get("HF_ENDPOINT") or None,
                token=hub.find_token(None) or False,
                local_files_only=hub.is_off(),
            )
        )
    except (OSError, ValueError, errors.HTTPError) as exc:  # the library's own errors are among these
        raise WeightsError(f"the code of {base.hub_id} at {base.revision} could not be fetched ({exc}): connect to the model hub") from exc
    found = {path.relative_to(folder).as_posix(): path.resolve() for path in sorted(folder.rglob("*.py"))}
    if not found:
        raise WeightsError(f"{base.hub_id} at {base.revision} asks for code (auto_map) and holds none: choose another revision")
    return found
