"""DALLE beyond the original's interface: labels of their own, the parts of its loss."""

import pytest
import torch
import torch.nn.functional as F
from small_models import prompts, small_dalle
from tolerance import assert_same_in_float64


def _codes(seed):
    return torch.randint(30, (3, 64), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("n", [64, 9])
def test_labels_are_predicted_from_the_codes_that_are_read(n):
    model, text, read, wanted = small_dalle(), prompts(3), _codes(0)[:, :n], _codes(1)[:, :n]
    logits = model(text, read)
    text_loss = F.cross_entropy(logits[:, :5].transpose(1, 2), model.padded_text(text)[:, 1:])
    image_loss = F.cross_entropy(logits[:, 5 : 5 + n, model.num_text_tokens :].transpose(1, 2), wanted)
    # Sums over the channels, then over the tokens of the batch, layer after layer.
    loss = model(text, read, return_loss=True, labels=wanted)
    assert_same_in_float64(loss, (text_loss + 7 * image_loss) / 8, 4 * 128 * 3 * 69)
    assert torch.equal(model(text, read, return_loss=True, labels=read), model(text, read, return_loss=True))


def test_bad_labels_are_refused_in_words():
    model, text, codes = small_dalle(), prompts(3), _codes(0)
    with pytest.raises(ValueError, match=r"labels must be \[3, 64\]"):
        model(text, codes, return_loss=True, labels=codes[:, :5])
    with pytest.raises(ValueError, match=r"labels must be in 0\.\.29"):
        model(text, codes, return_loss=True, labels=codes + 30)
    with pytest.raises(ValueError, match="without return_loss"):
        model(text, codes, labels=codes)


def test_the_parts_of_the_loss_are_those_it_is_made_of():
    model, text, codes = small_dalle(loss_img_weight=3), prompts(3), _codes(0)
    logits = model(text, codes)
    in_text = F.cross_entropy(logits[:, :5].transpose(1, 2), model.padded_text(text)[:, 1:])
    in_image = F.cross_entropy(logits[:, 5:, model.num_text_tokens :].transpose(1, 2), codes)
    loss, text_loss, image_loss = model(text, codes, return_loss=True, return_loss_parts=True)
    assert torch.equal(loss, model(text, codes, return_loss=True)) and loss.requires_grad
    assert torch.equal(loss, (text_loss + 3 * image_loss) / 4)
    assert not text_loss.requires_grad and not image_loss.requires_grad
    assert_same_in_float64(text_loss, in_text, 4 * 128 * 3 * 69)
    assert_same_in_float64(image_loss, in_image, 4 * 128 * 3 * 69)
    with pytest.raises(ValueError, match="return_loss_parts must come with return_loss=True"):
        model(text, codes, return_loss_parts=True)
