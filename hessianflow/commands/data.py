"""The commands `data fetch` and `data verify`."""

from collections.abc import Callable
from typing import Any

from jsonargparse import Namespace

from hessianflow.commands.parser import add_command, path
from hessianflow.data.sources import SOURCES


def add(commands: Any) -> dict[str, Callable[[Namespace], int]]:
    """Add the parsers, and return the function of the command."""
    data = add_command(commands, "data", "download or check the official files of a data set")
    actions = data.add_subcommands(required=True, title="actions", metavar="ACTION")
    for name, text in (
        ("fetch", "download what is missing, check it, unpack it"),
        ("verify", "compare local files with the published sizes and checksums"),
    ):
        action = add_command(actions, name, text, prefix="hessianflow data")
        action.add("name", type=str, help=f"data set: {', '.join(SOURCES)}")
        action.add_open("--data-dir", path, "folder of the files; default: a cache of this user")
    return {"data": _data}


def _data(arguments: Namespace) -> int:
    action = arguments.subcommand
    return {"fetch": _fetch, "verify": _verify}[action](arguments[action])


def _fetch(arguments: Namespace) -> int:
    from tqdm import tqdm

    from hessianflow.data import fetch

    bars: dict[str, Any] = {}

    def progress(file: str, done: int, total: int) -> None:
        bar = bars.setdefault(
            file, tqdm(total=total or None, desc=file, unit="B", unit_scale=True, disable=None)
        )
        bar.update(done - bar.n)

    try:
        folder = fetch(arguments.name, arguments.data_dir, progress=progress)
    finally:
        for bar in bars.values():
            bar.close()
    print(
        f"{arguments.name} is in {folder}: hessianflow train --data {arguments.name} --data-dir"
        f" {folder}"
    )
    return 0


def _verify(arguments: Namespace) -> int:
    from hessianflow.data import verify

    reports = verify(arguments.name, arguments.data_dir)
    for report in reports:
        print(f"{report.state:<8} {report.path}  {report.detail}".rstrip())
    if any(report.state != "ok" for report in reports):
        return 2
    return 0
