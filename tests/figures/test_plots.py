import sys

import numpy as np
import pytest
from PIL import Image

from remixdit.figures import plots

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
    assert plots.interval_labels([0.0, 0.125, 1.0]) == ["[0, 0.125)", "[0.125, 1]"]
    labels = plots.interval_labels([0.0, 0.10001, 0.10002, 1.0])
    assert labels == ["[0, 0.10001)", "[0.10001, 0.10002)", "[0.10002, 1]"]


def test_integer_timesteps_are_half_open():
    assert plots.interval_labels([0, 1]) == ["[0, 1)"]
    assert plots.interval_labels([0.0, 333.0, 1000.0]) == ["[0, 333)", "[333, 1000)"]


def overlaps(figure):
    """Return pairs of texts that overlap, and texts that are cut off, once the figure is drawn."""
    figure.draw_without_rendering()
    texts = [text for axes in figure.axes for text in axes.get_xticklabels() if text.get_text()]
    texts += [text for axes in figure.axes for text in axes.texts]
    boxes = [text.get_window_extent() for text in texts if not text.get_rotation()]
    inside = figure.bbox.padded(1)
    cut = [t for t in texts if not inside.containsx(t.get_window_extent().x0)]
    return [a for i, a in enumerate(boxes) for b in boxes[:i] if a.overlaps(b)] + cut


@pytest.mark.parametrize("num_experts", [1, 8, 20])
def test_no_text_overlaps_or_is_cut_off(num_experts):
    rng, boundaries = np.random.default_rng(0), uniform(num_experts)
    coefficients = rng.dirichlet(np.ones(4), size=num_experts)
    matrix = np.exp(3 * rng.random((num_experts, num_experts)))
    assert not overlaps(plots.coefficients_heatmap(coefficients, boundaries))
    assert not overlaps(plots.loss_matrix(matrix, boundaries))
    assert not overlaps(plots.loss_by_interval({"a": matrix[0], "b": matrix[-1]}, boundaries))


@pytest.mark.parametrize(("num_experts", "second"), [(100, "[40, 50)"), (1000, "[40, 41)")])
def test_many_experts_are_labelled_sparsely_and_without_numbers(num_experts, second):
    coefficients = np.full((num_experts, 4), 0.25)
    axes = plots.coefficients_heatmap(coefficients, uniform(num_experts)).axes[0]
    assert len(ticks(axes)) <= plots.MAX_TICKS
    assert not axes.texts
    assert ticks(axes)[1] == second


def test_boundaries_must_fit_the_table():
    with pytest.raises(ValueError, match=r"coefficients of shape \(4, 2\) needs 5 boundaries"):
        plots.coefficients_heatmap(np.ones((4, 2)), [0, 500, 1000])
    with pytest.raises(ValueError, match=r"remix of shape \(3,\) needs 4 boundaries"):
        plots.loss_by_interval({"plain": [1, 2], "remix": [1, 2, 3]}, [0, 500, 1000])


def test_a_name_with_a_dollar_sign_is_no_formula(tmp_path):
    name = "$ \\frac{ costs" + "x" * 100
    figure = plots.loss_by_interval({name: [1.0, 2.0], "b": [1.0, 2.0]}, [0, 500, 1000])
    plots.save(figure, tmp_path / "loss.png")
    assert figure.legends[0].get_texts()[0].get_text().startswith(r"\$ \frac{ costs")


def test_saved_picture_is_a_png_wide_enough_for_a_report(tmp_path):
    path = tmp_path / "heat.png"
    plots.save(plots.coefficients_heatmap(np.full((20, 4), 0.25), uniform(20)), path)
    with Image.open(path) as image:
        assert image.format == "PNG"
        assert image.width == 1500


def test_drawing_leaves_pyplot_alone():
    plots.loss_curve({"a": ([1, 2], [1.0, 2.0])})
    assert (
        "matplotlib.pyplot" not in sys.modules or not sys.modules["matplotlib.pyplot"].get_fignums()
    )
