"""The figures show the numbers they are given, with their units and their uncertainty."""

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.colors import to_rgb

from sae_lib import figures

matplotlib.use("Agg")


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


def history(steps=100, saes=("relu", "topk")):
    return [
        {"sae": place, "variant": name, "tokens": 10 * (step + 1), "loss": 1 / (step + 1), "l0": 3.0, "aux": 0.1}
        for step in range(steps)
        for place, name in enumerate(saes)
    ]


def luminance(colour):
    """Relative luminance of the WCAG."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(colour)]
    return float(np.dot(linear, (0.2126, 0.7152, 0.0722)))


def test_interval_is_the_t_interval_worked_by_hand():
    # 1, 2, 3: mean 2, s = 1, t(.975, 2) = 4.3027, so 4.3027 / sqrt(3) = 2.4841
    assert figures.interval([1, 2, 3]) == pytest.approx((2.0, 2.4841), abs=1e-4)


def test_interval_of_one_seed_is_unknown_and_missing_seeds_do_not_count():
    mean, half = figures.interval([np.nan, 5.0])
    assert mean == 5.0
    assert np.isnan(half)
    with pytest.raises(ValueError, match="at least one number"):
        figures.interval([np.nan])
    with pytest.raises(ValueError, match=r"level must be in \(0, 1\), got 1.5"):
        figures.interval([1, 2], level=1.5)


def test_frontier_draws_means_in_order_of_sparsity_with_intervals_both_ways():
    l0 = np.array([[8.0, 10.0, 12.0], [2.0, 4.0, 6.0]])
    fvu = np.array([[0.1, 0.2, 0.3], [0.4, 0.5, 0.6]])
    ax = figures.frontier({"topk": (l0, fvu), "relu": (l0 + 1, fvu)})
    container = ax.containers[0]
    line, _, (horizontal, vertical) = container
    np.testing.assert_allclose(line.get_xdata(), [4, 10])
    np.testing.assert_allclose(line.get_ydata(), [0.5, 0.2])
    left, right = horizontal.get_segments()[0][:, 0]
    assert (right - left) / 2 == pytest.approx(2 * 2.4841, abs=1e-3)
    low, high = vertical.get_segments()[0][:, 1]
    assert (high - low) / 2 == pytest.approx(0.1 * 2.4841, abs=1e-4)
    assert "L0" in ax.get_xlabel()
    assert "FVU" in ax.get_ylabel()
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["topk", "relu"]


def test_frontier_of_a_single_seed_claims_no_interval():
    ax = figures.frontier({"topk": ([1.0, 2.0], [0.5, 0.4])})
    assert not ax.containers[0].has_xerr
    assert not ax.containers[0].has_yerr
    assert ax.get_legend() is None


def test_frontier_refuses_shapes_that_differ():
    with pytest.raises(ValueError, match=r"'topk'.*\(2,\) and \(3,\)"):
        figures.frontier({"topk": ([1, 2], [1, 2, 3])})
    with pytest.raises(ValueError, match="at least one variant"):
        figures.frontier({})


def test_labels_differ_in_more_than_colour_and_keep_their_look():
    looks = figures.styles([str(i) for i in range(24)])
    assert len({(look["color"], look["marker"]) for look in looks.values()}) == 24
    same_colour = [look for look in looks.values() if look["color"] == figures.PALETTE[0]]
    assert len({look["marker"] for look in same_colour}) == len(same_colour) == 3
    assert figures.styles(["a", "b"])["a"] == figures.styles(["a", "c", "d"])["a"]
    with pytest.raises(ValueError, match="differ"):
        figures.styles(["a", "a"])
    with pytest.raises(ValueError, match="at most 24"):
        figures.styles([str(i) for i in range(25)])


def test_estimates_show_every_seed_the_mean_and_the_control():
    ax = figures.estimates({"random": [0.1, 0.2, 0.3], "trained": [0.7, 0.8, 0.9]}, x_label="MCC", control=0.5)
    seeds, means = ax.lines[0], ax.containers[0].lines[0]  # the dots and the error bar
    np.testing.assert_allclose(seeds.get_xdata(), [0.1, 0.2, 0.3])
    assert means.get_xdata()[0] == pytest.approx(0.2)
    assert [tick.get_text() for tick in ax.get_yticklabels()] == ["random", "trained"]
    assert any(list(line.get_xdata()) == [0.5, 0.5] for line in ax.lines)
    assert ax.get_xlabel() == "MCC"
    assert ax.get_ylim()[0] > ax.get_ylim()[1], "the first label stands on top"


def test_bars_show_the_middle_the_range_and_the_group():
    ax = figures.bars(
        {"ours": [1.5, 1.0, 2.5], "theirs": [4.0, 3.5, 4.25], "mine": [2, 2, 2]}, ["a", "b", "a"], x_label="ms"
    )
    assert [bar.get_width() for bar in ax.patches] == [1.5, 4.0, 2.0]
    (whiskers,) = ax.containers[1].errorbar.lines[2]
    ends = [[point[0] for point in segment] for segment in whiskers.get_segments()]
    assert ends == [[1.0, 2.5], [3.5, 4.25], [2.0, 2.0]]
    first, second, third = (bar.get_facecolor() for bar in ax.patches)
    assert first == third != second
    assert [tick.get_text() for tick in ax.get_yticklabels()] == ["ours", "theirs", "mine"]
    assert ax.get_ylim()[0] > ax.get_ylim()[1], "the first label stands on top"
    assert ax.get_xlabel() == "ms"


@pytest.mark.parametrize(("values", "groups"), [({}, []), ({"a": [1, 1, 1]}, [])])
def test_bars_want_a_group_for_each_label(values, groups):
    with pytest.raises(ValueError, match="groups must name one group for each of at least one label"):
        figures.bars(values, groups)


def test_heat_map_shows_the_matrix_and_centres_cosines_at_zero():
    matrix = np.array([[1.0, -0.5], [0.25, 0.0]])
    ax = figures.heat_map(matrix)
    image = ax.images[0]
    np.testing.assert_array_equal(image.get_array(), matrix)
    assert image.get_clim() == (-1, 1)
    assert ax.figure.axes[1].get_ylabel() == "cosine"
    assert figures.heat_map([[0.0, 3.0]], limits=None).images[0].get_clim() == (0, 3)
    assert figures.heat_map([[-4.0, 3.0]], limits=None).images[0].get_clim() == (-4, 4)
    with pytest.raises(ValueError, match=r"\(rows, columns\), got \(3,\)"):
        figures.heat_map([1, 2, 3])


def test_densities_count_the_latents_that_never_fire():
    ax = figures.densities({"topk": [0, 0, 0.01, 0.1]})
    assert ax.get_legend().get_texts()[0].get_text() == "topk (2 of 4 never fire)"
    heights = ax.patches[0].get_xy()[:, 1]
    assert heights.max() == 1
    with pytest.raises(ValueError, match=r"\[0, 1\], got values from 0.0 to 50.0"):
        figures.densities({"topk": [0, 50]})


def test_history_has_a_panel_a_column_and_a_line_an_sae():
    axes = figures.history_curves(history(), ["loss", "l0", "aux"])
    assert [ax.get_xlabel() for ax in axes] == ["tokens"] * 3
    labels = ["loss (squared norms)", "L0 (living latents a token)", "aux (term of the loss)"]
    assert [ax.get_ylabel() for ax in axes] == labels
    assert len(axes[0].figure.axes) == 3
    strong = [line for line in axes[0].lines if not line.get_label().startswith("_")]
    assert [line.get_label() for line in strong] == ["relu", "topk"]
    np.testing.assert_allclose(strong[0].get_xdata()[[0, -1]], [10, 1000])


def test_history_is_smoothed_by_a_centred_mean():
    rows = [{"sae": 0, "variant": "topk", "tokens": i, "loss": float(i)} for i in range(300)]
    faint, strong = figures.history_curves(rows, ["loss"])[0].lines
    np.testing.assert_allclose(faint.get_ydata(), np.arange(300))
    inner = slice(10, -10)
    assert len(strong.get_ydata()) == 300
    np.testing.assert_allclose(strong.get_ydata()[inner], np.arange(300)[inner], atol=0.51)


def test_two_saes_of_one_variant_get_names_of_their_own():
    ax = figures.history_curves(history(saes=("topk", "topk")), ["loss"])[0]
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["topk 0", "topk 1"]
    ax = figures.history_curves(history(saes=("topk", "topk")), ["loss"], labels=["k = 4", "k = 8"])[0]
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["k = 4", "k = 8"]


def test_history_refuses_what_it_cannot_draw():
    with pytest.raises(ValueError, match="at least one row"):
        figures.history_curves([])
    with pytest.raises(ValueError, match=r"'fvu'; it has .*'aux'"):
        figures.history_curves(history(), ["fvu"])
    with pytest.raises(ValueError, match="each of the 2 SAEs"):
        figures.history_curves(history(), ["loss"], labels=["one"])


def test_style_is_a_light_card_with_dark_ink_of_enough_contrast():
    with plt.rc_context():
        figures.set_style()
        figure, ax = plt.subplots()
        card, ink = luminance(figure.get_facecolor()), luminance(ax.xaxis.label.get_color())
        assert (card + 0.05) / (ink + 0.05) > 7
        assert plt.rcParams["savefig.facecolor"] == figures.CARD
        cycle = [to_rgb(colour) for colour in plt.rcParams["axes.prop_cycle"].by_key()["color"]]
        assert cycle == [to_rgb(colour) for colour in figures.PALETTE]


def test_loss_curve_needs_a_notebook():
    with pytest.raises(ValueError, match="needs a notebook"):
        figures.LossCurve()


class Shell:
    """What LossCurve uses of IPython: the events of a cell."""

    def __init__(self):
        self.events, self.registered = self, []

    def register(self, event, callback):
        self.registered.append((event, callback))

    def unregister(self, event, callback):
        self.registered.remove((event, callback))


class Display:
    """A notebook's display, on which every drawing takes a second of the clock."""

    def __init__(self):
        self.now, self.shown = 100.0, []

    def __call__(self, figure, display_id):
        assert display_id
        self.update(figure)
        return self

    def update(self, figure):
        self.now += 1
        self.shown.append(figure)


@pytest.fixture
def notebook(monkeypatch):
    shell, display = Shell(), Display()
    monkeypatch.setattr("IPython.get_ipython", lambda: shell)
    monkeypatch.setattr("IPython.display.display", display)
    monkeypatch.setattr("sae_lib.figures.time.monotonic", lambda: display.now)
    return shell, display


def test_loss_curve_draws_for_at_most_a_tenth_of_the_time(notebook):
    _, display = notebook
    curve, rows = figures.LossCurve(), history(steps=20)
    curve(rows)
    drawn = display.now
    display.now = drawn + 8.9
    curve(rows)
    assert len(display.shown) == 1
    display.now = drawn + 9
    curve(rows)
    assert len(display.shown) == 2


def test_loss_curve_ends_with_the_whole_history_when_its_cell_ends(notebook):
    shell, display = notebook
    curve, rows = figures.LossCurve(), history(steps=50)
    curve(rows[:20])
    curve(rows)
    [(event, finish)] = shell.registered
    assert event == "post_run_cell"
    finish(None)
    assert len(display.shown) == 2
    assert not shell.registered
    lines = display.shown[-1].axes[0].lines
    assert max(line.get_xdata().max() for line in lines) == 500
    assert not plt.get_fignums(), "figures are closed, or the notebook shows them twice"
