"""AWS's event stream encoding (application/vnd.amazon.eventstream), in which InvokeEndpointWithResponseStream answers.

A message is: total length, headers' length, CRC-32 of these eight bytes, headers, payload, CRC-32 of all before; lengths and sums as
big-endian 32-bit numbers. A header is a name (length in one byte), the type 7 (string), a value (length in two bytes).
https://docs.aws.amazon.com/lexv2/latest/dg/event-stream-encoding.html
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Mapping

_STRING = 7


def message(headers: Mapping[str, str], payload: bytes) -> bytes:
    """One message."""
    head = b"".join(
        struct.pack("!B", len(name)) + name.encode() + struct.pack("!BH", _STRING, len(value.encode())) + value.encode()
        for name, value in headers.items()
    )
    prelude = struct.pack("!II", 16 + len(head) + len(payload), len(head))
    body = prelude + struct.pack("!I", zlib.crc32(prelude)) + head + payload
    return body + struct.pack("!I", zlib.crc32(body))


def event(name: str, payload: bytes, content_type: str = "application/octet-stream") -> bytes:
    """An event, such as a PayloadPart."""
    return message({":message-type": "event", ":event-type": name, ":content-type": content_type}, payload)


def exception(name: str, members: Mapping[str, str]) -> bytes:
    """An error in the middle of a stream, such as a ModelStreamError; the client raises it."""
    headers = {":message-type": "exception", ":exception-type": name, ":content-type": "application/json"}
    return message(headers, json.dumps(dict(members)).encode())
