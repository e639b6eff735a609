"""Models and sampler on a GPU: golden numbers, cached = uncached, the noise of the CPU. `make gpu` runs these."""

import pytest
import torch
from golden_cases import golden, names
from small_models import prompts, small_dalle

from dalle_fast.ops.gumbel_noise import gumbel_noise
from dalle_fast.rng import Stream, philox4x32

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def _products_in_float32():
    """Golden tolerances hold for float32 products, not for TF32."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


@pytest.mark.parametrize("name", names("dalle_loss"))
def test_golden_logits_and_loss(name):
    case = golden(name)
    model = case.build_dalle().cuda()
    text, image = case.inputs["text"].cuda(), case.inputs["image"].cuda()
    case.check("logits", model(text, image))
    case.check("loss", model(text, image, return_loss=True))


@pytest.mark.parametrize("cond_scale", [1.0, 2.5])
@pytest.mark.parametrize(
    "attn_types", ["full", "axial_row", "axial_col", "conv_like", ("full", "axial_row", "axial_col", "conv_like")]
)
def test_cached_equals_uncached_in_float64(attn_types, cond_scale):
    model, text = small_dalle(attn_types=attn_types).cuda(), prompts(3).cuda()
    settings = {"seed": 5, "filter_thres": 0.0, "cond_scale": cond_scale, "return_tokens": True}
    cached = model.generate_images(text, **settings)[1]
    assert torch.equal(cached, model.generate_images(text, use_cache=False, **settings)[1])


def test_float64_tokens_are_those_of_the_cpu():
    model, text = small_dalle(), prompts(3)
    settings = {"seed": 5, "filter_thres": 0.0, "return_tokens": True}
    on_cpu = model.generate_images(text, **settings)[1]
    assert torch.equal(model.cuda().generate_images(text.cuda(), **settings)[1].cpu(), on_cpu)


def test_words_equal_the_cpus_and_noise_is_within_two_ulp():
    counter = torch.arange(4096).view(-1, 4)
    words = philox4x32(counter, (3, 4))
    assert torch.equal(philox4x32(counter.cuda(), (3, 4)).cpu(), words)
    position = torch.arange(257)
    on_cpu = gumbel_noise(99, position, Stream.IMAGE_SAMPLING, 1001, impl="reference")
    on_gpu = gumbel_noise(99, position.cuda(), Stream.IMAGE_SAMPLING, 1001).cpu()
    spacing = torch.nextafter(on_cpu.abs(), torch.tensor(torch.inf)) - on_cpu.abs()
    assert bool(((on_gpu - on_cpu).abs() <= 2 * spacing).all())


def test_half_precision_draws_and_keeps_float32_angles():
    model = small_dalle(torch.float32).cuda().bfloat16()
    assert model.transformer.angles.dtype == torch.float32 and model.transformer.angles.is_cuda
    images = model.generate_images(prompts(2).cuda(), seed=1)
    assert images.dtype == torch.bfloat16 and bool(images.isfinite().all())


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16], ids=str)
def test_training_steps_lower_the_loss(precision):
    """Attention, head and loss by the kernels, parameters in float32, under autocast where precision is of 16 bits."""
    model, text = small_dalle(torch.float32).cuda().train(), prompts(4).cuda()
    image = torch.randint(30, (4, 64), generator=torch.Generator().manual_seed(0)).cuda()
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(30):
        with torch.autocast("cuda", torch.bfloat16, enabled=precision == torch.bfloat16):
            loss = model(text, image, return_loss=True)
        optimiser.zero_grad()
        loss.backward()
        assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in model.parameters())
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
