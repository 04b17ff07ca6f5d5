"""The pieces show what the library selects, escape what they are given, and work by keyboard."""

import json
import re
from pathlib import Path

import matplotlib.pyplot as plt
import pytest
import torch

import sae_lib
from sae_lib.components import RULES, Piece, Rule, selection_picture, slider, token_text, unit_text
from sae_lib.data import Batch
from sae_lib.sparse import Scores

SCRIPT = (Path(sae_lib.__file__).parent / "assets/components.js").read_text()
SCORES = torch.tensor(
    [
        [3.0, 1.0, -1.0],
        [2.0, 0.5, 0.4],
        [-2.0, -1.0, -3.0],
    ]
)
SMALL = tuple(rule._replace(levels=[level for level in rule.levels if level <= 3]) for rule in RULES)
TRUTH = torch.tensor([[True, False, False], [True, True, False], [False, False, True]])


def small_picture(**given):
    return selection_picture(SCORES, **({"rules": SMALL, "level": 1} | given))


def data_of(piece):
    [packed] = re.findall(r'<script type="application/json">(.*?)</script>', piece, re.DOTALL)
    return json.loads(packed)


def alive(piece, rule, level):
    outcome = data_of(piece)["rules"][[each.name for each in SMALL].index(rule)]
    [state] = [state for state in outcome["states"] if state["level"] == level]
    return [[int(mark) for mark in state["alive"][i : i + 3]] for i in (0, 3, 6)]


@pytest.mark.parametrize(
    ("rule", "level", "expected"),
    [
        ("ReLU", "0", [[1, 1, 0], [1, 1, 1], [0, 0, 0]]),
        ("TopK", "1", [[1, 0, 0], [1, 0, 0], [0, 0, 0]]),
        ("TopK", "2", [[1, 1, 0], [1, 1, 0], [0, 0, 0]]),
        ("BatchTopK = Mutual Choice", "1", [[1, 1, 0], [1, 0, 0], [0, 0, 0]]),
        ("Feature Choice", "1", [[1, 1, 0], [0, 0, 1], [0, 0, 0]]),
        ("JumpReLU, Gated", "0.7", [[1, 1, 0], [0, 0, 1], [0, 0, 0]]),  # thresholds 2.1, .7, .28
        ("JumpReLU, Gated", "0.6", [[1, 1, 0], [1, 0, 1], [0, 0, 0]]),  # thresholds 1.8, .6, .24
    ],
)
def test_each_rule_selects_the_pairs_worked_by_hand(rule, level, expected):
    assert alive(small_picture(), rule, level) == expected


@pytest.mark.parametrize(
    ("rule", "variant"), [("TopK", sae_lib.TopKSAE), ("BatchTopK = Mutual Choice", sae_lib.BatchTopKSAE)]
)
def test_the_picture_shows_what_the_variant_selects(rule, variant):
    scores = torch.randn(7, 9, generator=torch.Generator().manual_seed(0))
    rules = data_of(selection_picture(scores))["rules"]
    [outcome] = [rules[i] for i in range(len(RULES)) if RULES[i].name == rule]
    for k in (1, 3, 6):
        [state] = [state for state in outcome["states"] if state["level"] == str(k)]
        recipe = Scores(scores, torch.eye(9), torch.zeros(9))
        selected = variant(4, 9, k).train().select(recipe, Batch(torch.zeros(7, 4))).dense() > 0
        assert state["alive"] == "".join("01"[live] for live in selected.flatten().tolist())
        assert state["rows"] == selected.sum(1).tolist()
        assert state["columns"] == selected.sum(0).tolist()


def test_the_sentence_counts_living_and_true_pairs():
    picture = small_picture(truth=TRUTH, rule="TopK", level=1)
    said = "2 of 9 pairs live: 0.7 a token on average (the mean L0). They hold 2 of the 4 true pairs, and 0 false ones."
    assert said in picture
    assert len(re.findall('<td class="pair[^"]* there"', picture)) == 4
    assert "true pairs" not in small_picture()


def test_the_first_state_stands_in_the_page_without_a_script():
    picture = small_picture(rule="Feature Choice", level=1)
    marks = [
        [("alive" in look) * 1 for look in re.findall('<td class="(pair[^"]*)"', row)] for row in picture.split("</tr>")
    ]
    assert [row for row in marks if row] == [[1, 1, 0], [0, 0, 1], [0, 0, 0]]
    assert picture.count("checked") == 1 + picture.count(":checked")
    assert "<output>1</output>" in picture


def test_a_chapter_adds_a_rule_of_its_own():
    def first_latent(scores, level):
        return sae_lib.sparse.Code.from_dense(scores.clamp(min=level) * torch.tensor([1.0, 0.0, 0.0]))

    rules = (*SMALL, Rule("First", "Only the first.", "floor", (1.0, 2.5), first_latent))
    picture = small_picture(rules=rules, rule="First", level=2.5)
    assert data_of(picture)["rules"][-1]["states"][1]["rows"] == [1, 1, 1]


def test_text_is_escaped_everywhere():
    nasty = '</script><img src=x onerror="alert(1)">&\''
    rules = (Rule(nasty, nasty, nasty, (1,), RULES[2].select),)
    for piece in (
        selection_picture(SCORES, tokens=[nasty] * 3, rules=rules, rule=nasty, level=1),
        token_text([[nasty]], [[1.0]], captions=[nasty], value_label=nasty),
    ):
        assert "<img" not in piece
        assert "&lt;img src=x onerror=&quot;alert(1)&quot;&gt;&amp;" in piece
        assert piece.count("</script>") == 2, "one for the data, one for the script"
    assert data_of(piece) == {"label": nasty}


def test_pieces_show_themselves_in_notebooks_and_fetch_nothing():
    for piece in (small_picture(), token_text([["a"]], [[1.0]])):
        assert isinstance(piece, Piece)
        assert piece._repr_html_() == piece
        assert not re.search(r"https?:|//cdn|\bimport\b|@import|url\(|fetch\(", piece)


def test_everything_can_be_reached_by_keyboard_and_read_aloud():
    picture = small_picture(truth=TRUTH)
    assert picture.count('type="radio"') == len(SMALL)
    assert 'type="range"' in picture
    assert 'role="status"' in picture
    assert "<legend>" in picture
    assert picture.count('scope="row"') == 4
    assert picture.count('scope="col"') == 4
    assert "<span>lives</span> true" in picture
    text = token_text([["The", " cat"], ["a"]], [[0.0, 2.0], [1.0]])
    assert text.count('tabindex="0"') == 2
    assert 'aria-label="Example 1; strongest: cat 2, The 0"' in text
    assert 'role="status"' in text


def test_colour_is_on_one_scale_over_all_examples():
    text = token_text([["a", "b"], ["c"]], [torch.tensor([1.0, 0.0]), torch.tensor([-4.0])])
    assert re.findall(r'data-value="(\S+)" class="(\w+)" style="--s:([\d.]+)"', text) == [
        ("1", "up", "0.25"),
        ("0", "none", "0.00"),
        ("-4", "down", "1.00"),
    ]
    assert "<span>-4</span><i></i><span>4</span> activation" in text
    assert "<span>0</span><i></i><span>1</span>" in token_text([["a"]], [[1.0]])


def test_line_breaks_are_visible():
    assert "a↵b⇥" in token_text([["a\nb\t"]], [[1.0]])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"scores": torch.zeros(3)}, r"\(tokens, latents\), each from 1 to 30, got \(3,\)"),
        ({"scores": torch.zeros(31, 3)}, r"got \(31, 3\)"),
        ({"scores": torch.full((3, 3), torch.nan)}, "finite, got 9 entries"),
        ({"tokens": ["a"]}, "each of the 3 rows of scores, got 1"),
        ({"truth": TRUTH[:2]}, r"\(3, 3\), got \(2, 3\)"),
        ({"rule": "Top"}, "rule must be one of .*'TopK'.*, got 'Top'"),
        ({"level": 7}, r"level must be one of \(1, 2, 3\), the levels of 'TopK', got 7"),
        ({"rules": RULES}, r"'TopK' must be able to select with k = 4, got scores of shape \(3, 3\)"),
    ],
)
def test_a_picture_refuses_what_it_cannot_show(given, message):
    with pytest.raises(ValueError, match=message):
        selection_picture(**({"scores": SCORES, "rules": SMALL, "level": 1} | given))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"tokens": [], "values": []}, "list of examples"),
        ({"tokens": ["a", "b"], "values": [[1.0], [1.0]]}, "put a single example into a list"),
        ({"tokens": [["a", "b"]], "values": [[1.0]]}, r"\[2\] tokens and \[1\] values"),
        ({"tokens": [["a"]], "values": [[float("nan")]]}, "mask those tokens with 0"),
        ({"tokens": [["a"]], "values": [[1.0]], "captions": []}, "each of the 1 examples, got 0"),
    ],
)
def test_a_text_refuses_what_it_cannot_show(given, message):
    with pytest.raises(ValueError, match=message):
        token_text(**given)


def seen(page):
    """The pairs that live on the page, and the counts at its margins."""
    cells = page.locator("td.pair").evaluate_all("cells => cells.map(cell => cell.classList.contains('alive') ? 1 : 0)")
    rows = page.locator("tbody .count").all_inner_texts()
    return [cells[i : i + 3] for i in (0, 3, 6)], [int(count) for count in rows]


def test_in_a_browser_every_rule_and_level_shows_what_python_selects(page):
    picture = small_picture(truth=TRUTH)
    page.set_content(f"<!doctype html>{picture}")
    for i, rule in enumerate(data_of(picture)["rules"]):
        page.locator("[name=rule]").nth(i).check(force=True)
        for position, state in enumerate(rule["states"]):
            assert page.locator("[type=range]").is_visible() == bool(rule["knob"])
            if rule["knob"]:
                page.locator("[type=range]").fill(str(position))
            cells, rows = seen(page)
            assert "".join(str(mark) for row in cells for mark in row) == state["alive"]
            assert rows == state["rows"]
            assert page.locator("output").inner_text() == state["level"]
            assert page.locator(".said").inner_text() == state["said"]
    assert page.errors == []


def test_in_a_browser_arrow_keys_turn_the_rule_and_the_slider(page):
    page.set_content(f"<!doctype html>{small_picture()}")
    page.locator("[name=rule]:checked").focus()
    page.keyboard.press("ArrowRight")
    assert seen(page)[0] == [[1, 1, 0], [1, 1, 1], [0, 0, 0]], "BatchTopK opens at its second level, k = 2"
    page.keyboard.press("Tab")
    page.keyboard.press("ArrowLeft")
    assert seen(page)[0] == [[1, 1, 0], [1, 0, 0], [0, 0, 0]]
    assert page.locator("td.pair .unseen span").all_inner_texts()[:4] == ["lives", "lives", "", "lives"]


def test_in_a_browser_two_equal_pieces_on_a_page_both_work_alone(page):
    picture = small_picture()
    page.set_content(f"<!doctype html>{picture}{picture}")
    page.locator(".sae-piece").nth(1).locator("[name=rule]").nth(0).check(force=True)
    said = page.locator(".said").all_inner_texts()
    assert said[0].startswith("2 of 9")
    assert said[1].startswith("5 of 9")


def test_in_a_browser_a_piece_that_comes_later_leaves_the_earlier_ones_as_they_are(page):
    page.set_content(f"<!doctype html>{small_picture()}")
    mutual_choice = page.locator("[name=rule]").nth(3)
    mutual_choice.check(force=True)
    page.locator("[type=range]").fill("0")
    page.locator("[name=rule]").nth(0).check(force=True)
    page.evaluate(
        "script => document.body.append(Object.assign(document.createElement('script'), {text: script}))", SCRIPT
    )
    mutual_choice.check(force=True)
    assert page.locator("output").inner_text() == "1", "the level that the reader left"


def test_in_a_browser_arrow_keys_read_out_the_tokens(page):
    page.set_content(f"<!doctype html>{token_text([['The', ' cat', ' <b>']], [[0.5, 2.0, -1.0]])}")
    page.locator(".text").focus()
    assert page.locator("[role=status]").inner_text().strip() == "cat: activation 2", "it starts at the strongest"
    page.keyboard.press("ArrowRight")
    assert page.locator("[role=status]").inner_text().strip() == "<b>: activation -1"
    page.keyboard.press("ArrowRight")
    assert page.locator(".here").all_inner_texts() == [" <b>"], "it stays on the last token"
    page.keyboard.press("Home")
    assert page.locator(".here").all_inner_texts() == ["The"]
    assert page.errors == []


def small_slider(start="<b>"):
    return slider(
        {name: plt.subplots(figsize=(1, 1))[0] for name in ("a", "<b>", "c")}, "knob", start=start, alt="nothing"
    )


def test_a_slider_shows_its_start_closes_its_figures_and_escapes_its_positions():
    figures_before = plt.get_fignums()
    shown = small_slider()
    assert plt.get_fignums() == figures_before
    assert ["hidden" in image for image in re.findall("<img[^>]*>", shown)] == [True, False, True]
    assert "<output>&lt;b&gt;</output>" in shown
    with pytest.raises(ValueError, match="start must be one of at least two positions, got 'd'"):
        small_slider("d")


def test_in_a_browser_the_slider_turns_through_its_figures(page):
    page.set_content(f"<!doctype html>{small_slider()}")
    page.locator("[type=range]").focus()
    page.keyboard.press("ArrowRight")
    assert [image.is_visible() for image in page.locator("img").all()] == [False, False, True]
    assert page.locator("output").inner_text() == "c"
    assert page.locator("[type=range]").get_attribute("aria-valuetext") == "c"
    assert page.errors == []


def test_a_units_best_tokens_are_shown_one_a_document_with_their_neighbours():
    activations = torch.tensor([[0.0], [4.0], [3.0], [0.0], [2.0], [0.0]])
    words, documents = ["a", "<b>", "c", "d", "e", "f"], torch.tensor([0, 0, 0, 1, 1, 1])
    shown = unit_text(activations, [0], words, documents, ["first", "second"], most=2, around=1)
    assert re.findall("<figcaption>(.*?)</figcaption>", shown) == [
        "0, on 50.00% of tokens: first",
        "0, on 50.00% of tokens: second",
    ]
    assert re.findall('data-value="(.*?)"', shown) == ["0", "1", "0.75", "0", "0.5", "0"], "shares of the maximum, 4"
    assert "&lt;b&gt;" in shown
    with pytest.raises(ValueError, match="words must name each of the 6 tokens, got 1"):
        unit_text(activations, [0], ["a"], documents, ["first", "second"])
