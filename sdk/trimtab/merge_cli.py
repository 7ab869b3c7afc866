"""`trimtab merge`: base and adapter as one model folder, and what that costs."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from trimtab import cli_options
from trimtab.completion import completes, run_handles

if TYPE_CHECKING:
    from trimtab.merge import Onto


@click.command()
@click.argument("handle", metavar="HANDLE|FOLDER", shell_complete=completes(run_handles, paths=True))
@click.argument("held_out", metavar="[DATA]...", nargs=-1, type=click.Path())
@cli_options.settings
@click.option(
    "--onto",
    type=click.Choice(["auto", "dequantised", "original"]),
    default="auto",
    show_default=True,
    help="weights to merge onto: the base's original ones, those that a qlora run trained on, or (auto) what predicts DATA best",
)
@click.option("--output", type=click.Path(path_type=Path), help="put the model into this folder, too; it must not hold anything")
@click.option("--allow-private-hosts", is_flag=True, help="allow DATA on private and loopback addresses")
@cli_options.as_json
def merge(
    handle: str,
    held_out: tuple[str, ...],
    settings: tuple[str, ...],
    onto: Onto,
    output: Path | None,
    allow_private_hosts: bool,
    as_json: bool,
) -> None:
    """Merge a run's adapter into its base model, measure what that costs, and print the folder.

    Measured is the loss on text that was not trained on: unmerged, merged in each way, and the base's. DATA are pages, files and folders
    of your own for that; without them it is general prose. What is picked is remembered for `trimtab deploy`. With --onto dequantised or
    original, and no DATA, nothing is measured. What a run of the method full left is whole, and named or copied as it is.

    \b
    Example:
      trimtab merge process://trim-7f3a9c21
      trimtab merge process://trim-7f3a9c21 unseen-pages/ --output models/handbook
    """
    from trimtab import data, weights
    from trimtab.artifact import Artifact
    from trimtab.errors import DataError
    from trimtab.merge import export, merged, pick_of, refuse_used
    from trimtab.merge_report import measure
    from trimtab.named import named, refuse_foreign
    from trimtab.progress import display

    given, what = cli_options.pairs(settings), named(handle)
    refuse_foreign(given, what.settings)
    artifact = what.artifact(given) or Artifact(handle)
    if output is not None:
        refuse_used(output)
    if artifact.is_whole:
        print("nothing to merge: the model is whole (method full)", file=sys.stderr)
        folder = artifact.path if output is None else export(artifact.path, output)
        print(json.dumps({"folder": str(folder), "onto": None, "reason": "the model is whole", "report": None}) if as_json else folder)
        return
    base = weights.resolve_trained(artifact)
    with display() as screen:
        report = None
        if held_out or onto == "auto":
            loaded = data.load(held_out, allow_private_hosts=allow_private_hosts, say=screen.say) if held_out else None
            if loaded is not None and loaded.examples is not None:
                raise DataError(
                    "the loss is measured on running text, and DATA holds other records: pass pages, or records with a column text"
                )
            documents = loaded.documents if loaded else ()
            report = measure(artifact, base, documents, show=screen.show)
        folder = merged(artifact, base, onto=onto, say=screen.say, show=screen.show)
    chosen, reason = pick_of(artifact, base) if onto == "auto" else (onto, "asked for")
    if output is not None:
        folder = export(folder, output)
    if as_json:
        told: dict[str, Any] = {"folder": str(folder), "onto": chosen, "reason": reason}
        print(json.dumps(told | {"report": asdict(report) if report else None}))
        return
    if report is not None:
        print("\n".join(report.lines()))
    print(folder)
