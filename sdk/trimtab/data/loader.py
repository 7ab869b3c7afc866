"""LangChain's `WebBaseLoader`, given our session. The only module that imports langchain_community, which is archived and pinned.

Import it from the main thread: what the import prints is silenced by process-wide filters. Silenced are the notice that the package
is archived (known: README.md) and the advice to set USER_AGENT (our session sends its own).
"""

from __future__ import annotations

import logging
import warnings
from typing import Any

import requests
from bs4 import BeautifulSoup

_ADVICE = logging.getLogger("langchain_community.utils.user_agent")
_was = _ADVICE.disabled
_ADVICE.disabled = True
try:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*langchain-community.* is being sunset", category=DeprecationWarning)
        from langchain_community.document_loaders.web_base import WebBaseLoader
finally:
    _ADVICE.disabled = _was


class PageLoader(WebBaseLoader):
    """A loader of one page that keeps the tree it made of it, because its text is the whole page's, menus included.

    Use `lazy_load` only: it is the one method that goes through the session; the asynchronous ones go round it.
    """

    tree: BeautifulSoup | None = None

    def __init__(self, url: str, session: requests.Session) -> None:
        # The session answers in UTF-8 whatever the page was in, so that its encoding is decided in one place.
        super().__init__(web_paths=[url], session=session, encoding="utf-8", raise_for_status=True, show_progress=False)

    def _scrape(self, url: str, parser: str | None = None, bs_kwargs: dict[str, Any] | None = None) -> BeautifulSoup:
        self.tree = super()._scrape(url, parser="lxml", bs_kwargs=bs_kwargs)
        assert self.tree is not None
        return self.tree
