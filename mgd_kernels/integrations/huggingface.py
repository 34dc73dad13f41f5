"""The loss of a causal language model of `transformers`, without its logits."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from mgd_kernels.errors import BadArgument
from mgd_kernels.functional import linear_cross_entropy

# What models multiply their logits by.
_SCALES = ("logit_scale", "logits_scaling", "lm_head_multiplier", "output_multiplier_scale")


def causal_lm_loss(model: Any, labels: Tensor, options: dict[str, Any] | None = None, **inputs: Any) -> Tensor:
    """As `model(**inputs, labels=labels).loss`: hidden states by the model's body, then `linear_cross_entropy` with its
    `lm_head`. Position i predicts label i + 1. Adapters of `peft` in the body are used.

    options: those of `linear_cross_entropy`, such as `reduction="none"`, which gives losses `[batch, length - 1]`.
    """
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    head, config = getattr(model, "lm_head", None), getattr(model, "config", None)
    if type(head) is not nn.Linear or config is None or getattr(config, "is_encoder_decoder", False):
        raise _unfit(f"a causal language model whose lm_head is an nn.Linear; got {type(model).__name__}")
    text = config.get_text_config()
    for name in _SCALES:
        if getattr(text, name, None) not in (None, 1, 1.0):
            raise _unfit(f"logits that are not scaled; got {name}={getattr(text, name)}")
    if getattr(text, "output_router_logits", False):
        raise _unfit("no loss of a router; got output_router_logits=True")
    softcap = getattr(text, "final_logit_softcapping", None)
    hidden = model.base_model(**inputs)[0]
    return linear_cross_entropy(
        hidden[:, :-1], head.weight, labels[:, 1:], head.bias, **{"softcap": softcap, **(options or {})}
    )


def _unfit(expected: str) -> BadArgument:
    return BadArgument(
        f"causal_lm_loss: expected {expected}: call linear_cross_entropy with the hidden states and the weight of the "
        "last layer"
    )
