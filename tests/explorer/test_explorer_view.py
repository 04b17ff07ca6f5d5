"""The page in a real browser, opened from disk with the network off: every control does what it says."""

import re
import time
from html import escape

import numpy as np
import pytest
from made_page import HOSTILE, VOCAB, made_page

from sae_lib.explorer.page import page as filled
from sae_lib.neuron_embeddings import central, cut, proxies

INDEX, PARTS, DISTANCES = made_page(sizes=(70, 40))
UNITS = [[unit for name in each["parts"] for unit in PARTS[name]] for each in INDEX["sets"]]
TEXTS = PARTS["explorer-documents"]["tokens"]
SUMMARY = INDEX["sets"][0]["summary"]
MANY = int(np.argmax(np.where(np.array(SUMMARY["examples"]) > 30, np.array(SUMMARY["clusters"], float), 0)))
"""A neuron with many examples in several clusters."""
OPEN = "document.querySelector('.pane h2')?.textContent && document.querySelector('#count').textContent"
DEAD, QUIET, SINGLE, PAIR = 3, 4, 5, 6


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("explorer") / "a page.html"
    path.write_text(filled(INDEX, PARTS), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def address(path, page):
    """The file's address; the browser is offline, and what it asks for or complains of is noted."""
    page.context.set_offline(True)
    page.said, page.asked = [], []
    page.on("console", lambda message: page.said.append(message.text))
    page.on("request", lambda request: page.asked.append(request.url))
    return path.as_uri()


@pytest.fixture
def show(page, address):
    """Opens the page at an address within it, and gives it back once it shows a unit."""

    def show(hash="", width=1400, **media):
        page.goto("about:blank")
        page.set_viewport_size({"width": width, "height": 900})
        page.emulate_media(**({"color_scheme": "light", "reduced_motion": "no-preference"} | media))
        page.said.clear(), page.errors.clear(), page.asked.clear()
        page.goto(address + hash)
        until(page, OPEN)
        return page

    yield show
    assert page.errors == []
    assert page.said == []
    assert [url for url in page.asked if not url.startswith(address)] == []


def until(page, condition, seconds=20):
    """Waits for a condition in JavaScript; the page's policy forbids the browser's own way, which evaluates text."""
    end = time.monotonic() + seconds
    while not page.evaluate(condition):
        assert time.monotonic() < end, f"not within {seconds} s: {condition}"
        time.sleep(0.02)


def neuron(page):
    """The number of the neuron or latent in the first pane."""
    return int(page.locator("h2").first.inner_text().split()[1])


def at(page, unit):
    """Waits until the first pane shows a unit."""
    until(page, f"document.querySelector('.pane h2').textContent.endsWith(' {unit}')")


def labels(page):
    """The cluster of each example, as the map shows it."""
    marks = page.locator(".map path").evaluate_all("all => all.map(e => [+e.dataset.example, +e.dataset.cluster])")
    return np.array([cluster for _, cluster in sorted(marks)])


def measure(page, name):
    text = page.locator(f"dd[data-name={name}]").first.get_attribute("data-value")
    return float(text) if text else float("nan")


def rows(page):
    """The numbers in the list."""
    return [int(text) for text in page.locator("#list b").all_inner_texts()]


def window(unit, example):
    """First token, tokens and bytes of an example's window."""
    document, position, _ = unit["examples"][example]
    start = max(0, position - 20)
    return start, [VOCAB[token] for token in TEXTS[document][start : position + 11]], unit["windows"][example]


def seen(text):
    """A text as the page shows it."""
    signs = {"\n": "↵", "\t": "⇥", "\0": "⟨00⟩", "\x1b": "⟨1B⟩", "\u202e": "⟨202E⟩", "\u2028": "⟨2028⟩"}
    return text.translate(str.maketrans(signs)).replace("\ud83d", "\ufffd")


# It opens -------------------------------------------------------------------------------------------------------------


def test_it_opens_from_disk_without_the_network_at_a_unit_with_several_clusters(show):
    page = show()
    assert page.title() == f"neuron {neuron(page)} · A made page"
    assert SUMMARY["clusters"][neuron(page)] > 1
    assert page.locator("h1").inner_text() == "A made page"


def test_its_policy_lets_nothing_out_and_no_other_script_run(show, page):
    page = show()
    refused = page.evaluate(
        """async () => {
            const kept = [];
            document.addEventListener("securitypolicyviolation", event => kept.push(event.effectiveDirective));
            await fetch("https://example.org/").catch(() => null);
            const script = document.createElement("script");
            script.textContent = "document.title = 'run'";
            document.body.append(script);
            const image = document.createElement("img");
            image.src = "https://example.org/x.png";
            document.body.append(image);
            await new Promise(done => setTimeout(done, 200));
            return kept.sort();
        }"""
    )
    assert refused == ["connect-src", "img-src", "script-src-elem"]
    assert page.title() != "run"
    page.said.clear(), page.asked.clear()  # the browser has said what it refused


def test_tokens_of_any_kind_are_shown_and_never_run(show):
    page = show(f"#unit={MANY}")
    before = page.evaluate("document.querySelectorAll('script, img, b, iframe').length")
    shown = set()
    for unit in (MANY, 0, 1, 7):
        page.fill("#number", str(unit))
        page.press("#number", "Enter")
        at(page, unit)
        while page.locator(".panel > .more").is_visible():
            page.locator(".panel > .more").click()
        shown |= set(page.locator(".text span, .chip").all_inner_texts())
    assert {"<script>document.title='run'</script>", "</script>", "<!--", "{{data}}", "⟨00⟩", "⟨202E⟩turned"} <= shown
    assert {"↵", "⇥", "⟨1B⟩[31m", "银行", "بنك", "🐟"} <= {text.strip() for text in shown}
    assert page.title() == "neuron 7 · A made page"
    assert page.evaluate("document.querySelectorAll('script, img, iframe').length") <= before
    assert not any("\0" in text or "\u202e" in text for text in shown)
    assert len(HOSTILE) > 10


@pytest.mark.parametrize("writes", [True, False], ids=["the address can be written", "it cannot"])
def test_it_works_inside_a_frame_that_has_no_address_of_its_own(page, address, path, writes):
    context = page.context.browser.new_context(viewport={"width": 1400, "height": 900})
    outer, errors = context.new_page(), []
    outer.on("pageerror", lambda error: errors.append(str(error)))
    if not writes:
        outer.add_init_script("history.pushState = history.replaceState = () => { throw new Error('refused') }")
    outer.set_content(
        f'<iframe width="1300" height="800" srcdoc="{escape(path.read_text(encoding="utf-8"))}"></iframe>'
    )
    frame = outer.frames[1]
    until(frame, OPEN)
    first = neuron(frame)
    for unit in (11, 12):
        frame.locator("#number").fill(str(unit))
        frame.locator("#number").press("Enter")
        at(frame, unit)
    for unit in (11, first):
        frame.locator("#back").click()
        at(frame, unit)
    assert frame.locator("#back").is_disabled()
    frame.locator("#forward").click()
    at(frame, 11)
    assert errors == []
    context.close()


# Clusters -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("unit", [0, MANY, PAIR])
def test_at_any_cut_clusters_and_proxies_are_those_of_the_library(show, unit):
    distances, made = DISTANCES[0][unit], UNITS[0][unit]
    tree = np.array([[a, b, merged, 0] for a, b, merged in made["tree"]])
    page = show(f"#set=neurons-1&unit={unit}")
    for height in (0, 0.13, 0.3, 0.5, 0.71, 2):
        page.evaluate(f"location.hash = '#set=neurons-1&unit={unit}&cut={height}'")
        until(page, f"document.querySelector('.cut').getAttribute('aria-valuenow') === '{height}'")
        expected = cut(tree, height)
        assert labels(page).tolist() == expected.tolist()
        tabs = page.locator("[role=tab] small").all_inner_texts()
        assert [int(text) for text in tabs] == np.bincount(expected).tolist()
        stored = distances.max() / 255 / 2  # distances are stored in 255ths of the largest
        for name, value in proxies(distances, expected).items():
            if name != "size":
                assert measure(page, name) == pytest.approx(value, abs=stored, nan_ok=True), name
        found = central((255 * distances / distances.max()).round(), expected)
        assert page.locator(".map .central").get_attribute("data-example") == str(found[0])
        assert page.locator(".windows .central").get_attribute("data-example") == str(found[0])


def test_the_cut_moves_by_keys_and_everything_follows(show):
    page = show(f"#unit={MANY}")
    handle = page.locator(".cut")
    before = len(set(labels(page)))
    handle.focus()
    page.keyboard.press("ArrowDown")
    assert handle.get_attribute("aria-valuenow") == "0.49"
    page.keyboard.press("PageDown")
    assert handle.get_attribute("aria-valuenow") == "0.39"
    page.keyboard.press("Home")
    count = len(UNITS[0][MANY]["examples"])
    assert handle.get_attribute("aria-valuetext") == f"0: {count} clusters"
    assert page.locator("[role=tab]").count() == count
    assert measure(page, "clusters") == count > before
    assert np.isnan(measure(page, "intra_distance"))
    assert "undefined here" in page.locator("dd[data-name=intra_distance]").inner_text()
    assert "cut=0" in page.url
    assert page.locator("#said").inner_text() == f"Cut at 0: {count} clusters"
    page.keyboard.press("End")
    assert page.locator("[role=tab]").count() == 1
    page.locator(".usual").click()
    assert len(set(labels(page))) == before
    assert "cut=" not in page.url


def test_when_the_cut_moves_the_cluster_in_view_stays_with_its_central_example(show):
    page = show(f"#unit={MANY}&cluster=1")
    followed = int(page.locator(".map .central").get_attribute("data-example"))
    page.locator(".cut").focus()
    for key in ("PageDown", "PageDown", "PageUp", "End"):
        page.keyboard.press(key)
        chosen = page.locator("[role=tab][aria-selected=true]").get_attribute("data-cluster")
        assert labels(page)[followed] == int(chosen)
        followed = int(page.locator(".map .central").get_attribute("data-example"))


def test_the_cut_is_dragged_by_the_mouse(show):
    page = show(f"#unit={MANY}")
    handle, tree = page.locator(".cut .grip"), page.locator(".tree svg").bounding_box()
    box = handle.bounding_box()
    page.mouse.move(box["x"] + 10, box["y"] + 10)
    page.mouse.down()
    page.mouse.move(box["x"] + 10, box["y"] + 40, steps=4)
    halfway = float(page.locator(".cut").get_attribute("aria-valuenow"))
    assert 0 < halfway < 0.5
    assert "cut=" not in page.url, "the address waits until the cut is let go"
    page.mouse.move(box["x"] + 10, tree["y"] + tree["height"] + 50, steps=4)
    page.mouse.up()
    assert page.locator(".cut").get_attribute("aria-valuenow") == "0"
    assert labels(page).max() == len(UNITS[0][MANY]["examples"]) - 1
    assert "cut=0" in page.url
    page.mouse.move(box["x"], box["y"])
    assert page.locator(".cut").get_attribute("aria-valuenow") == "0"


def test_the_cut_is_dragged_by_a_finger(page, address):
    context = page.context.browser.new_context(has_touch=True, viewport={"width": 390, "height": 900})
    phone = context.new_page()
    phone.goto(f"{address}#unit={MANY}")
    until(phone, "document.querySelector('.cut')?.getAttribute('aria-valuenow')")
    box, send = phone.locator(".cut .grip").bounding_box(), context.new_cdp_session(phone).send
    x, y = box["x"] + 20, box["y"] + 10
    top = float(phone.locator(".cut").get_attribute("aria-valuemax"))
    for kind, up in (("Start", 0), *(("Move", up) for up in range(10, 130, 10)), ("End", None)):
        points = [] if up is None else [{"x": x, "y": y - up}]
        send("Input.dispatchTouchEvent", {"type": f"touch{kind}", "touchPoints": points})
    until(phone, "location.hash.includes('cut=')")
    assert float(phone.locator(".cut").get_attribute("aria-valuenow")) == top
    assert phone.evaluate("scrollY") == 0, "the page stays where it is"
    context.close()


def test_the_cut_stays_from_unit_to_unit(show):
    page = show(f"#unit={MANY}&cut=0.2")
    page.keyboard.press("j")
    at(page, MANY + 1)
    assert page.locator(".cut").get_attribute("aria-valuenow") == "0.2"
    assert page.url.endswith(f"#set=neurons-1&unit={MANY + 1}&cut=0.2")
    page.keyboard.press("0")
    page.keyboard.press("k")
    at(page, MANY)
    assert page.locator(".cut").get_attribute("aria-valuenow") == "0.5"


def test_steps_of_the_cut_change_the_clusters_by_as_few_as_can_be(show):
    page = show(f"#unit={MANY}&cut=2")
    for key in ("]", "]", "]"):
        before = len(set(labels(page)))
        page.keyboard.press(key)
        assert len(set(labels(page))) > before
    finest = len(set(labels(page)))
    page.keyboard.press("[")
    assert len(set(labels(page))) < finest
    page.keyboard.press("0")
    assert page.locator(".cut").get_attribute("aria-valuenow") == "0.5"


def test_tabs_follow_the_arrow_keys_and_name_their_panel(show):
    page = show(f"#unit={MANY}")
    tabs, panel = page.locator("[role=tab]"), page.locator("[role=tabpanel]")
    tabs.nth(0).focus()
    page.keyboard.press("ArrowRight")
    assert page.evaluate("document.activeElement.dataset.cluster") == "1"
    assert [tabs.nth(i).get_attribute("aria-selected") for i in range(3)][:2] == ["false", "true"]
    assert [tab.get_attribute("tabindex") for tab in tabs.all()].count("0") == 1
    assert panel.get_attribute("aria-labelledby") == tabs.nth(1).get_attribute("id")
    assert tabs.nth(1).get_attribute("aria-controls") == panel.get_attribute("id")
    assert "cluster=1" in page.url
    members = np.flatnonzero(labels(page) == 1)
    shown = page.locator(".windows li").evaluate_all("all => all.map(e => +e.dataset.example)")
    assert set(shown) <= set(members.tolist())
    page.keyboard.press("End")
    assert page.evaluate("+document.activeElement.dataset.cluster") == tabs.count() - 1
    page.keyboard.press("ArrowRight")
    assert page.evaluate("document.activeElement.dataset.cluster") == "0"


def test_a_click_in_the_tree_chooses_its_cluster(show):
    page = show(f"#unit={MANY}")
    page.locator(".areas .foot[data-cluster='1']").click()
    assert page.locator("[role=tab]").nth(1).get_attribute("aria-selected") == "true"


def test_on_the_map_arrows_walk_and_enter_opens(show):
    page = show(f"#unit={MANY}")
    page.keyboard.press("Tab")
    page.locator(".map svg").focus()
    start = page.locator(".map .here").get_attribute("data-example")
    assert start == page.locator(".map .central").get_attribute("data-example")
    for key in ("ArrowDown", "ArrowRight", "ArrowUp", "ArrowLeft", "ArrowDown"):
        page.keyboard.press(key)
    here = page.locator(".map .here").get_attribute("data-example")
    assert here != start
    assert re.match(r"Cluster \d+: ", page.locator("#said").inner_text())
    page.keyboard.press("Enter")
    chosen = page.locator("[role=tab][aria-selected=true]").get_attribute("data-cluster")
    assert int(chosen) == labels(page)[int(here)]
    assert page.evaluate("document.activeElement.closest('li').dataset.example") == here


# Texts ----------------------------------------------------------------------------------------------------------------


def test_windows_show_tokens_in_the_colour_of_their_activation(show):
    page = show(f"#unit={MANY}")
    unit, item = UNITS[0][MANY], page.locator(".windows li").first
    example = int(item.get_attribute("data-example"))
    start, words, values = window(unit, example)
    spans = item.locator(".text span")
    assert spans.count() == len(words)
    strengths = spans.evaluate_all("all => all.map(e => +e.style.getPropertyValue('--strength'))")
    assert strengths == pytest.approx([value / 255 for value in values], abs=1e-3)
    key = spans.evaluate_all("all => all.findIndex(e => e.classList.contains('key'))")
    assert start + key == unit["examples"][example][1]
    paint = spans.nth(key).evaluate("e => getComputedStyle(e).backgroundColor")
    assert paint not in ("rgba(0, 0, 0, 0)", spans.nth(key - 1).evaluate("e => getComputedStyle(e).backgroundColor"))


def test_values_are_told_by_pointing_by_keys_and_by_tapping(show):
    page = show(f"#unit={MANY}")
    unit, item = UNITS[0][MANY], page.locator(".windows li").first
    example = int(item.get_attribute("data-example"))
    start, _, values = window(unit, example)
    key, largest = unit["examples"][example][1] - start, SUMMARY["maximum"][MANY]
    spans, tip = item.locator(".text span"), page.locator(".tip")
    spans.nth(key).hover()
    assert f"activation {values[key] / 255 * largest:.2f}" in tip.inner_text()
    page.mouse.move(5, 5)
    assert tip.is_hidden()
    item.locator(".text").focus()
    page.keyboard.press("ArrowRight")
    assert f"activation {values[key] / 255 * largest:.2f}" in page.locator("#said").inner_text(), "the key token first"
    page.keyboard.press("ArrowLeft")
    assert f": activation {values[key - 1] / 255 * largest:.2f}" in page.locator("#said").text_content()
    assert tip.is_visible()
    page.keyboard.press("Escape")
    assert tip.is_hidden()
    spans.nth(key - 1).click()
    assert tip.is_visible()
    assert item.locator(".here").count() == 1
    page.keyboard.press("ArrowDown")
    second = page.locator(".windows li").nth(1).get_attribute("data-example")
    assert page.evaluate("document.activeElement.closest('li').dataset.example") == second


def test_ten_texts_are_shown_and_it_says_how_many_more_there_are(show):
    page = show(f"#unit={MANY}&cut=2")
    count, items, more = len(UNITS[0][MANY]["examples"]), page.locator(".windows li"), page.locator(".panel > .more")
    assert items.count() == 10 < count - 10
    assert more.inner_text() == f"Show 10 more of {count - 10}"
    more.focus()
    page.keyboard.press("Enter")
    assert items.count() == 20
    assert page.evaluate("document.activeElement.closest('li').dataset.example") == items.nth(10).get_attribute(
        "data-example"
    )
    while more.is_visible():
        more.click()
    shown = items.evaluate_all("all => all.map(e => +e.dataset.example)")
    assert sorted(shown) == list(range(count))
    distances = (255 * DISTANCES[0][MANY] / DISTANCES[0][MANY].max()).round()
    assert (np.diff(distances.sum(1)[shown]) >= 0).all(), "from the most typical to the least"


def test_a_window_opens_to_its_whole_text(show):
    page = show(f"#unit={MANY}")
    example = page.locator(".windows li:has(button)").first.get_attribute("data-example")
    item, document = page.locator(f"li[data-example='{example}']"), UNITS[0][MANY]["examples"][int(example)][0]
    text = item.locator(".text")
    assert len(text.text_content()) < len(seen("".join(VOCAB[token] for token in TEXTS[document])))
    item.get_by_role("button", name="whole text").click()
    assert text.text_content().strip() == seen("".join(VOCAB[token] for token in TEXTS[document])).strip()
    assert item.get_by_role("button").count() == 0
    page.keyboard.press("ArrowRight")
    assert item.locator(".here.key").count() == 1


def test_tokens_can_be_coloured_by_importance(show):
    page = show(f"#unit={MANY}")
    page.get_by_label("importance").first.check(force=True)
    item = page.locator(".windows li").first
    example = item.get_attribute("data-example")
    row = UNITS[0][MANY]["importance"][example]
    strengths = item.locator(".text span").evaluate_all("all => all.map(e => +e.style.getPropertyValue('--strength'))")
    assert strengths == pytest.approx([value / 255 for value in row] + [0] * (len(strengths) - len(row)), abs=1e-3)
    item.locator(".text span").nth(len(row) - 1).hover()
    assert "importance 1.00" in page.locator(".tip").inner_text()
    assert "importance not computed" in page.locator(".windows li").last.inner_text()
    page.keyboard.press("i")
    assert page.get_by_label("activation", exact=True).first.is_checked()


def test_it_writes_and_how_often_stand_beside_the_texts(show):
    page = show(f"#unit={MANY}")
    unit = UNITS[0][MANY]
    values = page.locator(".promotes .value").all_inner_texts()
    assert [float(text) for text in values] == pytest.approx([logit for _, logit in unit["promotes"]], abs=0.006)
    assert page.locator(".suppresses li").count() == 10
    assert page.locator(".histogram .column").count() == len(unit["histogram"]["counts"])
    edges, within = np.array(unit["histogram"]["edges"][1:]), page.locator(".histogram .within").count()
    assert within == (edges > 0.75 * SUMMARY["maximum"][MANY]).sum()
    page.locator(".histogram .reach").nth(0).hover()
    assert f"{unit['histogram']['counts'][0]:,} tokens" in page.locator(".tip").inner_text()
    for term in page.locator(".metrics dl > div").all():
        assert len(term.inner_text().splitlines()) >= 4, "name, value, how it compares, what it means"


def test_units_without_or_with_one_example_are_told_of(show):
    page = show(f"#unit={DEAD}")
    assert "dead" in page.locator(".none").inner_text()
    assert page.locator("[role=tablist]").is_hidden()
    page = show(f"#unit={QUIET}")
    assert "as strongly as an example must be" in page.locator(".none").inner_text()
    page = show(f"#unit={SINGLE}")
    assert page.locator(".windows li").count() == 1
    assert page.locator("dd[data-name=mean_distance]").inner_text().startswith("–")


def test_keys_do_no_harm_to_a_unit_without_examples(show):
    page = show(f"#unit={MANY}")
    page.fill("#number", str(DEAD))
    page.press("#number", "Enter")
    at(page, DEAD)
    for key in "[]0i":
        page.keyboard.press(key)
    assert page.locator(".none").is_visible()


def test_data_that_cannot_be_read_are_said_to_be_so(page, path, tmp_path):
    text = path.read_text(encoding="utf-8")
    head = '<script type="application/octet-stream" id="explorer-part-0">'
    broken = tmp_path / "broken.html"
    broken.write_text(text.replace(head, head + "AAAA"), encoding="utf-8")
    page.goto(broken.as_uri())
    page.locator("#trouble").wait_for()
    assert page.locator("#trouble").inner_text().startswith("The page's data could not be read: ")


# Finding --------------------------------------------------------------------------------------------------------------


def test_units_are_found_by_number_and_the_way_back_is_kept(show):
    page = show(f"#unit={MANY}")
    for unit in (12, 40):
        page.fill("#number", str(unit))
        page.press("#number", "Enter")
        at(page, unit)
    assert page.locator("#list [aria-current]").inner_text().startswith("40")
    page.go_back()
    at(page, 12)
    page.locator("#back").click()
    at(page, MANY)
    assert page.locator("#back").is_disabled()
    page.locator("#forward").click()
    at(page, 12)
    page.go_forward()
    at(page, 40)
    assert page.locator("#forward").is_disabled()
    page.locator("#visits summary").click()
    page.locator("#visited a").last.click()
    at(page, MANY)


def test_who_is_in_a_hurry_gets_the_last_unit_asked_for_and_one_step_of_history(show):
    page = show("#unit=40")
    assert page.evaluate("history.state.at") == 0
    key = "document.body.dispatchEvent(new KeyboardEvent('keydown', { key: 'j', bubbles: true }))"
    page.evaluate(f"for (let i = 0; i < 6; i++) {key}")
    until(page, "location.hash === '#set=neurons-1&unit=46'")
    assert neuron(page) == 46
    assert page.evaluate("history.state.at") == 1
    page.locator("#back").click()
    at(page, 40)


def test_random_goes_to_another_unit_of_the_list_that_has_examples(show):
    page = show("#unit=0")
    page.locator("#random").click()
    until(page, "!document.querySelector('.pane h2').textContent.endsWith(' 0')")
    assert SUMMARY["examples"][neuron(page)] > 0


def test_the_search_for_a_token_lists_the_units_with_that_key_token(show):
    page = show()
    page.fill("#query", "BANK")
    until(page, "document.querySelector('#count').textContent.includes('key token')")
    expected = INDEX["sets"][0]["words"][str(VOCAB.index(" bank"))]
    assert rows(page) == sorted(expected)[:50]
    assert page.locator("#count").inner_text() == f"{len(expected)} of 70 neurons with the key token ␣bank"
    words = {VOCAB[int(token)].strip() for token in INDEX["sets"][0]["words"]} - {""}
    short = next(word for word in sorted(words) if sum(other.startswith(word) for other in words) > 1)
    page.fill("#query", short)
    until(page, f"/key token ␣?{short}$/.test(document.querySelector('#count').textContent)")
    page.fill("#query", "ri")
    until(page, "document.querySelector('#count').textContent.includes('river')")
    page.fill("#query", "nothing like it")
    until(page, "document.querySelector('#count').textContent.startsWith('0 of 70')")
    page.fill("#query", "")
    until(page, "document.querySelector('#count').textContent === '70 neurons'")


def test_the_search_in_texts_lists_the_units_with_such_windows_and_opens_one(show):
    page = show()
    page.get_by_label("texts", exact=True).check(force=True)
    page.fill("#query", "river money")
    until(page, "document.querySelector('#count').textContent.includes('with a text')")
    expected = {}
    for number, unit in enumerate(UNITS[0]):
        for example in range(len(unit["examples"])):
            if "river money" in "".join(window(unit, example)[1]).lower():
                expected.setdefault(number, []).append(example)
    assert rows(page) == sorted(expected, key=lambda unit: (-len(expected[unit]), unit))[:50]
    number = rows(page)[1]
    row = page.locator("#list li").nth(1)
    count = len(expected[number])
    assert f"{count} text{'' if count == 1 else 's'}" in row.inner_text()
    row.locator("a").click()
    at(page, number)
    assert int(page.locator(".windows li").first.get_attribute("data-example")) == expected[number][0]
    assert "the one you asked for" in page.locator(".windows li").first.inner_text()


@pytest.mark.parametrize("name", ["mean_distance", "clusters", "frequency", "examples", "maximum"])
def test_the_list_is_sorted_by_what_is_asked(show, name):
    page = show()
    page.select_option("#sort", name)
    page.locator("#more").click()
    values = [SUMMARY[name][unit] for unit in rows(page)]
    known = [value for value in values if value is not None]
    assert known == sorted(known, reverse=True)
    assert values[: len(known)] == known, "what is undefined comes last"
    page.locator("#turn").click()
    if page.locator("#more").is_visible():
        page.locator("#more").click()
    turned = [SUMMARY[name][unit] for unit in rows(page)]
    assert turned[: len(known)] == sorted(known)
    assert len(turned) == 70


def test_filters_keep_what_lies_within_them(show):
    page = show()
    page.locator("#filters summary").click()
    page.select_option("#status", "dead")
    assert rows(page) == [DEAD]
    page.select_option("#status", "quiet")
    assert rows(page) == [QUIET]
    page.select_option("#status", "all")
    page.fill("#clusters-low", "3")
    page.fill("#clusters-high", "4")
    page.fill("#mean_distance-low", "0.5")
    page.fill("#frequency-high", "5")
    expected = [
        unit
        for unit in range(70)
        if (SUMMARY["clusters"][unit] or 0) in (3, 4)
        and SUMMARY["mean_distance"][unit] >= 0.5
        and SUMMARY["frequency"][unit] <= 0.05
    ]
    assert rows(page) == expected != []
    page.locator("#clear").click()
    assert page.locator("#count").inner_text() == "70 neurons"


def test_the_overview_has_a_dot_for_each_unit_and_a_click_opens_it(show):
    page = show(f"#unit={MANY}")
    known = [unit for unit in range(70) if SUMMARY["mean_distance"][unit] is not None]
    places = re.findall(r"M([\d.]+) ([\d.]+)h0", page.locator("#overview .others").get_attribute("d"))
    places = {unit: (float(x), float(y)) for unit, (x, y) in zip(known, places, strict=True)}
    rarest, most = (
        min(known, key=lambda unit: sign * SUMMARY[name][unit])
        for name, sign in (("frequency", 1), ("mean_distance", -1))
    )
    assert min(places, key=lambda unit: places[unit][0]) == rarest
    assert min(places, key=lambda unit: places[unit][1]) == most, "upwards is more"
    box = page.locator("#overview svg").bounding_box()
    x, y = places[rarest]
    page.mouse.move(box["x"] + x + 1, box["y"] + y)
    assert page.locator(".tip").inner_text().startswith(f"neuron {rarest}")
    page.mouse.down()
    page.mouse.up()
    at(page, rarest)
    page.locator("#filters summary").click()
    page.fill("#clusters-low", "3")
    listed = page.locator("#overview .listed").get_attribute("d").count("M")
    assert listed == len([unit for unit in known if SUMMARY["clusters"][unit] >= 3]) < len(known)


def test_j_and_k_walk_through_the_list_as_it_is_sorted(show):
    page = show(f"#unit={MANY}")
    page.select_option("#sort", "frequency")
    order = rows(page)
    page.locator("#list a").nth(0).click()
    at(page, order[0])
    page.keyboard.press("j")
    at(page, order[1])
    page.keyboard.press("j")
    at(page, order[2])
    page.keyboard.press("k")
    at(page, order[1])


def test_similar_clusters_are_shown_by_their_central_text_and_lead_there(show):
    page = show(f"#unit={MANY}")
    central_there = UNITS[0][MANY]["similar"]["0"]
    items = page.locator(".similar li")
    assert items.count() == 8
    assert [float(text) for text in items.locator(".value").all_inner_texts()] == pytest.approx(
        [row[3] for row in central_there], abs=0.006
    )
    place, (target, unit, example, _) = next((i, row) for i, row in enumerate(central_there) if row[1] > 7)
    until(page, f"document.querySelectorAll('.similar .text')[{place}].children.length > 1")
    document, position, _ = UNITS[target][unit]["examples"][example]
    assert items.nth(place).locator(".key").get_attribute("data-token").strip("␣")
    assert items.nth(place).locator(".text span").count() == len(TEXTS[document][max(0, position - 10) : position + 6])
    items.nth(place).locator("a").click()
    until(page, f"location.hash.includes('unit={unit}')")
    there = page.locator(f".pane[aria-label='{INDEX['sets'][target]['name']}']")
    assert there.locator("h2").inner_text().endswith(f" {unit}")
    assert there.locator(".windows li").first.get_attribute("data-example") == str(example)


# Addresses ------------------------------------------------------------------------------------------------------------


def test_an_address_opens_what_it_names_and_is_kept(show):
    hash = f"#set=neurons-1&unit={MANY}&cluster=1&cut=0.3"
    page = show(hash)
    assert page.evaluate("location.hash") == hash
    assert page.locator("[role=tab]").nth(1).get_attribute("aria-selected") == "true"
    page.evaluate(f"location.hash = '#set=neurons-1&unit={QUIET}'")
    at(page, QUIET)
    page.go_back()
    at(page, MANY)
    assert page.locator(".cut").get_attribute("aria-valuenow") == "0.3"


@pytest.mark.parametrize(
    "hash",
    [
        "#unit=70",
        "#unit=-1",
        "#unit=x",
        "#set=none&unit=1",
        "#<script>",
        "#unit=0&cluster=99&cut=x&example=999",
        "#unit=0&cluster=0.5&example=1.5",
    ],
)
def test_an_address_that_names_nothing_opens_something(show, hash):
    page = show(hash)
    assert page.locator(".windows li").count() > 0


# Two sets -------------------------------------------------------------------------------------------------------------


def test_two_sets_stand_side_by_side_and_each_keeps_its_own_place(show):
    page = show(f"#set=neurons-1&unit={MANY}&beside=topk:2:1:0.4")
    panes = page.locator(".pane")
    assert panes.count() == 2
    assert panes.locator("h2").all_inner_texts() == [f"Neuron {MANY}", "Latent 2"]
    one, other = (panes.nth(i).bounding_box() for i in (0, 1))
    assert other["x"] >= one["x"] + one["width"] - 1
    assert panes.nth(1).locator(".cut").get_attribute("aria-valuenow") == "0.4"
    assert panes.nth(0).locator(".cut").get_attribute("aria-valuenow") == "0.5"
    assert panes.nth(1).locator("[role=tab]").nth(1).get_attribute("aria-selected") == "true"
    page.keyboard.press("s")
    assert page.locator("#count").inner_text() == "40 latents"
    page.fill("#number", "9")
    page.press("#number", "Enter")
    until(page, "document.querySelectorAll('.pane h2')[1].textContent === 'Latent 9'")
    assert page.evaluate("location.hash") == f"#set=topk&unit=9&cut=0.4&beside=neurons-1:{MANY}:0:0.5"
    page.uncheck("#beside")
    until(page, "document.querySelectorAll('.pane').length === 1")
    assert page.evaluate("location.hash") == "#set=topk&unit=9&cut=0.4"
    assert page.locator("h2").first.inner_text() == "Latent 9"


def test_inside_a_page_with_a_theme_the_colours_follow_it(page, address, path):
    page.goto("about:blank")
    page.emulate_media(color_scheme="light")
    page.set_content(f'<iframe srcdoc="{escape(path.read_text(encoding="utf-8"))}"></iframe>')
    page.evaluate("document.documentElement.dataset.theme = 'dark'")
    until(page.frames[1], OPEN)
    scheme = "getComputedStyle(document.documentElement).colorScheme"
    until(page.frames[1], f"{scheme} === 'dark'")
    page.evaluate("document.documentElement.dataset.theme = 'light'")
    until(page.frames[1], f"{scheme} === 'light'")


def test_alone_a_set_gives_way_to_the_other_and_is_found_again_where_it_was_left(show):
    page = show(f"#unit={MANY}")
    assert page.locator(".pane").count() == 1
    assert page.locator("#sets label").all_inner_texts() == ["70 neurons", "40 latents"]
    page.locator("#sets label").nth(1).click()
    until(page, "document.querySelector('.pane h2').textContent.startsWith('Latent')")
    assert page.locator("#count").inner_text() == "40 latents"
    page.locator("#sets label").nth(0).click()
    at(page, MANY)
    page.check("#beside")
    until(page, "document.querySelectorAll('.pane').length === 2")
    assert "beside=topk:" in page.url


def test_two_saes_are_told_apart_by_their_names(page, address, tmp_path):
    both = INDEX | {"sets": [each | {"kind": "latents"} for each in INDEX["sets"]]}
    (tmp_path / "both.html").write_text(filled(both, PARTS), encoding="utf-8")
    page.set_viewport_size({"width": 1400, "height": 900})
    page.goto((tmp_path / "both.html").as_uri())
    until(page, OPEN)
    assert page.locator("#sets label").all_inner_texts() == [each["name"] for each in INDEX["sets"]]
    assert page.locator(".pane").count() == 2, "a wide window opens on both"
    assert all(text.startswith("Latent") for text in page.locator("h2:visible").all_inner_texts())


def test_latents_have_decoder_neighbours_absorption_and_density(show):
    page = show("#set=topk&unit=9")
    assert page.locator(".neighbours li").count() == 8
    page.locator(".neighbours a").nth(3).click()
    at(page, 10)
    page.go_back()
    at(page, 9)
    assert "“b”" in page.locator(".absorption li").inner_text()
    assert "34 %" in page.locator(".absorption li").inner_text()
    density = INDEX["sets"][1]["summary"]["frequency"][9]
    assert measure(page, "frequency") == density
    assert show(f"#unit={MANY}").locator(".absorption").is_hidden(), "a neuron has none"


# For everybody --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "hash", [f"#unit={MANY}&cut=0.1", f"#unit={MANY}&beside=topk:2", f"#unit={DEAD}", "#set=topk&unit=9"]
)
def test_at_the_width_of_a_phone_nothing_scrolls_sideways(show, hash):
    page = show(hash, width=390)

    def wide():
        return page.evaluate("document.documentElement.scrollWidth")

    assert wide() == 390
    page.locator("#browse").click()
    assert page.locator("#browse").get_attribute("aria-expanded") == "true"
    page.locator("#filters summary").click()
    page.get_by_label("texts", exact=True).check(force=True)
    assert wide() == 390
    page.locator("#list a").nth(8).click()
    at(page, 8) if "set=topk" in hash or "beside" not in hash else None
    until(page, "!document.querySelector('#finder').classList.contains('open')")
    assert page.locator("#finder").is_hidden(), "it makes room for what was found"
    page.locator("#help").click()
    assert wide() == 390
    assert page.locator("#help-box").bounding_box()["width"] <= 390


CONTRAST = """() => {
    const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
    const over = (colours) => {
        canvas.clearRect(0, 0, 1, 1);
        for (const colour of colours) { canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1); }
        return [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3);
    };
    const light = (rgb) => {
        const [r, g, b] = rgb.map(v => v / 255).map(v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4);
        return .2126 * r + .7152 * g + .0722 * b;
    };
    const found = [];
    const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
    while (walk.nextNode()) {
        const e = walk.currentNode.parentElement, svg = e.closest("svg");
        const none = "script, template, noscript, option, .unseen, .skip, :disabled";
        if (!walk.currentNode.textContent.trim() || e.closest(none)) continue;
        if (!e.getClientRects().length || e.closest("label:has(:disabled)")) continue;
        const behind = [];
        for (let p = e; p; p = p.parentElement) behind.unshift(getComputedStyle(p).backgroundColor);
        if (e.closest(".cut")) behind.push(getComputedStyle(e.closest(".cut").querySelector(".grip")).fill);
        const ground = over(behind), style = getComputedStyle(e);
        const ink = over([...behind, svg ? style.fill : style.color]);
        const [a, b] = [light(ground), light(ink)].sort((x, y) => y - x);
        found.push([(a + .05) / (b + .05), e.outerHTML.slice(0, 90)]);
    }
    return found.sort((x, y) => x[0] - y[0]);
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_stands_out_from_its_ground(show, scheme):
    page = show(f"#unit={MANY}&cut=0.2", color_scheme=scheme)
    found = page.evaluate(CONTRAST)
    assert len(found) > 200
    assert found[0][0] >= 4.5, found[:5]
    page.get_by_label("importance").first.check(force=True)
    found = page.evaluate(CONTRAST)
    assert found[0][0] >= 4.5, found[:5]


def test_colours_follow_the_system_until_the_reader_chooses(show):
    page = show("#unit=0", color_scheme="dark")
    ground = "getComputedStyle(document.body).backgroundColor"
    dark = page.evaluate(ground)
    page.emulate_media(color_scheme="light")
    light = page.evaluate(ground)
    assert light != dark
    page.keyboard.press("t")
    assert page.locator("#theme").get_attribute("aria-label") == "Colours: light"
    page.keyboard.press("t")
    assert page.evaluate(ground) == dark
    page.reload()
    until(page, "document.querySelector('.pane h2')?.textContent")
    assert page.evaluate(ground) == dark, "the choice is kept"
    page.keyboard.press("t")
    assert page.evaluate(ground) == light


def test_clusters_differ_by_shape_and_colour(show):
    page = show(f"#unit={MANY}&cut=0")
    signs = page.locator(".map .sign").evaluate_all(
        "all => all.map(e => [e.getAttribute('d'), getComputedStyle(e).fill])"
    )
    assert len({tuple(sign) for sign in signs}) == min(len(signs), 56)
    assert len({colour for _, colour in signs}) == 7


def test_with_the_keyboard_alone_everything_is_reached_and_focus_is_seen(show):
    page = show(f"#unit={MANY}")
    reached = []
    for _ in range(120):
        page.keyboard.press("Tab")
        name, seen = page.evaluate(
            """() => {
                const e = document.activeElement, own = getComputedStyle(e);
                const near = getComputedStyle(e.closest(".switch") ?? e);
                const outlined = [own, near].some(s => s.outlineStyle !== "none" && parseFloat(s.outlineWidth) >= 2);
                const grip = e.matches(".cut") && getComputedStyle(e.querySelector(".grip")).strokeWidth === "3px";
                const name = e.id || e.getAttribute("role") || e.getAttribute("class") || e.name || e.tagName;
                return [name, e === document.body || grip || outlined];
            }"""
        )
        assert seen, f"the focus on {name} cannot be seen"
        reached.append(name)
        if name == "BODY":
            break
    assert {"skip", "about", "theme", "help", "number", "query", "sort", "turn", "random", "slider", "tab-0-0"} <= set(
        reached
    )
    assert reached.count("group") == 2, "the map and the texts, which are one stop: arrows lead on"
    assert sum(name.startswith("tab-") for name in reached) == 1
    page.locator("#skip").focus()
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.getAttribute('role')") == "tab"


def test_keys_are_told_of_and_can_be_switched_off(show):
    page = show(f"#unit={MANY}")
    page.keyboard.press("?")
    box = page.locator("#help-box")
    assert box.is_visible()
    told = box.locator("kbd").all_inner_texts()
    assert {"/", "g", "r", "j", "k", "[", "]", "i", "t", "?"} <= set(told)
    page.keyboard.press("Escape")
    assert box.is_hidden()
    page.keyboard.press("/")
    assert page.evaluate("document.activeElement.id") == "query"
    page.keyboard.type("rb?")
    assert page.input_value("#query") == "rb?", "in a field letters are letters"
    page.locator("#help").click()
    page.locator("#single-keys").uncheck()
    page.keyboard.press("Escape")
    page.locator("#back").evaluate("e => e.blur()")
    page.keyboard.press("?")
    assert box.is_hidden()
    page.locator("#help").click()
    page.locator("#single-keys").check()
    box.get_by_role("button", name="Close").click()
    assert box.is_hidden()


def test_about_tells_what_was_read(show):
    page = show()
    page.locator("#about").click()
    told = page.locator("#about-box").inner_text()
    assert "200 made texts" in told
    assert "TopK SAE of layer 1" in told


def test_every_control_has_a_name_and_changes_are_announced(show):
    page = show(f"#unit={MANY}")
    nameless = page.evaluate(
        """() => [...document.querySelectorAll("button, input, select, [tabindex], [role=slider], [role=tab]")]
            .filter(e => !e.closest("template") && !e.getAttribute("aria-label") && !e.getAttribute("aria-labelledby"))
            .filter(e => !e.textContent.trim() && !e.closest("label")).map(e => e.outerHTML)"""
    )
    assert nameless == []
    ids = page.evaluate("[...document.querySelectorAll('[id]')].map(e => e.id)")
    assert len(ids) == len(set(ids))
    page.fill("#number", "12")
    page.press("#number", "Enter")
    at(page, 12)
    assert page.locator("#said").inner_text().startswith("neuron 12: Active on")
    assert page.evaluate("document.activeElement.tagName") == "H2"


def test_without_motion_nothing_moves(show):
    page = show(f"#unit={MANY}", reduced_motion="reduce")
    assert page.evaluate("getComputedStyle(document.querySelector('.map .sign')).transitionDuration") in (
        "0s",
        "0s, 0s",
    )
