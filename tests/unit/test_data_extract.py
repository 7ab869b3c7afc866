from __future__ import annotations

import re
from pathlib import Path

import pytest
from bs4 import BeautifulSoup
from hypothesis import given, settings
from hypothesis import strategies as st

from trimtab.data.clean import collapse, without_repeated_edges, words
from trimtab.data.extract import extract
from trimtab.data.plain import markdown, text_lines
from trimtab.data.tables import row_lines

PAGES = sorted((Path(__file__).parents[2] / "benchmarks").glob("*/pages/*.html"))
PROSE = "The ferry Astrid Vane was built in 1974 at the yard in Osterhaven and has carried passengers across the sound ever since."
MORE = "Her captain is Ines Calder, who came to the company in 1998 after eleven years on the lighthouse tender of the same harbour."


def lines(body: str) -> tuple[str, ...]:
    return extract(f"<html><head><title>T</title></head><body>{body}</body></html>").lines


def main(body: str) -> tuple[str, ...]:
    return lines(f"<main><p>{PROSE}</p>{body}</main>")[1:]


def without_landmarks(html: str) -> str:
    return re.sub(r"<(/?)(main|article|section)\b", r"<\1div", html)


@pytest.mark.parametrize("change", [str, without_landmarks], ids=["as it is", "without main and article"])
@pytest.mark.parametrize("path", PAGES, ids=lambda path: f"{path.parts[-3]}-{path.stem}")
def test_no_block_of_a_real_page_is_lost_and_no_boilerplate_kept(path: Path, change):
    html = path.read_text(encoding="utf-8")
    tree = BeautifulSoup(html, "lxml")
    assert tree.main is not None
    wanted = [collapse(tag.get_text()) for tag in tree.main(["p", "li", "h1", "h2", "h3"])]
    cells = [collapse(tag.get_text()) for tag in tree.main("td")]
    boilerplate = [collapse(tag.get_text(" ")) for tag in tree(["p", "li", "label"]) if tag.find_parent("main") is None]
    boilerplate = [block for block in boilerplate if block not in wanted]  # a link to a page has the words of its headline
    extracted = extract(change(html))
    assert [block for block in wanted if block not in extracted.lines] == []
    assert [cell for cell in cells if not any(cell in line for line in extracted.lines)] == []
    assert [block for block in boilerplate if block in extracted.lines] == []
    assert extracted.title == collapse(tree.title.get_text() if tree.title else "")
    assert sum(map(words, extracted.lines)) < extracted.page_words


def test_there_are_pages_to_test_on():
    assert len(PAGES) >= 10


def test_found_by():
    assert extract(f"<main><p>{PROSE}</p></main>").found_by == "landmark"
    assert extract(f'<div role="main"><p>{PROSE}</p></div>').found_by == "landmark"
    assert extract(f"<body><div><p>{PROSE}</p><p>{MORE}</p></div></body>").found_by == "trafilatura"
    assert extract("<body><p>Short.</p></body>").found_by == "body"


def test_a_landmark_without_the_text_is_not_believed():
    filler = "".join(f"<p>{PROSE} {MORE} Number {n}.</p>" for n in range(5))
    found = lines(f"<main><p>Welcome</p></main><div>{filler}</div>")
    assert found == tuple(f"{PROSE} {MORE} Number {n}." for n in range(5))


def test_a_title_beside_the_main_part_is_kept():
    assert lines(f"<header><h1>The ferries</h1></header><main><p>{PROSE}</p></main>") == ("The ferries", PROSE)
    assert lines(f"<div><h2>The ferries</h2></div><div><p>{PROSE}</p><p>{MORE}</p></div>") == ("The ferries", PROSE, MORE)


def test_titles():
    assert extract("<title> A \n page </title><h1>Other</h1>").title == "A page"
    assert extract("<h1>The <b>only</b> one</h1>").title == "The only one"
    assert extract("<svg><title>icon</title></svg><h1>Right</h1>").title == "Right"
    assert extract("<p>none</p>").title == ""
    assert extract("<h1>The <noframes><script>code</script></noframes>bank<div>of seeds</div></h1>").title == "The bank of seeds"


def test_preformatted_text_and_captions_hold_what_is_shown():
    unseen = "<noframes><script>code</script></noframes><span hidden>gone</span><button>Copy</button>"
    assert main(f"<pre>one {unseen}\nline<br>\n\nnext</pre>") == ("one line", "next")
    assert main(f"<table><caption>Depths {unseen}</caption><tr><th>Quay<th>Feet<tr><td>north<td>12</table>")[0] == "Depths"
    assert main("<table><caption hidden>Depths</caption><tr><th>Quay<th>Feet<tr><td>north<td>12</table>")[0] != "Depths"


def test_inline_elements_do_not_part_words_and_blocks_do():
    assert main("<p>H<sub>2</sub>O and <em>em</em>phasis<br>next&nbsp;line</p><div>a<div>b</div>c</div>") == (
        "H2O and emphasis next line",
        "a",
        "b",
        "c",
    )


def test_two_breaks_end_a_paragraph():
    assert main("<p>one<br><br>two<br>\n <br/>three</p>") == ("one", "two", "three")


def test_lists_and_definitions():
    assert main("<ul><li>first</li><li>second<ul><li>inner</li></ul></li><li><p>with p</p></li></ul>") == (
        "first",
        "second",
        "inner",
        "with p",
    )
    assert main("<dl><dt>Built</dt><dd>1974</dd><dt>Who owns her?</dt><dd><p>The town.</p><p>Since 1980.</p></dd><dt>Alone</dt></dl>") == (
        "Built: 1974",
        "Who owns her? The town.",
        "Since 1980.",
        "Alone",
    )


def test_preformatted_text_is_parted_at_blank_lines():
    assert main("<pre>SELECT *\n  FROM ferries;\n\n (2 rows)</pre>") == ("SELECT * FROM ferries;", "(2 rows)")


def test_tables_of_data():
    assert main(
        "<table><tr><th>Ferry</th><th>Built</th></tr><tr><td>Vane</td><td>1974</td></tr><tr><td>Orla</td><td></td></tr></table>"
    ) == (
        "Ferry: Vane; Built: 1974",
        "Ferry: Orla",
    )
    assert main("<table><caption>Facts</caption><tr><th>Built</th><td>1974</td></tr><tr><th>Seats:</th><td>240</td></tr></table>") == (
        "Facts",
        "Built: 1974",
        "Seats: 240",
    )
    assert main("<table><tr><td>a</td><td>b</td><td>c</td></tr></table>") == ("a | b | c",)


def test_cells_that_span_reach_every_row_and_column_they_cover():
    table = (
        "<table><thead><tr><th>Port</th><th>Day</th><th>Time</th></tr></thead>"
        '<tr><td rowspan="2">Osterhaven</td><td>Monday</td><td>7:10</td></tr><tr><td>Sunday</td><td>9:40</td></tr>'
        '<tr><td colspan="3">Winter timetable</td></tr><tr><td>Lund</td><td colspan="2">closed</td></tr></table>'
    )
    assert main(table) == (
        "Port: Osterhaven; Day: Monday; Time: 7:10",
        "Port: Osterhaven; Day: Sunday; Time: 9:40",
        "Winter timetable",
        "Port: Lund; Day: closed; Time: closed",
    )


def test_a_span_of_a_billion_is_harmless():
    assert len(main('<table><tr><td colspan="1000000000" rowspan="999999999">x</td><td>y</td></tr><tr><td>z</td></tr></table>')) == 2


def test_a_table_that_arranges_the_page_is_no_data():
    long = f"{PROSE} {MORE} {PROSE} {MORE}"
    assert lines(f"<table><tr><td><p>{long}</p><p>{MORE}</p></td><td><p>{PROSE}</p></td></tr></table>") == (long, MORE, PROSE)


def test_boxes_in_the_main_part():
    boxes = (
        '<nav class="breadcrumb"><a href="/">Home</a></nav>'
        '<div class="cookieNotice"><p>We use cookies to remember your choice of harbour.</p><button>OK</button></div>'
        '<section class="newsletter"><h2>Newsletter</h2><p>Monthly news.</p><form><input name="mail"></form></section>'
        '<h2>Related pages</h2><ul><li><a href="/a">The crew of the Vane</a></li><li><a href="/b">Fares and times</a></li></ul>'
        '<p hidden>Hidden</p><div style="display: none">Not shown</div><script>var x</script><dialog>Ask</dialog>'
        "<footer>Last changed in May</footer>"
    )
    assert main(boxes + f"<h2>Captain</h2><p>{MORE}</p>") == ("Captain", MORE)


def test_an_unfortunate_class_name_does_not_lose_the_text():
    dishes = "".join(f"<li>Dish {n} is made of herring, potatoes and number {n} of our nineteen sauces.</li>" for n in range(12))
    assert len(lines(f'<main><h1>The galley</h1><div class="menu"><ul>{dishes}</ul></div></main>')) == 13
    assert lines(f'<main><h1>Baking</h1><section id="cookies"><p>{PROSE}</p></section></main>') == ("Baking", PROSE)


def test_headings_stay_whatever_follows_them():
    assert main(f'<h2>Fares</h2><img src="a.png"><p>{MORE}</p><h2>Crew</h2><h3>Deck</h3><div></div><h2>Last</h2>') == (
        "Fares",
        MORE,
        "Crew",
        "Deck",
        "Last",
    )
    assert main(f"<h2>Outer</h2><div><h2>Inner</h2><p>{MORE}</p></div>") == ("Outer", "Inner", MORE)


def test_links_with_words_of_their_own_stay():
    assert main('<ul><li><a href="/v">Vane</a>, built in 1974</li><li><a href="/o">Orla</a>, built in 1981</li></ul>') == (
        "Vane, built in 1974",
        "Orla, built in 1981",
    )


def test_no_text_no_lines():
    assert lines("") == ()
    assert lines("<noscript>Turn JavaScript on</noscript><div id=root></div>") == ()
    assert extract("").lines == ()
    assert lines("<main></main><p>Outside</p>") == ("Outside",)


@pytest.mark.parametrize("opening", ["<div>", "<b>", "<ul><li>", "<table><tr><td>", "<blockquote><span>"])
def test_deep_nesting(opening: str):
    assert lines(opening * 1000 + "The bottom of it." + f"<p>{PROSE}</p>")[-1] == PROSE


def test_what_would_make_the_parser_warn():
    assert extract('<?xml version="1.0" encoding="utf-8"?><rss><item>An item of a feed</item></rss>').lines == ("An item of a feed",)
    assert extract("page.html").lines == ("page.html",)


MARKUP = [
    "<p>",
    "<li>",
    "<h2>",
    "<table>",
    "<th>",
    "<td rowspan=3>",
    "</",
    "<!--",
    "<main>",
    "<aside class=share>",
    "<dt>",
    "<dd>",
    "<br>",
    "<a>",
]


@settings(deadline=None)
@given(st.lists(st.sampled_from([*MARKUP, *"ab <>/='&;\n!-"]), max_size=60))
def test_any_markup_gives_clean_lines(pieces: list[str]):
    for line in extract("".join(pieces)).lines:
        assert line == collapse(line)
        assert "\n" not in line


def test_collapse():
    assert collapse(" a\u00a0\t b\r\n\u2028c\u200b\u00ad ") == "a b c"
    assert collapse("e\u0301") == "é"
    assert collapse("\ud800x\x00") == "x"
    assert collapse("नमस्ते می\u200cخواهم") == "नमस्ते می\u200cخواهم"


def test_words_of_scripts_without_blanks():
    assert words("four words of English") == 4
    assert words("港の渡し船は一九七四年に建造") == 7


def test_what_a_site_repeats_stays_once():
    pages = [("Menu", f"Title {n}", "Opening hours", f"{n} to 5", "Legal text", "Address") for n in range(6)]
    cut, fewer = without_repeated_edges(pages)
    assert cut[0] == pages[0]
    assert cut[3] == ("Title 3", "Opening hours", "3 to 5")
    assert fewer == 15
    assert without_repeated_edges(pages[:3]) == (pages[:3], 0)


def test_pages_that_are_all_the_same_keep_one():
    assert without_repeated_edges([("a", "b")] * 5) == ([("a", "b"), (), (), (), ()], 8)


def test_plain_text():
    assert text_lines("One line\nof two.\n\nNext.\n- item one\n- item two\n  goes on\n\n") == (
        "One line of two.",
        "Next.",
        "item one",
        "item two goes on",
    )
    assert text_lines("a line\nanother line") == ("a line", "another line")
    assert text_lines("\n \n") == ()


def test_markdown():
    text = (
        '---\ntitle: front\n---\n# The *ferry* Vane\n\nBuilt in **1974**, see [her page](http://x/y "t")\nand `code_here`.\n\n'
        "## Fares ##\n\n| Port | Price |\n|:--|--:|\n| Lund | 12 |\n| Oster | 9 |\n\nSetext\n------\n> quoted\n> text\n\n"
        "1. one\n2. two\n   goes on\n\n```sql\nSELECT 1;\n```\n***\n<!-- comment -->snake_case_name 2*3*4\n\n[ref]: http://x\n"
    )
    assert markdown(text) == (
        "The ferry Vane",
        (
            "The ferry Vane",
            "Built in 1974, see her page and code_here.",
            "Fares",
            "Port: Lund; Price: 12",
            "Port: Oster; Price: 9",
            "Setext",
            "quoted text",
            "one",
            "two goes on",
            "SELECT 1;",
            "snake_case_name 2*3*4",
        ),
    )
    assert markdown("") == ("", ())


@settings(deadline=None)
@given(st.text())
def test_any_markdown_and_text_gives_clean_lines(text: str):
    assert all(line == collapse(line) for line in (*markdown(text)[1], *text_lines(text)))


def test_rows_longer_than_their_header():
    assert list(row_lines([["A", ""], ["1", "2", "3"]], has_header=True)) == ["A: 1; 2; 3"]
