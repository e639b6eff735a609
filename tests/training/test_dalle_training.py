"""Training the transformer: captions, noisy codes, Muon, resuming."""

import csv
from dataclasses import replace

import pytest
import torch
from tolerance import assert_same_in_float64

from dalle_fast.models.dalle import DALLE
from dalle_fast.models.dvae import DiscreteVAE
from dalle_fast.tokenizers.hug import HugTokenizer
from dalle_fast.training.captions import draw_caption, encode_captions, train_tokenizer
from dalle_fast.training.dalle import (
    DalleRecipe,
    add_noise,
    encode_pictures,
    epoch_indices,
    make_optimisers,
    train_dalle,
)
from dalle_fast.training.loop import Budget
from dalle_fast.training.muon import Muon, orthogonalise

CAPTIONS = [["red apple", "a red apple", "an emoji of a red apple"], ["owl", "an owl"], ["blue heart", "a blue heart"]]
TINY = DalleRecipe(text_seq_len=5, batch=4, warmup_steps=1, save_seconds=0.0, log_steps=1, noisy_share=0)
NOISY = replace(TINY, noisy_share=0.6)


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([line for lines in CAPTIONS for line in lines], 300)


def tiny_dalle(**options):
    torch.manual_seed(0)
    vae = DiscreteVAE(image_size=16, num_tokens=11, codebook_dim=4, num_layers=2, hidden_dim=4)
    types = ("full", "axial_row", "axial_col", "conv_like")
    sizes = {"dim": 16, "depth": 4, "heads": 2, "dim_head": 12, "attn_types": types, **options}
    return DALLE(vae=vae, num_text_tokens=300, text_seq_len=5, **sizes)


def codes(n=3):
    return torch.randint(0, 11, (n, 16), generator=torch.Generator().manual_seed(1))


def test_tokenizer_keeps_0_for_padding_and_loads_as_the_hug_tokenizer(tokenizer, tmp_path):
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    hug = HugTokenizer(tmp_path / "tokenizer.json")
    lines = [line for own in CAPTIONS for line in own]
    assert torch.equal(hug.tokenize(lines, 16), encode_captions(tokenizer, lines, 16))
    assert not any(0 in hug.encode(line) for line in [*lines, "Zebra? [ÄÖ]"])
    assert hug.decode(hug.encode("A RED apple")).strip() == "a red apple"


def test_encode_captions_pads_and_cuts(tokenizer):
    tokens = encode_captions(tokenizer, ["owl", "an emoji of a red apple"], 3)
    assert tokens[0, -1] == 0
    assert tokens[1].tolist() == tokenizer.encode("an emoji of a red apple").ids[:3]


def test_draw_caption_follows_its_probabilities():
    lines = ["one two three four", "b", "c"]
    drawn = [draw_caption(lines, torch.Generator().manual_seed(s), plain=0.5, word_dropout=0.5) for s in range(300)]
    assert set(drawn) - {"b", "c"} == {
        "one two three four", "two three four", "one three four", "one two four", "one two three",
    }  # fmt: skip
    assert 100 < sum(len(caption) > 1 for caption in drawn) < 200
    assert draw_caption(lines, torch.Generator(), plain=1.0, word_dropout=0.0) == lines[0]


def test_training_reduces_the_loss_and_writes_a_log(tokenizer, tmp_path):
    dalle, quick = tiny_dalle(), replace(TINY, learning_rate=2e-2)
    text = encode_captions(tokenizer, [lines[0] for lines in CAPTIONS], 5)
    with torch.no_grad():
        before = dalle(text, codes(), return_loss=True)
    train_dalle(dalle, tokenizer, codes(), CAPTIONS, tmp_path, Budget(steps=15), quick)
    with torch.no_grad():
        assert dalle(text, codes(), return_loss=True) < 0.8 * before
    rows = list(csv.DictReader((tmp_path / "dalle.csv").open()))
    assert [int(row["step"]) for row in rows] == list(range(1, 16))
    assert not dalle.training


def test_an_interrupted_run_resumes_bit_for_bit(tokenizer, tmp_path):
    whole = tiny_dalle()
    train_dalle(whole, tokenizer, codes(), CAPTIONS, tmp_path / "whole", Budget(steps=6), NOISY)

    def stop(row):
        if row["step"] == 4:
            raise KeyboardInterrupt

    parts = tmp_path / "parts"
    broken = tiny_dalle()
    with pytest.raises(KeyboardInterrupt):
        train_dalle(broken, tokenizer, codes(), CAPTIONS, parts, Budget(steps=6), NOISY, stop)
    resumed = tiny_dalle()
    train_dalle(resumed, tokenizer, codes(), CAPTIONS, parts, Budget(steps=6), NOISY)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name


def test_the_vae_stays_as_it_was(tokenizer, tmp_path):
    dalle = tiny_dalle()
    before = {name: tensor.clone() for name, tensor in dalle.vae.state_dict().items()}
    train_dalle(dalle, tokenizer, codes(), CAPTIONS, tmp_path, Budget(steps=2), TINY)
    assert all(torch.equal(before[name], tensor) for name, tensor in dalle.vae.state_dict().items())


def test_an_epoch_shows_every_picture_once():
    n, batch = 10, 4
    shown = torch.cat([epoch_indices(n, step, batch, seed=3) for step in range(5)])
    assert shown[:10].sort().values.tolist() == shown[10:].sort().values.tolist() == list(range(10))
    assert shown[:10].tolist() != shown[10:].tolist()


def test_noise_replaces_codes_of_its_share_of_the_samples():
    everything = torch.arange(4000).view(100, 40)
    wanted = everything[:80]
    noisy = add_noise(wanted, everything, torch.Generator().manual_seed(0), share=0.5, rate=0.8)
    changed = noisy != wanted
    assert 25 < int(changed.any(1).sum()) < 55
    assert 0.25 < changed[changed.any(1)].float().mean() < 0.55
    from_neighbour = noisy == wanted.roll(1, 0)
    assert 0.4 < (from_neighbour & changed).sum() / changed.sum() < 0.6
    assert torch.equal(add_noise(wanted, everything, torch.Generator(), share=0.0, rate=0.8), wanted)


def test_batch_must_fit_the_workers(tokenizer, tmp_path):
    recipe = DalleRecipe(text_seq_len=5, batch=5, workers=2)
    with pytest.raises(ValueError, match="multiple of workers"):
        train_dalle(tiny_dalle(), tokenizer, codes(), CAPTIONS, tmp_path, Budget(steps=1), recipe)


def test_muon_takes_the_matrices_of_the_transformer_and_adamw_the_rest():
    dalle = tiny_dalle()
    adamw, muon = make_optimisers(dalle, TINY)
    hidden = {id(p) for group in muon.param_groups for p in group["params"]}
    others = {id(p) for group in adamw.param_groups for p in group["params"]}
    named = {name: id(p) for name, p in dalle.named_parameters() if p.requires_grad}
    assert hidden | others == set(named.values()) and not hidden & others
    assert hidden == {i for name, i in named.items() if name.startswith("transformer.") and name.endswith("weight")
                      and ".fn." in name}  # fmt: skip


@pytest.mark.parametrize("shape", [(3, 6, 4), (3, 4, 6), (2, 5, 5)])
def test_orthogonalise_keeps_directions_and_levels_singular_values(shape):
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    u, s, vh = torch.linalg.svd(matrices, full_matrices=False)
    got = u.mT @ orthogonalise(matrices) @ vh.mT
    levels = got.diagonal(dim1=1, dim2=2)
    assert_same_in_float64(got, torch.diag_embed(levels), n_terms=1000)
    # Jordan et al.: the quintic ends between 0.68 and 1.13 for singular values of at least 1 % of the norm.
    kept = s / s.norm(dim=1, keepdim=True) > 0.01
    assert levels[kept].min() > 0.6 and levels.max() < 1.3


def test_muon_updates_stacked_maps_one_by_one():
    first, second = (torch.nn.Parameter(torch.zeros(4, 3)) for _ in range(2))
    both = torch.nn.Parameter(torch.zeros(8, 3))
    generator = torch.Generator().manual_seed(0)
    first.grad, second.grad = torch.randn(4, 3, generator=generator), 9 * torch.randn(4, 3, generator=generator)
    both.grad = torch.cat((first.grad, second.grad))
    Muon([(both, 2)], lr=0.1).step()
    Muon([(first, 1), (second, 1)], lr=0.1).step()
    assert torch.equal(both, torch.cat((first, second)))


def test_muon_refuses_what_is_no_matrix():
    with pytest.raises(ValueError, match="must be 2-D"):
        Muon([(torch.nn.Parameter(torch.zeros(3)), 1)], lr=0.1)


def test_encode_pictures_is_the_vaes_own_code():
    vae = tiny_dalle().vae
    pictures = torch.randint(0, 256, (5, 3, 16, 16), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    assert torch.equal(encode_pictures(vae, pictures, batch=2), vae.get_codebook_indices(pictures.float() / 255))
