"""generate_texts: cached steps equal the training forward, any tokenizer object, and what it refuses."""

import pytest
import torch
from small_models import small_dalle


class Blanks:
    """Ids written as numbers between blanks."""

    def encode(self, text):
        return [int(word) for word in text.split()]

    def decode(self, ids, pad_tokens=frozenset()):
        return " ".join(str(int(i)) for i in ids if int(i) not in pad_tokens)


class Carrier:
    tokenizer = Blanks()


def greedy_by_training_forward(model, beginning):
    """The most likely continuation, by the forward pass that training uses, one full pass a token."""
    ids = list(beginning)
    while len(ids) < model.text_seq_len:
        text = torch.tensor([ids + [1] * (model.text_seq_len - len(ids))])
        with torch.no_grad():
            logits = model(text, torch.zeros(1, 1, dtype=torch.long))
        ids.append(int(logits[0, len(ids), : model.num_text_tokens].argmax()))
    return ids


@pytest.mark.parametrize("attn_types", ["full", ("axial_row", "conv_like", "axial_col", "full")])
@pytest.mark.parametrize("text", [None, "", "7", "4 11 2"])
def test_greedy_text_is_the_one_training_predicts(text, attn_types):
    model = small_dalle(attn_types=attn_types)
    ids, texts = model.generate_texts(Blanks(), text, temperature=0)
    expected = greedy_by_training_forward(model, Blanks().encode(text or ""))
    assert ids.tolist() == [expected]
    assert texts == [" ".join(str(i) for i in expected if i < 20)]


def test_seeds_repeat_and_differ():
    model = small_dalle()
    texts = [model.generate_texts(Carrier, seed=seed, filter_thres=0.0)[0].tolist() for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_it_leaves_the_training_flags_alone():
    model = small_dalle()
    model.train()
    model.generate_texts(Blanks(), "3")
    with pytest.raises(ValueError, match="nothing left to write"):
        model.generate_texts(Blanks(), "1 2 3 4 5")
    assert all(module.training for module in model.modules())


def test_what_is_no_tokenizer_is_refused_in_words():
    with pytest.raises(TypeError, match="tokenizer must have encode and decode"):
        small_dalle().generate_texts(object(), "3")
