"""The commands that only read records of runs: plot, compare, report, replay."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jsonargparse import Namespace

from hessianflow.commands.parser import add_command, path
from hessianflow.commands.runs import (
    add_named_code,
    distinct,
    printable,
    require_named_code,
    require_settings,
    writing_to,
)
from hessianflow.commands.settings import add_settings
from hessianflow.interfaces import HessianFlowError

if TYPE_CHECKING:
    from hessianflow.config import RunConfig, TrainConfig


def add(commands: Any) -> dict[str, Callable[[Namespace], int]]:
    """Add the parsers, and return the function of each command."""
    about = "draw curvature trajectory and training curves of one or several runs"
    plot = add_command(commands, "plot", about)
    plot.add("run_dirs", type=path, nargs="+", help="run directories, drawn over each other")
    plot.add_open("--out", path, "folder for the pictures; default: RUN_DIR/plots or plots")
    about = "print and draw updates and accuracy of several runs side by side"
    compare = add_command(commands, "compare", about)
    about = "run directories; those that differ only in seed are averaged"
    compare.add("run_dirs", type=path, nargs="+", help=about)
    compare.add_open("--out", path, "folder for compare.md, compare.csv and compare.png")
    about = "write one self-contained HTML page about one or several runs"
    report = add_command(commands, "report", about)
    report.add("run_dirs", type=path, nargs="+", help="run directories")
    report.add_open("--out", path, "file of the page; default: RUN_DIR/report.html or report.html")
    about = "print the decisions of another controller on a run's measurements"
    replay = add_command(commands, "replay", about)
    replay.add("run_dir", type=path, help="run directory")
    add_settings(replay, ("controller", "max_batch_size"))
    add_named_code(replay)
    return {"plot": _plot, "compare": _compare, "report": _report, "replay": _replay}


def draw(runs: list[Path], folder: Path) -> None:
    """Draw the pictures of `runs` into `folder`, and print their paths.

    There are more for runs whose readings know the optimizer, with a server, with resolution
    stages, or with a changing number of workers.
    """
    from hessianflow import plots
    from hessianflow.runs import History

    with writing_to(folder):
        folder.mkdir(parents=True, exist_ok=True)
    histories = [History.load(run) for run in runs]
    has_server = any(history.of_kind("commit") for history in histories)
    pictures: list[tuple[Callable[..., Any], Any]] = [(plots.training_curves, runs)]
    if any(history.curvature for history in histories):
        pictures.insert(0, (plots.curvature_trajectory, runs))
    if plots.has_edge_share(runs):
        pictures.append((plots.edge_share, runs))
    if has_server:
        pictures.append((plots.accuracy_over_time, runs))
    if len(runs) == 1 and has_server:
        pictures.append((plots.commit_timeline, runs[0]))
    if len(runs) == 1 and "resolution_stages" in histories[0].config:
        pictures.append((plots.batch_and_resolution, runs[0]))
    for picture, source in pictures:
        path = folder / f"{picture.__name__}.png"
        picture(source, path=path)
        print(f"  {printable(path)}")
    elastic = [run for run in runs if plots.has_workers(run)]
    for run in elastic:
        path = folder / "workers.png"
        if len(runs) > 1:
            path = folder / f"workers-{run.name}.png"
        plots.workers(run, path=path)
        print(f"  {printable(path)}")


def _plot(arguments: Namespace) -> int:
    runs = _runs(arguments)
    draw(runs, Path(arguments.out or _home(runs) / "plots"))
    return 0


def _home(runs: list[Path]) -> Path:
    """Return the folder for what is made of runs: that of a single run, else the current one."""
    if len(runs) == 1:
        return runs[0]
    return Path()


def _compare(arguments: Namespace) -> int:
    from hessianflow import plots
    from hessianflow.runs.files import write_text

    runs = _runs(arguments)
    table = plots.compare_table(runs)
    print(table.to_markdown())
    if arguments.out:
        folder = Path(arguments.out)
        with writing_to(folder):
            folder.mkdir(parents=True, exist_ok=True)
            write_text(folder / "compare.md", table.to_markdown() + "\n")
            write_text(folder / "compare.csv", table.to_csv())
            plots.compare(runs, path=folder / "compare.png")
        print(f"  {printable(folder)}/compare.md, compare.csv, compare.png")
    return 0


def _report(arguments: Namespace) -> int:
    from hessianflow import plots

    runs = _runs(arguments)
    out = Path(arguments.out or _home(runs) / "report.html")
    with writing_to(out.parent):
        out.parent.mkdir(parents=True, exist_ok=True)
    plots.report(runs, path=out)
    print(f"  {printable(out)}")
    return 0


def _replay(arguments: Namespace) -> int:
    from hessianflow.choices import build_controller
    from hessianflow.control.replay import replay
    from hessianflow.parts import load_config
    from hessianflow.resolve import resolve
    from hessianflow.runs import History

    history = History.load(arguments.run_dir)
    require_settings(arguments.run_dir, "replay", "hf.control.replay")
    require_named_code(arguments.run_dir, arguments, builds_model=False)
    recorded = load_config(arguments.run_dir)
    config = resolve(_replayed(recorded, arguments.given.settings(arguments)))
    if config.norm_mode != recorded.norm_mode:
        print(
            f"note: the run measured with norm_mode {recorded.norm_mode!r};"
            f" {config.controller.name} means eigenvalues with {config.norm_mode!r}"
        )
    controller = build_controller(config)
    sizes = {
        "examples_per_epoch": history.fact("examples_per_epoch"),
        "total_epochs": config.counted_epochs,
    }
    result = replay(history.records, controller, **sizes)
    for step in result.changes:
        decision = step.decision
        share = config.adversary.options.get("share", 0.0) * decision.attack_factor
        print(
            f"epoch {step.epoch:>3}: batch {decision.batch_size}, rate x {decision.lr_factor:g}, "
            f"adversarial share {share:g}: {decision.reason}"
        )
    print(
        f"{config.controller.name}: {result.updates} updates; the run itself took"
        f" {history.epochs[-1]['updates']}"
    )
    return 0


def _replayed(recorded: "RunConfig", changes: dict[str, Any]) -> "TrainConfig":
    """Return the settings of a run with another controller, and open what depends on it.

    The default is absa. Options that are not given are those of the run's controller where that has
    options of the same name, and grow-instead-of-decay takes its milestones from the run's
    schedule.
    """
    from hessianflow.config import chosen, from_dict, to_dict
    from hessianflow.methods import KINDS, method_options, prefers

    kept = to_dict(recorded)
    controller = changes.pop("controller", "absa")
    if isinstance(controller, str):
        controller = {"name": controller}
    name = controller["name"]
    own = dict(kept["controller"])
    if name == "grow-instead-of-decay" and recorded.schedule.name == "multistep":
        own["milestones"] = recorded.schedule.options["milestones"]
        own["decay_factor"] = 1 / recorded.schedule.options["lr_decay"]
    shared = method_options(KINDS["controller"], name).keys() & own.keys()
    controller = {option: own[option] for option in shared} | controller
    if recorded.controller.name != name:
        # These may not go with another controller, or have another meaning there.
        for setting in ("schedule", "lr_rule", "max_lr_factor", "norm_mode"):
            del kept[setting]
    controllers = (recorded.controller, chosen("controller", name))
    if any("adversary" in prefers(KINDS["controller"], one) for one in controllers):
        del kept["adversary"]
    return from_dict({**kept, **changes, "controller": controller}, str(recorded.run_dir))


def _runs(arguments: Namespace) -> list[Path]:
    from hessianflow.runs import History

    runs = distinct(arguments.run_dirs)
    for run in runs:
        if not History.load(run).epochs:
            raise HessianFlowError(f"{run} holds no completed epoch yet: nothing to show")
    return runs
