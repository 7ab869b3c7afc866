"""What a container may put in the place of the folders that are uploaded."""

from __future__ import annotations

from pathlib import Path

import pytest

from control_plane.layout import Tree
from control_plane.outputs import together
from support.training_jobs import Jobs


def test_a_link_in_a_folders_place_uploads_nothing_of_this_machine(jobs: Jobs) -> None:
    name = jobs.start("echo w >/opt/ml/model/w; rm -r /opt/ml/output/data; ln -s /etc /opt/ml/output/data; ln -s /etc /opt/ml/model/etc")
    assert jobs.wait(name)["TrainingJobStatus"] == "Completed"
    assert jobs.keys(f"out/{name}/output/") == ["model.tar.gz"]
    assert jobs.packed(name) == {"w": "w\n"}


@pytest.mark.parametrize("place", ["output", "output/data"])
def test_a_link_anywhere_on_the_way_to_a_folder_counts(tmp_path: Path, place: str) -> None:
    """A process can replace what is a mount in a container."""
    elsewhere = tmp_path / "elsewhere" / "data"
    elsewhere.mkdir(parents=True)
    (elsewhere / "secret").touch()
    (elsewhere.parent / "failure").write_text("secret")
    (elsewhere / "failure").write_text("secret")
    tree = Tree(tmp_path / "tree").make()
    (tree.data / "mine").touch()
    assert list(together([tree.root], "output/data")) == ["mine"]
    tree.data.rename(tmp_path / "away")
    if place == "output":
        tree.output.rmdir()
    (tree.root / place).symlink_to(elsewhere.parent if place == "output" else elsewhere)
    assert (tree.data / "secret").exists()
    assert together([tree.root], "output/data") == {}
    assert tree.reason() == ""


def test_a_tree_below_a_link_is_a_tree(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    tree = Tree(tmp_path / "link").make()
    (tree.model / "w").touch()
    (tree.model / "v").symlink_to("w")
    assert list(together([tree.root], "model")) == ["v", "w"]
