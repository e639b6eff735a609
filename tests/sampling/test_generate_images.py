"""generate_images: cached = uncached for every option, known tokens, seeds, callbacks, and what it refuses."""

import pytest
import torch
from small_models import prompts, small_dalle

from dalle_fast.models.clip import CLIP

OPTIONS = {
    "cycle": {},
    "full": {"attn_types": "full"},
    "row": {"attn_types": "axial_row"},
    "col": {"attn_types": "axial_col"},
    "conv": {"attn_types": "conv_like"},
    "sparse": {"attn_types": "sparse"},
    "paper": {"attn_types": ("paper_row", "paper_col", "paper_row", "paper_conv")},
    "no_rotary": {"rotary_emb": False},
    "no_shift": {"shift_tokens": False},
    "plain": {"shift_tokens": False, "rotary_emb": False},
    "reversible": {"reversible": True},
    "stable": {"stable": True},
    "sandwich": {"sandwich_norm": True},
    "shared": {
        "depth": 4,
        "attn_types": ("full", "axial_row"),
        "shared_attn_ids": (0, 1, 0, 1),
        "shared_ff_ids": (0, 0, 1, 1),
    },
    "tied": {"share_input_output_emb": True},
}


def drawn(model, text, **settings):
    return model.generate_images(text, return_tokens=True, **{"seed": 11, "filter_thres": 0.0, **settings})[1]


@pytest.mark.parametrize("cond_scale", [1.0, 2.5])
@pytest.mark.parametrize("name", OPTIONS)
def test_cached_equals_uncached_with_noise_in_float64(name, cond_scale):
    model, text = small_dalle(**OPTIONS[name]), prompts(3)
    cached = drawn(model, text, cond_scale=cond_scale)
    assert torch.equal(cached, drawn(model, text, cond_scale=cond_scale, use_cache=False))
    assert cached.unique().numel() > 5  # a model that always draws the same would prove nothing


@pytest.mark.parametrize("name", OPTIONS)
def test_cached_equals_uncached_greedily_in_float32(name):
    model, text = small_dalle(torch.float32, **OPTIONS[name]), prompts(2)
    assert torch.equal(drawn(model, text, temperature=0), drawn(model, text, temperature=0, use_cache=False))


@pytest.mark.parametrize("cond_scale", [1.0, 3.0])
@pytest.mark.parametrize("n", [0, 1, 7, 8, 27, 63])
def test_priming_equals_forcing_the_same_codes(n, cond_scale):
    model, text = small_dalle(), prompts(2)
    img = torch.rand(2, 3, 16, 16, dtype=torch.float64)
    primed = drawn(model, text, img=img, num_init_img_tokens=n, cond_scale=cond_scale)
    codes = model.vae.get_codebook_indices(img)[:, :n]
    assert torch.equal(primed[:, :n], codes)
    assert torch.equal(primed, drawn(model, text, known_tokens=codes, cond_scale=cond_scale))
    assert torch.equal(primed, drawn(model, text, known_tokens=codes, cond_scale=cond_scale, use_cache=False))


def test_priming_takes_seven_sixteenths_by_default():
    model, img = small_dalle(), torch.rand(1, 3, 16, 16, dtype=torch.float64)
    codes = model.vae.get_codebook_indices(img)
    assert torch.equal(drawn(model, prompts(1), img=img)[:, :28], codes[:, :28])


def test_inpainting_keeps_known_codes_anywhere():
    model, text = small_dalle(), prompts(3)
    generator = torch.Generator().manual_seed(0)
    known = torch.randint(30, (3, 64), generator=generator)
    known[torch.rand(3, 64, generator=generator) < 0.6] = -1
    before = known.clone()
    out = drawn(model, text, known_tokens=known)
    assert torch.equal(known, before)
    assert torch.equal(out[known >= 0], known[known >= 0])
    assert torch.equal(out, drawn(model, text, known_tokens=known, use_cache=False))
    assert not torch.equal(out, drawn(model, text))


def test_all_codes_known_draws_nothing_and_decodes_them():
    model, known = small_dalle(), torch.arange(64).remainder(30)[None]
    images, codes = model.generate_images(prompts(1), known_tokens=known, return_tokens=True)
    assert torch.equal(codes, known)
    assert torch.equal(images, model.vae.decode(known))


def test_an_image_depends_on_its_prompt_and_seed_alone():
    model, text = small_dalle(), prompts(3)
    together = drawn(model, text, seed=[5, 2**64 - 1, 9])
    for i, seed in enumerate((5, 2**64 - 1, 9)):
        assert torch.equal(together[i : i + 1], drawn(model, text[i : i + 1], seed=seed))
    assert torch.equal(drawn(model, text, seed=5)[2], drawn(model, text[2:], seed=7)[0])  # image i has seed + i


def test_seed_none_follows_torch():
    model, text = small_dalle(), prompts(1)
    torch.manual_seed(3)
    one, two = drawn(model, text, seed=None), drawn(model, text, seed=None)
    torch.manual_seed(3)
    assert torch.equal(one, drawn(model, text, seed=None))
    assert not torch.equal(one, two)
    generators = [torch.Generator().manual_seed(3) for _ in range(2)]
    assert torch.equal(*(drawn(model, text, seed=None, generator=g) for g in generators))


def test_on_tokens_reports_each_row_once():
    model, text, seen = small_dalle(), prompts(2), []
    out = drawn(
        model,
        text,
        known_tokens=torch.zeros(2, 11, dtype=torch.long),
        on_tokens=lambda start, codes: seen.append((start, codes)),
    )
    assert [(start, codes.shape[1]) for start, codes in seen] == [(11, 5), *((start, 8) for start in range(16, 64, 8))]
    assert torch.equal(torch.cat([codes for _, codes in seen], dim=1), out[:, 11:])


@pytest.mark.parametrize("error", [RuntimeError("stop"), KeyboardInterrupt()])
def test_an_exception_in_on_tokens_stops_at_the_row_and_leaves_the_model_as_it_was(error):
    model, rows = small_dalle(), []
    model.train()
    model.vae.eval()
    flags = {name: module.training for name, module in model.named_modules()}

    def stop(start, codes):
        rows.append(start)
        if len(rows) == 3:
            raise error

    with pytest.raises(type(error)):
        drawn(model, prompts(1), on_tokens=stop)
    assert rows == [0, 8, 16]
    assert flags == {name: module.training for name, module in model.named_modules()}


def test_the_prompt_is_not_written_to_and_training_goes_on():
    model, text = small_dalle(attn_dropout=0.5), prompts(2)
    model.train()
    before = text.clone()
    assert torch.equal(drawn(model, text, cond_scale=2.0), drawn(model, text, cond_scale=2.0))  # dropout is off inside
    assert torch.equal(text, before)
    assert model.training and model.transformer.training


def test_scores_of_a_clip_come_second():
    model, text = small_dalle(torch.float32), prompts(2)
    torch.manual_seed(0)
    clip = CLIP(
        dim_text=16, dim_image=16, dim_latent=16, num_text_tokens=25, text_enc_depth=1, text_seq_len=5, text_heads=2,
        visual_enc_depth=1, visual_heads=2, visual_image_size=16, visual_patch_size=8,
    )  # fmt: skip
    clip.train()
    images, scores, codes = model.generate_images(text, clip=clip, return_tokens=True, seed=0)
    assert images.shape == (2, 3, 16, 16) and scores.shape == (2,) and codes.shape == (2, 64)
    assert clip.training
    clip.eval()
    with torch.no_grad():
        assert torch.equal(scores, clip(text, images))


def test_an_empty_batch_draws_nothing():
    images, codes = small_dalle().generate_images(prompts(2)[:0], return_tokens=True)
    assert images.shape == (0, 3, 16, 16) and codes.shape == (0, 64)


def test_longer_texts_are_cut_as_in_the_original():
    model, text = small_dalle(), prompts(1)
    assert torch.equal(drawn(model, torch.cat((text, text), dim=1)), drawn(model, text))


IMG = torch.rand(1, 3, 16, 16, dtype=torch.float64)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"text": torch.ones(1, 3, dtype=torch.long)}, ValueError, "text_seq_len=5"),
        ({"text": torch.full((1, 5), 99)}, ValueError, "text ids must be in 0..24, got 99"),
        ({"text": torch.ones(1, 5)}, TypeError, "integers"),
        ({"img": IMG[..., :8]}, ValueError, "img must be"),
        ({"img": IMG.expand(2, -1, -1, -1)}, ValueError, "img must be"),
        ({"img": IMG, "num_init_img_tokens": 64}, ValueError, "0..63"),
        ({"img": IMG, "known_tokens": torch.zeros(1, 4, dtype=torch.long)}, ValueError, "not both"),
        ({"num_init_img_tokens": 3}, ValueError, "needs img"),
        ({"known_tokens": torch.zeros(1, 65, dtype=torch.long)}, ValueError, "at most 64"),
        ({"known_tokens": torch.full((1, 2), 30)}, ValueError, "0..29"),
        ({"known_tokens": torch.full((1, 2), -2)}, ValueError, "-1 or codes"),
        ({"known_tokens": torch.zeros(1, 2)}, TypeError, "integers"),
        ({"seed": -1}, ValueError, "seed"),
        ({"seed": 2**64}, ValueError, "seed"),
        ({"seed": [1, 2]}, ValueError, "seed"),
        ({"seed": 0.5}, TypeError, "seed"),
        ({"seed": 1, "generator": torch.Generator()}, ValueError, "seed"),
        ({"temperature": -1.0}, ValueError, "temperature"),
        ({"top_k": 0}, ValueError, "top_k"),
        ({"filter_thres": 2.0}, ValueError, "filter_thres"),
        ({"cond_scale": float("nan")}, ValueError, "cond_scale"),
    ],
)
def test_bad_input_is_refused_in_words_and_changes_nothing(settings, error, message):
    model = small_dalle()
    model.train()
    text = settings.pop("text", prompts(1))
    with pytest.raises(error, match=message):
        model.generate_images(text, **settings)
    assert all(module.training for module in model.modules())
