"""What the demonstration shows: tables for terminal and page, and pictures."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mgd.recipes.data import Images
from mgd.recipes.demo import pictures
from mgd.recipes.demo.recipe import Demo
from mgd.recipes.ranking import auc
from mgd.ui import charts
from mgd.ui.page import Page, Section, Table
from mgd.util.text import format_bytes

_NAMES = {
    "lr": "learning rates",
    "weight_decay": "weight decay",
    "data_weights": "image weights",
}


def headline(demo: Demo) -> str:
    problem = demo.problem
    parameters = sum(p.numel() for p in problem.function.model.parameters())
    return (
        f"{problem.train.name}: {len(problem.train):,} training images, {int(problem.wrong.sum())} of them mislabelled "
        f"on purpose; a convolutional network of {parameters:,} parameters, {len(problem.function):,} steps of AdamW. "
        f"Its loss on {len(problem.held_out):,} held-out images is {float(demo.result.value):.4f}. "
        "One metagradient says how that loss depends on every choice below."
    )


def gradients(demo: Demo) -> Table:
    """Each metaparameter: how many numbers, the norm of its gradient, and what finite differences say."""
    rows = [["", "numbers", "gradient\nnorm", "finite-diff.\nerror", "Taylor\norder", "float32\nerror"]]
    for key, gradient in demo.result.grads.items():
        found = demo.check.keys[key]
        rows.append(
            [
                _NAMES[key],
                f"{gradient.numel():,}",
                f"{float(gradient.norm()):.3e}",
                f"{found.relative_error:.1e}",
                "-" if found.order is None else f"{found.order:.2f}",
                "-" if found.float32_error is None else f"{found.float32_error:.1e}",
            ]
        )
    return rows


def detection(demo: Demo) -> Table:
    wrong = demo.problem.wrong
    rows = [["looking at", "wrong labels there", "by chance"]]
    for share in (0.05, 0.10):
        count = max(1, round(share * len(wrong)))
        base = float(wrong.double().mean())
        rows.append([f"the {count} most harmful images ({share:.0%})", f"{demo.precision(share):.0%}", f"{base:.0%}"])
    rows.append(["area under the ROC curve", f"{auc(demo.harm, wrong):.3f}", "0.500"])
    return rows


def retraining(demo: Demo) -> Table:
    rows = [["trained again on", "test loss", "test accuracy"]]
    return rows + [[name, f"{r['loss']:.4f}", f"{r['accuracy']:.1%}"] for name, r in demo.retrained.items()]


def cost(demo: Demo) -> Table:
    """Seconds by phase, in units of the plain training too, and the process's most memory until then."""
    rows = [["phase", "seconds", "trainings", "peak memory"]]
    phases = {
        "training": demo.training_seconds,
        "metagradient": demo.metagradient_seconds,
        "check": demo.seconds["check"],
        "retraining": demo.seconds["retraining"],
    }
    names = {
        "training": "plain training",
        "metagradient": "metagradient, its training included",
        "check": f"check: {demo.check.trainings} float64 trainings",
        "retraining": f"training again, {len(demo.retrained)} times",
    }
    for phase, seconds in phases.items():
        memory = format_bytes(demo.peak_memory[phase])
        rows.append([names[phase], f"{seconds:.2f}", f"{seconds / demo.training_seconds:.2f}", memory])
        if phase == "metagradient":
            for part, spent in demo.result.report.seconds.items():
                rows.append([f"    {part}", f"{spent:.2f}", f"{spent / demo.training_seconds:.2f}", ""])
    stored = sum(demo.result.report.plan.get("peak", {}).values())
    rows.append(["stored for the reverse sweep", "", "", format_bytes(stored)])
    return rows


def page(demo: Demo) -> Page:
    """The demonstration in the form of a recipe."""
    tables = [
        ("How the held-out loss depends on the training", gradients(demo)),
        ("Are the wrong labels among the most harmful images?", detection(demo)),
        ("What leaving images out does", retraining(demo)),
        ("What it cost", cost(demo)),
    ]
    verdict = (
        f"The metagradient {'holds' if demo.check.passed else 'does NOT hold'} against finite differences in float64."
    )
    return Page("Which training images hurt?", headline(demo), tables, lambda: _sections(demo), verdict)


def _sections(demo: Demo) -> list[Section]:
    problem, order = demo.problem, demo.ranking
    first, last = order[:24], order.flip(0)[:24]
    in_first = f"{int(problem.wrong[first].sum())} of these {len(first)} have a wrong label"
    in_last = f"{int(problem.wrong[last].sum())} of these {len(last)} have a wrong label"
    return [
        Section(
            "The most harmful training images",
            f"More weight on these images raises the held-out loss the most; {in_first}. In red, in quotation "
            "marks: the wrong label that the training saw; below it what the image is. The metagradient knows nothing "
            f"of the true labels of the training images, only of the {len(problem.held_out):,} held-out ones.",
            charts.gallery(
                "Most harmful. Above, in red: the wrong label that training was given. Below: what it is.",
                *_captions(problem.train, problem.given, first),
            ),
            "most-harmful",
        ),
        Section(
            "The most helpful training images",
            f"More weight on these lowers the held-out loss the most; {in_last}.",
            charts.gallery(
                "Most helpful, with the label that training was given.", *_captions(problem.train, problem.given, last)
            ),
            "most-helpful",
        ),
        Section(
            "Finding the wrong labels",
            "",
            pictures.separation(demo.harm, problem.wrong),
            "wrong-labels",
            detection(demo),
        ),
        Section(
            "Training again without them",
            f"On {len(problem.test):,} test images, which had no part in the training or in the metagradient.",
            table=retraining(demo),
        ),
        Section(
            "The learning rate of every step",
            f"The same metagradient holds the derivative with respect to each of the {len(problem.function):,} "
            "learning rates: where the bars are green the training would have profited from larger steps.",
            pictures.schedule(problem.z["lr"], demo.result.grads["lr"]),
            "learning-rate",
        ),
        Section(
            "Is it right?",
            "Each derivative was compared with central finite differences of the whole training in float64, along a "
            "random direction; the remainder of the first-order Taylor expansion must fall with the square of the step "
            "(order 2). The last column compares the float32 metagradient with the float64 one.",
            table=gradients(demo),
        ),
        Section(
            "What it cost",
            "In seconds, and in units of one plain training. Memory is the process's high-water mark at the end of "
            "each phase.",
            table=cost(demo),
        ),
    ]


def _captions(
    images: Images, given: torch.Tensor, index: torch.Tensor
) -> tuple[torch.Tensor, Sequence[str], Sequence[str]]:
    def names(labels: torch.Tensor) -> list[str]:
        return [images.classes[label] for label in labels[index].tolist()]

    return images.images[index], names(given), names(images.labels)
