"""A comparison as one HTML page that needs nothing else: no scripts, no fonts, no pictures from anywhere.

What models say is text here and never markup; a content policy in the page forbids everything but its own style, should that ever fail.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterable, Iterator, Sequence
from html import escape
from pathlib import Path

from trimtab.compare import Answer, Column, Comparison, Difference, Question, Score
from trimtab.counting import counted
from trimtab.errors import StagingError
from trimtab.probes import WORDS
from trimtab.terminal import plain

TITLES = {"starts": "Starts of sentences", "questions": "Questions", "general": "General questions"}

_STYLE = """
:root {
  color-scheme: light dark;
  --page: #f6f7f9; --card: #ffffff; --ink: #1b2230; --soft: #5b6576; --line: #dfe3ea; --code: #eef1f5;
  --right: #0b7a4b; --right-soft: #dff3e8; --wrong: #b3261e; --wrong-soft: #fbe4e2; --warn: #8a5a00; --warn-soft: #fdf0d5;
  --m0: #2f6fde; --m1: #d2691e; --m2: #7b4fd0; --m3: #0f8b8d; --m4: #b8336a; --m5: #5c7a29;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #0f131a; --card: #181e28; --ink: #e6eaf1; --soft: #9aa5b8; --line: #2b3442; --code: #212937;
    --right: #5fd39b; --right-soft: #12352a; --wrong: #ff9a90; --wrong-soft: #40201f; --warn: #f2c46d; --warn-soft: #3a2e14;
    --m0: #7aa7ff; --m1: #f0a068; --m2: #b79bff; --m3: #58c9ca; --m4: #f08bb4; --m5: #aecb74;
  }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 16px/1.55 system-ui, sans-serif; -webkit-text-size-adjust: 100%; }
main { max-width: 1500px; margin: 0 auto; padding: 2rem clamp(1rem, 3vw, 2.5rem) 3rem; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .3rem; letter-spacing: -.01em; }
h2 { font-size: 1.2rem; line-height: 1.35; margin: 0 0 .9rem; overflow-wrap: anywhere; }
section { margin-top: 2.4rem; }
.soft { color: var(--soft); }
.facts { display: flex; flex-wrap: wrap; gap: .4rem .5rem; margin: 1rem 0 0; padding: 0; list-style: none; font-size: .85rem; }
.facts li { background: var(--card); border: 1px solid var(--line); border-radius: 999px; padding: .15rem .7rem; }
.facts b { font-weight: 600; }
.number { color: var(--soft); font-weight: 500; margin-right: .5rem; }
.cards { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 17rem), 1fr)); }
.card {
  background: var(--card); border: 1px solid var(--line); border-top: 4px solid var(--mark); border-radius: 10px; padding: .9rem 1rem .8rem;
  display: flex; flex-direction: column; min-width: 0;
}
.card h3 { font-size: .95rem; margin: 0; overflow-wrap: anywhere; }
.head { display: flex; gap: .6rem; align-items: baseline; justify-content: space-between; flex-wrap: wrap; margin-bottom: .6rem; }
.answer { white-space: pre-wrap; overflow-wrap: anywhere; unicode-bidi: isolate; margin: 0; flex: 1; }
.given { color: var(--soft); font-style: italic; }
.times { border-top: 1px solid var(--line); margin: .8rem 0 0; padding-top: .5rem; font-size: .82rem; color: var(--soft); }
.times, td.n, th.n { font-variant-numeric: tabular-nums; }
.badge { font-size: .78rem; font-weight: 600; border-radius: 999px; padding: .1rem .6rem; white-space: nowrap; }
.right { color: var(--right); background: var(--right-soft); }
.wrong { color: var(--wrong); background: var(--wrong-soft); }
.warn { color: var(--warn); background: var(--warn-soft); }
.note { font-size: .82rem; color: var(--warn); margin: .5rem 0 0; }
.dot { display: inline-block; width: .7em; height: .7em; border-radius: 50%; background: var(--mark); margin-right: .5em; }
.wide { overflow-x: auto; background: var(--card); border: 1px solid var(--line); border-radius: 10px; }
table { border-collapse: collapse; width: 100%; font-size: .92rem; }
th, td { text-align: left; padding: .5rem .9rem; border-top: 1px solid var(--line); vertical-align: middle; }
tr:first-child > * { border-top: 0; }
th { font-weight: 600; }
thead th { color: var(--soft); font-size: .8rem; font-weight: 600; }
td.n, th.n { text-align: right; white-space: nowrap; }
th[scope=row] { min-width: 10rem; }
.where { overflow-wrap: anywhere; color: var(--soft); font-size: .82rem; font-weight: 400; padding-left: 1.45em; }
.bar { position: relative; height: 1.15rem; min-width: 9rem; background: var(--code); border-radius: 4px; overflow: hidden; }
.bar i, .bar b { position: absolute; top: 0; bottom: 0; }
.bar i { left: 0; background: var(--mark); opacity: .85; }
.bar b { top: 44%; bottom: 44%; background: var(--ink); opacity: .75; }
.bar.zero b { top: 30%; bottom: 30%; background: var(--mark); opacity: .9; border-radius: 3px; }
.bar.zero i { left: 50%; width: 1px; background: var(--ink); opacity: .6; }
details { margin-top: 1rem; }
summary { cursor: pointer; font-weight: 600; padding: .3rem 0; }
details .answer { font-size: .88rem; }
footer { margin-top: 3rem; font-size: .82rem; color: var(--soft); overflow-wrap: anywhere; }
:focus-visible { outline: 2px solid var(--m0); outline-offset: 2px; }
@media (max-width: 40rem) {
  h1 { font-size: 1.4rem; } main { padding-top: 1.3rem; } table { font-size: .85rem; } th, td { padding: .4rem .5rem; }
  th[scope=row] { min-width: 8rem; } td.n, th.n { white-space: normal; }
}
@media print { body { background: #fff; } .card, .wide { break-inside: avoid; } }
"""

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"


def page(found: Comparison) -> str:
    """The whole page."""
    return "\n".join(_page(found)) + "\n"


def write(found: Comparison, file: Path) -> None:
    """Write the page, whole or not at all. Raises StagingError where it cannot be written."""
    text = page(found).encode("utf-8", errors="replace")
    try:
        beside = file.parent / f".{file.name}.{secrets.token_hex(8)}"  # not mkstemp's: who may read it is told by the umask
        try:
            with beside.open("xb") as opened:
                opened.write(text)
                opened.flush()
                os.fsync(opened.fileno())
            beside.replace(file)
        finally:
            beside.unlink(missing_ok=True)
    except OSError as exc:
        raise StagingError(
            f"{file} cannot be written ({exc.strerror}): check the folder and the space left, or choose another file"
        ) from exc


def _text(text: str) -> str:
    return escape(plain(text), quote=True)


def _page(found: Comparison) -> Iterator[str]:
    titles = ", ".join(column.label for column in found.columns)
    yield "<!doctype html>"
    yield '<html lang="en">'
    yield "<head>"
    yield '<meta charset="utf-8">'
    yield f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
    yield '<meta name="viewport" content="width=device-width, initial-scale=1">'
    yield '<meta name="referrer" content="no-referrer">'
    yield f"<title>{_text(titles)}</title>"
    yield f"<style>{_STYLE}</style>"
    yield "</head>"
    yield "<body><main>"
    yield from _head(found)
    for number, question in enumerate(found.questions):
        yield from _question(found, number, question)
    if any(column.scores for column in found.columns):
        yield from _scores(found)
        yield from _probes(found)
    yield f"<footer>{_text(' · '.join(f'{name} {version}' for name, version in found.versions.items()))}</footer>"
    yield "</main></body>"
    yield "</html>"


def _head(found: Comparison) -> Iterator[str]:
    sampling, count = found.sampling, len(found.questions)
    asked = [counted(count, "question")] if count else []
    probes = sum(map(len, found.probes.values()))
    asked += [counted(probes, "probe")] if probes else []
    yield f"<header><h1>{len(found.columns)} models, {' and '.join(asked)}</h1>"
    at = f'<time datetime="{_text(found.at)}">{_text(found.at.replace("T", " ").replace("+00:00", " UTC"))}</time>'
    yield f'<p class="soft" style="margin:0">Each was asked the same, one model after the other. {at}</p>'
    settings = {"new tokens": sampling.max_new_tokens, "temperature": f"{sampling.temperature:g}", "top_p": f"{sampling.top_p:g}"}
    settings["seed"] = "none" if sampling.seed is None else sampling.seed
    yield '<ul class="facts">' + "".join(f"<li>{name} <b>{value}</b></li>" for name, value in settings.items()) + "</ul></header>"
    yield '<section aria-label="Models"><div class="wide"><table><thead><tr><th>Model</th><th>asked as</th>'
    yield '<th class="n">ready after</th><th class="n">tokens/s, median</th></tr></thead><tbody>'
    for place, column in enumerate(found.columns):
        ready = "" if column.ready_after is None else f"{column.ready_after:.1f} s"
        rate = _median([answer.rate for answer in column.answers if answer.rate is not None])
        way = "chat" if column.kind == "chat" else "start of a sentence"
        way = f'<span class="badge warn">{_text(column.problem)}</span>' if column.problem else way
        where = "" if column.where == column.label else f'<div class="where">{_text(_public(column.where))}</div>'
        speed = "" if rate is None else f"{rate:.1f}"
        yield f'<tr style="{_mark(place)}"><th scope="row"><span class="dot"></span>{_text(column.label)}{where}</th><td>{way}</td>'
        yield f'<td class="n">{ready}</td><td class="n">{speed}</td></tr>'
    yield "</tbody></table></div></section>"


def _question(found: Comparison, number: int, question: Question) -> Iterator[str]:
    yield f'<section><h2><span class="number">{number + 1}</span>{_text(question.question)}</h2>'
    if question.accept:
        accepted = f"accepted in the first {WORDS['questions']} words: {_text(' or '.join(question.accept))}"
        yield f'<p class="soft" style="margin:-.5rem 0 .8rem">{accepted}</p>'
    yield '<div class="cards">'
    for place, column in enumerate(found.columns):
        yield from _card(place, column, column.answers[number])
    yield "</div></section>"


def _card(place: int, column: Column, answer: Answer) -> Iterator[str]:
    yield f'<article class="card" style="{_mark(place)}"><div class="head"><h3>{_text(column.label)}</h3>{_badge(answer)}</div>'
    yield f'<p class="answer" dir="auto">{_said(column, answer)}</p>'
    if answer.note:
        yield f'<p class="note">{_text(answer.note)}</p>'
    yield f'<p class="times">{_text(times(answer))}</p></article>'


def _said(column: Column, answer: Answer) -> str:
    if answer.problem and not answer.text:
        return f'<span class="given">{_text(answer.problem)}</span>'
    given = f'<span class="given">{_text(answer.prompt)}</span>' if column.kind == "completion" else ""
    broken = f'\n<span class="given">{_text(answer.problem)}</span>' if answer.problem else ""
    return given + (_text(answer.text if given else answer.text.strip()) or '<span class="given">(nothing)</span>') + broken


def _badge(answer: Answer) -> str:
    if answer.problem:
        return '<span class="badge warn">no answer</span>'
    if answer.right is None:
        return ""
    return '<span class="badge right">✓ right</span>' if answer.right else '<span class="badge wrong">✗ wrong</span>'


def times(answer: Answer) -> str:
    """Seconds, tokens and the first text's delay, as far as they are known."""
    parts = [f"{answer.seconds:.1f} s"]
    if answer.tokens is not None:
        parts.append(f"{answer.tokens} tokens")
    if answer.rate is not None:
        parts.append(f"{answer.rate:.1f} tokens/s")
    if answer.first is not None:
        parts.append(f"first text after {answer.first:.2f} s")
    if answer.ended is False:
        parts.append("cut off at the limit")
    return " · ".join(parts)


def _scores(found: Comparison) -> Iterator[str]:
    yield "<section><h2>Probes: accepted answers</h2>"
    words = f"among the first {WORDS['questions']} words of an answer, or the first {WORDS['starts']} after the start of a sentence"
    yield f'<p class="soft" style="margin:-.5rem 0 .8rem">Right is what has an accepted answer {words}.'
    yield " The thin line is the interval that holds the true share with 95 % confidence.</p>"
    for kind, probes in found.probes.items():
        if not probes:
            continue
        yield '<div class="wide" style="margin-bottom:1rem"><table><thead><tr>'
        yield f'<th style="width:35%">{TITLES[kind]}</th><th class="n">right</th>'
        yield '<th style="width:40%">share</th><th class="n">95 %</th></tr></thead><tbody>'
        for place, column in enumerate(found.columns):
            yield from (_score(place, column.label, score) for score in column.scores if score.kind == kind)
        yield "</tbody></table></div>"
    if found.differences:
        yield '<h2 style="margin-top:1.6rem">Differences, probe by probe</h2><div class="wide"><table><thead><tr>'
        yield "<th>Model</th><th>against</th><th></th>"
        yield '<th class="n">gained</th><th class="n">lost</th><th class="n">difference</th><th>95 %</th></tr></thead><tbody>'
        for one in found.differences:
            yield _difference(found.columns, one)
        yield "</tbody></table></div>"
    yield "</section>"


def _score(place: int, label: str, score: Score) -> str:
    low, high = score.interval
    bar = f'<div class="bar"><i style="width:{score.right / score.of:.2%}"></i><b style="left:{low:.2%};width:{high - low:.2%}"></b></div>'
    span = f"{low:.0%} to {high:.0%}"
    return (
        f'<tr style="{_mark(place)}"><th scope="row"><span class="dot"></span>{_text(label)}</th>'
        f'<td class="n">{score.right} of {score.of}</td><td>{bar}</td><td class="n">{span}</td></tr>'
    )


def _difference(columns: Sequence[Column], one: Difference) -> str:
    low, high = one.interval
    shown = f"{(one.gained - one.lost) / one.of:+.0%}".replace("-", "−")
    bar = f'<div class="bar zero"><b style="left:{(low + 1) / 2:.2%};width:{(high - low) / 2:.2%}"></b><i></i></div>'
    sure = "" if low <= 0 <= high else f' <span class="badge {"right" if low > 0 else "wrong"}">{"better" if low > 0 else "worse"}</span>'
    span = f"{low:+.0%} to {high:+.0%}".replace("-", "−")
    model, against = (_text(columns[place].label) for place in (one.model, one.against))
    return (
        f'<tr style="{_mark(one.model)}"><th scope="row"><span class="dot"></span>{model}</th><td>{against}</td>'
        f'<td class="soft">{TITLES[one.kind].lower()}</td><td class="n">{one.gained}</td><td class="n">{one.lost}</td>'
        f'<td class="n">{shown}{sure}</td><td>{bar}<span class="soft" style="font-size:.8rem">{span}</span></td></tr>'
    )


def _probes(found: Comparison) -> Iterator[str]:
    for kind, probes in found.probes.items():
        if not probes:
            continue
        yield f"<details><summary>{TITLES[kind]}: all {len(probes)} with their answers</summary>"
        yield (
            '<div class="wide"><table><thead><tr><th>Probe</th>'
            + "".join(f"<th>{_text(one.label)}</th>" for one in found.columns)
            + "</tr></thead><tbody>"
        )
        for number, probe in enumerate(probes):
            cells = (_cell(column.probes[kind][number]) for column in found.columns)
            accepted = f'<div class="soft">{_text(" or ".join(probe.accept))}</div>'
            yield f'<tr><th scope="row" style="min-width:11rem">{_text(probe.prompt)}{accepted}</th>{"".join(cells)}</tr>'
        yield "</tbody></table></div></details>"


def _cell(answer: Answer) -> str:
    said = _text(answer.text.strip()) or f'<span class="given">{_text(answer.problem or "(nothing)")}</span>'
    return f'<td style="min-width:12rem;vertical-align:top">{_badge(answer)}<div class="answer" dir="auto">{said}</div></td>'


def _mark(place: int) -> str:
    return f"--mark:var(--m{place % 6})"


def _public(where: str) -> str:
    """A page is shown to others: of a folder of this machine only the last two parts."""
    return "/".join(Path(where).parts[-2:]) if where.startswith(("/", "~", ".")) else where


def _median(values: Iterable[float]) -> float | None:
    ordered = sorted(values)
    return (ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) / 2 if ordered else None
