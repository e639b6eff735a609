"""Training a DALLE: its loss, the noise of a step, what is measured, shown and saved."""

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from tiny_tasks import batch_of, dalle_config, tokenizer, tokenizer_file, vae

from dalle_fast.models.dalle import DALLE
from dalle_fast.training.config import CodeNoise, DataConfig
from dalle_fast.training.data import open_source
from dalle_fast.training.tasks.dalle import DalleTask, noise_pool, token_losses
from dalle_fast.training.tasks.noise import drawn_in_step
from dalle_fast.training.tasks.text import mean_text_length

POOL = torch.randint(0, 12, (7, 16), generator=torch.Generator().manual_seed(9))


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    return tokenizer(tmp_path_factory.mktemp("words"))


def task(words, *, pool=None, text_length=3.0, **settings):
    return DalleTask(dalle_config(**settings), vae(), words, pool, text_length)


def codes_of(one, batch):
    return one.model.vae.get_codebook_indices(batch["pixels"].float() / 255)


def test_checkpointing_changes_no_bit(words):
    def gradients(**settings):
        torch.manual_seed(0)
        one = task(words, **settings)
        assert one.model.transformer.checkpointing == settings.get("checkpointing", False)
        one.module(batch_of(4), 0, 0.0)[0].backward()
        return [parameter.grad for _, parameter in one.parameters_for()]

    for one, other in zip(gradients(), gradients(checkpointing=True), strict=True):
        assert (one is None and other is None) or torch.equal(one, other)


@pytest.mark.parametrize("model", [{}, {"stable": True}, {"rotary_emb": False, "share_input_output_emb": True}])
def test_with_all_padding_the_loss_is_the_originals(words, model):
    one = task(words, model=model, padding_loss="all")
    batch = batch_of(4)
    loss, parts = one.module(batch, 0, 0.0)
    wanted = one.model(batch["text"], codes_of(one, batch), return_loss=True, return_loss_parts=True)
    assert torch.equal(loss, wanted[0])
    assert torch.equal(parts["text_loss"], wanted[1]) and torch.equal(parts["image_loss"], wanted[2])


def test_of_the_padding_only_the_end_of_a_caption_counts(words):
    """B16: the original averages over all padding, so that short captions teach little."""
    one = task(words, text_length=2.5)
    batch = batch_of(4)
    codes = codes_of(one, batch)
    text_loss, image_loss, n_text = token_losses(one.model, batch["text"], codes, codes, padding_loss="first")
    logits = one.model(batch["text"], codes)
    unique = torch.where(batch["text"] == 0, torch.arange(7, 12), batch["text"])
    each = F.cross_entropy(logits[:, :5].flatten(0, 1), unique.flatten(), reduction="none").view(4, 5)
    lengths = (batch["text"] != 0).sum(1)
    assert lengths.tolist() == [1, 2, 3, 4], "captions end in different places"
    counted = torch.cat([each[i, : n + 1] for i, n in enumerate(lengths.tolist())])
    assert text_loss.item() == pytest.approx(counted.mean().item(), rel=1e-5) and n_text == len(counted) == 14
    loss, parts = one.module(batch, 0, 0.0)
    assert parts["text_loss"].item() == pytest.approx(counted.sum().item() / (4 * 2.5), rel=1e-5)
    assert loss.item() == pytest.approx((parts["text_loss"] + 7 * image_loss).item() / 8, rel=1e-6)


@pytest.mark.parametrize("padding_loss", ["first", "all"])
def test_a_loss_is_a_mean_over_samples_however_a_batch_is_split(words, padding_loss):
    noise = {"share": 0.8, "rate": 0.8}
    one = task(words, pool=POOL, code_noise=noise, null_cond_prob=0.3, padding_loss=padding_loss)
    whole, parts = one.module(batch_of(6), 0, 0.0)
    each = [one.module(batch_of(n, first=first), 0, 0.0) for first, n in ((0, 2), (2, 2), (4, 2))]
    assert sum(loss for loss, _ in each).item() / 3 == pytest.approx(whole.item(), rel=1e-5)
    for name in ("text_loss", "image_loss"):
        assert sum(part[name] for _, part in each).item() / 3 == pytest.approx(parts[name].item(), rel=1e-5)


def test_the_length_of_captions_is_the_datas(words, tmp_path):
    for i, lines in enumerate(("a red apple\nowl", "flag", "a a a a a a a")):
        Image.new("RGB", (16, 16)).save(tmp_path / f"{i}.png")
        (tmp_path / f"{i}.txt").write_text(lines)
    source = open_source(
        DataConfig(source=str(tmp_path), truncate=True), image_size=16, channels=3, tokenizer=words, text_seq_len=5,
        need={"text", "codes"},
    )  # fmt: skip
    n = [len(words.encode(line)) for line in ("a red apple", "owl", "flag")]
    assert mean_text_length(source) == pytest.approx((sum(n) + 3 + 5) / 4)


def test_a_cache_of_codes_gives_the_losses_of_its_pictures(words):
    one = task(words)
    batch = batch_of(4)
    cached = {**batch, "codes": codes_of(one, batch)}
    del cached["pixels"]
    assert one.module(cached, 0, 0.0)[0] == one.module(batch, 0, 0.0)[0]


def test_pictures_are_encoded_in_float32_under_autocast(words):
    one = task(words)
    batch = batch_of(4)
    cached = {**batch, "codes": codes_of(one, batch)}
    with torch.autocast("cpu", torch.bfloat16):
        assert one.module(cached, 0, 0.0)[0] == one.module(batch, 0, 0.0)[0]


def test_the_vae_stays_as_it_is(words):
    one = task(words)
    one.module(batch_of(4), 0, 0.0)[0].backward()
    assert all(parameter.grad is None for parameter in one.model.vae.parameters())
    names = {name for name, _ in one.parameters_for()}
    assert names and not any(name.startswith("vae.") for name in names)
    assert all(parameter.grad.abs().sum() > 0 for _, parameter in one.parameters_for())


def test_draws_of_a_sample_do_not_depend_on_its_batch():
    batch, noise = batch_of(6, first=30, codes=True), CodeNoise(share=0.7, rate=0.8)
    tensors = (batch["text"], batch["codes"], batch["position"])
    text, read = drawn_in_step(*tensors, POOL, noise, null_cond_prob=0.4, seed=1)
    for i in range(0, 6, 2):
        part = drawn_in_step(*(t[i : i + 2] for t in tensors), POOL, noise, null_cond_prob=0.4, seed=1)
        assert torch.equal(part[0], text[i : i + 2]) and torch.equal(part[1], read[i : i + 2])
    _, other = drawn_in_step(*tensors, POOL, noise, null_cond_prob=0.4, seed=2)
    assert not torch.equal(other, read)
    assert (batch["text"] != 0).any(1).all() and (batch["codes"] == batch_of(6, first=30, codes=True)["codes"]).all()


def test_noise_replaces_codes_of_its_share_of_the_samples():
    pool = torch.arange(1000, 5000).view(100, 40)
    codes = torch.zeros(300, 40, dtype=torch.long)
    text, positions = torch.ones(300, 3, dtype=torch.long), torch.arange(300)
    noise = CodeNoise(share=0.5, rate=0.8)
    empty, read = drawn_in_step(text, codes, positions, pool, noise, null_cond_prob=0.25, seed=0)
    assert 50 < int((empty == 0).all(1).sum()) < 100 and ((empty == 0).all(1) | (empty == 1).all(1)).all()
    changed = read != 0
    assert 120 < int(changed.any(1).sum()) < 180
    assert 0.3 < changed[changed.any(1)].float().mean() < 0.5
    # of one other picture at its place, or anywhere
    column = torch.arange(40).expand_as(read)
    assert 0.4 < ((read - 1000) % 40 == column)[changed].float().mean() < 0.65
    same = drawn_in_step(text, codes, positions, pool, CodeNoise(), null_cond_prob=0.0, seed=0)
    assert same[0] is text and same[1] is codes


def test_the_pool_is_the_runs_first_samples(words):
    class Source:
        n = 3

        def loader(self, **how):
            assert how["world"] == 1 and how["first_step"] == 0 and how["seed"] == 3
            assert how["batch"] == how["micro_batch"] == 3 and how["steps"] == 1
            return iter([batch_of(3)])

    config, model = dalle_config(code_noise={"share": 0.5, "rate": 0.5}), vae()
    pool = noise_pool(Source(), model, config)
    assert torch.equal(pool, model.get_codebook_indices(batch_of(3)["pixels"].float() / 255))
    assert noise_pool(Source(), model, dalle_config()) is None


def test_evaluation_counts_every_token_alike_and_has_no_noise(words):
    one = task(words, pool=POOL, code_noise={"share": 1.0, "rate": 1.0}, null_cond_prob=1.0)
    figures = one.evaluate([batch_of(3), batch_of(1, first=3)])
    parts = [one.evaluate([batch_of(3)]), one.evaluate([batch_of(1, first=3)])]
    assert figures["image_loss"] == pytest.approx((3 * parts[0]["image_loss"] + parts[1]["image_loss"]) / 4)
    # two, three and four of the first batch, five of the second
    assert figures["text_loss"] == pytest.approx((9 * parts[0]["text_loss"] + 5 * parts[1]["text_loss"]) / 14)
    batch = batch_of(1, first=3)
    loss = token_losses(one.model, batch["text"], codes_of(one, batch), codes_of(one, batch), padding_loss="first")
    assert parts[1]["image_loss"] == pytest.approx(loss[1].item())
    assert one.evaluate([]) == {}


@pytest.mark.parametrize("codes", [False, True])
def test_pictures_are_drawn_beside_what_was_read(words, codes):
    one = task(words)
    one.module.train()
    random = torch.get_rng_state()
    shown = one.pictures({**batch_of(6, codes=codes), "names": ["a.png"] * 6})["samples"]
    assert shown.dtype == torch.uint8 and shown.shape[0] == 3
    assert torch.equal(torch.get_rng_state(), random) and one.model.training
    assert torch.equal(shown, one.pictures(batch_of(6, codes=codes))["samples"])


def test_a_saved_model_has_its_tokenizer(words, tmp_path):
    one = DalleTask(dalle_config(tokenizer=str(tokenizer_file(tmp_path))), vae())
    (tmp_path / "out").mkdir()
    one.save(tmp_path / "out")
    saved = DALLE.from_pretrained(tmp_path / "out")
    text, codes = batch_of(2)["text"], POOL[:2]
    assert torch.equal(saved(text, codes), one.model.eval()(text, codes))
    assert (tmp_path / "out" / "tokenizer.json").read_text() == (tmp_path / "tokenizer.json").read_text()
    assert saved.num_text_tokens == 7 + 5, "the tokenizer's entries and the padding"


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"model": {"num_text_tokens": 3}}, r"num_text_tokens must be at least the 7 entries.*got 3\. Leave it out"),
        ({"code_noise": {"share": 0.1, "rate": 0.1}}, "code_noise must have a pool"),
        ({"model": {"widht": 3}}, "model must hold arguments of DALLE, got others.*widht"),
        ({"model": {"attn_types": ["fulll"]}}, "fulll"),
    ],
)
def test_wrong_settings_are_a_sentence(words, settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        task(words, **settings)
