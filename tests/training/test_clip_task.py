"""Training a CLIP: the loss of the global batch on one process and on two, recall, what is saved."""

import pytest
import torch
import torch.multiprocessing as mp
from tiny_tasks import WORDS, batch_of, clip_config, tokenizer, tokenizer_file
from torch import distributed
from two_processes import meeting

from dalle_fast.models.clip import CLIP
from dalle_fast.training.tasks.clip import ClipTask, latents, text_mask


class Words:
    """Stands for a tokenizer where only its size matters."""

    vocab_size = len(WORDS)


def task(**settings):
    torch.manual_seed(0)
    return ClipTask(clip_config(**settings), Words())


def images(batch):
    return batch["pixels"].float() / 255


def test_the_loss_is_the_models_own_without_padding():
    one = task()
    batch = batch_of(4)
    loss, parts = one.module(batch, 0, 0.0)
    wanted = one.model(batch["text"], images(batch), text_mask=batch["text"] != 0, return_loss=True)
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-6)
    assert parts["temperature"] == 1.0 and 0 <= parts["batch_recall"] <= 1
    loss.backward()
    assert all(p.grad is not None for _, p in one.parameters_for())


def test_an_empty_text_has_a_token():
    assert text_mask(torch.tensor([[3, 4, 0], [0, 0, 0]])).tolist() == [[True, True, False], [True, False, False]]
    one = task()
    assert torch.isfinite(one.module(batch_of(4) | {"text": torch.zeros(4, 5, dtype=torch.long)}, 0, 0.0)[0])


def gradients_of(rank, folder):
    with meeting(rank, folder):
        one = task(batch=6)
        loss, _ = one.module(batch_of(3, first=3 * rank), 0, 0.0)
        loss.backward()
        for _, parameter in one.parameters_for():  # as DistributedDataParallel
            distributed.all_reduce(parameter.grad)
            parameter.grad /= 2
        torch.save((loss.detach(), {name: p.grad for name, p in one.parameters_for()}), f"{folder}/{rank}.pt")


def test_two_processes_have_the_loss_and_gradients_of_one_with_the_whole_batch(tmp_path):
    mp.spawn(gradients_of, args=(str(tmp_path),), nprocs=2)
    one = task(batch=6)
    loss, _ = one.module(batch_of(6), 0, 0.0)
    loss.backward()
    for rank in range(2):
        theirs, gradients = torch.load(tmp_path / f"{rank}.pt")
        torch.testing.assert_close(theirs, loss.detach())
        for name, parameter in one.parameters_for():
            torch.testing.assert_close(gradients[name], parameter.grad, msg=name)


def test_recall_is_counted_over_all_held_out_pairs():
    one = task()
    whole = batch_of(7)
    figures = one.evaluate([batch_of(4), batch_of(3, first=4)])
    with torch.no_grad():
        texts, pictures = latents(one.model, whole["text"], images(whole))
    similarity = texts @ pictures.t()
    hits = (
        sum(int(similarity[i].argmax()) == i for i in range(7)),
        sum(int(similarity[:, i].argmax()) == i for i in range(7)),
    )
    assert figures["recall_text_to_picture"] == pytest.approx(hits[0] / 7)
    assert figures["recall_picture_to_text"] == pytest.approx(hits[1] / 7)
    assert figures["pairs"] == 7 and one.evaluate([]) == {}
    assert one.figures() == {} and one.pictures(whole) == {}


def test_a_step_takes_the_whole_batch():
    with pytest.raises(ValueError, match=r"whole share of the batch, 4 of 4 on 1 process, got 2\. Accumulation cannot"):
        task().module(batch_of(2), 0, 0.0)
    config = clip_config()
    loop = config.loop.model_copy(update={"micro_batch": 2})
    with pytest.raises(ValueError, match="micro_batch must be a process's whole share"):
        ClipTask(config.model_copy(update={"loop": loop}), Words())


def test_a_saved_model_has_its_tokenizer(tmp_path):
    one = ClipTask(clip_config(tokenizer=str(tokenizer_file(tmp_path))), tokenizer(tmp_path))
    (tmp_path / "out").mkdir()
    one.save(tmp_path / "out")
    saved = CLIP.from_pretrained(tmp_path / "out")
    assert saved.num_text_tokens == len(WORDS) and (tmp_path / "out" / "tokenizer.json").is_file()
    batch = batch_of(2)
    assert torch.equal(saved(batch["text"], images(batch)), one.model.eval()(batch["text"], images(batch)))


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"model": {"num_text_tokens": 3}}, r"num_text_tokens must be at least the 7 entries.*got 3\. Leave it out"),
        ({"model": {"visual_patch_size": 5}}, "visual_patch_size must divide visual_image_size=16, got 5"),
        ({"model": {"depth": 5}}, "model must hold arguments of CLIP, got others.*depth"),
    ],
)
def test_wrong_settings_are_a_sentence(settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        task(**settings)
