"""``dure cache``: what dure keeps on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dure import settings
from dure.cli import options
from dure.cli.output import print_json, show, table

WithModels = Annotated[bool, typer.Option("--models", help="Remove the pulled models too.")]


def register(app: typer.Typer) -> None:
    """Add the commands to the application."""
    group = typer.Typer(
        help="Show or clear what dure keeps on disk.",
        epilog="Example: dure cache stats",
        rich_markup_mode=None,
        no_args_is_help=True,
    )
    group.callback()(_group)
    group.command(epilog="Example: dure cache stats --json")(stats)
    group.command(epilog="Example: dure cache clear --models")(clear)
    app.add_typer(group, name="cache")


def _group() -> None:
    """Show or clear what dure keeps on disk."""


def stats(as_json: options.Json = False) -> None:
    """Show the compiled code and the models on disk."""
    from dure.models.catalogue import models_dir
    from dure.models.storage import readable_bytes
    from dure.runtime.cache import ObjectCache

    limit = settings.cache_limit_bytes()
    objects = ObjectCache(settings.cache_dir(), limit).statistics()
    model_files, model_bytes = _files_below(models_dir())
    if as_json:
        print_json(
            {
                "folder": str(settings.cache_dir()),
                "objects": objects.entries,
                "object_bytes": objects.total_bytes,
                "object_limit_bytes": limit,
                "models_folder": str(models_dir()),
                "model_files": model_files,
                "model_bytes": model_bytes,
            }
        )
        return
    table(
        [
            ("WHAT", "FILES", "SIZE", "FOLDER"),
            (
                "compiled code",
                str(objects.entries),
                f"{readable_bytes(objects.total_bytes)} of {readable_bytes(limit)}",
                str(settings.cache_dir()),
            ),
            ("models", str(model_files), readable_bytes(model_bytes), str(models_dir())),
        ],
        right=(1, 2),
    )


def clear(models: WithModels = False, as_json: options.Json = False) -> None:
    """Remove the compiled code, which is made again when it is needed."""
    from dure.models.download import remove_models
    from dure.models.storage import readable_bytes
    from dure.runtime.cache import ObjectCache

    objects = ObjectCache(settings.cache_dir(), settings.cache_limit_bytes())
    freed = objects.clear()
    freed_models = remove_models() if models else 0
    if as_json:
        print_json({"freed_object_bytes": freed, "freed_model_bytes": freed_models})
    else:
        show(f"{readable_bytes(freed + freed_models)} freed\n")


def _files_below(folder: Path) -> tuple[int, int]:
    """The number and the total size in bytes of the files below ``folder``."""
    sizes: list[int] = []
    for path in folder.rglob("*"):
        try:
            if path.is_file():
                sizes.append(path.stat().st_size)
        except OSError:
            continue  # another process has just removed it
    return len(sizes), sum(sizes)
