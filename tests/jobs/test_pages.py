"""Pages: what comes from outside stays text, a prompt's page needs no other file, the best picture comes first."""

import base64
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image
from stored_jobs import HOSTILE

from dalle_fast.jobs.pages import Picture, PromptOnIndex, gallery_page, index_page, shortened

VOID = ("meta", "img")
EXPECTED = {
    *("html", "head", "meta", "title", "style", "body", "h1", "h2", "p", "details", "summary", "dl", "dt", "dd"),
    *("main", "section", "div", "figure", "figcaption", "img", "b", "span", "a"),
}


class Page(HTMLParser):
    """A parsed page: its elements as (tag, attributes, the text in them)."""

    def __init__(self, html: bytes) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict, list]] = []
        self._open: list[tuple[str, dict, list]] = []
        self.feed(html.decode("utf-8"))
        self.close()
        assert not self._open, "every element is closed"

    def handle_starttag(self, tag, attrs):
        assert tag in EXPECTED, f"a {tag} that no template has"
        element = (tag, dict(attrs), [])
        assert len(element[1]) == len(attrs)
        self.elements.append(element)
        if tag not in VOID:
            self._open.append(element)

    def handle_endtag(self, tag):
        assert self._open.pop()[0] == tag

    def handle_data(self, data):
        for _, _, text in self._open:
            text.append(data)

    def handle_comment(self, data):
        raise AssertionError("no template has comments")

    def texts(self, tag):
        return ["".join(text) for name, _, text in self.elements if name == tag]

    def attributes(self, tag):
        return [attributes for name, attributes, _ in self.elements if name == tag]


def pictures(folder: Path, n=3, size=(4, 4), scored=True) -> list[Picture]:
    made = []
    for i in range(n):
        path = folder / f"{i}.png"
        Image.new("RGB", size, (i * 40, 0, 0)).save(path)
        made.append(Picture(f"000000-{i:05d}", i, 2**64 - 1 - i, 0.75 - i / 4 if scored else None, path))
    return made


def gallery(prompt: str, shown: list[Picture], **changes) -> Page:
    options = {"n_drawn": 8, "ranked": True, "facts": {"model": "/m", "temperature": 0.9}} | changes
    return Page(b"".join(gallery_page(prompt, shown, **options)))


@pytest.mark.parametrize("prompt", HOSTILE, ids=range(len(HOSTILE)))
def test_whatever_a_prompt_holds_is_text(prompt, tmp_path):
    page = gallery(prompt, pictures(tmp_path), facts={prompt: prompt, "rank": prompt})
    assert page.texts("h1") == [prompt] and page.texts("title") == [shortened(prompt)]
    assert page.texts("dt") == [prompt, "rank"] and page.texts("dd") == [prompt] * 2
    assert {image["alt"] for image in page.attributes("img")} == {
        f"{shortened(prompt)}, seed {2**64 - 1 - i}" for i in range(3)
    }
    assert not any(name.startswith("on") for _, attributes, _ in page.elements for name in attributes)

    prompts = [PromptOnIndex(prompt, "galleries/000000.html", (f"images/{prompt}.png",))]
    index = Page(b"".join(index_page(prompts, n_prompts=1, n_drawn=8, first_image=tmp_path / "0.png")))
    assert index.texts("h2") == [prompt]
    assert [image["src"] for image in index.attributes("img")] == [f"images/{prompt}.png"]
    assert not any(name.startswith("on") for _, attributes, _ in index.elements for name in attributes)


def test_headings_keep_lines_and_directions_of_their_own(tmp_path):
    page = gallery("a\nb", pictures(tmp_path))
    assert page.attributes("h1") == [{"dir": "auto"}] and "white-space: pre-wrap" in page.texts("style")[0]


def test_a_prompts_page_needs_no_other_file(tmp_path):
    shown = pictures(tmp_path)
    page = gallery("red apple", shown)
    sources = [image["src"] for image in page.attributes("img")]
    assert [base64.b64decode(source.removeprefix("data:image/png;base64,")) for source in sources] == [
        picture.path.read_bytes() for picture in shown
    ]
    assert not {"script", "link", "iframe"} & {tag for tag, _, _ in page.elements}
    assert not any({"href", "srcset"} & set(attributes) for _, attributes, _ in page.elements)
    assert "url(" not in page.texts("style")[0] and "@import" not in page.texts("style")[0]


def test_pictures_have_score_and_seed_under_them_in_the_order_given(tmp_path):
    page = gallery("red apple", pictures(tmp_path))
    assert page.texts("figcaption") == [
        f"{score}seed {2**64 - 1 - i}" for i, score in enumerate(("0.75", "0.5", "0.25"))
    ]
    assert "8 pictures drawn, the best 3 kept, best first" in page.texts("p")
    plain = gallery("red apple", pictures(tmp_path, scored=False), n_drawn=3, ranked=False)
    assert plain.texts("figcaption") == [f"seed {2**64 - 1 - i}" for i in range(3)]
    assert "3 pictures drawn, all kept" in plain.texts("p")


def test_settings_stand_in_a_details_block(tmp_path):
    page = gallery("red apple", pictures(tmp_path))
    assert page.texts("summary") == ["Settings"]
    assert page.texts("dt") == ["model", "temperature"] and page.texts("dd") == ["/m", "0.9"]


@pytest.mark.parametrize(
    ("size", "shown", "enlarged"),
    [
        ((4, 4), 256, True),
        ((100, 60), 200, True),
        ((128, 128), 256, True),
        ((256, 256), 256, False),
        ((300, 200), 300, False),
        ((1024, 512), 512, False),
    ],
)
def test_small_pictures_are_enlarged_by_whole_pixels(size, shown, enlarged, tmp_path):
    page = gallery("red apple", pictures(tmp_path, size=size))
    assert page.attributes("main")[0]["style"] == f"--shown: {shown}px"
    for image in page.attributes("img"):
        assert (int(image["width"]), int(image["height"])) == size
        assert image.get("class") == ("enlarged" if enlarged else None)
    assert not enlarged or shown % size[0] == 0


def test_pages_follow_the_readers_choice_of_dark_or_light(tmp_path):
    page = gallery("red apple", pictures(tmp_path))
    assert {"name": "color-scheme", "content": "light dark"} in page.attributes("meta")
    assert "prefers-color-scheme: dark" in page.texts("style")[0]


def test_the_index_links_to_every_page_with_its_best_pictures(tmp_path):
    pictures(tmp_path)
    prompts = [
        PromptOnIndex(f"p{i}", f"galleries/{i:06d}.html", (f"images/{i}-a.png", f"images/{i}-b.png")) for i in (0, 1)
    ]
    page = Page(b"".join(index_page(iter(prompts), n_prompts=2, n_drawn=512, first_image=tmp_path / "0.png")))
    assert page.attributes("main") == [{"style": "--shown: 128px"}]
    assert page.texts("h1") == ["2 prompts"] and page.texts("p") == ["512 pictures drawn each"]
    links = [link["href"] for link in page.attributes("a")]
    assert links == [page for i in (0, 1) for page in [f"galleries/{i:06d}.html"] * 3]
    assert [image["src"] for image in page.attributes("img")] == [f"images/{i}-{x}.png" for i in (0, 1) for x in "ab"]


def test_equal_input_gives_equal_pages(tmp_path):
    shown = pictures(tmp_path)
    pages = {b"".join(gallery_page("a", shown, n_drawn=3, ranked=True, facts={"x": 1})) for _ in range(3)}
    assert len(pages) == 1


def test_a_page_is_made_picture_by_picture(tmp_path, monkeypatch):
    """512 large pictures must not be in memory at a time."""
    read = []
    monkeypatch.setattr(Picture, "data_uri", lambda self: read.append(self.name) or "data:")
    pieces = gallery_page("a", pictures(tmp_path, n=20), n_drawn=20, ranked=True, facts={})
    seen = 0
    for piece in pieces:
        assert len(read) <= seen + 5
        seen += piece.count(b"</figure>")
    assert seen == len(read) == 20


def test_long_prompts_are_cut_in_the_title_alone():
    assert shortened(" a\n b ") == "a b"
    assert len(shortened("x" * 500)) == 80 and shortened("x" * 80) == "x" * 80
