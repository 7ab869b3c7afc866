"""Every target, in the order in which they are tried."""

from __future__ import annotations

from fuzz import page_targets, training_targets, wire_targets

TARGETS = [*training_targets.TARGETS, *page_targets.TARGETS, *wire_targets.TARGETS]
