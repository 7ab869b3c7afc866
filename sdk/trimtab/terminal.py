"""What may go to a terminal: words of data, of models and of files must not steer it."""

from __future__ import annotations

import re

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ufeff]")


def plain(text: str) -> str:
    """Text without control characters but for line ends and tabs: what a model or a file says must not steer a terminal or a browser."""
    return _CONTROL.sub("", text.replace("\r\n", "\n").replace("\r", "\n"))
