"""What the README of dalle-pytorch 1.6.6 shows runs after replacing the package's name; sizes are smaller here.

Its sections, in its order. Left out: OpenAIDiscreteVAE and VQGanVAE (they need downloaded weights; tests/compat has
their twins), and `mask=` of generate_images, which 1.6.6 itself no longer takes.
"""

import math

import pytest
import torch
from golden_cases import FOLDER, golden
from PIL import Image

IMAGE_SIZE = 32
VAE = {"image_size": IMAGE_SIZE, "num_layers": 3, "num_tokens": 48, "codebook_dim": 16, "hidden_dim": 8}
DALLE_SIZES = {"dim": 32, "num_text_tokens": 50, "text_seq_len": 12, "heads": 2, "dim_head": 12}
CLIP_SIZES = {
    "dim_text": 16,
    "dim_image": 16,
    "dim_latent": 16,
    "num_text_tokens": 50,
    "text_enc_depth": 1,
    "text_seq_len": 12,
    "text_heads": 2,
    "num_visual_tokens": 48,
    "visual_enc_depth": 1,
    "visual_image_size": IMAGE_SIZE,
    "visual_patch_size": 16,
    "visual_heads": 2,
}
N_CODES = (IMAGE_SIZE // 2**3) ** 2


def batch():
    text = torch.randint(0, DALLE_SIZES["num_text_tokens"], (2, DALLE_SIZES["text_seq_len"]))
    return text, torch.randn(2, 3, IMAGE_SIZE, IMAGE_SIZE)


def make_dalle(**options):
    from dalle_fast import DALLE, DiscreteVAE

    vae = DiscreteVAE(**VAE, num_resnet_blocks=1, temperature=0.9)
    return DALLE(vae=vae, **{**DALLE_SIZES, "depth": 2, **options})


def train_a_step(loss, *models):
    """The loss is a number, its gradient reaches every parameter that is trained."""
    assert loss.shape == () and math.isfinite(loss.item())
    loss.backward()
    for model in models:
        trained = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
        assert trained and all(grad is not None and grad.isfinite().all() for grad in trained.values())


def check_images(images):
    assert images.shape == (2, 3, IMAGE_SIZE, IMAGE_SIZE)
    assert images.isfinite().all()


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.mark.parametrize("straight_through", [False, True])
def test_train_a_discrete_vae(straight_through):
    from dalle_fast import DiscreteVAE

    vae = DiscreteVAE(**VAE, num_resnet_blocks=1, temperature=0.9, straight_through=straight_through)
    loss = vae(batch()[1], return_loss=True)
    train_a_step(loss, vae)


def test_train_dalle_and_generate():
    dalle = make_dalle(attn_dropout=0.1, ff_dropout=0.1)
    text, images = batch()
    train_a_step(dalle(text, images, return_loss=True), dalle)
    check_images(dalle.generate_images(text))


def test_prime_with_the_start_of_an_image():
    dalle = make_dalle()
    text, img_prime = batch()
    n_kept = 2 * 4  # two of the four rows of codes
    images, tokens = dalle.generate_images(text, img=img_prime, num_init_img_tokens=n_kept, return_tokens=True)
    check_images(images)
    assert tokens.shape == (2, N_CODES)
    assert torch.equal(tokens[:, :n_kept], dalle.vae.get_codebook_indices(img_prime)[:, :n_kept])
    check_images(dalle.generate_images(text, img=img_prime))


def test_generate_texts():
    from dalle_fast.tokenizer import HugTokenizer

    tokenizer = HugTokenizer(FOLDER / golden("tokenizer").spec["hug_file"])
    # The vocabulary needs room for every id of the tokenizer.
    dalle = make_dalle(num_text_tokens=tokenizer.vocab_size)
    text_tokens, texts = dalle.generate_texts(tokenizer, "a red")
    prompt = tokenizer.encode("a red")
    assert text_tokens.shape[-1] == DALLE_SIZES["text_seq_len"]
    assert text_tokens.flatten()[: len(prompt)].tolist() == prompt
    assert len(texts) == 1 and texts[0].startswith("a red")


def test_adjust_the_strength_of_text_conditioning():
    dalle = make_dalle()
    text, images = batch()
    before = text.clone()
    train_a_step(dalle(text, images, return_loss=True, null_cond_prob=0.2), dalle)
    check_images(dalle.generate_images(text, cond_scale=3.0))
    assert torch.equal(text, before)


def test_train_clip_and_rank_the_generations():
    from dalle_fast import CLIP

    clip = CLIP(**CLIP_SIZES)
    text, images = batch()
    mask = torch.ones_like(text).bool()
    train_a_step(clip(text, images, text_mask=mask, return_loss=True), clip)

    images, scores = make_dalle().generate_images(text, clip=clip)
    check_images(images)
    assert scores.shape == (2,) and scores.isfinite().all()
    ranked = images[scores.topk(1).indices]
    assert ranked.shape == (1, 3, IMAGE_SIZE, IMAGE_SIZE)


@pytest.mark.parametrize(
    "options",
    [
        {"depth": 4, "reversible": True},
        {"depth": 4, "reversible": True, "attn_types": ("full", "axial_row", "axial_col", "conv_like")},
        {"depth": 2, "attn_types": ("full", "sparse")},
        {"depth": 4, "shared_attn_ids": (0, 1, 0, 1), "shared_ff_ids": (0, 0, 1, 1)},
        {"depth": 2, "share_input_output_emb": True, "stable": True, "sandwich_norm": True},
        {"depth": 2, "shift_tokens": False, "rotary_emb": False, "optimize_for_inference": True, "loss_img_weight": 3},
    ],
    ids=lambda options: "-".join(options),
)
def test_scale_depth_and_choose_attention(options):
    dalle = make_dalle(**options)
    text, images = batch()
    train_a_step(dalle(text, images, return_loss=True), dalle)
    check_images(dalle.generate_images(text))


def test_train_from_an_image_text_folder(tmp_path):
    """The layout that the README draws: pictures and texts of one name, a caption a line, in any subfolder."""
    from torch.utils.data import DataLoader

    from dalle_fast.loader import TextImageDataset
    from dalle_fast.tokenizer import HugTokenizer

    (tmp_path / "pets").mkdir()
    for name, color in (("cat.png", "gray"), ("dog.jpg", "brown"), ("pets/turtle.jpeg", "green")):
        Image.new("RGB", (40, 36), color).save(tmp_path / name)
        captions = tmp_path / f"{name.rpartition('.')[0]}.txt"
        captions.write_text("a picture of a pet by the house\na small one on a branch\n")
    tokenizer = HugTokenizer(bpe_path=FOLDER / golden("tokenizer").spec["hug_file"])
    pairs = TextImageDataset(
        tmp_path, text_len=12, image_size=IMAGE_SIZE, truncate_captions=True, tokenizer=tokenizer, shuffle=True
    )
    assert len(pairs) == 3
    text, images = next(iter(DataLoader(pairs, batch_size=3, shuffle=True)))
    dalle = make_dalle(num_text_tokens=tokenizer.vocab_size)
    train_a_step(dalle(text, images, return_loss=True), dalle)


def test_tokenize_and_generate_as_its_generate_script_does():
    """Prompts separated by '|', CLIP's tokenizer, pictures in chunks, the model kept as a checkpoint's dict."""
    from dalle_fast.tokenizer import tokenizer

    typed = "a small dog|a cat chasing mice"
    try:
        prompts = [tokenizer.tokenize([text], 12, truncate_text=True) for text in typed.split("|")]
    except FileNotFoundError as error:
        pytest.skip(str(error))
    dalle = make_dalle(num_text_tokens=tokenizer.vocab_size)
    again = make_dalle(num_text_tokens=tokenizer.vocab_size)
    again.load_state_dict(dalle.state_dict())
    for prompt in prompts:
        text = prompt.repeat(2, 1)
        outputs = [again.generate_images(chunk, filter_thres=0.9) for chunk in text.split(1)]
        check_images(torch.cat(outputs))
