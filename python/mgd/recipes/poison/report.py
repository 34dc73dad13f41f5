"""What the poisoning test shows: tables for terminal and page, and pictures."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from mgd.recipes.poison.recipe import CANCELLING, MGD, Found, standard_error
from mgd.ui import charts
from mgd.ui.page import Page, Section, Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = {"clean": charts.INK, CANCELLING: "#d9a441", MGD: charts.BAD}


def page(found: Found) -> Page:
    tables = [
        ("Test accuracy of freshly trained models", accuracies(found)),
        ("What the poison costs, seed by seed against the clean training", drops(found)),
        ("Which checks find it?", checks(found)),
    ]
    ratio, (low, high) = found.ratio(), found.ratio_interval()
    drop = float(found.drops(MGD).mean())
    if ratio == float("inf"):
        versus = "gradient cancelling lowers it not at all"
    else:
        versus = f"{ratio:.1f} times what gradient cancelling does (95% interval {low:.1f} to {high:.1f})"
    verdict = f"On fresh seeds the poison costs {100 * drop:.1f} points of test accuracy, {versus}."
    return Page("How much does a little poison cost?", lead(found), tables, lambda: sections(found), verdict)


def lead(found: Found) -> str:
    s, count = found.settings, len(found.poisoned)
    return (
        f"{found.data}: {len(found.labels):,} training images, of which {count} ({count / len(found.labels):.1%}) "
        f"may be perturbed inside [{s.low:g}, {s.high:g}]; their labels stay. A network ({s.network}) is trained "
        f"for {s.steps} steps. {s.meta_steps} meta-steps of metagradient descent move the pixels such that it errs on "
        f"{s.held_out:,} held-out images; other images, {s.test:,} at most, judge."
    )


def accuracies(found: Found) -> Table:
    judges = found.accuracies
    rows = [["training set", *(f"{name}\n({len(scores['clean'])})" for name, scores in judges.items())]]
    for arm in found.images:
        cells = []
        for scores in judges.values():
            x = torch.tensor(scores[arm], dtype=torch.float64)
            cells.append(f"{100 * float(x.mean()):.1f} ± {100 * float(x.std()):.1f}%")
        rows.append([arm, *cells])
    return rows


def drops(found: Found) -> Table:
    """Means of the paired differences, in points, with their standard errors."""
    rows = [["training set", *found.accuracies]]
    for arm in found.images:
        if arm != "clean":
            paired = [found.drops(arm, judges) for judges in found.accuracies]
            rows.append([arm, *(f"{100 * float(d.mean()):.2f} ± {100 * standard_error(d):.2f}" for d in paired)])
    return rows


def checks(found: Found) -> Table:
    count = len(found.poisoned)
    dropped = next(iter(found.checks.values()))[0].dropped
    rows = [
        ["check", "poison by", "area under\nROC curve", f"poison in the\nfirst {count}", f"accuracy\nwithout {dropped}"]
    ]
    for arm, results in found.checks.items():
        for check in results:
            repaired = sum(check.repaired) / len(check.repaired)
            rows.append([check.check, arm, f"{check.auc:.3f}", f"{check.found:.0%}", f"{repaired:.1%}"])
    chance = sum(found.at_random) / len(found.at_random)
    return [*rows, ["at random", MGD, "0.500", f"{count / len(found.labels):.0%}", f"{chance:.1%}"]]


def sections(found: Found) -> list[Section]:
    levels = found.noise_levels()
    seen = ", ".join(
        f"{torch.tensor(levels[arm]).median():.1f} dB by {arm}" for arm in ("noise", CANCELLING, MGD) if levels[arm]
    )
    return [
        Section(
            "The descent",
            "Every meta-step trains the network anew and moves the pixels of the poisoned images by the sign of the "
            "metagradient. The line is the test accuracy of those trainings, whose seeds the descent sees in turn; the "
            "dots are of models trained with seeds that it never sees. Nothing is chosen by test accuracy.",
            way(found),
            "descent",
        ),
        Section(
            "Test accuracy of freshly trained models",
            "Bars are means over seeds (start and order of the data), dots are the seeds. Controls: the same images as "
            "uniform noise; images of other classes in their places, which is a wrong label; and the poison itself "
            "handed out in an order that does not know the labels.",
            bars(found),
            "accuracy",
            accuracies(found),
        ),
        Section(
            "What it costs",
            "In points of test accuracy against the clean training of the same seed: mean and standard error.",
            table=drops(found),
        ),
        Section(
            "What it looks like",
            f"Originals above, what was made of them below. The pixels are far from the originals: "
            f"median peak signal-to-noise ratio {seen}. Under about 30 dB a change is plain to the eye.",
            gallery(found),
            "gallery",
        ),
        Section(
            "Which checks find it?",
            "A defender has clean images of his own. Metagradient: how his loss rises with the weight of each training "
            "image. Training loss: of each image under the model trained on all. Distance: to the nearest image of the "
            "same label. The last column trains without the most suspicious images, and judges on the test images.",
            curves(found),
            "checks",
            checks(found),
        ),
    ]


def way(found: Found) -> Figure:
    fig, axis = charts.figure(8, 4)
    axis.plot([100 * a for a in found.test_on_the_way], color=charts.BAD, linewidth=1.2, label="seeds of the descent")
    steps = list(found.way)
    means = [100 * sum(scores) / len(scores) for scores in found.way.values()]
    axis.plot(steps, means, "o", color=charts.INK, markersize=4, label=f"fresh seeds, mean of {len(found.way[0])}")
    for arm in ("clean", CANCELLING):
        scores = found.accuracies["fresh seeds"][arm]
        axis.axhline(100 * sum(scores) / len(scores), color=COLOURS[arm], linestyle="--", linewidth=1, label=arm)
    axis.legend(frameon=False, fontsize=9)
    charts.label(axis, "Test accuracy falls as the pixels move", "meta-step", "test accuracy (%)")
    return fig


def bars(found: Found) -> Figure:
    fig, axes = charts.figure(10, 4.2, columns=len(found.accuracies), sharey=True, squeeze=False)
    every = [100 * a for scores in found.accuracies.values() for values in scores.values() for a in values]
    for axis, (judges, scores) in zip(axes[0], found.accuracies.items(), strict=True):
        for i, (arm, values) in enumerate(scores.items()):
            points = [100 * a for a in values]
            axis.bar(i, sum(points) / len(points), color=COLOURS.get(arm, charts.SOFT), width=0.75, alpha=0.85)
            axis.plot([i] * len(points), points, ".", color="black", markersize=3)
        clean = [100 * a for a in scores["clean"]]
        axis.axhline(sum(clean) / len(clean), color=charts.INK, linestyle=":", linewidth=1)
        axis.set_xticks(range(len(scores)), list(scores), rotation=55, ha="right", fontsize=8)
        charts.label(axis, judges)
    axes[0][0].set(ylabel="test accuracy (%), axis cut", ylim=(min(every) - 2, max(every) + 1))
    return fig


def gallery(found: Found, columns: int = 10) -> Figure:
    shown = found.poisoned[:columns]
    arms = ["clean", CANCELLING, MGD]
    fig, axes = charts.figure(1.0 * len(shown) + 1, 3.9, rows=3, columns=len(shown), squeeze=False)
    for row, arm in zip(axes, arms, strict=True):
        for axis, index in zip(row, shown.tolist(), strict=True):
            charts.picture(axis, found.images[arm][index].clamp(0, 1), white=1)
            axis.set(xticks=[], yticks=[])
            if arm == "clean":
                axis.set_title(found.classes[int(found.labels[index])], fontsize=8)
        row[0].set_ylabel({"clean": "original"}.get(arm, arm.replace(" ", "\n")), fontsize=9)
    return fig


def curves(found: Found) -> Figure:
    """How many of the poisoned images are found, against how many images are looked at."""
    fig, axes = charts.figure(10, 3.8, columns=len(found.checks), sharey=True, squeeze=False)
    total, n = len(found.poisoned), len(found.labels)
    mask = torch.zeros(n, dtype=torch.bool).index_fill(0, found.poisoned, True)
    for axis, (arm, results) in zip(axes[0], found.checks.items(), strict=True):
        for check, colour in zip(results, (charts.BAD, charts.GOOD, "#d9a441"), strict=True):
            order = check.suspicion.argsort(descending=True)
            hits = 100 * mask[order].cumsum(0).double() / total
            looked = 100 * torch.arange(1, n + 1) / n
            axis.plot(looked.tolist(), hits.tolist(), color=colour, label=f"{check.check} ({check.auc:.2f})")
        axis.plot([0, 100], [0, 100], color=charts.SOFT, linestyle="--", linewidth=1, label="at random (0.50)")
        axis.legend(frameon=False, fontsize=9, loc="lower right")
        axis.set(xlim=(0, 100), ylim=(0, 102))
        charts.label(axis, f"Poison by {arm}", "training images looked at, the most suspicious first (%)")
    axes[0][0].set(ylabel="poisoned images found (%)")
    return fig
