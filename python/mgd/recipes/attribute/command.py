"""The command `mgd recipe attribute`, and its settings."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from mgd.recipes.attribute.images import images_task
from mgd.recipes.attribute.recipe import Evaluation, run
from mgd.recipes.attribute.task import Task, Training
from mgd.recipes.attribute.texts import gpt_task, lora_task, smollm2_task
from mgd.recipes.options import train_and_test
from mgd.ui.options import Data, Device, Json, Out, Quick, Seed, Threads


class Setting(str, Enum):
    """What is trained."""

    images = "images"
    text = "text"
    lora = "lora"
    smollm2 = "smollm2"


Tasks = tuple[Task, "Task | None", Evaluation]

SMOOTH = Training(examples=1000, batch=100, epochs=10, rate=1.5e-3, eps_root=1e-3)
ROUGH = Training(examples=1000, batch=100, epochs=10, rate=4e-3, eps_root=1e-12)
QUICK = Training(examples=400, batch=50, epochs=5, rate=2e-3, eps_root=1e-3)
TEXT = Training(examples=1000, batch=50, epochs=6, rate=3e-3, eps_root=1e-4)
QUICK_TEXT = Training(examples=200, batch=50, epochs=6, rate=3e-3, eps_root=1e-4)
LORA = Training(examples=200, batch=20, epochs=2, rate=1e-3, eps_root=1e-4)
QUICK_LORA = Training(examples=30, batch=10, epochs=2, rate=1e-3, eps_root=1e-4)
# 16 steps of 4 passages, each read once. A training takes minutes: it is not repeated for every subset.
SMOLLM2 = Training(examples=64, batch=4, epochs=1, rate=1e-4, eps_root=1e-8)
QUICK_SMOLLM2 = Training(examples=8, batch=4, epochs=1, rate=1e-4, eps_root=1e-8)
ONE_TRAINING = Evaluation(fractions=(), baselines=(), removed=0.0)


def images(data: Path | None, seed: int, quick: bool) -> Tasks:
    (train, test), evaluation = train_and_test(data), Evaluation()
    if quick:
        return images_task(train, test, QUICK, 6, seed), None, evaluation.quick()
    rough = images_task(train, test, ROUGH, 16, seed, rough=True)
    return images_task(train, test, SMOOTH, 16, seed), rough, evaluation


def text(data: Path | None, seed: int, quick: bool) -> Tasks:
    if quick:
        return gpt_task(QUICK_TEXT, 4, seed), None, Evaluation().quick()
    return gpt_task(TEXT, 16, seed), None, Evaluation(subsets=30)


def lora(data: Path | None, seed: int, quick: bool) -> Tasks:
    if quick:
        return lora_task(QUICK_LORA, 3, seed), None, replace(Evaluation().quick(), fractions=(0.1,), subsets=5)
    return lora_task(LORA, 8, seed), None, Evaluation(subsets=12)


def smollm2(data: Path | None, seed: int, quick: bool) -> Tasks:
    if quick:
        return smollm2_task(QUICK_SMOLLM2, 32, 1, seed), None, ONE_TRAINING
    return smollm2_task(SMOLLM2, 256, 1, seed), None, ONE_TRAINING


SETTINGS: dict[str, Callable[[Path | None, int, bool], Tasks]] = {
    "images": images,
    "text": text,
    "lora": lora,
    "smollm2": smollm2,
}


def command(
    setting: Annotated[
        Setting, typer.Option(help="A network on images, a GPT on text, LoRA on an encoder, or a whole language model.")
    ] = Setting.images,
    data: Data = None,
    out: Out = None,
    json: Json = None,
    seed: Seed = 0,
    threads: Threads = 1,
    quick: Quick = False,
    device: Device = "cpu",
) -> None:
    """Which training examples decided a prediction? Exact scores, judged by retraining without some (MAGIC)."""
    from mgd.recipes.attribute import report
    from mgd.ui.console import Session
    from mgd.util.devices import checked_device
    from mgd.util.packages import require

    require("linear datamodeling scores", "attribution", "scipy")
    checked_device(device)
    session = Session("recipe attribute", out, json, threads)
    task, rough, evaluation = SETTINGS[setting.value](data, seed, quick)
    if device != "cpu":
        task, rough = replace(task, device=device), rough and replace(rough, device=device)
    result = run(task, rough, evaluation, session.reporter)
    session.finish(report.page(result), result.to_dict())
