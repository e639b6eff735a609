"""What a model has never read, and the captions nearest to it."""

from dalle_fast.jobs.prompts import KnownCaptions

CAPTIONS = KnownCaptions(["red apple", "green apple", "grinning face", "grinning cat", "Flag of Chad", "cat's eye"])


def test_unknown_words_are_named_once_and_in_order():
    assert CAPTIONS.unknown_words("a purple Apple in a purple hat") == ["a", "purple", "in", "hat"]
    assert CAPTIONS.unknown_words("FLAG of chad, cat's eye!") == []


def test_nearest_captions_share_words_before_letters():
    assert CAPTIONS.nearest("a grining cat", 1) == ["grinning cat"]
    assert set(CAPTIONS.nearest("apple pie", 2)) == {"red apple", "green apple"}
    assert len(CAPTIONS.nearest("xyzzy", 3)) == 3
