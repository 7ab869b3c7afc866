"""`trimtab compare`: the same questions to several models, on the terminal, as JSON and as a page."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import click

from trimtab import cli_options
from trimtab.completion import completes, endpoint_handles, model_aliases, run_handles
from trimtab.errors import SpecError

_complete = completes(run_handles, endpoint_handles, model_aliases, paths=True)


@click.command()
@click.argument("models", metavar="MODEL...", nargs=-1, required=True, shell_complete=_complete)
@click.option("--question", "-q", "asked", multiple=True, help="ask this; may be repeated")
@click.option("--questions", "file", type=click.Path(path_type=Path), help="file of questions: one a line, or JSON with start and accept")
@click.option("--probes", "probe_file", type=click.Path(path_type=Path), help="JSON file of starts, questions, general questions to score")
@click.option("--max-tokens", type=click.IntRange(1), default=200, show_default=True, help="longest answer, in tokens")
@click.option("--temperature", type=click.FloatRange(0, 100), default=0.01, show_default=True, help="0: the likeliest token each time")
@click.option("--top-p", type=click.FloatRange(0, 1, min_open=True), default=0.9, show_default=True, help="draw from this share")
@click.option("--seed", type=click.IntRange(0), default=42, show_default=True, help="draw the same again")
@click.option("--html", "page", type=click.Path(path_type=Path), help="write all answers side by side as one page that needs nothing else")
@cli_options.api_key
@cli_options.settings
@cli_options.as_json
def compare(
    models: tuple[str, ...],
    asked: tuple[str, ...],
    file: Path | None,
    probe_file: Path | None,
    max_tokens: int,
    temperature: float,
    top_p: float,
    seed: int,
    page: Path | None,
    api_key_file: Path | None,
    settings: tuple[str, ...],
    as_json: bool,
) -> int:
    """Ask each MODEL the same, one after the other, and show the answers side by side.

    A MODEL is a run's handle, which means its base model and its tuned one (with #base or #tuned one of them); an endpoint's handle or
    address (with #NAME one of its models); or a model by alias, Hub id or folder. LABEL= before it is its title. Runs and models are served
    on this machine meanwhile. Models that only complete text get the start of a sentence. An answer is right where one of those accepted
    stands among its first 60 words, after the start of a sentence 30. Exit code 1 where an answer is missing.

    \b
    Example:
      trimtab compare process://trim-7f3a9c21 -q "When was the mill built?"
      trimtab compare process://trim-7f3a9c21 --questions questions.json --probes probes.json --html compare.html
      trimtab compare smollm2-135m-instruct tuned=docker://trim-ep-0c5d11ab -q "What is a mill?"
    """
    from trimtab import compare_page, compare_table, probes
    from trimtab.compare import Question, Sampling, read_questions, to_json
    from trimtab.compare import compare as put_to_all
    from trimtab.progress import display

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # what is served meanwhile ends then, too
    if page is not None and not page.absolute().parent.is_dir():
        raise SpecError(f"{page.parent} is no folder: make it, or choose another place for the page")
    questions = [*(Question(one) for one in asked), *(read_questions(file) if file else ())]
    judged = probes.load(probe_file) if probe_file else None
    with display() as screen:
        found = put_to_all(
            models,
            questions,
            probes=judged,
            sampling=Sampling(max_tokens, temperature, top_p, seed),
            api_key=cli_options.key(api_key_file),
            settings=cli_options.pairs(settings),
            say=screen.say,
            show=screen.show,
        )
    try:
        if as_json:
            print(json.dumps(to_json(found), ensure_ascii=False), flush=True)
        else:
            compare_table.show(found)
    finally:  # each of the two is all there is of the answers where the other one cannot be written
        if page is not None:
            compare_page.write(found, page)
            click.echo(f"page: {page}", err=True)
    return 1 if found.problems else 0
