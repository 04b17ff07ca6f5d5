"""The ledger shows every claim, escapes what it shows, and counts right."""

import re
from html.parser import HTMLParser

import pytest
from made_claims import PAPERS, VALUE, described, in_range, one, pairs

from sae_lib.claims import checked, judge, read_claims, verdicts
from sae_lib.ledger import in_words, ledger, picture


class Tags(HTMLParser):
    """The names of all tags that are opened; fails on one that is closed out of turn."""

    def __init__(self, html):
        super().__init__()
        self.open, self.seen = [], []
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.seen.append(tag)
        if tag not in ("input", "path", "rect", "circle", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in ("path", "rect", "circle"):
            assert self.open.pop() == tag


def test_every_verdict_of_the_book_is_on_the_page():
    papers, claims = read_claims()
    html = ledger(found := verdicts(), papers, {"comparison"})
    shown = re.findall(r'<tr role="row" id="claim-([\w-]+)" data-verdict="([\w ]+)"', html)
    assert shown == [(verdict.claim.id, verdict.word) for verdict in found]
    assert len(shown) == len(claims)
    assert '<a href="comparison.html">' in html
    assert '<a href="nowhere.html">' not in html
    assert Tags(html).seen.count("tbody") == len(papers)


def test_counts_stand_at_the_top():
    found = [one(pairs(9, 10, 11)), one(pairs(-9, -10, -11), id="topk-2"), one(pairs(1, 2, 3), id="topk-3")]
    html = ledger(found, PAPERS)
    counted = {word: int(n) for word, n in re.findall(r"</span> ([a-z ]+) <b>(\d+)</b>", html)}
    assert counted == {"holds": 1, "fails": 1, "inconclusive": 1, "not run": 0}
    assert "3 of 3 claims are shown." in html
    assert 'value="topk">TopK (3)<' in html
    assert 'value="relu"' not in html


def test_what_comes_from_a_file_is_escaped():
    evil = "<script>alert(1)</script>"
    changes = {"statement": evil, "control": evil, "source": {"where": evil, "known": "figure"}, "chapter": evil}
    test = {"metric": evil, "a": {"sae": evil, "width": evil}, "where": {evil: evil}, "equal": [evil]}
    (verdict,) = judge([checked(described(**changes, test=test), PAPERS)], lambda chapter, scale: [])
    html = ledger([verdict], {"topk": evil}, {evil})
    assert evil not in html
    assert html.count("&lt;script&gt;") >= 10
    assert Tags(html).seen.count("script") == 2  # its own


def test_effect_interval_and_each_sign_are_told():
    html = ledger([one(pairs(-1, 2, 3))], PAPERS)
    # mean 4 / 3, standard deviation 2.082: half-width 4.303 * 2.082 / sqrt(3) = 5.171
    assert "<b>+1.33</b> [−3.84, +6.5]" in html
    assert "seed by seed: −1 +2 +3" in html
    assert "95.0% interval, n = 3" in html
    assert "would have detected 6.4" in html


def test_what_was_not_run_says_how_to_run_it():
    html = ledger([one([], chapter="gba")], PAPERS, {"topk"})
    assert "<code>python -m sae_lib reproduce topk --scale pocket</code>" in html
    assert "gba (no chapter yet)" in html


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, "m: A − B; topk/small. The claim: above 0."),
        ({"prediction": "lower", "margin": 0.1}, "The claim: below −0.1."),
        ({"kind": "non-inferiority", "margin": 0.1}, "The claim: above −0.1."),
        ({"test": {"statistic": "ratio"}}, "m: A ÷ B; topk/small. The claim: above 1."),
        (in_range(0.5, 0.7, **VALUE), "m: A; topk/small. The claim: 0.5 to 0.7."),
        ({"test": {"where": {"target": 16}, "equal": ["l0"]}}, "topk/small; target 16; at equal l0."),
        ({"test": {"b": {"sae": "A", "width": 8, "metric": "n"}}}, "m: A − n of A at width 8;"),
        ({"test": {"beyond": {"width": 8}}}, "A − B, minus the same at width 8;"),
        ({"test": {"statistic": "at_equal_l0", "l0": 16}}, "A − B, read off at L0 16;"),
        ({"kind": "identity", "prediction": "equal"}, "The claim: equal in every seed, to the last bit."),
    ],
)
def test_a_test_is_told_in_words(changes, said):
    assert said in re.sub(r"</?code>", "", in_words(checked(described(**changes), PAPERS)))


def test_the_picture_has_the_region_the_interval_and_a_mark_a_seed():
    drawn = picture(one(pairs(9, 10, 11)))
    assert drawn.count('class="seed"') == 3
    # from 0, the end of the region, to 12.484 on 164 pixels after a margin of 6: 10 lies at 137.4
    assert 'class="region" x="6.0" y="0" width="170.0"' in drawn
    assert re.search(r'<circle cx="137\.4"', drawn)
    assert drawn.count('d="M6.0 0v30"') == 2  # the end of the region, and zero


def test_each_paper_needs_a_name():
    with pytest.raises(ValueError, match="papers must name each paper, got no name for topk"):
        ledger([one(pairs(1, 2, 3))], {"relu": "ReLU"})


def test_in_a_browser_the_filter_works_by_keyboard_and_a_link_shows_its_claim(page):
    claims = [(pairs(9, 10, 11), {}), (pairs(-9, -10, -11), {"id": "topk-2"}), ([], {"id": "relu-1", "paper": "relu"})]
    page.set_content(ledger([one(rows, **changes) for rows, changes in claims], PAPERS))

    def shown() -> list[str]:
        return [row.get_attribute("id") for row in page.locator("[data-verdict]").all() if row.is_visible()]

    assert shown() == ["claim-topk-1", "claim-topk-2", "claim-relu-1"]
    page.locator("[name=verdict]:checked").focus()
    page.keyboard.press("ArrowRight")
    assert shown() == ["claim-topk-1"]
    assert page.inner_text("[role=status]") == "1 of 3 claims are shown."
    assert not page.get_by_text("ReLU", exact=True).is_visible()  # no heading without claims
    page.keyboard.press("ArrowRight")
    assert shown() == ["claim-topk-2"]
    page.select_option("select", "relu")
    assert shown() == []
    page.check("[name=verdict][value='']", force=True)
    assert shown() == ["claim-relu-1"]
    page.evaluate("location.hash = '#claim-topk-2'")
    page.wait_for_function("document.querySelectorAll('[data-verdict][hidden]').length === 0")
    assert shown() == ["claim-topk-1", "claim-topk-2", "claim-relu-1"]
    assert page.errors == []
