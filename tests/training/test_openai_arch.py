"""`train-vae --arch openai`: the paper's model, loss and schedules; what it saves feeds `encode` and `train`."""

from __future__ import annotations

import pytest
import torch
from click.testing import CliRunner
from data_folders import write_folder
from tiny_tasks import batch_of, dalle_config, tokenizer, tokenizer_file, vae_config

from dalle_fast.cli.__main__ import main
from dalle_fast.models.dalle import DALLE
from dalle_fast.models.logit_laplace import logit_laplace_loss
from dalle_fast.models.openai_dvae import OpenAIDiscreteVAE
from dalle_fast.ops.gumbel_codebook import gumbel_codebook
from dalle_fast.training import schedules
from dalle_fast.training.config import resolve
from dalle_fast.training.tasks.dalle import DalleTask
from dalle_fast.training.tasks.vae import VaeTask

MODEL = {"image_size": 16, "num_tokens": 12, "hidden_dim": 8, "codebook_dim": 6, "blocks_per_group": 1}
KL = {"start": 0.0, "end": 6.6, "steps": 10, "shape": "cosine"}


def config(**settings):
    """`vae_config` without the arguments of DiscreteVAE."""
    made = vae_config(arch="openai", **settings)
    return made.model_copy(update={"model": MODEL | settings.get("model", {})})


def task(**settings):
    torch.manual_seed(0)
    return VaeTask(config(**settings))


def test_the_loss_is_the_papers():
    """(sum of -ln f + beta sum of KL) over the numbers of a picture."""
    one, batch = task(kl=KL), batch_of(3, first=20)
    loss, parts = one.module(batch, 5, 0.05)
    assert isinstance(one.model, OpenAIDiscreteVAE)
    images = batch["pixels"].float() / 255
    plain = OpenAIDiscreteVAE(from_scratch=True, **MODEL, kl_div_loss_weight=1.0)
    plain.load_state_dict(one.model.state_dict())
    _, statistics = plain(
        images, return_loss=True, return_statistics=True, temp=1.0, seed=3 * 1_000_003 + 5, first_row=0
    )
    numbers = 3 * 16 * 16
    expected = statistics.reconstruction + 3.3 * statistics.penalty / 3 / numbers
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert parts["kl_weight"].item() == pytest.approx(3.3)
    log_q = plain(images, return_logits=True).log_softmax(1)
    kl = (log_q.exp() * (log_q + torch.tensor(12.0).log())).sum()
    assert statistics.penalty.item() == pytest.approx(kl.item(), rel=1e-4)


def test_the_bottleneck_is_the_mixed_codebook_through_the_decoder():
    """What the fused op gives is the paper's 1x1 convolution of the softmax; gradients reach everything."""
    torch.manual_seed(0)
    vae = OpenAIDiscreteVAE(from_scratch=True, **MODEL).double()
    images = batch_of(2)["pixels"].double() / 255
    noise = torch.randn(2, 12, 2, 2, dtype=torch.float64)
    loss, recons = vae(images, return_loss=True, return_recons=True, temp=0.7, gumbel_noise=noise)
    weights = ((vae(images, return_logits=True) + noise) / 0.7).softmax(1)
    maps = vae.decoder(torch.einsum("bkhw,kd->bdhw", weights, vae.codebook.weight))
    assert loss.item() == pytest.approx(logit_laplace_loss(maps, 0.8 * images + 0.1).item(), rel=1e-12)
    assert torch.allclose(recons, ((maps[:, :3].sigmoid() - 0.1) / 0.8).clamp(0, 1))
    loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in vae.parameters())


def test_parts_of_a_batch_meet_the_noise_of_the_whole():
    whole, parts = task(batch=4), task(batch=4)
    loss, _ = whole.module(batch_of(4, first=8), 2, 0.0)
    losses = [parts.module(batch_of(2, first=8 + 2 * i), 2, 0.0)[0] for i in range(2)]
    assert sum(losses).item() / 2 == pytest.approx(loss.item(), rel=1e-5)


def test_the_loss_falls_and_figures_are_logged():
    one, batch = task(kl=KL), batch_of(4)
    colours = torch.tensor([[230, 20, 20], [20, 200, 40], [10, 20, 240], [250, 250, 250]], dtype=torch.uint8)
    batch["pixels"] = colours[:, :, None, None].expand_as(batch["pixels"]).contiguous()
    optimizer = torch.optim.AdamW(one.model.parameters(), lr=3e-3)
    losses = []
    for step in range(40):
        loss, parts = one.module(batch | {"position": torch.arange(4) + 4 * step}, step, step / 40)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(parts["reconstruction"].item())
    assert losses[-1] < losses[0] - 0.5
    row = one.figures()
    assert row["codes_used"] >= 1 and row["error_hard"] == row["error_hard"]
    assert set(one.evaluate([batch])) == {"psnr", "codes_used", "perplexity"}
    assert one.pictures(batch)["reconstructions"].shape == (3, 32, 64)


def test_mixed_precision_keeps_the_bottleneck_and_the_loss_in_float32(monkeypatch):
    seen = []

    def watched(*tensors, **options):
        seen.extend(tensor.dtype for tensor in tensors)
        result = gumbel_codebook(*tensors, **options)
        seen.append(result[0].dtype)
        return result

    monkeypatch.setattr("dalle_fast.models.openai_dvae.gumbel_codebook", watched)
    one, convolved = task(), []
    one.model.decoder.output.register_forward_hook(lambda module, inputs, output: convolved.append(output.dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, _ = one.module(batch_of(2), 0, 0.0)
    loss.backward()
    assert seen == [torch.float32] * 5 and loss.dtype == torch.float32
    assert convolved[0] == torch.bfloat16, "the rest is mixed"
    assert all(p.grad.dtype == torch.float32 for p in one.model.parameters())


def test_the_preset_has_the_papers_schedules():
    paper = resolve("vae", preset="openai", overrides=["data.source=x"])
    assert paper.arch == "openai" and paper.model == {}
    assert [schedules.ramp(paper.temperature, step) for step in (0, 75_000, 150_000, 10**6)] == pytest.approx(
        [1, (1 + 1 / 16) / 2, 1 / 16, 1 / 16]
    )
    assert [schedules.ramp(paper.kl, step) for step in (0, 2_500, 5_000, 10**6)] == pytest.approx([0, 3.3, 6.6, 6.6])
    rates = [
        schedules.learning_rate(paper.optimiser, paper.schedule, step, paper.loop.steps, None)
        for step in (0, 600_000, 1_200_000, 3_000_000)
    ]
    assert rates == pytest.approx([1e-4, (1e-4 + 1.25e-6) / 2, 1.25e-6, 1.25e-6])
    assert paper.optimiser.weight_decay == 1e-4 and paper.loop.ema_decay == 0.999 and paper.loop.batch == 512


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"l1_weight": 0.1}, "l1_weight must be left out with arch=openai, got 0.1"),
        ({"fold": True}, "fold must be left out with arch=openai"),
        ({"plain_steps": 3}, "plain_steps must be left out with arch=openai, got 3"),
        ({"model": {"quantizer": "vq"}}, "model must hold arguments of OpenAIDiscreteVAE"),
        ({"model": {"encoder_path": "x"}}, "encoder_path must be left out with from_scratch=True, got x"),
        ({"model": {"kl_div_loss_weight": 1}}, "kl_div_loss_weight must be left out"),
    ],
)
def test_what_is_not_for_it_is_refused(settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        task(**settings)


def call(*arguments, fails=None):
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert (result.exit_code == 0) == (fails is None), (result.output, result.exception)
    assert fails is None or fails in " ".join(result.output.split()), result.output
    return result.output


def test_from_pictures_to_a_dalle(tmp_path):
    write_folder(tmp_path / "pictures")
    sizes = [part for name, value in MODEL.items() for part in ("--set", f"model.{name}={value}")]
    quiet = ["--workers", 0, "--batch", 4]
    command = ["train-vae", tmp_path / "pictures", tmp_path / "vae", "--arch", "openai", *quiet, *sizes]
    said = call(*command, "--steps", 3, "--precision", "no")
    assert f"dalle-fast encode {tmp_path / 'pictures'} --vae {tmp_path / 'vae'}" in said
    trained = OpenAIDiscreteVAE.from_pretrained(tmp_path / "vae" / "model")
    assert trained.config == OpenAIDiscreteVAE(from_scratch=True, **MODEL).config, "no step's KL weight"
    call("encode", tmp_path / "pictures", "--vae", tmp_path / "vae", "--out", tmp_path / "codes", "--workers", 0)
    tokenizer_file(tmp_path)
    dalle = [part for size in ("dim=16", "depth=1", "heads=1", "dim_head=12", "text_seq_len=5", "attn_types=[full]")
             for part in ("--set", f"model.{size}")]  # fmt: skip
    call("train", tmp_path / "codes", tmp_path / "dalle", "--vae", tmp_path / "vae", "--tokenizer",
         tmp_path / "tokenizer.json", "--steps", 2, *quiet, *dalle, "--set", "data.truncate=true")  # fmt: skip
    assert isinstance(DALLE.from_pretrained(tmp_path / "dalle" / "model").vae, OpenAIDiscreteVAE)
    call(*command, "--preset", "small", "--steps", 3, fails="must be left out with arch=openai")
    call(*command, "--steps", 3, "--upstream-checkpoint", tmp_path / "vae.pt", fails="got OpenAIDiscreteVAE")


def test_end_to_end_training_reaches_its_encoder_and_decoder(tmp_path):
    torch.manual_seed(0)
    vae = OpenAIDiscreteVAE(from_scratch=True, **MODEL)
    one = DalleTask(dalle_config(end_to_end=True), vae, tokenizer(tmp_path))
    loss, parts = one.module(batch_of(3), 0, 0.0)
    loss.backward()
    assert parts["reconstruction"].isfinite()
    assert all(p.grad is not None and p.grad.any() for p in vae.parameters())
    assert {"codes_used", "error_soft"} <= set(one.figures())
