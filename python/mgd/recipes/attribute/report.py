"""What the recipe shows: tables for terminal and page, and pictures."""

from __future__ import annotations

import torch

from mgd.recipes.attribute import pictures
from mgd.recipes.attribute.dropout import SHARE, Dropout
from mgd.recipes.attribute.judging import DIFFERENCE_STEP, OURS, Judged
from mgd.recipes.attribute.lds import LDS
from mgd.recipes.attribute.many import Many
from mgd.recipes.attribute.recipe import Found
from mgd.ui.page import Page, Section, Table

EARLY_LATE = "Which steps decide? Linear datamodeling score of a part of the training"
MASKS = "With dropout: linear datamodeling score, by the masks of the retrainings"
GALLERY, EACH = 8, 6  # queries shown, and training examples of each kind for one of them
WORK = {
    "training": ("training", "update"),
    "rehearsal: the training once more": ("rehearsal",),
    "replay of the training": ("replay", "rebuild", "store"),
    "second derivatives": ("hvp",),
    "optimizer VJP": ("optimizer vjp",),
    "scoring": ("objective", "scores"),
}


def page(found: Found) -> Page:
    smooth = found.smooth
    tables = [("What it cost", cost(smooth))]
    if smooth.removal:
        tables.insert(0, (_without(found), removal(found)))
    if smooth.true:
        tables.insert(0, ("Linear datamodeling score, by share of examples dropped", lds(found)))
    if smooth.windows:
        tables.insert(-1, (EARLY_LATE, windows(smooth)))
    if found.dropout is not None:
        tables.insert(-1, (MASKS, masks(found.dropout)))
    if found.rough is not None:
        tables.insert(-1, ("How smooth must a training be?", roughness(found)))
    return Page("Which training examples decided?", lead(found), tables, lambda: sections(found), verdict(found))


def lead(found: Found) -> str:
    smooth, task = found.smooth, found.smooth.task
    never = len(smooth.attribution.unvisited)
    unread = f" {never} training examples were read at no step: their scores are exactly 0." if never else ""
    return (
        f"{task.data}: {len(task):,} training examples, {task.queries} test examples. A network of "
        f"{sum(p.numel() for p in task.model.parameters() if p.requires_grad):,} trained parameters, "
        f"{len(task.function):,} steps of AdamW; test loss {smooth.loss:.3f}, accuracy {smooth.accuracy:.1%}. The "
        "metagradient of every test loss with respect to the weight of every training example says how it would "
        f"change without the example.{unread}"
    )


def verdict(found: Found) -> str:
    if not found.smooth.true:
        by_scores, by_difference = found.smooth.difference
        return (
            f"The derivative along the metagradient is {by_scores:.6g}, and {by_difference:.6g} by two more trainings."
        )
    first, by = min(found.smooth.true), found.smooth.scores
    ours = by[OURS][first]
    others = {name: scores[first].mean for name, scores in by.items() if name != OURS}
    rest = ""
    if others:
        best = max(others, key=lambda name: others[name])
        rest = f"; the best baseline, {best}, {others[best]:.2f}"
    return f"With {first:.0%} of the examples dropped, the metagradient's score is {ours.mean:.3f}{rest}."


def lds(found: Found) -> Table:
    fractions = list(found.smooth.true)
    rows = [["method", *(f"{p:.0%}\ndropped" for p in fractions)]]
    entries = dict(found.smooth.scores)
    if found.rough is not None:
        entries[pictures.ROUGH] = found.rough.scores[OURS]
    for name, by in entries.items():
        rows.append([name, *(interval(by[p]) for p in fractions)])
    for name in found.smooth.missing:
        rows.append([name, *("not installed" for _ in fractions)])
    return rows


def interval(score: LDS) -> str:
    return f"{score.mean:.3f}\n[{score.low:.2f}, {score.high:.2f}]"


def _without(found: Found) -> str:
    return f"Without the {found.evaluation.removed:.0%} of the examples that help a query most"


def removal(found: Found) -> Table:
    """The mean rise of a query's loss, and its interval; beside it, where there is one, that of random subsets."""
    rows = [["method", "rise of its loss", "95% interval"]]
    by_rise = sorted(found.smooth.removal.items(), key=lambda pair: -pair[1][0])
    rows += [[name, f"{mean:+.4f}", f"{low:+.4f} to {high:+.4f}"] for name, (mean, low, high) in by_rise]
    chance = found.smooth.true.get(found.evaluation.removed)
    return rows if chance is None else [*rows, ["random examples", f"{float(chance.mean()):+.4f}", ""]]


def roughness(found: Found) -> Table:
    rows = [["training", "meta-\nsmoothness", "test\naccuracy", *(f"score,\n{p:.0%}" for p in found.smooth.true)]]
    for name, judged in (("smooth", found.smooth), ("rough", found.rough)):
        if judged is not None:
            scores = [f"{score.mean:.3f}" for score in judged.scores[OURS].values()]
            rows.append([name, f"{judged.smoothness:.2f}", f"{judged.accuracy:.1%}", *scores])
    return rows


def windows(judged: Judged) -> Table:
    """What scores from some of the steps alone predict, and what they cost; those of first steps are differences."""
    plain = judged.task.queries * judged.plain_seconds
    rows = [["scores from", "trainings\nper query", "size", *(f"{p:.0%}\ndropped" for p in judged.true)]]
    whole = [interval(score) for score in judged.scores[OURS].values()]
    rows.append([f"all {len(judged.task.function)} steps", f"{judged.trainings_per_query:.2f}", "1.00", *whole])
    for window in judged.windows:
        spent = "" if window.seconds is None else f"{window.seconds / plain:.2f}"
        rows.append([window.name, spent, f"{window.size:.2f}", *(interval(score) for score in window.lds.values())])
    return rows


def masks(dropout: Dropout) -> Table:
    methods = list(dropout.judged.scores)
    rows = [["retrained with", *methods]]
    for name, by in dropout.scores.items():
        rows.append([name, *(interval(by[method]) for method in methods)])
    return rows


def cost(judged: Judged) -> Table:
    """Where the attribution's seconds went, and what that is in plain trainings per query."""
    k, plain, report = judged.task.queries, judged.plain_seconds, judged.attribution.report
    rows = [["work", "seconds", "share", "trainings per query"]]

    def row(name: str, seconds: float) -> None:
        rows.append([name, f"{seconds:.2f}", f"{seconds / total:.0%}", f"{seconds / plain / k:.2f}"])

    total = judged.attribution_seconds
    for name, kinds in WORK.items():
        row(name, sum(report.seconds.get(kind, 0.0) for kind in kinds))
    row(f"all of the attribution of {k} queries", total)
    rows.append(["a plain training", f"{plain:.2f}", "", "1.00"])
    for name, seconds in judged.baseline_seconds.items():
        rows.append([f"{name}, for comparison", f"{seconds:.2f}", "", f"{seconds / plain / k:.2f}"])
    return rows


def sections(found: Found) -> list[Section]:
    smooth = found.smooth
    parts = [*_examples(smooth), *(_judged(found) if smooth.true else ()), _differentiated(smooth)]
    if smooth.removal:
        text = (
            "For every method and every test example the training is repeated without the training examples that the "
            "method calls most helpful to it. The higher its loss rises, the more these examples had to do with it."
        )
        parts.append(Section(_without(found), text, table=removal(found)))
    if smooth.windows:
        parts.append(_windows(smooth))
    if found.dropout is not None:
        parts.append(_masks(found))
    if found.rough is not None or found.rough_failure:
        text = (
            "The same data and evaluation with ReLU, max pooling, no norm, a larger learning rate and a tiny eps_root. "
            "Its metagradient is as exact as before, but a training whose outcome jumps with the weights is not "
            "predicted by its derivative; the empirical metasmoothness says so beforehand, for three trainings."
        )
        if found.rough_failure:
            text += f"\n\nThat training gave no attribution: {found.rough_failure}"
        table = roughness(found) if found.rough is not None else ()
        parts.append(Section("How smooth must a training be?", text, table=table))
    parts.append(
        Section(
            "What it cost",
            "All test examples of a chunk share a training and a reverse sweep. The rehearsal is one more training: "
            "the others must repeat it bit by bit.",
            table=cost(smooth),
        )
    )
    return parts


def _judged(found: Found) -> list[Section]:
    """What retrainings without some of the examples say."""
    smooth, count = found.smooth, len(next(iter(found.smooth.true.values())))
    methods = [m for m in (OURS, "EK-FAC", "TRAK") if m in smooth.scores]
    return [
        Section(
            "Do the scores predict what leaving examples out does?",
            f"For every share, {count} random subsets of the training examples got weight 0, and the training was "
            "repeated. For each test example the predicted changes of its loss are ranked against the true ones "
            "(Spearman), and the correlations averaged. In brackets and as bars: 95% bootstrap intervals over test "
            "examples and subsets. All methods predict the same retrainings.",
            pictures.scores_by_fraction(smooth, found.rough),
            "scores",
            lds(found),
        ),
        Section(
            "Predicted and true changes",
            "Each point is one test example and one subset. The metagradient predicts the change itself; the other "
            "methods' predictions have no scale, and are scaled to fit best.",
            pictures.prediction_against_truth(smooth, methods),
            "predictions",
        ),
    ]


def _windows(judged: Judged) -> Section:
    text = (
        "A score is a sum over the steps that read the example. The part of the last steps costs what these steps cost "
        "(since=); what is left is the part of the first steps. Each is judged by the retrainings above, which leave "
        "examples out at all steps. Size: the norm of these scores, in units of that of all."
    )
    return Section(EARLY_LATE, text, table=windows(judged))


def _masks(found: Found) -> Section:
    dropout = found.dropout
    assert dropout is not None
    judged, count = dropout.judged, len(dropout.judged.dropped[SHARE])
    text = (
        f"The same training with dropout {dropout.rate:g} (test accuracy {judged.accuracy:.1%}, metasmoothness "
        f"{judged.smoothness:.3f}; without dropout {found.smooth.accuracy:.1%} and {found.smooth.smoothness:.3f}), "
        f"and {count} retrainings without {SHARE:.0%} of the examples. Masks are a function of the seed: from the same "
        "seed, a retraining differs by the examples alone. That is what the scores are the derivative of, and how they "
        "should be judged. With other masks, every subset has a seed of its own, and the change is that between two "
        "trainings from this seed. With their chance, it is the change from the one training that was attributed; no "
        f"attribution knows the chance. A query's loss deviates by {dropout.effect:.2g} over the subsets, and by "
        f"{dropout.chance:.2g} over masks with nothing dropped."
    )
    return Section(MASKS, text, table=masks(dropout))


def _differentiated(judged: Judged) -> Section:
    ours, difference = judged.difference
    rows = [["derivative", "value"], ["by the scores", f"{ours:.8g}"], ["by a difference", f"{difference:.8g}"]]
    text = (
        "The mean loss of the test examples, differentiated along its own metagradient: by the scores, and by a "
        f"central difference of two trainings, in which no weight moves by more than {DIFFERENCE_STEP:g}. Relative "
        f"difference {abs(ours - difference) / max(abs(ours), 1e-300):.1e}, empirical metasmoothness "
        f"{judged.smoothness:.3f}."
    )
    if judged.singles is not None:
        count, k = judged.singles[0].shape
        text += (
            f" The same for {count} examples whose weights were moved one by one, and {k} test examples each: a "
            f"relative difference of {judged.singles_error:.1e}."
        )
    return Section("Is the derivative right?", text, table=rows)


def _examples(judged: Judged) -> list[Section]:
    """The most helpful and harmful training examples of some test examples, as pictures or as texts."""
    task, a = judged.task, judged.attribution
    words = (
        "More weight on the helpful examples lowers the loss of the test example, more weight on the harmful ones "
        "raises it."
    )
    shown = range(min(GALLERY, task.queries))
    if task.pictures is not None:
        rows = [(q, torch.from_numpy(a.scores[q].copy()), *a.top(q, EACH)) for q in shown]
        figure = pictures.examples(task, rows, EACH)
        return [Section("Which training images decided?", words, figure, "examples")]
    assert task.texts is not None and task.query_texts is not None
    parts = []
    for q in shown:
        helpful, harmful = a.top(q, EACH // 2)
        table: Table = [["", "score", "training text"]]
        for name, index in (("helpful", helpful), ("harmful", harmful)):
            for i in index.tolist():
                table.append([name, f"{a.scores[q, i]:+.2e}", pictures.cut(f"[{task.labels[i]}] {task.texts[i]}")])
        text = f"[{task.query_labels[q]}] {pictures.cut(task.query_texts[q])}"
        parts.append(Section(f"Test text {q + 1}, loss {float(a.values[q]):.2f}", text, table=table))
    parts[0].text = f"{words}\n\n{parts[0].text}"
    return parts


def page_of_many(many: Many) -> Page:
    """Scores of many queries by a few combined sweeps, beside exact ones."""
    task, shares = many.task, list(many.ways[0].lds)
    rows: Table = [["sweeps", "queries", "trainings", "error", "told", *(f"score,\n{p:.0%} dropped" for p in shares)]]
    for way in many.ways:
        errors = [f"{x:.3f}" if x is not None else "" for x in (way.error, way.measured)]
        scores = [interval(way.lds[p]) for p in shares]
        rows.append(
            [
                f"{way.sweeps:,} {way.name.lstrip('0123456789 ')}",
                f"{way.queries:,}",
                f"{way.trainings:.0f}",
                *errors,
                *scores,
            ]
        )
    first, exact = many.ways[0], many.ways[-1]
    text = (
        f"{task.data}: {len(task):,} training examples, {task.queries:,} queries, {len(task.function):,} steps. A "
        "combined sweep stands for a principal direction of the queries' gradients. Error: of all estimated scores, "
        "relative to the exact ones; told: what the estimate said itself, from forward passes. Cost in plain trainings "
        "of processor time, and the linear datamodeling score."
    )
    share = shares[0]
    verdict = (
        f"{first.sweeps} combined sweeps give all {first.queries:,} queries a score of {first.lds[share].mean:.3f} for "
        f"{first.trainings:.0f} trainings; all exact: {exact.lds[share].mean:.3f} for {exact.trainings:.0f}."
    )
    return Page(
        "Many queries from few sweeps",
        text,
        [("What sweeps buy", rows)],
        lambda: [Section("What sweeps buy", text, table=rows)],
        verdict,
    )
