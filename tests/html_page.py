"""A page as a reader or a browser sees it, and what every report must be: one file that a phone can show."""

from __future__ import annotations

import re
from html.parser import HTMLParser

VOID = {"meta", "br", "wbr", "use", "image"}
FETCHING = {"script", "link", "img", "iframe", "object", "embed", "video", "audio", "source", "base"}


class Page(HTMLParser):
    """Checks that elements nest, and keeps what a reader or a browser would see."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.source = text
        self.open: list[str] = []
        self.text: list[str] = []
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        """Element, name, value."""
        self.parents: list[tuple[str, ...]] = []
        """Of each of `tags`, outermost first."""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.parents.append(tuple(self.open))
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        self.ids += [value or "" for name, value in attrs if name == "id"]

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    @property
    def words(self) -> str:
        return " ".join("".join(self.text).split())

    def values(self, tag: str, name: str) -> list[str]:
        return [value for each, key, value in self.attributes if (each, key) == (tag, name)]

    def inside(self, tag: str) -> list[str]:
        """What each element `tag` is directly in."""
        return [parents[-1] for each, parents in zip(self.tags, self.parents, strict=True) if each == tag]


def assert_one_file_for_a_phone(page: Page) -> None:
    """Nothing is fetched; ids are unique and links meet them; tables scroll in a box; figures say what they are."""
    assert "://" not in page.source and "@import" not in page.source
    assert not FETCHING & set(page.tags)
    assert not {"src", "srcset", "data", "action", "poster"} & {name for _, name, _ in page.attributes}
    for value in [value for _, name, value in page.attributes if name == "href"]:
        assert value.startswith(("#", "data:image/png;base64,")), value
    assert len(set(page.ids)) == len(page.ids), "ids collide"
    targets = [first or second for first, second in re.findall(r'href="#([^"]+)|url\(#([^)]+)', page.source)]
    assert set(targets) <= set(page.ids)
    assert page.source.isascii() and page.source.startswith("<!DOCTYPE html>")
    assert page.values("html", "lang") == ["en"] and page.tags.count("title") == page.tags.count("h1") == 1
    assert "width=device-width, initial-scale=1" in page.values("meta", "content")
    assert page.tags.count("table") == page.tags.count("caption") == page.values("div", "class").count("scroll")
    assert set(page.inside("table")) <= {"div"}
    assert re.search(r"\.scroll \{[^}]*overflow-x: auto", page.source)
    assert set(page.inside("svg")) == {"figure"} and page.values("svg", "role") == ["img"] * page.tags.count("svg")
    assert page.tags.count("figure") == page.tags.count("figcaption") == page.tags.count("svg")
    assert all(page.values("svg", "aria-label")) and len(page.values("svg", "aria-label")) == page.tags.count("svg")
