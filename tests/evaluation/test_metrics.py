from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from remixdit.evaluation.metrics import (
    Estimate,
    Moments,
    bootstrap_frechet,
    fit_linear_probe,
    frechet_distance,
    gaussian,
    inception_score,
    jackknife_frechet,
    kernel_distance,
    kernel_distance_subsets,
    linear_probe_accuracy,
    memorisation,
    nearest_neighbours,
    precision_recall,
    real_floor,
    self_test,
)


def draw(count: int, size: int, seed: int = 0, *, shift: float = 0.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, size, generator=generator, dtype=torch.float64) + shift


def covariance(size: int, seed: int) -> Tensor:
    factor = draw(size, 2 * size, seed)
    return factor @ factor.T / size


def rotation(size: int, seed: int = 9) -> Tensor:
    return torch.linalg.qr(draw(size, size, seed)).Q


# Fréchet distance


def test_frechet_distance_equals_the_closed_form_for_gaussians() -> None:
    variances = torch.rand(2, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    means, basis = draw(2, 12), rotation(12)
    first = (means[0], basis * variances[0] @ basis.T)  # covariances that commute
    second = (means[1], basis * variances[1] @ basis.T)
    expected = (means[0] - means[1]).square().sum()
    expected += (variances[0].sqrt() - variances[1].sqrt()).square().sum()
    assert frechet_distance(first, second) == pytest.approx(float(expected), rel=1e-12)


def test_frechet_distance_equals_the_complex_matrix_square_root_of_scipy() -> None:
    linalg = pytest.importorskip("scipy.linalg")
    first, second = covariance(40, 1), covariance(40, 2)
    mean, other = draw(2, 40)
    root = linalg.sqrtm((first @ second).numpy())
    expected = (mean - other).square().sum() + first.trace() + second.trace()
    expected -= 2 * np.trace(root).real
    got = frechet_distance((mean, first), (other, second))
    assert got == pytest.approx(float(expected), rel=1e-10)


def test_frechet_distance_with_fewer_images_than_features_equals_the_nuclear_norm() -> None:
    real, fake = draw(9, 30, 1), draw(7, 30, 2, shift=0.3)
    # tr((C1 C2)^(1/2)) is the sum of singular values of A1 A2^T for C = A^T A: no root at all.
    first = (real - real.mean(0)) / 8**0.5
    second = (fake - fake.mean(0)) / 6**0.5
    expected = (real.mean(0) - fake.mean(0)).square().sum() + first.square().sum()
    expected += second.square().sum() - 2 * torch.linalg.svdvals(first @ second.T).sum()
    got = frechet_distance(gaussian(real), gaussian(fake))
    assert got == pytest.approx(float(expected), rel=1e-6)


def test_frechet_distance_is_symmetric_and_zero_for_equal_gaussians() -> None:
    first, second = gaussian(draw(50, 8, 1)), gaussian(draw(50, 8, 2, shift=0.2))
    assert frechet_distance(first, second) == pytest.approx(frechet_distance(second, first))
    assert abs(frechet_distance(first, first)) < 1e-12


def test_distances_do_not_change_under_rotation_or_order_of_images() -> None:
    real, fake, basis = draw(40, 6, 1), draw(40, 6, 2, shift=0.3), rotation(6)
    shuffled = fake[torch.randperm(40, generator=torch.Generator().manual_seed(0))]
    frechet = frechet_distance(gaussian(real), gaussian(fake))
    turned = frechet_distance(gaussian(real @ basis), gaussian(shuffled @ basis))
    assert turned == pytest.approx(frechet, rel=1e-9)
    kernel = kernel_distance(real, fake)
    assert kernel_distance(real @ basis, shuffled @ basis) == pytest.approx(kernel, rel=1e-9)
    assert precision_recall(real @ basis, shuffled @ basis) == precision_recall(real, fake)


@pytest.mark.filterwarnings("ignore:Metric `Kernel Inception Distance` will save")
def test_frechet_and_kernel_distance_equal_torchmetrics() -> None:
    pytest.importorskip("torchmetrics")
    from torchmetrics.image.fid import FrechetInceptionDistance
    from torchmetrics.image.kid import KernelInceptionDistance

    class Flatten(torch.nn.Module):
        num_features = 12

        def forward(self, images: Tensor) -> Tensor:
            return images.flatten(1).double() / 255

    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (2, 60, 3, 2, 2), generator=generator, dtype=torch.uint8)
    features = images.flatten(2).double() / 255
    frechet = FrechetInceptionDistance(Flatten(), input_img_size=(3, 2, 2)).set_dtype(torch.float64)
    kernel = KernelInceptionDistance(Flatten(), subsets=1, subset_size=60)
    for metric in (frechet, kernel):
        metric.update(images[0], real=True)
        metric.update(images[1], real=False)
    got = frechet_distance(gaussian(features[0]), gaussian(features[1]))
    assert got == pytest.approx(float(frechet.compute()), rel=1e-9)
    got = kernel_distance(features[0], features[1]).value
    assert got == pytest.approx(float(kernel.compute()[0]), abs=1e-6)  # it rounds to float32


def test_moments_in_batches_equal_numpy_mean_and_covariance() -> None:
    features = draw(101, 7).float()
    moments = Moments(7)
    for batch in features.split(16):
        moments.update(batch)
    mean, covariance = moments.gaussian()
    wide = features.double().numpy()
    np.testing.assert_allclose(mean, wide.mean(0), rtol=1e-12)
    np.testing.assert_allclose(covariance, np.cov(wide, rowvar=False), rtol=1e-10, atol=1e-14)
    np.testing.assert_allclose(gaussian(features).covariance, covariance, rtol=1e-10, atol=1e-14)
    assert covariance.dtype == torch.float64


def test_moments_of_two_processes_merge_into_those_of_one() -> None:
    features = draw(30, 5)
    whole, first, second = Moments(5), Moments(5), Moments(5)
    whole.update(features)
    first.update(features[:11])
    second.update(features[11:])
    reduced = first.state + second.state  # what an all-reduce does
    first.merge(second)
    assert torch.equal(first.state, reduced)
    torch.testing.assert_close(first.gaussian().covariance, whole.gaussian().covariance)


def test_moments_stay_exact_when_the_mean_is_a_thousand_deviations() -> None:
    features = draw(500, 4, shift=1000.0)
    moments = Moments(4)
    moments.update(features)
    expected = np.cov(features.numpy(), rowvar=False)
    np.testing.assert_allclose(moments.gaussian().covariance, expected, atol=1e-8)


ERRORS = [bootstrap_frechet, jackknife_frechet]


@pytest.mark.parametrize("estimate", ERRORS)
def test_error_of_the_frechet_distance_equals_the_spread_over_fresh_images(
    estimate: Callable[..., Estimate],
) -> None:
    reference = gaussian(draw(20_000, 4, 99))
    draws = [draw(200, 4, seed, shift=0.2) for seed in range(200)]
    fresh = np.std([frechet_distance(reference, gaussian(fake)) for fake in draws])
    errors = [estimate(reference, fake).standard_error for fake in draws[:20]]
    assert np.mean(errors) == pytest.approx(fresh, rel=0.2)


def test_jackknife_error_holds_with_fewer_images_than_features() -> None:
    reference = gaussian(draw(2000, 40, 99))
    draws = [draw(30, 40, seed, shift=0.1) for seed in range(200)]
    fresh = np.std([frechet_distance(reference, gaussian(fake)) for fake in draws])
    errors = [jackknife_frechet(reference, d, num_groups=10).standard_error for d in draws[:40]]
    assert np.mean(errors) == pytest.approx(fresh, rel=0.35)
    too_large = [bootstrap_frechet(reference, d, num_resamples=20) for d in draws[:10]]
    assert np.mean([estimate.standard_error for estimate in too_large]) > 1.5 * fresh


@pytest.mark.parametrize("estimate", ERRORS)
def test_error_of_the_frechet_distance_keeps_the_value_and_repeats_for_a_seed(
    estimate: Callable[..., Estimate],
) -> None:
    reference, fake = gaussian(draw(100, 5, 1)), draw(60, 5, 2, shift=0.5)
    first = estimate(reference, fake, seed=3)
    assert first.value == frechet_distance(reference, gaussian(fake))
    assert first == estimate(reference, fake, seed=3)
    low, high = first.interval()
    assert low < first.value < high


def test_jackknife_error_equals_leaving_each_group_out() -> None:
    reference, fake = gaussian(draw(50, 3, 1)), draw(12, 3, 2, shift=0.5)
    remaining = [fake[torch.arange(12) % 6 != group] for group in range(6)]
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    undone = torch.empty(12, dtype=torch.long)
    undone[order] = torch.arange(12).view(2, 6).T.flatten()  # the shuffle gives these groups back
    left = [frechet_distance(reference, gaussian(rest)) for rest in remaining]
    got = jackknife_frechet(reference, fake[undone], num_groups=6).standard_error
    assert got == pytest.approx((5 * np.var(left)) ** 0.5, rel=1e-6)


def test_interval_is_the_normal_one() -> None:
    assert Estimate(1.0, 2.0).interval(0.95) == pytest.approx((1 - 3.919928, 1 + 3.919928))


# kernel distance


def naive_kernel_distance(real: Tensor, fake: Tensor) -> float:
    def kernel(x: Tensor, y: Tensor) -> float:
        return float((x @ y / len(x) + 1) ** 3)

    def within(rows: Tensor) -> float:
        pairs = [kernel(x, y) for i, x in enumerate(rows) for j, y in enumerate(rows) if i != j]
        return sum(pairs) / len(pairs)

    across = [kernel(x, y) for x in real for y in fake]
    return within(real) + within(fake) - 2 * sum(across) / len(across)


def test_kernel_distance_equals_naive_loops() -> None:
    real, fake = draw(11, 5, 1), draw(8, 5, 2, shift=0.4)
    assert kernel_distance(real, fake).value == pytest.approx(naive_kernel_distance(real, fake))


def test_kernel_distance_error_equals_leaving_out_each_image() -> None:
    real, fake = draw(9, 4, 1), draw(7, 4, 2, shift=0.4)

    def without(rows: Tensor, row: int) -> Tensor:
        return torch.cat([rows[:row], rows[row + 1 :]])

    left_real = [naive_kernel_distance(without(real, i), fake) for i in range(9)]
    left_fake = [naive_kernel_distance(real, without(fake, i)) for i in range(7)]
    variance = 8 * np.var(left_real) + 6 * np.var(left_fake)
    assert kernel_distance(real, fake).standard_error == pytest.approx(variance**0.5)


def test_kernel_distance_error_equals_the_spread_over_fresh_images() -> None:
    estimates = [
        kernel_distance(draw(100, 4, seed), draw(100, 4, 1000 + seed, shift=0.5))
        for seed in range(300)
    ]
    errors = [estimate.standard_error for estimate in estimates]
    assert np.mean(errors) == pytest.approx(
        np.std([estimate.value for estimate in estimates]), rel=0.15
    )


def test_kernel_distance_of_equal_distributions_has_mean_zero() -> None:
    values = [kernel_distance(draw(50, 4, s), draw(50, 4, 500 + s)).value for s in range(200)]
    assert abs(np.mean(values)) < 3 * np.std(values) / 200**0.5
    assert min(values) < 0


def test_kernel_distance_does_not_depend_on_the_chunks() -> None:
    real, fake = draw(20, 5, 1), draw(23, 5, 2)
    assert kernel_distance(real, fake, chunk_size=7) == pytest.approx(kernel_distance(real, fake))


def test_kernel_distance_over_subsets_tends_to_all_pairs() -> None:
    real, fake = draw(120, 4, 1), draw(120, 4, 2, shift=0.5)
    subsets = kernel_distance_subsets(real, fake, num_subsets=400, subset_size=40)
    error = subsets.std / 400**0.5
    assert abs(subsets.mean - kernel_distance(real, fake).value) < 3 * error


# inception score


def test_inception_score_equals_naive_loops() -> None:
    logits = draw(30, 4)
    probabilities = logits.exp() / logits.exp().sum(1, keepdim=True)
    marginal = probabilities.mean(0)
    divergences = [float((p * (p.log() - marginal.log())).sum()) for p in probabilities]
    got = inception_score(logits, num_splits=1)
    assert got == pytest.approx((np.exp(np.mean(divergences)), 0.0))


def test_inception_score_lies_between_one_and_the_number_of_classes() -> None:
    sure = torch.eye(5).repeat(20, 1)
    assert inception_score(sure.log(), num_splits=1).mean == pytest.approx(5)  # log 0 too
    assert inception_score(torch.zeros(100, 5)).mean == pytest.approx(1)


def test_inception_score_of_splits_survives_images_sorted_by_class() -> None:
    logits = 50 * torch.eye(4).repeat_interleave(100, 0)
    assert inception_score(logits, num_splits=4).mean > 3.8  # unshuffled splits would score 1
    assert inception_score(logits, num_splits=4).std > 0


# precision and recall


def naive_precision(real: Tensor, fake: Tensor, k: int) -> float:
    inside = 0
    for sample in fake:
        for i, centre in enumerate(real):
            others = sorted(float((centre - x).norm()) for j, x in enumerate(real) if i != j)
            if float((sample - centre).norm()) <= others[k - 1]:
                inside += 1
                break
    return inside / len(fake)


@pytest.mark.parametrize("k", [1, 3])
def test_precision_and_recall_equal_naive_loops(k: int) -> None:
    real, fake = draw(40, 3, 1), draw(30, 3, 2, shift=1.0)
    got = precision_recall(real, fake, k=k, chunk_size=7)
    assert got == pytest.approx((naive_precision(real, fake, k), naive_precision(fake, real, k)))
    assert 0 < got.precision < 1


def test_precision_and_recall_are_one_for_equal_and_zero_for_distant_sets() -> None:
    real = draw(30, 4)
    assert precision_recall(real, real) == (1, 1)
    assert precision_recall(real, real + 100) == (0, 0)


def test_a_collapsed_generator_has_precision_without_recall() -> None:
    real = draw(200, 2)
    collapsed = 1e-3 * draw(200, 2, 1)
    precision, recall = precision_recall(real, collapsed)
    assert precision == 1
    assert recall < 0.05


# floor


def test_real_floor_compares_disjoint_images() -> None:
    real = torch.arange(20.0)[:, None]
    seen: list[set[float]] = []

    def distance(reference: Tensor, images: Tensor) -> float:
        assert (len(reference), len(images)) == (12, 8)
        assert not set(reference.flatten().tolist()) & set(images.flatten().tolist())
        seen.append(set(images.flatten().tolist()))
        return len(seen)

    assert real_floor(real, 8, distance, num_repeats=3).mean == 2
    assert len({frozenset(images) for images in seen}) == 3


def test_real_floor_of_the_frechet_distance_falls_with_the_number_of_images() -> None:
    real = draw(2000, 8)

    def distance(reference: Tensor, images: Tensor) -> float:
        return frechet_distance(gaussian(reference), gaussian(images))

    few = real_floor(real, 100, distance, num_reference=1000)
    many = real_floor(real, 800, distance, num_reference=1000)
    assert few.mean > 3 * many.mean > 0


# linear probe


def test_linear_probe_equals_the_minimum_that_scipy_finds() -> None:
    optimize = pytest.importorskip("scipy.optimize")
    features, class_labels = draw(60, 3), torch.arange(60) % 4
    probe = fit_linear_probe(features, class_labels, penalty=0.1)
    rows = ((features - features.mean(0)) / features.std(0)).numpy()

    def loss(flat: np.ndarray) -> float:
        weight, bias = flat[:12].reshape(3, 4), flat[12:]
        scores = rows @ weight + bias
        chosen = scores[np.arange(60), class_labels.numpy()]
        likelihood = np.mean(np.log(np.exp(scores).sum(1)) - chosen)
        return float(likelihood + 0.05 * np.square(weight).sum())

    best = optimize.minimize(loss, np.zeros(16), method="BFGS", options={"gtol": 1e-7})
    ours = np.concatenate([probe.weight.flatten(), probe.bias])
    assert loss(ours) <= best.fun + 1e-12
    np.testing.assert_allclose(ours[:12], best.x[:12], atol=1e-4)  # theirs by differences


def test_linear_probe_repeats_bit_for_bit() -> None:
    features, class_labels = draw(50, 6), torch.arange(50) % 3
    first, second = (fit_linear_probe(features, class_labels) for _ in range(2))
    assert torch.equal(first.weight, second.weight)


def test_linear_probe_finds_separate_classes_and_guesses_at_noise() -> None:
    class_labels = torch.arange(400) % 2
    apart = draw(400, 5) + 6 * class_labels[:, None]
    halves = class_labels[:200], class_labels[200:]
    assert linear_probe_accuracy(apart[:200], halves[0], apart[200:], halves[1]) == 1
    noise = draw(400, 5)
    assert 0.35 < linear_probe_accuracy(noise[:200], halves[0], noise[200:], halves[1]) < 0.65


def test_linear_probe_takes_features_made_in_inference_mode_and_constant_ones() -> None:
    with torch.inference_mode():
        features = torch.cat([draw(20, 2), torch.ones(20, 1, dtype=torch.float64)], 1)
    assert fit_linear_probe(features, torch.arange(20) % 2).weight.isfinite().all()


# nearest neighbours


def test_nearest_neighbours_equal_naive_loops() -> None:
    samples, references = draw(9, 4, 1), draw(15, 4, 2)
    distances, indices = nearest_neighbours(samples, references, chunk_size=4)
    for sample, distance, index in zip(samples, distances, indices, strict=True):
        each = (references - sample).norm(dim=1)
        assert float(distance) == pytest.approx(float(each.min()))
        assert index == each.argmin()


def test_memorisation_tells_copies_from_new_images() -> None:
    train, held_out = draw(300, 6, 1), draw(300, 6, 2)
    copies = memorisation(train + 1e-3, train, held_out)
    assert copies.fraction_nearer_train.value == 1
    assert copies.median_to_train < 0.01 < copies.median_to_held_out
    fresh = memorisation(draw(300, 6, 3), train, held_out).fraction_nearer_train
    assert abs(fresh.value - 0.5) < 4 * fresh.standard_error


def test_memorisation_error_equals_the_spread_over_fresh_images() -> None:
    fractions = [
        memorisation(
            draw(150, 40, seed), draw(100, 40, 1000 + seed), draw(100, 40, 2000 + seed)
        ).fraction_nearer_train
        for seed in range(200)
    ]
    spread = np.std([fraction.value for fraction in fractions])
    errors = [fraction.standard_error for fraction in fractions]
    assert np.mean(errors) == pytest.approx(spread, rel=0.15)
    assert spread > 1.3 * 0.5 / 150**0.5  # the binomial error would be too small


def test_memorisation_compares_sets_of_equal_size() -> None:
    fresh = memorisation(draw(400, 4, 3), draw(4000, 4, 1), draw(400, 4, 2))
    assert abs(fresh.fraction_nearer_train.value - 0.5) < 0.12


# refusals


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: gaussian(draw(1, 3)), "features must hold at least 2 images, got 1"),
        (lambda: gaussian(draw(4, 3)[0]), r"features must have the shape \(B, F\), got \(3,\)"),
        (lambda: gaussian(draw(4, 3) / 0), "features must be finite, got 4 images"),
        (lambda: Moments(3).gaussian(), "num_images must be at least 2 for a covariance, got 0"),
        (lambda: Moments(3).update(draw(4, 2)), "num_features must be 3, got 2"),
        (lambda: Moments(3).merge(Moments(4)), "num_features must be 3, got 4"),
        (
            lambda: frechet_distance(gaussian(draw(9, 3)), gaussian(draw(9, 4))),
            "fake must have the 3 features of real, got 4",
        ),
        (
            lambda: frechet_distance((draw(2, 3)[0], draw(2, 3)), gaussian(draw(9, 3))),
            r"real must be a mean \(F,\) and a covariance \(F, F\), got \(3,\) and \(2, 3\)",
        ),
        (
            lambda: bootstrap_frechet(gaussian(draw(9, 3)), draw(9, 3), num_resamples=1),
            "num_resamples must be at least 2, got 1",
        ),
        (
            lambda: jackknife_frechet(gaussian(draw(9, 3)), draw(9, 3), num_groups=1),
            "num_groups must be at least 2, got 1",
        ),
        (
            lambda: jackknife_frechet(gaussian(draw(9, 3)), draw(9, 3), num_groups=5),
            "fake must hold at least 10 images, got 9",
        ),
        (lambda: Estimate(0, 1).interval(95), "confidence must be between 0 and 1, got 95"),
        (
            lambda: kernel_distance(draw(9, 3), draw(9, 4)),
            "fake must have the 3 features of real, got 4",
        ),
        (lambda: kernel_distance(draw(9, 3), draw(2, 3)), "fake must hold at least 3 .* got 2"),
        (
            lambda: kernel_distance_subsets(draw(9, 3), draw(9, 3)),
            "real must hold at least 1000 images, got 9",
        ),
        (
            lambda: kernel_distance(draw(9, 3), draw(9, 3), chunk_size=0),
            "chunk_size must be at least 1, got 0",
        ),
        (lambda: inception_score(draw(5, 3)), "logits must hold at least 10 images, got 5"),
        (lambda: inception_score(draw(5, 3), num_splits=0), "num_splits must be at least 1, got 0"),
        (lambda: precision_recall(draw(9, 3), draw(9, 3), k=0), "k must be at least 1, got 0"),
        (lambda: precision_recall(draw(3, 3), draw(9, 3)), "real must hold at least 4 .* got 3"),
        (
            lambda: real_floor(draw(9, 3), 5, lambda a, b: 0.0, num_reference=5),
            "real must hold at least 10 images, got 9",
        ),
        (
            lambda: fit_linear_probe(draw(9, 3), torch.zeros(8).long()),
            r"class_labels must have the shape \(9,\), got \(8,\)",
        ),
        (
            lambda: fit_linear_probe(draw(9, 3), torch.arange(9), penalty=0),
            "penalty must be positive, got 0",
        ),
        (
            lambda: fit_linear_probe(draw(9, 3), torch.arange(9)).predict(draw(9, 2)),
            "features must have the 3 of the probe, got 2",
        ),
        (
            lambda: memorisation(draw(9, 3), draw(9, 3), draw(9, 4)),
            "fake must have the 3 features of real, got 4",
        ),
    ],
)
def test_a_refusal_names_the_field_the_rule_and_the_value(call, message) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=message):
        call()


# self test


def test_self_test_passes() -> None:
    table = self_test()
    assert len(table) == 13
    assert [check.name for check in table if not check.passed] == []


def test_self_test_on_a_device_that_cannot_compute_fails_without_raising() -> None:
    assert not any(check.passed for check in self_test("meta"))
