"""A `Trainer` of transformers as a training function, with a weight for every example.

>>> trainer = Trainer(model, TrainingArguments(...), train_dataset=..., eval_dataset=..., data_collator=...)
>>> f = training_function(trainer)
>>> result = f.metagradient({"weights": torch.ones(f.batches.examples)})
>>> load_into(model, result)

Same batches (up to the order, which is drawn here), optimizer, parameter groups, schedule, clipping, accumulation and
precision. Models of peft train what they train there.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mgd.errors import BadArgument, BadLoss
from mgd.function import TrainingFunction
from mgd.integrations.batches import INDEX
from mgd.integrations.batches import batches as mgd_batches
from mgd.results import Metagradient, Trained
from mgd.step.model import modes_kept
from mgd_kernels import Optimizer
from mgd_kernels.integrations.torch_optim import matching_optimizer

ITEMS = "items_per_example"  # of a step's whole batch: tokens with a label, or 1
IGNORED = -100  # a label that has no loss
_AGREE = 1e-3  # relative: the losses of a model in 16 bits, or with float32 inside float64


@dataclass(frozen=True)
class LabelLoss:
    """A loss by example. sums(logits, labels): of its losses; counts(labels): of its labels; each `[batch]`."""

    sums: Callable[[Tensor, Tensor], Tensor]
    counts: Callable[[Tensor], Tensor]


def _tokens(shift: int) -> LabelLoss:
    def sums(logits: Tensor, labels: Tensor) -> Tensor:
        logits, labels = logits[:, : logits.shape[1] - shift], labels[:, shift:]
        losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="none")
        return losses.view(labels.shape).sum(1)

    return LabelLoss(sums, lambda labels: (labels[:, shift:] != IGNORED).sum(1))


def _one(labels: Tensor) -> Tensor:
    return torch.ones(len(labels), dtype=torch.int64)


LOSSES = {
    "of the next token": _tokens(1),
    "of each token": _tokens(0),
    "of one class": LabelLoss(lambda x, y: F.cross_entropy(x, y.view(-1), reduction="none"), _one),
    "of several classes": LabelLoss(
        lambda x, y: F.binary_cross_entropy_with_logits(x, y, reduction="none").flatten(1).mean(1), _one
    ),
    "the squared error": LabelLoss(
        lambda x, y: F.mse_loss(x.view(len(x), -1), y.view(len(y), -1), reduction="none").mean(1), _one
    ),
}


def training_function(
    trainer: Any,
    *,
    objective: Callable[[nn.Module], Tensor] | None = None,
    weights: str = "weights",
    eps_root: float = 0.0,
    **options: Any,
) -> TrainingFunction:
    """What `trainer.train()` does, as a function of metaparameters. The trainer is left as it is.

    trainer: a `transformers.Trainer` with a `train_dataset` that has `len()` and `[i]`, and an optimizer that
    `torch.optim` has. Its model's loss must be the cross-entropy of tokens (shifted or not; -100 is ignored), of one
    class per example, of several, or a squared error; which one is found by comparison with the model's own.
    objective: the mean loss on `eval_dataset` by default, per token or example.
    weights: the metaparameter with one weight per training example, `[n]`; 1 where z does not have it.
    eps_root: of Adam (see `mgd_kernels.Adam`). options: further arguments of `TrainingFunction`, such as `budget`.

    Raises BadArgument for what has no counterpart here, and BadLoss for a model whose loss is another one.
    """
    args, model, loader = trainer.args, trainer.model, trainer.get_train_dataloader()
    _check(args)
    kind = _loss_of(model, next(iter(mgd_batches(loader, steps=1, indices=False))))
    accumulated = args.gradient_accumulation_steps
    per_epoch = math.ceil(len(loader) / accumulated)
    steps = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * per_epoch)
    data = mgd_batches(
        loader.dataset,
        steps=steps,
        batch_size=args.train_batch_size * accumulated,
        drop_last=args.dataloader_drop_last,
        collate=_Collate(loader.collate_fn, kind),
        seed=args.seed if args.data_seed is None else args.data_seed,
    )
    optimizer, rates = _optimizer(trainer, steps, eps_root)
    chosen = {
        "objective": objective or _evaluation(trainer, kind),
        "fixed": {"lr": rates},
        "max_grad_norm": args.max_grad_norm or None,
        "microbatches": accumulated,
        "seed": args.seed,
        "autocast": torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None,
        "per_example": {weights: data.indices_of},
    }
    return TrainingFunction(model, _Loss(kind, weights), data, optimizer=optimizer, **(chosen | options))


def load_into(model: nn.Module, result: Metagradient | Trained) -> None:
    """Put the trained parameters and buffers into the model."""
    own: dict[str, Tensor] = dict(model.named_parameters()) | dict(model.named_buffers())
    if unknown := [name for name in result.model_state if name not in own]:
        raise BadArgument(f"expected the model that was trained; it has no {unknown[0]!r}")
    with torch.no_grad():
        for name, tensor in result.model_state.items():
            own[name].copy_(tensor)


class _Loss:
    """The mean loss per label, each example's times its weight; a microbatch has its examples' share of it."""

    def __init__(self, kind: LabelLoss, weights: str):
        self.kind, self.weights = kind, weights

    def __call__(self, model: nn.Module, batch: Mapping[str, Any], z: Mapping[str, Any]) -> Tensor:
        sums = self.kind.sums(_logits(model, batch), batch["labels"])
        weighted = sums * z[self.weights] if self.weights in z else sums
        return weighted.sum() / (len(sums) * batch[ITEMS]).to(sums.dtype)


class _Collate:
    """The trainer's collator, which also says how many labels the examples of a batch have on average."""

    def __init__(self, collate: Callable[[list[Any]], Any], kind: LabelLoss):
        self.collate, self.kind = collate, kind

    def __call__(self, rows: list[Any]) -> Any:
        batch = self.collate(rows)
        batch[ITEMS] = self.kind.counts(batch["labels"]).double().mean()
        return batch


class _Evaluation:
    """The mean loss of a model per label of these batches."""

    def __init__(self, kind: LabelLoss, held_out: list[Mapping[str, Any]]):
        self.kind, self.held_out = kind, held_out

    def __call__(self, model: nn.Module) -> Tensor:
        sums = [self.kind.sums(_logits(model, batch), batch["labels"]).sum() for batch in self.held_out]
        return torch.stack(sums).sum() / sum(int(self.kind.counts(batch["labels"]).sum()) for batch in self.held_out)


def _evaluation(trainer: Any, kind: LabelLoss) -> _Evaluation:
    if trainer.eval_dataset is None:
        raise BadArgument("expected an objective, or a Trainer with an eval_dataset; got neither")
    return _Evaluation(kind, [dict(batch) for batch in trainer.get_eval_dataloader()])


def _logits(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """Of the model; one that decodes is given the labels, from which it makes the decoder's inputs."""
    decodes = getattr(model.config, "is_encoder_decoder", False)
    inputs = {key: x for key, x in batch.items() if key not in (INDEX, ITEMS) and (decodes or key != "labels")}
    return model(**inputs).logits


def _loss_of(model: nn.Module, batch: Mapping[str, Any]) -> LabelLoss:
    """The kind of loss that the model computes itself, by its value on a batch."""
    if "labels" not in batch:
        raise BadLoss(f"expected batches with 'labels'; got {sorted(batch)}: see TrainingArguments.label_names")
    with modes_kept(model), torch.no_grad():
        model.eval()
        outputs = model(**batch)
    for kind in LOSSES.values():
        with contextlib.suppress(RuntimeError, ValueError, IndexError):
            counts = kind.counts(batch["labels"])
            found = kind.sums(outputs.logits, batch["labels"]).sum() / counts.sum()
            if torch.allclose(found.double(), outputs.loss.double(), rtol=_AGREE):
                return kind
    raise BadLoss(
        f"expected a {type(model).__name__} whose loss is the cross-entropy {', '.join(LOSSES)}, per label; it is "
        "another one: write the loss out, and give it to mgd.TrainingFunction"
    )


def _optimizer(trainer: Any, steps: int, eps_root: float) -> tuple[Optimizer, Tensor]:
    """The trainer's optimizer, and its learning rates of all steps, `[T, G]`, or `[T]` where there is one group."""
    given = trainer.optimizer, trainer.lr_scheduler
    try:
        theirs = trainer.create_optimizer() or trainer.optimizer
        optimizer = matching_optimizer(theirs, trainer.model, eps_root=eps_root)
        scheduler = trainer.create_scheduler(steps, theirs)
        before = scheduler.state_dict(), [group["lr"] for group in theirs.param_groups]
        table = []
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a scheduler whose optimizer makes no steps
            for _ in range(steps):
                table.append([float(group["lr"]) for group in theirs.param_groups if group["params"]])
                scheduler.step()
        scheduler.load_state_dict(before[0])
        for group, lr in zip(theirs.param_groups, before[1], strict=True):
            group["lr"] = lr
    finally:
        trainer.optimizer, trainer.lr_scheduler = given
    rates = torch.tensor(table, dtype=torch.float64)
    return optimizer, rates if optimizer.groups > 1 else rates[:, 0]


def _check(args: Any) -> None:
    """Raise BadArgument for settings that change the training and have no counterpart here."""
    for name, what in {
        "label_smoothing_factor": "label smoothing",
        "neftune_noise_alpha": "noise on the embeddings",
        "deepspeed": "DeepSpeed",
        "fsdp": "FSDP",
        "use_liger_kernel": "Liger's kernels, which have no second derivatives",
    }.items():
        if getattr(args, name, None):
            raise BadArgument(f"expected TrainingArguments without {name}; got {what}: write the loss out, or leave it")
    if args.world_size > 1:
        raise BadArgument(f"expected a training in one process; got one of {args.world_size}")
