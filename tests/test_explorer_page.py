"""A page is one file: hostile tokens stay text, the same data give the same bytes, nothing else is replaced."""

import base64
import gzip
import hashlib
import html.parser
import json

import pytest

from sae_lib.explorer import page as page_module
from sae_lib.explorer.page import MOST_BYTES, page, sizes, write

HOSTILE = [
    "<script>",
    "</script><img src=x onerror=alert(1)>",
    "<!--",
    "]]>",
    "&lt;",
    "'\"`\\",
    "\u2028\u2029\n\r\0",
    "\ud83d",  # half an emoji
    "\udcff",  # a byte that is no text
    "👩‍👩‍👧",
    "\u202eright to left: שלום مرحبا",
    "{{style}}{{script}}",
    "€",
]


class Elements(html.parser.HTMLParser):
    """The elements of a page, and what its scripts hold."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.scripts, self.title, self.inside = [], {}, "", None
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.inside = (tag, dict(attributes).get("id"))

    def handle_endtag(self, tag):
        self.inside = None

    def handle_data(self, data):
        if self.inside == ("title", None):
            self.title += data
        elif self.inside and self.inside[0] == "script":
            self.scripts[self.inside[1]] = self.scripts.get(self.inside[1], "") + data


@pytest.fixture
def template(tmp_path, monkeypatch):
    """A template of one line a marker."""
    folder = tmp_path / "template"
    folder.mkdir()
    (folder / "explorer.html").write_text(
        "<!doctype html><meta charset=utf-8><title>{{title}}</title>\n<style>{{style}}</style>\n"
        "<main></main>\n{{data}}\n<script>{{script}}</script>\n<!-- '{{style_hash}}' '{{script_hash}}' -->"
    )
    (folder / "explorer.css").write_text("main { color: red }")
    for number, name in enumerate(page_module.SCRIPTS):
        (folder / name).write_text(f'"use strict"; // {{{{title}}}} is no marker in file {number}')
    monkeypatch.setattr(page_module, "FOLDER", folder)


def small(title="A title", tokens=("a",)):
    """An index with one set of one part, and its parts."""
    index = {
        "title": title,
        "vocab": list(tokens),
        "documents": "explorer-documents",
        "sets": [{"parts": ["explorer-part-0"]}],
    }
    return index, {"explorer-documents": {"tokens": [[0]]}, "explorer-part-0": [{"examples": [[0, 0, 1.5]]}]}


def test_a_page_holds_its_data_and_nothing_is_fetched(template):
    index, parts = small()
    made = page(index, parts)
    read = Elements(made)
    assert json.loads(read.scripts["explorer-index"]) == index
    unpacked = {name: json.loads(gzip.decompress(base64.b64decode(read.scripts[name]))) for name in parts}
    assert unpacked == parts
    assert "main { color: red }" in made
    script = "\n".join(
        f'"use strict"; // {{{{title}}}} is no marker in file {i}' for i in range(len(page_module.SCRIPTS))
    )
    assert read.scripts[None] == script
    for text in ("main { color: red }", script):
        assert f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'" in made


@pytest.mark.parametrize("hostile", HOSTILE, ids=ascii)
def test_tokens_of_any_kind_stay_text_and_come_back_whole(template, hostile):
    plain, made = Elements(page(*small())), page(*small(hostile.replace("\ud83d", "").replace("\udcff", ""), [hostile]))
    read = Elements(made)
    assert read.tags == plain.tags, "no element more than without it"
    assert json.loads(read.scripts["explorer-index"])["vocab"] == [hostile]
    assert made.isascii()


def test_a_title_with_half_a_surrogate_pair_is_shown(template):
    assert "&#55357;" in page(*small("\ud83d"))


def test_the_same_data_give_the_same_bytes(template, monkeypatch):
    before = page(*small())
    monkeypatch.setattr("time.time", lambda: 2e9)
    assert page(*small()) == before
    header = gzip.compress(b"", mtime=0)[4:8]
    assert header == bytes(4)


def test_the_index_and_the_parts_must_agree(template):
    index, parts = small()
    with pytest.raises(ValueError, match=r"got \['explorer-part-0'\] named alone and \['other'\] given alone"):
        page(index, {"explorer-documents": parts["explorer-documents"], "other": []})


def test_a_number_that_is_not_finite_is_refused(template):
    index, parts = small()
    with pytest.raises(ValueError, match="numbers of a page must be finite; write None"):
        page(index, parts | {"explorer-part-0": [{"examples": [[0, 0, float("nan")]]}]})


def test_a_page_is_written_whole_and_replaces_only_its_like(template, tmp_path):
    path = tmp_path / "explorer.html"
    write(page(*small("one")), path)
    assert write(page(*small("two")), path) == path
    assert path.read_text() == page(*small("two"))
    assert sorted(file.name for file in tmp_path.iterdir()) == ["explorer.html", "template"]
    thesis = tmp_path / "thesis.html"
    thesis.write_text("my own")
    with pytest.raises(ValueError, match="must be new or an explorer's page, got .*thesis.html"):
        write(page(*small()), thesis)
    assert thesis.read_text() == "my own"
    with pytest.raises(ValueError, match="must be new or an explorer's page"):
        write(page(*small()), tmp_path / "template")
    with pytest.raises(ValueError, match="the folder of a page must exist, got .*nowhere"):
        write(page(*small()), tmp_path / "nowhere/explorer.html")


def test_a_page_that_is_too_large_is_refused_with_both_sizes_and_a_remedy(template, tmp_path):
    made = page(*small())
    assert MOST_BYTES == 15e6
    write(made, tmp_path / "just.html", most=len(made))
    with pytest.raises(ValueError, match=r"at most 15.0 MB.*got 16.\d MB: ask for fewer examples"):
        write(made + " " * 16_000_000, tmp_path / "large.html")
    assert not (tmp_path / "large.html").exists()


def test_sizes_add_up(template):
    index, parts = small(tokens=HOSTILE)
    made = page(index, parts)
    found, read = sizes(made), Elements(made)
    assert found["all"] == len(made) == sum(found.values()) - found["all"]
    assert found["documents"] == len(read.scripts["explorer-documents"])
    assert found["units"] == len(read.scripts["explorer-part-0"])
    assert found["index"] == len(read.scripts["explorer-index"])
