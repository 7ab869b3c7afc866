"""Names, builds, finds, checks, pushes and prunes the images in which jobs run and models are served.

Nothing of the docker SDK is imported before it is used.

An image is called after what is in it, `trimtab-<device>-<target>:<version>-<digest>`: the digest is that of its build context and of the
arguments of its build. So it is built again when something of it changed, and only then.
"""

from __future__ import annotations

from trimtab.images.building import Progress, build
from trimtab.images.context import TARGETS
from trimtab.images.plan import LABEL, Plan, tag_of
from trimtab.images.present import ENGINE_REMEDY, Image, check, engine, find, inspect, installed
from trimtab.images.pruning import Pruned, outdated, prune
from trimtab.images.pushing import Pushed, push

__all__ = [
    "ENGINE_REMEDY",
    "LABEL",
    "TARGETS",
    "Image",
    "Plan",
    "Progress",
    "Pruned",
    "Pushed",
    "build",
    "check",
    "engine",
    "find",
    "inspect",
    "installed",
    "outdated",
    "prune",
    "push",
    "tag_of",
]
