from __future__ import annotations

from pathlib import Path

import pytest

from trimtab.data.sources import Expanded, check_url, expand, public_url


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("b.html", "a.txt", "sub/c.md", "sub/D.HTM", ".hidden.html", ".git/x.html", "sub/data.csv", "picture.png", "LICENSE"):
        path = tmp_path / "site" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    return tmp_path / "site"


def names(expanded: Expanded) -> list[str]:
    return [source.name for source in expanded.sources]


def reason(given: str | Path) -> str:
    (refused,) = expand([given]).refused
    return refused.reason


def test_a_folder_is_its_pages_in_order_without_hidden_ones(folder: Path):
    expanded = expand(folder)
    assert names(expanded) == ["site/a.txt", "site/b.html", "site/sub/D.HTM", "site/sub/c.md", "site/sub/data.csv"]
    assert [source.records for source in expanded.sources] == [None] * 4 + ["csv"]
    assert expanded.refused == ()
    assert expanded.notes == ("site: passed over 2 files of kinds that are not read (1 .png, 1 no suffix)",)


def test_names_are_relative_as_given_and_never_absolute(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(folder)
    assert names(expand(["sub", "b.html", Path("sub/../a.txt"), folder / "sub"])) == [
        *("sub/D.HTM", "sub/c.md", "sub/data.csv", "b.html", "a.txt")
    ]
    assert names(expand(".")) == ["a.txt", "b.html", "sub/D.HTM", "sub/c.md", "sub/data.csv"]


def test_the_users_order_stays_and_each_source_comes_once(folder: Path):
    expanded = expand(["https://b.test/", str(folder / "b.html"), "https://a.test", "HTTPS://B.test:443/#top", str(folder)])
    assert names(expanded)[:3] == ["https://b.test/", "b.html", "https://a.test"]
    assert len(expanded.sources) == 7
    assert expanded.notes[0] == "https://B.test:443/ was given more than once and is read once"


def test_an_address_or_a_path_alone_is_a_list_of_one(folder: Path):
    assert names(expand("https://a.test/x")) == ["https://a.test/x"]
    assert names(expand(folder / "a.txt")) == ["a.txt"]


def test_links(folder: Path, tmp_path: Path):
    (tmp_path / "secret.html").write_text("secret")
    (tmp_path / "other").mkdir()
    (folder / "out.html").symlink_to(tmp_path / "secret.html")
    (folder / "outfolder").symlink_to(tmp_path / "other")
    (folder / "loop.html").symlink_to(folder / "loop.html")
    (folder / "again.html").symlink_to(folder / "b.html")
    (folder / "sub" / "up").symlink_to(folder)
    expanded = expand(folder)
    assert [item.source for item in expanded.refused] == ["site/loop.html", "site/out.html", "site/outfolder"]
    assert "leads out of the folder" in expanded.refused[1].reason
    assert names(expanded) == ["site/a.txt", "site/again.html", "site/sub/D.HTM", "site/sub/c.md", "site/sub/data.csv"]


def test_a_folder_without_pages_or_records_is_named(tmp_path: Path):
    (tmp_path / "empty").mkdir()
    assert reason(tmp_path / "empty") == (
        "the folder holds no file of the kinds that are read "
        "(.html, .htm, .txt, .md, .jsonl, .ndjson, .json, .csv, .tsv, .parquet); pass one that does"
    )


def test_beside_web_pages_json_is_no_record_and_beside_records_a_readme_no_page(folder: Path, tmp_path: Path):
    (folder / "manifest.json").write_text("{}")
    expanded = expand(folder)
    assert "site/manifest.json" not in names(expanded)
    assert expanded.notes[0] == (
        "site/manifest.json was passed over (a .json file beside web pages); pass it by name if it is to be learned"
    )
    assert names(expand(folder / "manifest.json")) == ["manifest.json"]
    rows = tmp_path / "rows"
    rows.mkdir()
    for name in ("README.md", "a.json", "b.jsonl.gz", "dataset_infos.json", "notes.txt"):
        (rows / name).write_text("{}")
    expanded = expand(rows)
    assert names(expanded) == ["rows/a.json", "rows/b.jsonl.gz", "rows/notes.txt"]
    assert [note.split()[0] for note in expanded.notes] == ["rows/README.md", "rows/dataset_infos.json"]


def test_what_a_name_says_about_records(tmp_path: Path):
    for name, kind in {"a.JSONL": "jsonl", "a.csv.gz": "csv", "a.tsv": "tsv", "a.parquet": "parquet", "a.ndjson": "jsonl"}.items():
        (tmp_path / name).write_text("x")
        assert expand(tmp_path / name).sources[0].records == kind
    (source,) = expand("https://a.test/x/faq.jsonl?download=true").sources
    assert source.records == "jsonl"
    (source,) = expand("hf://datasets/tiny/faq@main/train").sources
    assert (source.records, source.url, source.name) == ("hub", None, "hf://datasets/tiny/faq@main/train")
    for name in ("state.json", "dataset_info.json"):
        (tmp_path / name).write_text("{}")
    assert [source.records for source in expand(tmp_path).sources] == ["saved"]
    assert reason("https://huggingface.co/datasets/tiny/faq") == (
        "it is the page about a dataset; for its records pass  hf://datasets/tiny/faq"
    )


def test_what_is_not_there(folder: Path, tmp_path: Path):
    assert reason(tmp_path / "sit") == "there is no such file or folder; did you mean site?"
    assert reason(folder / "b.htm") == "there is no such file or folder; did you mean b.html?"
    assert reason(tmp_path / "zzzzzz" / "b.html").startswith("there is no folder ")
    assert reason("example.com/page") == "there is no such file; an address starts with its scheme: https://example.com/page"


def test_files_of_other_kinds_are_refused_when_given_directly(folder: Path):
    assert reason(folder / "picture.png").startswith("files of this kind are not read, only .html")


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("file:///etc/hosts", "pass the path: /etc/hosts"),
        ("file://localhost/a%20b.html", "pass the path: /a b.html"),
        ("ftp://a.test/x", "ftp: is not read, only http and https"),
        ("javascript:alert(1)", "javascript: is not read"),
        ("data:text/html,x", "data: is not read"),
        ("https://me:secret@a.test/", "carries a user name or password"),
        ("https://token@a.test/", "carries a user name or password"),
        ("https://", "cannot be read as an address"),
        ("http://a.test:99999/", "cannot be read as an address"),
        ("http://[::1/", "cannot be read as an address"),
        ("http://a b.test/", "cannot be read as an address"),
        ("http://a.test\\@b.test/", "carries a user name or password"),
    ],
)
def test_addresses_that_are_refused(url: str, said: str):
    assert said in reason(url)
    assert "secret" not in expand(url).refused[0].source


def test_check_url_accepts():
    assert check_url("https://a.test/x?y=1#z") is None
    assert check_url("HTTP://[2001:db8::1]:8080/") is None


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("https://u:p@a.test/x#frag", "https://a.test/x"),
        ("https://a.test/x?page=2&lang=en", "https://a.test/x?page=2&lang=en"),
        ("https://a.test/x?page=2&token=abc", "https://a.test/x?page=2&token=***"),
        ("https://a.test/x?X-Amz-Signature=abc&X-Amz-Date=1", "https://a.test/x?X-Amz-Signature=***&X-Amz-Date=***"),
        ("https://a.test/x?q=0123456789abcdef0123456789abcdef01", "https://a.test/x?q=***"),
        ("https://a.test/x?api_key=", "https://a.test/x?api_key=***"),
    ],
)
def test_what_is_shown_of_an_address(url: str, shown: str):
    assert public_url(url) == shown


@pytest.mark.parametrize(
    ("given", "secret"),
    [
        ("hf://datasets/o/n?token=hf_abcdef", "hf_abcdef"),
        ("hf://user:hf_secret@datasets/o/n", "hf_secret"),
        ("HF://hf_secret@datasets/o/n", "hf_secret"),
        ("hf://datasets/o/n#hf_secret", "hf_secret"),
    ],
)
def test_a_token_in_the_name_of_a_dataset_is_refused_and_not_shown(given: str, secret: str):
    expanded = expand(given)
    assert expanded.sources == ()
    (refused,) = expanded.refused
    assert secret not in f"{refused.source} {refused.reason}"
    assert "set HF_TOKEN" in refused.reason
    (good,) = expand("hf://datasets/o/n@refs%2Fpr%2F1/c/train").sources
    assert (good.name, good.records) == ("hf://datasets/o/n@refs%2Fpr%2F1/c/train", "hub")
    assert "it cannot be read as a name" in reason("hf://[x")
