"""The command line. torch, and everything that needs it, is imported inside the commands."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from mgd.ui.console import Session
from mgd.ui.options import Data, Device, Json, Out, Seed, Steps, Threads

# Name of a command -> module whose function `command` it is, with options annotated for typer.
BENCHMARKS: dict[str, str] = {
    "throughput": "mgd.bench.throughput",
    "memory": "mgd.bench.memory",
    "overhead": "mgd.bench.overhead",
    "short": "mgd.bench.short",
    "peers": "mgd.bench.peers.command",
    "plan": "mgd.bench.plan_times",
    "offload": "mgd.bench.offload",
    "kernels": "mgd.bench.kernels",
    "gpu": "mgd.bench.gpu",
}
PROFILES: dict[str, str] = {"time": "mgd.bench.profile_time", "memory": "mgd.bench.profile_memory"}
RECIPES: dict[str, str] = {
    "poison": "mgd.recipes.poison.command",
    "lr-schedule": "mgd.recipes.lr_schedule.command",
    "smoothness": "mgd.recipes.smoothness.command",
    "select": "mgd.recipes.select.command",
    "rate": "mgd.recipes.rate.command",
    "attribute": "mgd.recipes.attribute.command",
    "mixture": "mgd.recipes.mixture.command",
}

app = typer.Typer(
    name="mgd",
    help="Exact metagradients: the gradient of a trained model's output with respect to how it was trained.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


def _imported(commands: Mapping[str, str]) -> type[TyperGroup]:
    """A group whose commands are imported when they are called."""

    class Imported(TyperGroup):
        def list_commands(self, ctx: Any) -> list[str]:
            return list(commands)

        def get_command(self, ctx: Any, cmd_name: str) -> Any:
            if cmd_name not in commands:
                return None
            one = typer.Typer(add_completion=False)
            one.command(cmd_name)(importlib.import_module(commands[cmd_name]).command)
            return typer.main.get_command(one)

    return Imported


app.add_typer(
    typer.Typer(cls=_imported(BENCHMARKS), no_args_is_help=True),
    name="bench",
    help="Measure speed, memory and bandwidth.",
)
app.add_typer(
    typer.Typer(cls=_imported(PROFILES), no_args_is_help=True),
    name="profile",
    help="Measure a metagradient of your own training.",
)
app.add_typer(
    typer.Typer(cls=_imported(RECIPES), no_args_is_help=True),
    name="recipe",
    help="Use metagradients: complete examples on real data.",
    hidden=not RECIPES,
)


def _show_version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        typer.echo(f"mgd {version('mgd-kernels')}")
        raise typer.Exit


@app.callback()
def _common(
    shows_version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and end.")
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the traceback of an error. May stand anywhere in the command.")
    ] = False,
) -> None:
    pass


@app.command()
def demo(
    data: Data = None,
    out: Out = None,
    json: Json = None,
    steps: Steps = 200,
    seed: Seed = 0,
    threads: Threads = 1,
    device: Device = "cpu",
) -> None:
    """Find the mislabelled images of a training set, and check the metagradient that finds them."""
    from mgd.recipes.data import load
    from mgd.recipes.demo import recipe, report
    from mgd.util.devices import checked_device

    checked_device(device)
    session = Session("demo", out, json, threads)
    result = recipe.run(load(data), load(data, train=False), steps, seed, session.reporter, device)
    session.finish(report.page(result), result.to_dict())
    if not result.check.passed:
        raise typer.Exit(1)


@app.command()
def doctor(json: Json = None) -> None:
    """Say what works on this machine, what does not, and what to do about it."""
    from mgd.cli import doctor

    session = Session("doctor", json=json)
    offer = doctor.examine()
    session.print(doctor.describe(offer), whole=True)
    session.write(None, offer)


@app.command()
def plan(
    steps: Annotated[int, typer.Option("--steps", min=1, help="Number of training steps, T.")],
    parameters: Annotated[
        str, typer.Option(metavar="N", help='Number of trained parameters: 124000000, "124M", "1.5B".')
    ],
    optimizer: Annotated[str, typer.Option(help="One of sgd, momentum, adam, adamw.")] = "adamw",
    dtype: Annotated[
        str | None,
        typer.Option(
            help="Data type of the gradients: float32 (the default), bfloat16 (with --ranks), float16 or float64."
        ),
    ] = None,
    budget: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TIER=SIZE",
            help="device=1GB, host=8GB, disk=100GB or disk=DIR:100GB. Repeat the option for further tiers.",
        ),
    ] = None,
    schedule: Annotated[str, typer.Option(help="One of auto, log, revolve, kary, kary:K, sqrt, binary, all.")] = "auto",
    step_seconds: Annotated[float | None, typer.Option(min=0, help="Measured duration of one training step.")] = None,
    residuals: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help='What one captured step can keep, such as "92MB": plans how many steps do.'),
    ] = None,
    ranks: Annotated[
        int | None, typer.Option(min=1, help="Forecast a training on so many ranks; all sizes are then of each rank.")
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="With --ranks, each one's: a100, h100 (the default), h200 or mi300x.")
    ] = None,
    network: Annotated[
        str | None, typer.Option(help='With --ranks, of each: "400Gb" (bits per second, the default), "50GB" (bytes).')
    ] = None,
    tokens: Annotated[
        str | None, typer.Option(help='With --ranks: tokens per step, such as "4M". By default 20 P / T.')
    ] = None,
    out: Out = None,
    json: Json = None,
) -> None:
    """Plan a metagradient before running it: what is stored where, what is replayed, how long it takes."""
    from mgd.cli import plan as planning
    from mgd.errors import BadArgument

    session = Session("plan", out, json)
    how = optimizer, dtype or ("float32" if ranks is None else "bfloat16"), budget or [], schedule
    try:
        planning.check_options(ranks, [device, network, tokens], [step_seconds, residuals])
        if ranks is not None:
            on = device or "h100", network or "400Gb"
            found = planning.forecast_for(ranks, steps, parameters, on, *how, tokens)
            session.print(found.explain(), whole=True)
            return session.write(planning.page(found.plan), found.to_dict())
        made = planning.plan_for(steps, parameters, *how, step_seconds, residuals)
    except ValueError as error:
        if _is_the_users(error):
            raise
        raise BadArgument(str(error)) from error  # a size or a schedule that is none
    session.print(made.explain(), whole=True)
    if step_seconds is None:
        session.print("\nTimes assume a training step of 1 s; --step-seconds sets what you measured.")
    session.write(planning.page(made), made.to_dict())


def main(arguments: Sequence[str] | None = None) -> None:
    """The `mgd` command. A user's error ends with its message and exit code 2."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in arguments
    if debug:
        arguments = ["--debug", *(argument for argument in arguments if argument != "--debug")]
    from mgd.util.system import keep_freed_memory

    keep_freed_memory()  # the process is the command's own
    try:
        app(arguments, prog_name="mgd")
    except Exception as error:
        if debug or not _is_the_users(error):
            raise
        message = " ".join(str(error).split())
        typer.secho("error: ", fg="red", bold=True, err=True, nl=False)
        typer.echo(f"{message} (--debug shows where)", err=True)
        raise SystemExit(2) from None


def _is_the_users(error: Exception) -> bool:
    from mgd.errors import KernelError, MetagradientError

    # Of the operating system's errors, those that name a file: one that cannot be read or written.
    return isinstance(error, MetagradientError | KernelError) or (isinstance(error, OSError) and bool(error.filename))
