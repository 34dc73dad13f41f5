"""The command `mgd recipe attribute`, and its settings."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from mgd.recipes.attribute.images import images_task
from mgd.recipes.attribute.many import by_combinations
from mgd.recipes.attribute.recipe import Evaluation, run
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


Tasks = tuple[Task, "Task | None", Evaluation]

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
ONE_TRAINING = Evaluation(fractions=(), baselines=(), removed=0.0, singles=0)


# Each from a folder of data, a seed, whether to be quick, and a number of queries in place of its own.
def images(data: Path | None, seed: int, quick: bool, queries: int | None) -> Tasks:
    (train, test), evaluation = train_and_test(data), Evaluation()
    if quick:
        return images_task(train, test, QUICK, queries or 6, seed), None, evaluation.quick()
    rough = None if queries else images_task(train, test, ROUGH, 16, seed, rough=True)
    return images_task(train, test, SMOOTH, queries or 16, seed), rough, evaluation


def mlp(data: Path | None, seed: int, quick: bool, queries: int | None) -> Tasks:
    train, test = train_and_test(data)
    if quick:
        task = images_task(train, test, replace(MLP, examples=400), queries or 6, seed, dense=True)
        return task, None, Evaluation().quick()
    return images_task(train, test, MLP, queries or 16, seed, dense=True), None, Evaluation()


def text(data: Path | None, seed: int, quick: bool, queries: int | None) -> Tasks:
    if quick:
        return gpt_task(QUICK_TEXT, queries or 4, seed), None, Evaluation().quick()
    return gpt_task(TEXT, queries or 16, seed), None, Evaluation(subsets=30)


def lora(data: Path | None, seed: int, quick: bool, queries: int | None) -> Tasks:
    if quick:
        evaluation = replace(Evaluation().quick(), fractions=(0.1,), subsets=5)
        return lora_task(QUICK_LORA, queries or 3, seed), None, evaluation
    return lora_task(LORA, queries or 8, seed), None, Evaluation(subsets=12)


def smollm2(data: Path | None, seed: int, quick: bool, queries: int | None) -> Tasks:
    if quick:
        return smollm2_task(QUICK_SMOLLM2, 32, queries or 1, seed), None, ONE_TRAINING
    return smollm2_task(SMOLLM2, 256, queries or 1, seed), None, ONE_TRAINING


SETTINGS: dict[str, Callable[[Path | None, int, bool, int | None], Tasks]] = {
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
) -> None:
    """Which training examples decided a prediction? Exact scores, judged by retraining without some (MAGIC)."""
    from mgd.recipes.attribute import report
    from mgd.ui.console import Session
    from mgd.util.devices import checked_device
    from mgd.util.packages import require

    require("linear datamodeling scores", "attribution", "scipy")
    checked_device(device)
    session = Session("recipe attribute", out, json, threads)
    task, rough, evaluation = SETTINGS[setting.value](data, seed, quick, queries)
    if device != "cpu":
        task, rough = replace(task, device=device), rough and replace(rough, device=device)
    if queries is not None:
        many = by_combinations(task, evaluation, reporter=session.reporter)
        session.finish(report.page_of_many(many), many.to_dict())
        return
    result = run(task, rough, evaluation, session.reporter)
    session.finish(report.page(result), result.to_dict())
