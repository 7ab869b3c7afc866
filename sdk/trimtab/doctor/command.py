"""The command `trimtab doctor`."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict

import click

from trimtab.doctor.facts import PLACES


@click.command()
@click.option("--backend", type=click.Choice(PLACES), default="process", show_default=True, help="whose needs decide the exit code")
@click.option("--gpu", is_flag=True, help="run the GPU image's self-test on a GPU, and nothing else")
@click.option("--json", "as_json", is_flag=True, help="print one JSON value instead of text")
@click.pass_context
def doctor(context: click.Context, backend: str, gpu: bool, as_json: bool) -> None:
    """Look at this machine and say what is there, what is missing, and what to type.

    Nothing is changed, and no secret is read or printed. Exit code 1 when something is missing that the backend needs, and with --gpu
    whenever nothing ran on a GPU.

    \b
    Example:
      trimtab doctor
      trimtab doctor --backend docker
      trimtab doctor --gpu
    """
    from trimtab.doctor import page
    from trimtab.doctor.judge import judge
    from trimtab.doctor.look import look

    facts = look()
    if gpu:
        from trimtab.doctor.gpu import prove

        findings, place = prove(facts), "docker"
    else:
        findings, place = judge(facts), backend
    if as_json:
        print(json.dumps([asdict(finding) for finding in findings], ensure_ascii=False))
    else:
        page.show(findings, place)
    print(page.verdict(findings, place, gpu=gpu), file=sys.stderr)
    if any(finding.stops(place) for finding in findings):
        context.exit(1)
