"""The pretrained encoder of the LoRA settings: its word pieces, its padding, and what is trained."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from mgd.recipes.models import encoder, wordpiece


def test_word_pieces_are_the_longest_there_are():
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "un", "##able", "##a", "unable", "play", "##ing", "!"]
    tokenize = wordpiece.WordPiece({word: i for i, word in enumerate(words)})
    assert tokenize("Unable playing!", 8) == [2, 7, 8, 9, 10, 3, 0, 0]
    assert tokenize("una xyz", 8) == [2, 4, 6, 1, 3, 0, 0, 0]
    assert tokenize("play play play play", 4) == [2, 8, 8, 3]


def test_the_encoder_ignores_padding_and_lora_begins_as_the_frozen_model():
    torch.manual_seed(0)
    model = encoder.Encoder(3).eval()
    tokens = torch.randint(1, 1000, (2, 6))
    with torch.no_grad():
        plain = model(tokens)
        torch.testing.assert_close(model(F.pad(tokens, (0, 3))), plain, rtol=1e-4, atol=1e-5)
        model.freeze()
        torch.testing.assert_close(model(tokens), plain)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * 2 * encoder.LAYERS + 2 and isinstance(model.layers[0].query.base, nn.Linear)
