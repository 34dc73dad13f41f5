"""The command `mgd recipe attribute`, and its settings."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from mgd.errors import BadArgument
from mgd.recipes.attribute.images import images_task
from mgd.recipes.attribute.judging import Evaluation
from mgd.recipes.attribute.many import by_combinations
from mgd.recipes.attribute.recipe import run
from mgd.recipes.attribute.task import Task, Training
from mgd.recipes.attribute.texts import gpt_task, lora_task, smollm2_task
from mgd.recipes.options import train_and_test
from mgd.ui.options import Data, Device, Json, Out, Quick, Seed, Threads


class Setting(str, Enum):
    """What is trained."""

    images = "images"
    mlp = "mlp"
    text = "text"
    lora = "lora"
    smollm2 = "smollm2"


@dataclass
class Tasks:
    """What a setting trains. rough, dropout: as of `run`."""

    whole: Task
    evaluation: Evaluation
    rough: Task | None = None
    dropout: Task | None = None


SMOOTH = Training(examples=1000, batch=100, epochs=10, rate=1.5e-3, eps_root=1e-3)
ROUGH = Training(examples=1000, batch=100, epochs=10, rate=4e-3, eps_root=1e-12)
QUICK = Training(examples=400, batch=50, epochs=5, rate=2e-3, eps_root=1e-3)
MLP = Training(examples=1000, batch=100, epochs=10, rate=1e-2, eps_root=1e-5)
TEXT = Training(examples=1000, batch=50, epochs=6, rate=3e-3, eps_root=1e-4)
QUICK_TEXT = Training(examples=200, batch=50, epochs=6, rate=3e-3, eps_root=1e-4)
LORA = Training(examples=200, batch=20, epochs=2, rate=1e-3, eps_root=1e-4)
QUICK_LORA = Training(examples=30, batch=10, epochs=2, rate=1e-3, eps_root=1e-4)
# 16 steps of 4 passages, each read once. A training takes minutes: it is not repeated for every subset.
SMOLLM2 = Training(examples=64, batch=4, epochs=1, rate=1e-4, eps_root=1e-8)
QUICK_SMOLLM2 = Training(examples=8, batch=4, epochs=1, rate=1e-4, eps_root=1e-8)
ONE_TRAINING = Evaluation(fractions=(), baselines=(), windows=(), removed=0.0, singles=0)
DROPOUT, TAKE_DROPOUT = 0.1, ("images", "mlp", "text")  # the rate of the second training on images; who has one


@dataclass(frozen=True)
class Asked:
    """What the options ask of a setting. queries, dropout: None for its own."""

    data: Path | None
    seed: int
    quick: bool
    queries: int | None
    dropout: float | None

    def tasks(self, make: Callable[..., Task], evaluation: Evaluation, dropout: float = 0.0) -> Tasks:
        """make: makes the task, of a rate of dropout. dropout: the setting's own rate."""
        rate = dropout if self.dropout is None else self.dropout
        masked = make(dropout=rate) if rate and self.queries is None else None
        return Tasks(make(), evaluation, dropout=masked)


def images(asked: Asked) -> Tasks:
    train, test = train_and_test(asked.data)
    training, k = (QUICK, 6) if asked.quick else (SMOOTH, 16)
    make = functools.partial(images_task, train, test, training, asked.queries or k, asked.seed)
    tasks = asked.tasks(make, Evaluation().quick() if asked.quick else Evaluation(), DROPOUT)
    if not asked.quick and asked.queries is None:
        tasks.rough = images_task(train, test, ROUGH, 16, asked.seed, rough=True)
    return tasks


def mlp(asked: Asked) -> Tasks:
    train, test = train_and_test(asked.data)
    training, k = (replace(MLP, examples=400), 6) if asked.quick else (MLP, 16)
    make = functools.partial(images_task, train, test, training, asked.queries or k, asked.seed, dense=True)
    return asked.tasks(make, Evaluation().quick() if asked.quick else Evaluation())


def text(asked: Asked) -> Tasks:
    training, k = (QUICK_TEXT, 4) if asked.quick else (TEXT, 16)
    make = functools.partial(gpt_task, training, asked.queries or k, asked.seed)
    return asked.tasks(make, Evaluation().quick() if asked.quick else Evaluation(subsets=30))


def lora(asked: Asked) -> Tasks:
    if asked.quick:
        evaluation = replace(Evaluation().quick(), fractions=(0.1,), subsets=5)
        return Tasks(lora_task(QUICK_LORA, asked.queries or 3, asked.seed), evaluation)
    return Tasks(lora_task(LORA, asked.queries or 8, asked.seed), Evaluation(subsets=12))


def smollm2(asked: Asked) -> Tasks:
    training, length = (QUICK_SMOLLM2, 32) if asked.quick else (SMOLLM2, 256)
    return Tasks(smollm2_task(training, length, asked.queries or 1, asked.seed), ONE_TRAINING)


SETTINGS: dict[str, Callable[[Asked], Tasks]] = {
    "images": images,
    "mlp": mlp,
    "text": text,
    "lora": lora,
    "smollm2": smollm2,
}


def command(
    setting: Annotated[
        Setting,
        typer.Option(
            help="A network on images, a smaller one, a GPT on text, LoRA on an encoder, or a whole language model."
        ),
    ] = Setting.images,
    data: Data = None,
    out: Out = None,
    json: Json = None,
    seed: Seed = 0,
    threads: Threads = 1,
    quick: Quick = False,
    device: Device = "cpu",
    queries: Annotated[
        int | None,
        typer.Option(
            min=20, help="Attribute so many test examples, by a few combined sweeps and exactly, and compare."
        ),
    ] = None,
    dropout: Annotated[
        float | None,
        typer.Option(
            help="Judge a training with this rate of dropout as well, by retrainings with the same masks and with "
            f"others; 0: do not. Default: {DROPOUT:g} for images, else 0."
        ),
    ] = None,
    windows: Annotated[
        str | None,
        typer.Option(
            metavar="SHARES",
            help="Judge scores from these shares of the last steps alone as well, and from the steps before: by "
            'default "0.25,0.5"; "": do not.',
        ),
    ] = None,
) -> None:
    """Which training examples decided a prediction? Exact scores, judged by retraining without some (MAGIC)."""
    from mgd.recipes.attribute import report
    from mgd.ui.console import Session
    from mgd.util.devices import checked_device
    from mgd.util.packages import require

    require("linear datamodeling scores", "attribution", "scipy")
    checked_device(device)
    session = Session("recipe attribute", out, json, threads)
    if queries is not None and (dropout is not None or windows is not None):
        raise BadArgument("expected --queries, which compares combined sweeps, without --dropout and --windows")
    if dropout is not None and not 0 <= dropout < 1:
        raise BadArgument(f"expected a rate of dropout from 0 to below 1; got {dropout:g}")
    if dropout and setting not in TAKE_DROPOUT:
        raise BadArgument(f"expected --dropout with --setting {', '.join(TAKE_DROPOUT)}; got {setting.value}")
    shares = None if windows is None else _shares(windows)
    tasks = SETTINGS[setting.value](Asked(data, seed, quick, queries, dropout))
    if shares is not None:
        tasks.evaluation = replace(tasks.evaluation, windows=shares)
    if device != "cpu":
        for name in ("whole", "rough", "dropout"):
            if (task := getattr(tasks, name)) is not None:
                setattr(tasks, name, replace(task, device=device))
    if queries is not None:
        many = by_combinations(tasks.whole, tasks.evaluation, reporter=session.reporter)
        session.finish(report.page_of_many(many), many.to_dict())
        return
    result = run(tasks.whole, tasks.rough, tasks.evaluation, session.reporter, tasks.dropout)
    session.finish(report.page(result), result.to_dict())


def _shares(words: str) -> tuple[float, ...]:
    """Numbers from "0.25,0.5"."""
    try:
        return tuple(float(word) for word in words.split(",") if word.strip())
    except ValueError:
        raise BadArgument(f'expected shares of the steps, such as "0.25,0.5"; got {words!r}') from None
