from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import ValidationError

from support.site_server import Reply, SiteServer, page
from trimtab.data import Document, FetchLimits, Loaded, Skipped, from_jsonl, load, to_jsonl
from trimtab.errors import DataError

PAGES = Path(__file__).parents[2] / "benchmarks/demo/pages"
QUICK = FetchLimits(backoff_s=0.01)
VANE = page("The Vane", "The ferry Astrid Vane was built in 1974.", "She has  240\nseats.")
ORLA = page("The Orla", "The ferry Orla is painted green.")


@pytest.fixture
def site() -> Iterator[SiteServer]:
    with SiteServer({"/vane": VANE, "/orla": ORLA}) as server:
        yield server


class Said(list[str]):
    """What `load` said, line by line."""

    def __call__(self, line: str) -> None:
        self.append(line)


def read(*sources: str | Path, on_error: str = "fail", limits: FetchLimits = QUICK, said: Said | None = None) -> Loaded:
    return load(sources, on_error=on_error, allow_private_hosts=True, limits=limits, say=said if said is not None else Said())  # type: ignore[arg-type]


def test_a_page_becomes_a_document(site: SiteServer):
    said = Said()
    (document,) = read(site.url("/vane"), said=said).documents
    assert document.title == "The Vane"
    assert document.text == "The Vane\nThe ferry Astrid Vane was built in 1974.\nShe has 240 seats."
    assert document.paragraphs == ("The Vane", "The ferry Astrid Vane was built in 1974.", "She has 240 seats.")
    assert document.source == site.url("/vane")
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", document.fetched_at)
    assert re.fullmatch(r"[0-9a-f]{16}", document.id)
    assert said[-1] == "data: 1 document with 14 words of main text; the pages show 20 words"


def test_a_site_from_the_network_and_from_its_folder_is_the_same():
    with SiteServer(folder=PAGES) as site:
        names = sorted(path.name for path in PAGES.glob("*.html"))
        fetched = read(*(site.url(f"/{name}") for name in names)).documents
        assert site.peak <= 2
    opened = read(PAGES).documents
    assert len(opened) == len(names) >= 10
    assert [document.source for document in opened] == [f"pages/{name}" for name in names]
    strip = {"source", "fetched_at"}
    assert [document.model_dump(exclude=strip) for document in fetched] == [document.model_dump(exclude=strip) for document in opened]


def test_order_stays_whatever_answers_first():
    def pages(site: str) -> dict[str, Reply]:
        return {f"/{n}": Reply(f"<p>Page {n} of site {site}.</p>", wait_s=0.3 if n % 3 == 0 else 0.0) for n in range(6)}

    with SiteServer(pages("one")) as one, SiteServer(pages("two")) as two:
        urls = [site.url(f"/{n}") for n in range(6) for site in (one, two)]
        documents = read(*urls).documents
        assert one.peak <= 2
        assert two.peak <= 2
    assert [document.source for document in documents] == urls


def test_every_failure_is_named_with_its_reason(site: SiteServer, tmp_path: Path):
    site.pages["/empty"] = Reply("")
    site.pages["/script"] = Reply("<html><noscript>Turn JavaScript on</noscript><div id='app'></div></html>")
    (tmp_path / "void.txt").write_text(" \n")
    bad = [site.url("/none"), "ftp://a.test/x", site.url("/empty"), site.url("/script"), tmp_path / "void.txt", "http://u:p@a.test/"]
    with pytest.raises(DataError) as caught:
        read(site.url("/vane"), *bad)
    message = str(caught.value)
    assert message.splitlines()[0] == "6 of 7 sources could not be read:"
    assert f"  {site.url('/none')}: HTTP 404 Not Found" in message
    assert "ftp://a.test/x: ftp: is not read" in message
    assert f"{site.url('/empty')}: it is empty" in message
    assert f"{site.url('/script')}: it holds no text; if a browser shows some, a script writes it" in message
    assert "void.txt: it is empty" in message
    assert "http://a.test/: it carries a user name or password" in message
    assert message.endswith('Correct what is broken, or go on without it: --on-error skip (on_error="skip").')


def test_skip_goes_on_and_says_so(site: SiteServer):
    said = Said()
    loaded = read(site.url("/vane"), site.url("/none"), site.url("/orla"), on_error="skip", said=said)
    assert [document.title for document in loaded.documents] == ["The Vane", "The Orla"]
    assert loaded.skipped == (Skipped(source=site.url("/none"), reason="HTTP 404 Not Found; check the address"),)
    assert f"data: skipped {site.url('/none')}: HTTP 404 Not Found; check the address" in said


@pytest.mark.parametrize("on_error", ["fail", "skip"])
def test_nothing_left_is_an_error(site: SiteServer, on_error: str):
    with pytest.raises(DataError, match=r"none of the 2 sources could be read:\n(.|\n)*404"):
        read(site.url("/a"), site.url("/b"), on_error=on_error)
    with pytest.raises(DataError, match="the source could not be read:"):
        read(site.url("/a"), on_error=on_error)
    with pytest.raises(DataError, match="no data was given"):
        read(on_error=on_error)


def test_many_failures_make_a_message_of_bearable_length():
    with pytest.raises(DataError) as caught:
        read(*(f"ftp://a.test/{n}" for n in range(80)))
    assert "  and 30 more" in str(caught.value)
    assert len(str(caught.value).splitlines()) == 53


def test_the_same_address_and_the_same_text_are_kept_once(site: SiteServer):
    site.pages["/copy"] = Reply(str(VANE.body).replace("<title>The Vane", "<title>Another title"))
    said = Said()
    loaded = read(site.url("/vane"), site.url("/vane#top"), site.url("/copy"), site.url("/orla"), said=said)
    assert [document.title for document in loaded.documents] == ["The Vane", "The Orla"]
    assert f"data: {site.url('/vane')} was given more than once and is read once" in said
    assert f"data: {site.url('/copy')} has the same text as {site.url('/vane')}; kept once" in said
    assert len([request for request in site.requests if request.path == "/vane"]) == 1


def test_no_secret_of_an_address_is_kept_or_said(site: SiteServer):
    site.pages["/vane?token=s3cret"] = VANE
    site.pages["/gone?token=s3cret"] = Reply("", 302, headers={"Location": "/other?sig=s3cret"})
    said = Said()
    loaded = read(site.url("/vane?token=s3cret"), site.url("/gone?token=s3cret"), on_error="skip", said=said)
    assert "/vane?token=s3cret" in [request.path for request in site.requests]
    assert loaded.documents[0].source == site.url("/vane?token=***")
    assert "s3cret" not in loaded.model_dump_json() + "".join(said)


def test_private_hosts_are_refused_by_default(site: SiteServer):
    with pytest.raises(DataError, match="is a loopback address; pass allow_private_hosts=True"):
        load([site.url("/vane")], say=Said())
    assert site.requests == []


def test_text_and_markdown_from_the_network_and_from_files(site: SiteServer, tmp_path: Path):
    markdown = "# The *Vane*\n\nBuilt in\n**1974**.\n\n- blue\n- fast\n"
    (tmp_path / "vane.md").write_text(markdown)
    (tmp_path / "crew_list.txt").write_bytes("Käthe\r\n\r\nJürgen\r\nis the cook".encode("cp1252"))
    site.pages["/vane.md"] = Reply(markdown, content_type="text/markdown")
    site.pages["/crew-list.txt"] = Reply("Ines", content_type="text/plain")
    documents = read(tmp_path / "vane.md", tmp_path / "crew_list.txt").documents
    assert documents[0].text == "The Vane\nBuilt in 1974.\nblue\nfast"
    assert [document.title for document in documents] == ["The Vane", "crew list"]
    assert documents[1].text == "Käthe\nJürgen is the cook"
    fetched = read(site.url("/vane.md"), site.url("/crew-list.txt")).documents
    assert [(document.title, document.text) for document in fetched] == [("The Vane", documents[0].text), ("crew list", "Ines")]


def test_files_that_cannot_be_read(tmp_path: Path):
    (tmp_path / "large.txt").write_text("x" * 101)
    (tmp_path / "picture.html").write_bytes(b"GIF89a" + bytes(300))
    with pytest.raises(DataError) as caught:
        read(tmp_path / "large.txt", tmp_path / "picture.html", tmp_path / "none.html", limits=FetchLimits(max_bytes=100))
    assert "large.txt: it is larger than 100 bytes" in str(caught.value)
    assert "picture.html: it is larger" in str(caught.value)
    with pytest.raises(DataError, match="it is a GIF image"):
        read(tmp_path / "picture.html")


def test_what_a_site_repeats_is_kept_once(tmp_path: Path):
    for n in range(5):
        (tmp_path / f"{n}.txt").write_text(f"Harbour news\n\nNumber {n} of the year.\n\nPrinted in Osterhaven.")
    said = Said()
    documents = read(tmp_path, said=said).documents
    assert documents[0].text == "Harbour news\nNumber 0 of the year.\nPrinted in Osterhaven."
    assert [document.text for document in documents[1:]] == [f"Number {n} of the year." for n in range(1, 5)]
    assert "data: left out 8 lines that most pages of the folder begin or end with, but for their first occurrence" in said


def test_documents_file_round_trip(site: SiteServer, tmp_path: Path):
    documents = read(site.url("/vane"), site.url("/orla")).documents
    odd = Document.model_validate({**make("A\u2028line\u0085separator é 港"), "title": 'a "quote"'})
    path = tmp_path / "documents.jsonl"
    to_jsonl([*documents, odd], path)
    assert from_jsonl(path) == (*documents, odd)
    assert len(path.read_bytes().splitlines()) == 3
    assert [entry.name for entry in tmp_path.iterdir()] == ["documents.jsonl"]


def make(text: str) -> dict[str, str]:
    digest = hashlib.sha256(text.encode()).hexdigest()
    return {"id": digest[:16], "source": "a.txt", "title": "A", "text": text, "sha256": digest, "fetched_at": "2026-01-01T00:00:00+00:00"}


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "Invalid JSON"),
        (json.dumps({**make("a"), "more": 1}), "more: Extra inputs are not permitted"),
        (json.dumps({**make("a"), "text": "b"}), "id does not belong to text"),
        (json.dumps({key: value for key, value in make("a").items() if key != "source"}), "source: Field required"),
        ("\udcff", "Invalid JSON"),
    ],
)
def test_a_broken_line_is_named(tmp_path: Path, line: str, said: str):
    path = tmp_path / "documents.jsonl"
    path.write_bytes(b"\n".join([json.dumps(make("fine")).encode(), b"", line.encode("utf-8", "surrogateescape"), b""]))
    with pytest.raises(DataError) as caught:
        from_jsonl(path)
    assert str(caught.value).startswith(f"{path}, line 3: ")
    assert said in str(caught.value)
    assert str(caught.value).endswith("make the file again with trimtab.data.load")


def test_files_that_are_not_there(tmp_path: Path):
    with pytest.raises(DataError, match=r"none\.jsonl cannot be read \(No such file"):
        from_jsonl(tmp_path / "none.jsonl")
    with pytest.raises(DataError, match=r"x\.jsonl cannot be written \(No such file"):
        to_jsonl([], tmp_path / "none" / "x.jsonl")


def test_a_document_cannot_be_changed_or_hold_nothing():
    document = Document.model_validate(make("a"))
    with pytest.raises(ValidationError):
        document.text = "b"  # type: ignore[misc]
    with pytest.raises(ValidationError):
        Document.model_validate(make(""))


def test_nothing_heavy_is_imported_before_it_is_used(tmp_path: Path):
    (tmp_path / "a.txt").write_text("Text.")
    code = (
        "import sys, trimtab.data, trimtab.data.documents\n"
        f"assert trimtab.data.load([{str(tmp_path)!r}], say=str).documents[0].text == 'Text.'\n"
        "print(sorted({'requests', 'bs4', 'lxml', 'trafilatura', 'langchain_community', 'urllib3'} & set(sys.modules)))\n"
    )
    assert run_python(code) == "[]\n"


def test_the_remedy_when_packages_are_missing(tmp_path: Path):
    (tmp_path / "a.html").write_text("<p>Text</p>")
    for missing, source in (("bs4", str(tmp_path)), ("langchain_community", "https://a.test/"), ("requests", "https://a.test/")):
        code = (
            f"import sys; sys.modules[{missing!r}] = None\n"
            "import trimtab.data\nfrom trimtab.errors import DataError\n"
            f"try: trimtab.data.load([{source!r}])\nexcept DataError as exc: print(exc)\n"
        )
        assert run_python(code).rstrip().endswith("pip install 'trimtab[data]'")


def test_importing_the_loader_says_nothing(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("USER_AGENT", raising=False)
    assert run_python("import trimtab.data.fetch") == ""


def run_python(code: str) -> str:
    """What `code` printed, errors included, in a fresh interpreter where warnings are errors."""
    sdk = str(Path(__file__).parents[2] / "sdk")
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", f"import sys; sys.path.insert(0, {sdk!r})\n{code}"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
        check=False,
    )
    return done.stdout
