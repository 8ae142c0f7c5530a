import sys
from itertools import pairwise

import matplotlib
import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.text import Text
from PIL import Image

from remixdit.figures import axes as figure_axes
from remixdit.figures import plots
from remixdit.figures.animation import Animation
from remixdit.figures.axes import interval_labels

QUARTERS = [0, 250, 500, 750, 1000]


def uniform(num_experts):
    return np.arange(num_experts + 1) * 1000 // num_experts


def ticks(axes):
    return [text.get_text() for text in axes.get_xticklabels()]


def written(axes):
    """(rows, columns) of the texts in the cells of a picture."""
    rows, columns = axes.images[0].get_array().shape
    cells = {tuple(round(place) for place in text.get_position()): text for text in axes.texts}
    return [[cells[column, row].get_text() for column in range(columns)] for row in range(rows)]


def test_cells_show_the_coefficient_of_basis_and_interval():
    coefficients = np.random.default_rng(0).dirichlet(np.ones(3), size=4)  # (N, K)
    axes = plots.coefficients_heatmap(coefficients, QUARTERS).axes[0]
    assert np.array_equal(axes.images[0].get_array(), coefficients.T)
    assert written(axes) == [[f"{value:.2f}" for value in basis] for basis in coefficients.T]
    assert ticks(axes) == ["[0, 250)", "[250, 500)", "[500, 750)", "[750, 1000)"]


def test_every_block_has_its_own_picture_on_one_scale():
    tables = np.random.default_rng(0).dirichlet(np.ones(3), size=(5, 4))  # (L, N, K)
    *panels, _ = plots.coefficients_heatmap(tables, QUARTERS).axes
    assert [axes.get_ylabel() for axes in panels] == [*(f"block {i}" for i in range(4)), "outside"]
    for axes, table in zip(panels, tables, strict=True):
        assert np.array_equal(axes.images[0].get_array(), table.T)
        assert axes.images[0].get_clim() == (0, 1)


def test_one_block_is_drawn_as_a_table_of_its_own():
    tables = np.random.default_rng(0).dirichlet(np.ones(3), size=(5, 4))
    axes, _ = plots.coefficients_heatmap(tables, QUARTERS, block=2).axes
    assert np.array_equal(axes.images[0].get_array(), tables[2].T)
    assert len(axes.texts) == 12


def test_coefficients_outside_0_and_1_widen_the_scale():
    axes = plots.coefficients_heatmap([[-0.5, 1.5], [0.5, 0.5]], [0, 1, 2]).axes[0]
    assert axes.images[0].get_clim() == (-0.5, 1.5)


def test_losses_are_compared_with_the_first_series_in_per_cent():
    series = {"plain": [1.0, 0.1, 0.01, 0.001], "remix": [0.9, 0.1, 0.011, np.nan]}
    losses, changes = plots.loss_by_interval(series, QUARTERS).axes
    assert losses.get_yscale() == "log"
    for line, values in zip(losses.lines, series.values(), strict=True):
        np.testing.assert_array_equal(line.get_ydata(), values)
    np.testing.assert_allclose(changes.lines[0].get_ydata(), 0)
    np.testing.assert_allclose(changes.lines[1].get_ydata(), [-10, 0, 10, np.nan], atol=1e-12)


def test_errors_are_bars_around_their_losses():
    series, errors = {"a": [2.0, 4.0], "b": [1.0, 5.0]}, {"b": [0.5, 0.2]}
    losses, changes = plots.loss_by_interval(series, [0, 500, 1000], errors).axes
    (low, high), _ = losses.collections[0].get_segments()
    assert (low[1], high[1]) == (0.5, 1.5)
    (low, high), _ = changes.collections[0].get_segments()
    assert (low[1], high[1]) == (-75, -25)  # 0.5 and 1.5 against 2


def test_one_series_needs_no_second_panel():
    assert len(plots.loss_by_interval({"only": [1.0, 2.0]}, [0, 500, 1000]).axes) == 1


def test_losses_that_may_be_negative_are_on_a_linear_axis():
    axes = plots.loss_by_interval({"only": [1.0, -2.0]}, [0, 500, 1000]).axes[0]
    assert axes.get_yscale() == "linear"


def test_loss_matrix_shows_the_excess_over_the_best_expert_of_each_interval():
    matrix = np.array([[1.0, 0.022], [1.5, 0.02], [3.0, 0.03]])  # (N, I)
    axes = plots.loss_matrix(matrix, [0, 500, 1000]).axes[0]
    np.testing.assert_allclose(axes.images[0].get_array(), [[0, 10], [50, 0], [200, 50]])
    assert written(axes) == [["0", "10"], ["50", "0"], ["200", "50"]]
    centres = [(frame.get_x() + 0.5, frame.get_y() + 0.5) for frame in axes.patches]
    assert centres == [(0, 0), (1, 1)]  # (interval, expert)


@pytest.mark.parametrize("loss", [0.0, -1.0, np.nan])
def test_loss_matrix_refuses_losses_that_have_no_ratio(loss):
    with pytest.raises(ValueError, match="matrix must hold positive losses"):
        plots.loss_matrix([[1.0, loss]], [0, 500, 1000])


def test_running_mean_is_drawn_over_the_faint_losses():
    steps, losses = np.arange(100), np.random.default_rng(0).random(100) + 1
    raw, mean = plots.loss_curve({"a": (steps, losses)}, window=5).axes[0].lines
    assert np.array_equal(raw.get_ydata(), losses)
    assert raw.get_alpha() < 0.5
    np.testing.assert_allclose(mean.get_ydata()[50], losses[48:53].mean())
    assert np.array_equal(mean.get_xdata(), steps)


def test_running_mean_takes_fewer_values_at_the_ends_and_leaves_nan_out():
    np.testing.assert_allclose(plots.smoothed([1, 2, 3, 7], 3), [1.5, 2, 4, 5])
    np.testing.assert_allclose(plots.smoothed([1, np.nan, 3, 7], 3), [1, np.nan, 5, 5])
    values = np.random.default_rng(0).random(9)
    np.testing.assert_allclose(plots.smoothed(values, 1), values)


def test_gradients_share_a_log_axis_and_zeros_leave_a_gap():
    axes = plots.gradient_curve([1, 2, 3], [0.1, 0.2, 0.1], [0.01, 0.001, 0]).axes[0]
    assert axes.get_yscale() == "log"
    np.testing.assert_array_equal(axes.lines[0].get_ydata(), [0.1, 0.2, 0.1])
    np.testing.assert_array_equal(axes.lines[2].get_ydata(), [0.01, 0.001, np.nan])


def test_gradients_that_are_all_zero_can_be_drawn(tmp_path):
    plots.save(plots.gradient_curve([1, 2], [0, 0], [0, 0]), tmp_path / "zero.png")


def test_continuous_timesteps_are_told_apart_and_end_closed():
    assert interval_labels([0.0, 0.125, 1.0]) == ["[0, 0.125)", "[0.125, 1]"]
    labels = interval_labels([0.0, 0.10001, 0.10002, 1.0])
    assert labels == ["[0, 0.10001)", "[0.10001, 0.10002)", "[0.10002, 1]"]


def test_integer_timesteps_are_half_open():
    assert interval_labels([0, 1]) == ["[0, 1)"]
    assert interval_labels([0.0, 333.0, 1000.0]) == ["[0, 333)", "[333, 1000)"]


def overlaps(figure):
    """Return pairs of texts that overlap, and texts that are cut off, once the figure is drawn."""
    figure.draw_without_rendering()
    outside = set()  # ticks beyond the ends of an axis, which are not drawn
    for axis in (axis for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)):
        low, high = sorted(axis.get_view_interval())
        ticks = [*axis.get_major_ticks(), *axis.get_minor_ticks()]
        outside |= {t for tick in ticks if not low <= tick.get_loc() <= high
                    for t in tick.findobj(Text)}  # fmt: skip
    found = set(figure.findobj(Text)) - outside
    texts = [t for t in found if t.get_text().strip() and t.get_visible()]
    boxes = [(t, t.get_window_extent()) for t in texts]
    inside = figure.bbox.padded(1)
    cut = [t for t, box in boxes if not inside.contains(box.x0, box.y0)]
    cut += [t for t, box in boxes if not inside.contains(box.x1, box.y1)]
    straight = [(t, box) for t, box in boxes if t.get_rotation() in (0, 90)]
    pairs = [(s, t) for i, (s, a) in enumerate(straight) for t, b in straight[:i] if a.overlaps(b)]
    return pairs + cut


NAMED = {"title": "runs/digits/remixed: " + "a long name " * 20}


@pytest.mark.parametrize("named", [{}, NAMED])
@pytest.mark.parametrize("num_experts", [1, 2, 8, 20, 26, 100, 1000])
def test_no_text_overlaps_or_is_cut_off(num_experts, named):
    rng, boundaries = np.random.default_rng(0), uniform(num_experts)
    coefficients = rng.dirichlet(np.ones(4), size=num_experts)
    series = {f"variant {i}": np.exp(rng.random(num_experts)) for i in range(8)}
    assert not overlaps(plots.coefficients_heatmap(coefficients, boundaries, **named))
    assert not overlaps(plots.loss_by_interval(series, boundaries, dict(series), **named))
    if num_experts <= 100:
        matrix = np.exp(3 * rng.random((num_experts, num_experts)))
        assert not overlaps(plots.loss_matrix(matrix, boundaries, **named))


def test_no_text_of_a_curve_overlaps():
    steps, losses = np.arange(1, 500), np.linspace(1, 0.3, 499)
    many = {f"a name as long as names become {i}": (steps, losses) for i in range(6)}
    assert not overlaps(plots.loss_curve(many, **NAMED))
    assert not overlaps(plots.gradient_curve(steps, losses, losses / 7, **NAMED))
    tables = np.random.default_rng(0).dirichlet(np.ones(3), size=(13, 8))
    assert not overlaps(plots.coefficients_heatmap(tables, uniform(8), **NAMED))


@pytest.mark.parametrize("num_experts", [100, 1000])
def test_many_experts_are_labelled_sparsely_and_without_numbers(num_experts):
    coefficients = np.full((num_experts, 4), 0.25)
    axes = plots.coefficients_heatmap(coefficients, uniform(num_experts)).axes[0]
    assert ticks(axes) == [str(100 * n) for n in range(11)]
    assert np.allclose(
        axes.get_xticks(), np.arange(11) * num_experts / 10 - 0.5
    )  # where cells begin
    assert not axes.texts


def test_curves_are_told_apart_without_colour():
    looks = [figure_axes.look(index) for index in range(8)]
    assert len({color for color, _ in looks}) == 8
    for (first, dashes), (second, others) in pairwise(looks):
        grey = abs(np.dot(np.subtract(to_rgb(first), to_rgb(second)), (0.299, 0.587, 0.114)))
        assert dashes != others or grey > 0.2


@pytest.mark.parametrize("name", ["cividis", "viridis_r"])
def test_the_shades_of_heat_maps_are_ordered_in_grey(name):
    shades = matplotlib.colormaps[name](np.linspace(0, 1, 64))[:, :3] @ (0.299, 0.587, 0.114)
    assert len(set(np.sign(np.diff(shades)))) == 1


@pytest.mark.parametrize(
    ("kind", "start"), [("png", b"\x89PNG"), ("svg", b"<?xml"), ("pdf", b"%PDF")]
)
def test_a_figure_is_saved_the_same_each_time(tmp_path, kind, start):
    for name in "ab":
        figure = plots.loss_curve({"a": ([1, 2], [1.0, 2.0])}, title="run")
        plots.save(figure, tmp_path / name, kind)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert (tmp_path / "a").read_bytes().startswith(start)


def test_a_title_in_letters_that_no_font_has_is_escaped(tmp_path):
    figure = plots.loss_curve({"a": ([1, 2], [1.0, 2.0])}, title="run \ue123")
    plots.save(figure, tmp_path / "loss.png")  # matplotlib would warn of a missing glyph
    assert figure.get_suptitle() == r"run \ue123"


def test_boundaries_must_fit_the_table():
    with pytest.raises(ValueError, match=r"coefficients of shape \(4, 2\) needs 5 boundaries"):
        plots.coefficients_heatmap(np.ones((4, 2)), [0, 500, 1000])
    with pytest.raises(ValueError, match=r"remix of shape \(3,\) needs 4 boundaries"):
        plots.loss_by_interval({"plain": [1, 2], "remix": [1, 2, 3]}, [0, 500, 1000])


def test_a_name_with_a_dollar_sign_is_no_formula(tmp_path):
    name = "$ \\frac{ costs" + "x" * 100
    figure = plots.loss_by_interval({name: [1.0, 2.0], "b": [1.0, 2.0]}, [0, 500, 1000])
    plots.save(figure, tmp_path / "loss.png")
    assert figure.axes[0].get_legend().get_texts()[0].get_text().startswith(r"\$ \frac{ costs")


def test_saved_picture_is_a_png_wide_enough_for_a_report(tmp_path):
    path = tmp_path / "heat.png"
    plots.save(plots.coefficients_heatmap(np.full((20, 4), 0.25), uniform(20)), path)
    with Image.open(path) as image:
        assert image.format == "PNG"
        assert image.width == 1500


def test_an_animation_begins_and_ends_with_the_tables_of_the_run(tmp_path):
    tables = np.random.default_rng(0).dirichlet(np.ones(3), size=(100, 4))  # (S, N, K)
    steps = list(range(0, 1000, 10))
    Animation(tables, steps, QUARTERS, "run").save(tmp_path / "a.gif")
    assert (tmp_path / "a.gif").stat().st_size < 1e6
    with Image.open(tmp_path / "a.gif") as gif:
        assert gif.n_frames == 60
        shown = []
        for frame in (0, 59):
            gif.seek(frame)
            assert gif.convert("RGB").getpixel((1, gif.height - 1)) == (255, 255, 255)
            shown.append(np.asarray(gif.convert("RGB")).astype(int))
    assert shown[0].shape == shown[1].shape
    for table, pixels in zip(tables[[0, -1]], shown, strict=True):
        image = plots.coefficients_heatmap(table, QUARTERS).axes[0].images[0]
        wanted = 255 * image.to_rgba(table[:1])[0, :, :3]  # the colours of the first expert
        found = pixels.reshape(-1, 1, 3)
        assert (abs(found - wanted).max(2).min(0) < 6).all()


def test_drawing_leaves_pyplot_alone():
    plots.loss_curve({"a": ([1, 2], [1.0, 2.0])})
    assert (
        "matplotlib.pyplot" not in sys.modules or not sys.modules["matplotlib.pyplot"].get_fignums()
    )
