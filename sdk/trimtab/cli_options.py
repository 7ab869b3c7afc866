"""Options and arguments that several commands share, and how their help is laid out."""

from __future__ import annotations

import difflib
import importlib
import os
import signal
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Any, Literal, TypeVar, Union, get_args, get_origin

import click
from click.shell_completion import CompletionItem

from trimtab.backends import BACKENDS
from trimtab.completion import completes, model_aliases, recipe_names

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo

KEY_VARIABLE = "TRIMTAB_API_KEY"

Command = TypeVar("Command", bound=Callable[..., Any])

SECTIONS = {
    "Model and method": (
        *("model", "recipe", "method", "lora_rank", "lora_alpha", "lora_targets", "use_rslora", "use_dora"),
        *("lora_init", "lora_dropout", "dtype"),
    ),
    "Data": ("on_error", "allow_private_hosts", "max_page_mb", "max_page_seconds"),
    "Rows and objective": ("max_seq_len", "objective", "too_long", "views", "questions", "replay"),
    "Schedule": (
        *("epochs", "learning_rate", "lr_schedule", "warmup_ratio", "weight_decay", "batch_rows", "accumulation"),
        *("max_grad_norm", "seed"),
    ),
    "Limits": ("max_steps", "max_minutes", "max_usd"),
    "Saving": ("save_every_steps", "save_every_minutes", "keep_checkpoints", "keep_merged"),
    "Place": ("backend", "settings", "device", "nodes", "ranks"),
}
"""Where the options of `fit` and `plan` stand in their help; what is named nowhere comes last, under Options."""

_NAMES: dict[str, Callable[[], Any]] = {"model": model_aliases, "recipe": recipe_names}  # that a shell completes

as_json = click.option("--json", "as_json", is_flag=True, help="print one JSON value instead of text")

settings = click.option(
    "--backend-option",
    "settings",
    metavar="NAME=VALUE",
    multiple=True,
    help="a setting of the backend, such as memory=8g for docker or region=us-east-1 for sagemaker; may be repeated",
)

api_key = click.option(
    "--api-key-file",
    type=click.Path(path_type=Path, dir_okay=False, exists=True),
    help="file that holds the API key; else it is taken from TRIMTAB_API_KEY",
)


class NumberOr(click.ParamType):  # type: ignore[type-arg]  # generic in newer versions alone
    """A whole number, or one of a few words."""

    def __init__(self, words: Sequence[str]) -> None:
        self.words = tuple(words)
        self.name = "|".join(("integer", *self.words))

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if isinstance(value, int) or value in self.words:
            return value
        try:
            return int(value)
        except ValueError:
            self.fail(f"{value!r} is neither a whole number nor {' or '.join(self.words)}.", param, ctx)


def key(file: Path | None) -> str | None:
    """The API key of a file, else of the environment: what stands on a command line, others can read."""
    return (file.read_text(encoding="utf-8", errors="replace").strip() if file else os.environ.get(KEY_VARIABLE)) or None


class InSections(click.Command):
    """A command whose options stand under the headings of `SECTIONS`."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        records = {each.name: each.get_help_record(ctx) for each in self.get_params(ctx) if isinstance(each, click.Option)}
        placed = {name for names in SECTIONS.values() for name in names}
        for title, names in {**SECTIONS, "Options": tuple(name for name in records if name not in placed)}.items():
            if rows := [row for name in names if (row := records.get(name))]:
                with formatter.section(title):
                    formatter.write_dl(rows)


class Commands(click.Group):
    """A group that says the nearest right command, and, of commands given by `places`, imports the one that is used.

    `places`: a command's name -> "module:attribute".
    """

    def __init__(self, *args: Any, places: Mapping[str, str] | None = None, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.places = dict(places or {})

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted({*self.commands, *self.places})

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in self.commands and cmd_name in self.places:
            module, _, attribute = self.places[cmd_name].partition(":")
            self.add_command(getattr(importlib.import_module(module), attribute), cmd_name)
        return super().get_command(ctx, cmd_name)

    def resolve_command(self, ctx: click.Context, args: list[str]) -> tuple[str | None, click.Command | None, list[str]]:
        names = self.list_commands(ctx)
        if not ctx.resilient_parsing and args[0] not in names and not args[0].startswith("-"):
            near = difflib.get_close_matches(args[0], names, n=1, cutoff=0.5)
            ctx.fail(f"No such command {args[0]!r}. " + (f"Did you mean {near[0]!r}?" if near else f"There are: {', '.join(names)}"))
        return super().resolve_command(ctx, args)

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """By the names alone: what a command says of itself would need it to be imported."""
        if self.places and incomplete[:1] != "-":
            return [CompletionItem(name) for name in self.list_commands(ctx) if name.startswith(incomplete)]
        return super().shell_complete(ctx, incomplete)


def field(name: str, one: FieldInfo) -> Callable[[Command], Command]:
    """The option of a spec's field: its name, default and description."""
    settings = _kind(one)
    if name in _NAMES:
        settings["shell_complete"] = completes(_NAMES[name], paths=name == "model")
    return click.option(f"--{name.replace('_', '-')}", name, **settings)


def backend(meaning: str, *, default: str | None = "process") -> Callable[[Command], Command]:
    """`--backend`; without a default it is None where it is not given."""
    return click.option("--backend", type=click.Choice(list(BACKENDS)), default=default, show_default=default is not None, help=meaning)


def ends_like_ctrl_c() -> None:
    """SIGTERM and SIGHUP end this process as Ctrl-C does: a half-made folder is removed then, too, and what was started is named.
    With nohup a closed terminal ends nothing."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler)


def pairs(values: Sequence[str], option: str = "--backend-option", example: str = "memory=8g") -> dict[str, str]:
    """NAME=VALUE, each once. Raises UsageError for what is none."""
    split = [value.partition("=") for value in values]
    for name, equals, _ in split:
        if not (name and equals):
            raise click.UsageError(f"{option} takes NAME=VALUE, such as {example}, not {name + equals!r}")
    return {name: value for name, _, value in split}


def _kind(one: FieldInfo) -> dict[str, Any]:
    """click's settings for a field, from its type, default and description."""
    settings: dict[str, Any] = {"help": one.description}
    kind: Any = one.annotation
    words: tuple[str, ...] = ()
    if get_origin(kind) in (Union, UnionType):  # such as int | None, or int | Literal["auto"]
        words = next((get_args(part) for part in get_args(kind) if get_origin(part) is Literal), ())
        kind = next(part for part in get_args(kind) if part is not NoneType)
    if get_origin(kind) is tuple:
        kind = get_args(kind)[0]
        settings |= {"multiple": True, "help": f"{one.description}; may be repeated"}
    if kind is bool:
        settings |= {"is_flag": True, "flag_value": True}
    else:
        settings["type"] = click.Choice(list(get_args(kind))) if get_origin(kind) is Literal else NumberOr(words) if words else kind
    if words:
        settings["metavar"] = "|".join(("INTEGER", *words))
    settings |= {"required": True} if one.is_required() else {"default": None}
    if kind is not bool and not one.is_required() and one.default not in (None, ()):
        default = one.default
        settings["help"] += f"  [default: {' '.join(default) if isinstance(default, tuple) else default}]"
    return settings
