"""A container's life, as it is noted in a folder: `container.json`."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from trimtab.backends.run_folder import read_json, write_json
from trimtab.errors import BackendError

NAME = "container.json"


class Ended(BaseModel):
    """How a container ended. `exit_code` is None when it was gone before anyone looked; one that never `started` may have an `error`."""

    model_config = ConfigDict(frozen=True)

    exit_code: int | None = None
    oom_killed: bool = False
    started: bool = True
    error: str = ""
    at: str = ""


class Life(BaseModel):
    """The run's newest container. Its events and its log begin at these bytes of the files; `ended` is None until somebody looked."""

    model_config = ConfigDict(frozen=True)

    container: str = ""
    events_from: int = 0
    log_from: int = 0
    ended: Ended | None = None


def read_life(folder: Path) -> Life | None:
    """The newest life; None where none ever began."""
    try:
        return Life.model_validate(read_json(folder / NAME))
    except FileNotFoundError:
        return None
    except ValidationError as exc:
        raise BackendError(f"{folder / NAME} is damaged ({exc}): remove the folder {folder} and run the job again") from exc


def write_life(folder: Path, life: Life) -> None:
    write_json(folder / NAME, life.model_dump(mode="json"))
