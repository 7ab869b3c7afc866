"""One page from the network, through a session that cannot be led elsewhere.

LangChain's `WebBaseLoader` asks; the session it is given answers. Every hop (first request, redirect, retry) passes `_Adapter.send`,
and every connection `Gate.connect`, which resolves the name once, checks all addresses and connects to one of those it checked.
The name stays in the Host header and in TLS (server name and certificate check), because only the socket is made differently.
"""

from __future__ import annotations

import email.utils
import importlib.metadata
import io
import os
import time
from dataclasses import dataclass
from http.client import HTTPException
from typing import Any
from urllib.parse import urlsplit

import requests
from bs4 import BeautifulSoup
from requests.adapters import HTTPAdapter
from requests.utils import get_environ_proxies, select_proxy
from urllib3.exceptions import HTTPError, NameResolutionError

from trimtab.data.addresses import Resolver, checked, resolve
from trimtab.data.body import HTML_TYPES, TEXT_TYPES, content_type, read, sniffed
from trimtab.data.connect import Deadline, Gate, ProxyGate, use_gate
from trimtab.data.decode import decode
from trimtab.data.limits import FetchLimits
from trimtab.data.loader import PageLoader
from trimtab.data.markup import parseable
from trimtab.data.parts import RECORD_TYPES
from trimtab.data.sources import check_url, public_url
from trimtab.errors import DataError


def _version() -> str:
    try:
        return importlib.metadata.version("trimtab")
    except importlib.metadata.PackageNotFoundError:  # run from a checkout
        return "0"


USER_AGENT = f"trimtab/{_version()} (fetches the pages that its user names, to tune a model on them)"
_WORTH_A_RETRY = frozenset({429, 500, 502, 503, 504})


@dataclass(frozen=True)
class Page:
    """A page as it came, and as text."""

    url: str  # as asked for
    media_type: str  # one of HTML_TYPES, TEXT_TYPES or RECORD_TYPES; anything else, or "", where records were asked for
    body: bytes  # decompressed
    text: str  # "" where it holds records
    tree: BeautifulSoup  # of `text`, as WebBaseLoader parsed it


def fetch_page(
    url: str,
    limits: FetchLimits,
    *,
    allow_private_hosts: bool = False,
    proxies_from_environment: bool = False,
    resolver: Resolver = resolve,
    verify: bool | str | None = None,
    records: bool = False,
) -> Page:
    """The page at `url`. Raises DataError with the reason alone; the caller knows the URL. `records` says that the address names a file
    of records, whatever type the server gives it.

    `verify` is a file of certificate authorities; None takes REQUESTS_CA_BUNDLE or SSL_CERT_FILE, else the bundled ones.
    """
    with Deadline(limits.total_s) as deadline:
        adapter = _Adapter(limits, deadline, Gate(resolver, deadline, allow_private_hosts), proxies_from_environment, records)
        with _session(adapter, limits, verify) as session:
            try:
                loader = PageLoader(url, session)
                next(loader.lazy_load())
            except DataError:
                raise
            except (requests.RequestException, HTTPError, OSError, ValueError) as exc:
                raise DataError(deadline.reason() or _reason(exc, limits)) from exc
    if adapter.page is None:
        raise DataError("it redirects, and says not where to; pass the address of the page itself")
    assert loader.tree is not None
    return Page(url, *adapter.page, loader.tree)


def _session(adapter: _Adapter, limits: FetchLimits, verify: bool | str | None) -> requests.Session:
    """One session a page: no cookie, connection or password of one page reaches another."""
    session = requests.Session()
    session.trust_env = False  # no proxies, no .netrc
    session.max_redirects = limits.redirects
    session.verify = verify or os.environ.get("REQUESTS_CA_BUNDLE") or os.environ.get("SSL_CERT_FILE") or True
    session.headers.clear()
    session.headers.update(
        {
            "User-Agent": USER_AGENT,
            "Accept": ", ".join(
                ["*/*"] if adapter.records else [*HTML_TYPES, *(f"{kind};q=0.9" for kind in TEXT_TYPES), "application/json;q=0.1"]
            ),
            "Accept-Encoding": "gzip, deflate",
        }
    )
    session.adapters.clear()  # http and https, nothing else
    session.mount("http://", adapter)
    session.mount("https://", adapter)
    adapter.cookies = session.cookies
    return session


class _Adapter(HTTPAdapter):
    """Each hop: its URL checked, retried, its body read within the limits. Keeps the page; requests follows the redirects."""

    cookies: Any = None

    def __init__(self, limits: FetchLimits, deadline: Deadline, gate: Gate, proxies_from_environment: bool, records: bool = False) -> None:
        self.records = records
        self.limits, self.deadline, self.gate, self.proxies_from_environment = limits, deadline, gate, proxies_from_environment
        self.page: tuple[str, bytes, str] | None = None
        super().__init__()
        use_gate(self.poolmanager, gate)

    def proxy_manager_for(self, proxy: str, **proxy_kwargs: Any) -> Any:
        if not proxy.lower().startswith(("http://", "https://")):
            raise DataError("the environment's proxy is neither http nor https; name such a one in HTTPS_PROXY and HTTP_PROXY")
        manager = super().proxy_manager_for(proxy, **proxy_kwargs)
        use_gate(manager, ProxyGate(self.gate))
        return manager

    def send(
        self,
        request: requests.PreparedRequest,
        stream: bool = False,
        timeout: Any = None,
        verify: Any = True,
        cert: Any = None,
        proxies: Any = None,
    ) -> requests.Response:
        url = request.url or ""
        if problem := check_url(url):
            raise DataError(f"{public_url(url)}: {problem}")
        proxies = self._proxies(url)
        pause = self.limits.backoff_s
        for attempt in range(self.limits.retries + 1):
            last = attempt == self.limits.retries
            self.deadline.check()
            try:
                timeout = (min(self.limits.connect_s, max(self.deadline.left(), 0.001)), self.limits.read_s)
                response = super().send(request, stream=True, timeout=timeout, verify=verify, cert=cert, proxies=proxies)
                if response.status_code not in _WORTH_A_RETRY or last:
                    return self._received(response)
                response.close()
                wait = self._asked_pause(response, pause)
            except requests.exceptions.SSLError:
                raise  # a certificate is no better the second time
            except (requests.ConnectionError, requests.Timeout, HTTPError):
                self.deadline.check()
                if last:
                    raise
                wait = pause
            if wait >= self.deadline.left():
                raise DataError(
                    f"it took longer than {self.limits.total_s:g} s with its pauses; "
                    "raise max_page_seconds (--max-page-seconds), or try later"
                )
            time.sleep(wait)
            pause *= 2
        raise AssertionError("unreachable: the last attempt returns or raises")

    def _proxies(self, url: str) -> dict[str, str]:
        """The environment's proxies if asked for. The proxy resolves the name, so what we can resolve is checked beforehand."""
        proxies = get_environ_proxies(url) if self.proxies_from_environment else {}
        if select_proxy(url, proxies):
            host = urlsplit(url).hostname or ""
            try:
                addresses = self.gate.resolver(host, 0)
            except (OSError, UnicodeError):
                return proxies  # a name that only the proxy knows
            checked(host, addresses, allow_private_hosts=self.gate.allow_private_hosts)
        return proxies

    def _asked_pause(self, response: requests.Response, pause: float) -> float:
        asked = _retry_after(response.headers.get("Retry-After"))
        if asked is not None and asked > self.limits.retry_after_s:
            raise DataError(f"HTTP {response.status_code}, and it asks for a pause of {asked:.0f} s; try again after it")
        return max(pause, asked or 0.0)

    def _received(self, response: requests.Response) -> requests.Response:
        """`response` with its body, in UTF-8, for a page; without one for a redirect or an error, whose text nobody reads."""
        self.cookies.update(response.cookies)  # some sites set one and redirect to the same address
        raw, text = response.raw, ""
        try:
            if response.status_code == 200:
                media_type, charset = content_type(response.headers, records=self.records)
                body = read(raw, response.headers, self.limits.max_bytes)
                self.deadline.check()  # a cut connection can look like the end of the page
                if not self.records and media_type not in RECORD_TYPES:
                    media_type = media_type or sniffed(body)
                    text = decode(body, header_charset=charset, markup=media_type in HTML_TYPES).text
                self.page = media_type, body, text
                text = parseable(text)
            elif not 400 <= response.status_code < 600 and not response.is_redirect:
                raise DataError(f"{_status(response)}; only 200 brings a page: save it from a browser and pass the file")
        finally:
            raw.close()
        response.raw = io.BytesIO(text.encode("utf-8", errors="replace"))
        return response


def _status(response: requests.Response) -> str:
    return f"HTTP {response.status_code} {response.reason or ''}".rstrip()


def _next_step(status: int) -> str:
    if status in (401, 402, 403, 407, 451):
        return "the site does not give it to programs: save it from a browser and pass the file"
    if status in _WORTH_A_RETRY or status == 408:
        return "try again later"
    return "check the address"


def _retry_after(value: str | None) -> float | None:
    """Seconds of a Retry-After header: a number or a date (RFC 9110, 10.2.3). None if absent or unreadable."""
    if not value:
        return None
    if value.strip().isascii() and value.strip().isdigit():
        return float(value.strip())
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except ValueError:
        return None


def _reason(exc: Exception, limits: FetchLimits) -> str:
    """What happened, without the library's words and without the URL, which may hold a secret."""
    chain: list[BaseException] = [exc]
    for error in chain:  # grows while it is walked
        inner = [error.__cause__, error.__context__, getattr(error, "reason", None), *error.args]
        chain += [item for item in inner if isinstance(item, BaseException) and item not in chain]
    if isinstance(exc, requests.HTTPError) and exc.response is not None:
        return f"{_status(exc.response)}; {_next_step(exc.response.status_code)}"
    if isinstance(exc, requests.TooManyRedirects):
        return f"more than {limits.redirects} redirects; open it in a browser and pass the address that it ends at"
    if isinstance(exc, requests.exceptions.InvalidSchema):
        return "it redirects to an address that is neither http nor https; pass the address of the page itself"
    if isinstance(exc, requests.exceptions.InvalidHeader):
        return "its headers contradict each other; save it from a browser and pass the file"
    if any(isinstance(error, NameResolutionError) for error in chain):
        return "its host name does not resolve; check the spelling and the network"
    if isinstance(exc, requests.exceptions.SSLError):
        return (
            f"its certificate or its TLS is not accepted ({_innermost(chain)}); check the address, "
            "or name the file of your own authority in SSL_CERT_FILE"
        )
    if isinstance(exc, requests.ConnectTimeout):
        return f"no connection within {limits.connect_s:g} s; check the address and the network, or try later"
    if isinstance(exc, requests.Timeout) or any(isinstance(error, TimeoutError) for error in chain):
        return f"no data for {limits.read_s:g} s; try again later"
    if isinstance(exc, ValueError):
        return "it is, or redirects to, an address that cannot be read; check its spelling, or pass the address of the page itself"
    return f"the connection failed ({_innermost(chain)}); check the address, or try again later"


def _innermost(chain: list[BaseException]) -> str:
    if chain[0].args and isinstance(chain[0].args[0], str):
        return chain[0].args[0]  # one of our own
    for error in chain:
        if isinstance(error, OSError) and error.strerror:
            return error.strerror
        if isinstance(error, HTTPException) and str(error):
            return str(error)
    last = chain[-1]
    return str(last.args[0]) if isinstance(last, HTTPError | requests.RequestException) and len(last.args) == 1 else type(last).__name__
