"""CLIP: the original's similarities, losses and gradients; what it refuses, in words."""

import pytest
import torch
from golden_cases import golden

from dalle_fast.compat.names import upstream_names
from dalle_fast.models.clip import CLIP

SMALL = {
    "dim_text": 24,
    "dim_image": 16,
    "dim_latent": 8,
    "num_text_tokens": 20,
    "text_enc_depth": 1,
    "text_seq_len": 6,
    "text_heads": 1,
    "visual_enc_depth": 1,
    "visual_heads": 1,
    "visual_image_size": 8,
    "visual_patch_size": 4,
}


def small(**changes):
    torch.manual_seed(0)
    return CLIP(**{**SMALL, **changes})


def small_batch(n=3, **changes):
    sizes = {**SMALL, "channels": 3, **changes}
    side = sizes["visual_image_size"]
    torch.manual_seed(1)
    text = torch.randint(1, sizes["num_text_tokens"], (n, sizes["text_seq_len"]))
    return text, torch.rand(n, sizes["channels"], side, side)


@pytest.fixture
def case():
    return golden("clip")


@pytest.fixture
def clip(case):
    model = CLIP(**case.models["clip"])
    model.load_state_dict(case.weights)
    return model.train()


def test_golden_similarities(case, clip):
    text, image, mask = (case.inputs[name] for name in ("text", "image", "mask"))
    case.check("sim", clip(text, image))
    case.check("sim_mask", clip(text, image, text_mask=mask))
    case.check("sim_short_text", clip(text[:, : clip.text_seq_len - 4], image))
    case.check("sim", clip(text.int(), image))


@pytest.mark.parametrize("masked", [False, True])
def test_golden_losses_and_gradients(case, clip, masked):
    text, image, mask = (case.inputs[name] for name in ("text", "image", "mask"))
    kind = "grad_mask." if masked else "grad."
    loss = clip(text, image, text_mask=mask if masked else None, return_loss=True)
    case.check("loss_mask" if masked else "loss", loss)
    loss.backward()
    ours = {theirs: name for name, theirs in upstream_names(clip).items()}
    parameters = dict(clip.named_parameters())
    checked = 0
    for output in case.outputs:
        if output.startswith(kind):
            case.check(output, parameters[ours[output.removeprefix(kind)]].grad)
            checked += 1
    assert checked == 9


def test_golden_ranking_scores():
    """The scores that the original's generate_images gave its images."""
    case = golden("gen_full_with_clip")
    model = CLIP(**case.models["clip"])
    model.load_state_dict(case.inputs_below("clip."))
    case.check("scores", model.eval()(case.inputs["text"], case.outputs["images"]))


def test_patches_are_read_row_by_row_with_channels_innermost():
    """The embedding of one patch depends on that patch's pixels alone, in the original's order of weights."""
    clip = small(channels=2, visual_image_size=12)  # 3 x 3 patches
    seen = {}
    clip.to_visual_embedding.register_forward_hook(lambda module, inputs, output: seen.update(patches=inputs[0]))
    image = torch.rand(2, 2, 12, 12)
    clip(*small_batch(2)[:1], image, return_loss=True)
    assert seen["patches"].shape == (2, 9, 4 * 4 * 2)
    for patch in range(9):
        row, column = 4 * (patch // 3), 4 * (patch % 3)
        block = image[:, :, row : row + 4, column : column + 4]
        assert torch.equal(seen["patches"][:, patch], block.permute(0, 2, 3, 1).flatten(1))


def test_masked_tokens_do_not_matter():
    clip, (text, image) = small(), small_batch()
    mask = torch.ones_like(text, dtype=torch.bool)
    mask[1, 2:] = False
    mask[2, [0, 3]] = False
    changed = torch.where(mask, text, (text + 7) % SMALL["num_text_tokens"])
    assert torch.equal(clip(text, image, text_mask=mask), clip(changed, image, text_mask=mask))
    assert not torch.equal(clip(text, image), clip(changed, image))


def test_a_pair_scores_alone_as_in_a_batch_and_one_text_ranks_many_pictures():
    clip, (text, image) = small().double(), small_batch()
    image = image.double()
    together = clip(text, image)
    alone = torch.cat([clip(text[i : i + 1], image[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(together, alone)
    torch.testing.assert_close(clip(text[:1], image), clip(text[:1].expand(3, -1), image))
    torch.testing.assert_close(clip(text, image[:1]), clip(text, image[:1].expand(3, -1, -1, -1)))
    assert clip(text[:0], image[:0]).shape == (0,)


def test_a_few_steps_teach_it_its_batch():
    clip, (text, image) = small(), small_batch(4)
    optimizer = torch.optim.Adam(clip.parameters(), lr=0.01)
    losses = []
    for _ in range(30):
        loss = clip(text, image, return_loss=True)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert all(p.grad is not None for p in clip.parameters())
    assert losses[-1] < 0.5 * losses[0]
    with torch.no_grad():
        scores = torch.stack([clip(text[i : i + 1], image) for i in range(4)])
    assert torch.equal(scores.argmax(dim=1), torch.arange(4))


def test_inputs_are_left_unchanged():
    clip, (text, image) = small(), small_batch()
    mask = text > 5
    mask[:, 0] = True
    before = text.clone(), image.clone(), mask.clone()
    clip(text, image, text_mask=mask, return_loss=True).backward()
    assert all(torch.equal(a, b) for a, b in zip(before, (text, image, mask), strict=True))


def test_saved_and_loaded_it_scores_the_same(tmp_path):
    clip, (text, image) = small().eval(), small_batch()
    clip.save_pretrained(tmp_path / "clip")
    loaded = CLIP.from_pretrained(tmp_path / "clip")
    assert loaded.config == clip.config
    assert torch.equal(loaded(text, image), clip(text, image))


def test_upstream_names_go_there_and_back(case, clip):
    names = upstream_names(clip)
    assert set(names.values()) == set(case.weights)
    assert set(names) == set(clip.state_dict())


def _with(tensor, value, *index):
    tensor = tensor.clone()
    tensor[index] = value
    return tensor


MASK = torch.ones(3, 6, dtype=torch.bool)
REFUSED = {
    "long text": (lambda t, i: (torch.cat([t, t], 1), i), ValueError, r"text_seq_len=6, got \[3, 12\]"),
    "text of one dimension": (lambda t, i: (t[0], i), ValueError, r"text must be \[B, n\].*got \[6\]"),
    "no text": (lambda t, i: (t[:, :0], i), ValueError, r"got \[3, 0\]"),
    "id too large": (lambda t, i: (_with(t, 20, 1, 2), i), ValueError, r"0\.\.19, got 20\."),
    "id negative": (lambda t, i: (_with(t, -1, 1, 2), i), ValueError, r"0\.\.19, got -1\."),
    "float ids": (lambda t, i: (t.float(), i), TypeError, "int64 or int32, got torch.float32"),
    "small picture": (lambda t, i: (t, i[..., :4, :4]), ValueError, r"\[B, 3, 8, 8\], got \[3, 3, 4, 4\]"),
    "gray picture": (lambda t, i: (t, i[:, :1]), ValueError, r"got \[3, 1, 8, 8\]"),
    "picture of bytes": (lambda t, i: (t, (i * 255).byte()), TypeError, "floating, got torch.uint8"),
    "unequal batch": (lambda t, i: (t[:2], i), ValueError, "pairs, got 2 texts and 3 pictures"),
    "mask of another shape": (lambda t, i: (t, i, MASK[:, :4]), ValueError, r"text_mask must be bool \[3, 6\], got"),
    "mask of integers": (lambda t, i: (t, i, MASK.long()), TypeError, r"got torch.int64 \[3, 6\]"),
    "row without a token": (lambda t, i: (t, i, _with(MASK, False, 1)), ValueError, "every row, got none in row 1"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_wrong_input_is_refused_in_words(what):
    change, error, message = REFUSED[what]
    clip = small()
    with pytest.raises(error, match=message):
        clip(*change(*small_batch()))
    assert clip.training


def test_wrong_batches_for_the_loss_are_refused_in_words():
    clip, (text, image) = small(), small_batch()
    with pytest.raises(ValueError, match=r"got 1 texts and 3 pictures\. Without return_loss"):
        clip(text[:1], image, return_loss=True)
    with pytest.raises(ValueError, match="at least one pair, got an empty batch"):
        clip(text[:0], image[:0], return_loss=True)


def test_patches_that_do_not_divide_the_picture_are_refused_in_words():
    with pytest.raises(ValueError, match="must divide visual_image_size=8, got 3"):
        small(visual_patch_size=3)
