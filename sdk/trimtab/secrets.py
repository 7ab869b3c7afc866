"""What looks like an access token, a password or a private key, so that none leaves in a request, a tag or a log.

Shapes are those that the issuers document, and that secret scanners go by: a fixed prefix and a length, or a name in front of a
value. A digest, a commit id, a UUID, an ARN or an S3 URI is none, so a value without prefix and name (40 characters of an AWS
secret key, alone) cannot be told from data and is let through.
"""

from __future__ import annotations

import re
from functools import partial

# a token begins a word, or stands behind a terminal's colour, a written line end, an encoded character
_EDGE = r"(?:(?<![A-Za-z0-9])|(?<=[\[;][0-9]m)|(?<=[\[;][0-9]{2}m)|(?<=\\[nrt])|(?<=%[0-9A-Fa-f]{2}))"
_ASSIGNED = r"[\"']?\s{0,3}(?:=>|[:=])\s{0,3}[\"']?"  # name=value, "name": "value"

# each with one group that matched, the part to take out
_KINDS = {
    "Hugging Face token": _EDGE + r"(?P<secret>(?:hf|api_org)_[A-Za-z0-9]{24,})(?![A-Za-z0-9_])",
    "AWS access key id": _EDGE + r"(?P<secret>(?:AKIA|ASIA)[A-Z0-9]{16})(?![A-Za-z0-9+/])",
    "AWS secret key": r"(?i:secret_?-?(?:access_?-?)?key)" + _ASSIGNED + r"(?P<secret>[A-Za-z0-9/+]{40})(?![A-Za-z0-9/+=])",
    "AWS session token": r"(?:(?i:(?:session|security)_?-?token)"
    + _ASSIGNED
    + r"(?P<secret>[A-Za-z0-9/+=%]{60,})|"
    + _EDGE
    + r"(?P<secret_1>(?:IQoJb3JpZ2lu|F[Qw]oGZXIvYXdz)[A-Za-z0-9/+=%]{40,}))",
    "signed URL": r"(?i:[?&]X-(?:Amz|Goog)-Signature=)(?P<secret>[0-9A-Fa-f]{32,})",
    "GitHub token": _EDGE + r"(?P<secret>gh[opsur]_[A-Za-z0-9]{36,}|github_pat_[A-Za-z0-9_]{36,})",
    "GitLab token": _EDGE + r"(?P<secret>gl(?:pat|ptt|rt|dt)-[A-Za-z0-9_-]{20,})",
    # OpenAI, Anthropic and those that copied the shape: sk-..., sk-ant-api03-..., sk-proj-...
    "API key": _EDGE
    + r"(?P<secret>sk-(?:(?:ant|proj|svcacct|admin|or)-[A-Za-z0-9_-]{20,}|(?=[A-Za-z]*[0-9])[A-Za-z0-9]{20,}[A-Za-z0-9_-]*))",
    "Slack token": _EDGE + r"(?P<secret>xox[abeoprs]-[0-9A-Za-z-]{10,}|xapp-[0-9]-[0-9A-Za-z-]{20,})",
    "Google key": _EDGE + r"(?P<secret>AIza[0-9A-Za-z_-]{35}|ya29\.[0-9A-Za-z_-]{30,}|GOCSPX-[0-9A-Za-z_-]{20,})",
    "JSON web token": _EDGE + r"(?P<secret>eyJ[A-Za-z0-9_-]{10,}\.eyJ[A-Za-z0-9_-]{10,}(?:\.[A-Za-z0-9_-]+)?)",
    "private key": r"-----BEGIN (?:[A-Z0-9]+ ){0,3}PRIVATE KEY(?: BLOCK)?-----(?:\s|\\r|\\n)*"
    r"(?P<secret>(?:(?:Proc-Type|DEK-Info|Version|Comment):[^\n]*\s+|[A-Za-z0-9+/=]{16})(?s:.*?))(?=-----END |\Z)",
    "npm token": _EDGE + r"(?P<secret>npm_[A-Za-z0-9]{36})(?![A-Za-z0-9])",
    "PyPI token": _EDGE + r"(?P<secret>pypi-AgE[A-Za-z0-9_-]{40,})",
    # a digit tells a token from prose about bearer tokens
    "Authorization header": r"(?i:\bbearer[ \t]{1,3}|authorization[\"']?[ \t]{0,3}[:=][ \t]{0,3}[\"']?(?:basic|token)[ \t]{1,3})"
    r"(?P<secret>(?=[A-Za-z._~+/=-]*[0-9])[A-Za-z0-9._~+/=-]{20,})",
    # not a placeholder, such as ${PASSWORD}, <password>, %s or ***
    "password in a URL": r"(?i:\b[a-z][a-z0-9+.-]{1,20}://)[^\s/:@?#\"'`<>]{0,256}:(?P<secret>(?![$<{%*\[])[^\s/@?#\"'`<>]{1,256})@[A-Za-z0-9\[]",
    "password or key by its name": r"(?i:(?:api_?-?key|(?:access|auth|hf|hub)_?-?token|password|passwd|client_?-?secret))"
    + _ASSIGNED
    + r"(?P<secret>(?=[A-Za-z_-]{0,200}[0-9])(?=[0-9_-]{0,200}[A-Za-z])[A-Za-z0-9+/_~-]{20,}={0,2})(?![A-Za-z0-9+/_~.:({\[-])",
}
_PATTERNS = {kind: re.compile(pattern) for kind, pattern in _KINDS.items()}

# one of these stands in every secret: a line of a log is mostly told to be none by one search
_HINT = re.compile(
    r"hf_|api_org_|AKIA|ASIA|IQoJ|F[Qw]oG|gh[opsur]_|github_pat_|gl(?:pat|ptt|rt|dt)-|sk-|xox|xapp-|AIza|ya29|GOCSPX|eyJ|PRIVATE KEY|"
    r"npm_|pypi-|://|(?i:secret|(?:session|security|access|auth|hf|hub)_?-?token|signature=|bearer|authorization|api_?-?key|passw)"
)


def kind_of_token(text: str) -> str | None:
    """What the first secret found in a text is, such as `Hugging Face token`; None where there is none."""
    if _HINT.search(text) is None:
        return None
    return next((kind for kind, pattern in _PATTERNS.items() if pattern.search(text)), None)


def looks_like_token(text: str) -> bool:
    """Whether a text holds something of the shape of an access token, a password or a private key."""
    return kind_of_token(text) is not None


def redact(text: str) -> str:
    """The text with each secret replaced by what it is, such as `[redacted: Hugging Face token]`; the rest as it was."""
    if _HINT.search(text) is None:
        return text
    for kind, pattern in _PATTERNS.items():
        text = pattern.sub(partial(_without, kind), text)
    return text


def _without(kind: str, found: re.Match[str]) -> str:
    first, last = next(found.span(group) for group in found.groupdict() if found[group] is not None)
    start = found.start()
    return f"{found[0][: first - start]}[redacted: {kind}]{found[0][last - start :]}"
