"""Results of `remixdit evaluate` and `remixdit losses` as tables for a person."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from remixdit.evaluation.metrics import Check

__all__ = ["checks_text", "images_text", "intervals_text"]

Facts = Mapping[str, Any]


def checks_text(checks: Sequence[Check]) -> str:
    """Return the table of the self-test."""
    lines = [
        f"{'ok' if check.passed else 'FAILED':7}{check.name:46}"
        f"expected {check.expected:.6g}, got {check.got:.6g}"
        for check in checks
    ]
    failed = sum(not check.passed for check in checks)
    return "\n".join([*lines, f"{len(checks) - failed} of {len(checks)} checks passed"])


def images_text(result: Facts) -> str:
    """Return scores, each with its error and the score of real images, and their conditions."""
    return "\n".join(
        [
            *conditions(result),
            "",
            f"{'score':20}{'value':>12}{'error':>12}{'real images':>13}{'n':>9}{'of real':>9}",
            *(score_line(name, score) for name, score in result["scores"].items()),
            *check_lines(result),
            *cost_lines(result.get("cost")),
            *(f"note: {note}" for note in result["notes"]),
        ]
    )


def conditions(result: Facts) -> Iterator[str]:
    """Yield the conditions under which the scores were measured."""
    evaluated, reference, extractor = (
        result[part] for part in ("evaluated", "reference", "extractor")
    )
    size = f"{evaluated['image_size']} x {evaluated['image_size']}"
    left = f", {evaluated['unreadable']} unreadable" if evaluated["unreadable"] else ""
    where = evaluated.get("checkpoint") or evaluated["path"]
    yield f"images       {evaluated['num_images']:,} of {size} from {where}{left}"
    drawn = evaluated["sampling"]
    if drawn is None:
        yield "drawn        not known"
    else:
        low, high = drawn["guidance_interval"]
        kind = drawn.get("thresholding", "none")  # samples of earlier versions do not say it
        clips = "" if kind == "none" else f", {kind} thresholding"
        yield (
            f"drawn        {drawn['scheduler']}, {drawn['num_inference_steps']} steps, guidance "
            f"{drawn['guidance_scale']:g} on [{low:g}, {high:g}]{clips}, seed {drawn['seed']}"
            + (f", {drawn['precision']}" if "precision" in drawn else "")
        )
        if "labels" in drawn:
            yield f"labels       {drawn['labels']}"
    count = "statistics" if "num_images" not in reference else f"{reference['num_images']:,} images"
    known = reference["statistics"] == "of the file"
    both = " and its statistics" if known and "num_images" in reference else ""
    yield f"reference    {count}{both} of {reference['path']}" + (
        f", split {reference['split']}" if reference["split"] else ""
    )
    digest = extractor["weights_sha256"][:8]
    yield f"extractor    {extractor['extractor']} (weights {digest}), {extractor['resize']}"


def score_line(name: str, score: Facts) -> str:
    """Return the line of a score."""
    if score["value"] is None:
        return f"{name:20}{'-':>12}  {score['left_out']}"
    error = "" if score["standard_error"] is None else f"± {score['standard_error']:.3g}"
    real = score["real"]["value"]
    reference = score["num_reference"]
    return (
        f"{name:20}{score['value']:12.5g}{error:>12}{'-' if real is None else f'{real:.4g}':>13}"
        f"{score['num_images']:9,}{'' if reference is None else f'{reference:,}':>9}"
    )


def check_lines(result: Facts) -> Iterator[str]:
    """Yield the accuracy of the probe and the share of copies."""
    yield ""
    accuracy = result["conditional_accuracy"]
    if accuracy["value"] is None:
        yield f"{'requested class':20}{'-':>12}  {accuracy['left_out']}"
    else:
        real = accuracy["real"]["value"]
        yield (
            f"{'requested class':20}{accuracy['value']:12.4f}"
            f"{'± {:.2g}'.format(accuracy['standard_error']):>12}"
            f"{'-' if real is None else f'{real:.4f}':>13}{accuracy['num_images']:9,}"
        )
    copied = result["memorisation"]
    if copied["value"] is None:
        yield f"{'nearer to train':20}{'-':>12}  {copied['left_out']}"
    else:
        yield (
            f"{'nearer to train':20}{copied['value']:12.4f}"
            f"{'± {:.2g}'.format(copied['standard_error']):>12}{0.5:13}{copied['num_images']:9,}"
        )


def cost_lines(cost: Facts | None) -> Iterator[str]:
    """Yield the cost of a sampling step."""
    if cost is None:
        return
    parameters = cost["parameters"]
    yield ""
    yield f"parameters   {parameters['active']:,} active, {parameters['total']:,} in all"
    flops = cost.get("step_flops_per_image", cost["forward_flops_per_image"])
    times = ", ".join(
        f"{row['median_ms']:.3g} ms for {row['batch_size']}" for row in cost["step_latency"]
    )
    yield f"a step       {flops / 1e9:,.3g} GFLOP per image; {times}"


def intervals_text(result: Facts) -> str:
    """Return the losses by interval, beside the other model's, and their mean."""
    evaluated, data = result["evaluated"], result["data"]
    rows = [(f"[{row['from']:g}, {row['to']:g})", row) for row in result["intervals"]]
    return "\n".join(
        [
            f"model        {evaluated['checkpoint']}, {evaluated['num_experts']} experts, "
            f"{evaluated['prediction_type']}, {evaluated['precision']}",
            *([f"against      {evaluated['against']}"] if evaluated["against"] else []),
            f"images       {data['num_images']:,} of {data['path']}, seed "
            f"{evaluated['seed']}; ± is the 95 % interval over images",
            "",
            *(value_line(name, row) for name, row in rows),
            value_line("mean", result["loss"]),
            *bits_lines(result["bits_per_dim"]),
            *matrix_lines(result["matrix"]),
            *cost_lines(result["cost"]),
        ]
    )


def value_line(name: str, found: Facts) -> str:
    """Return the line of a value with its interval, and the difference to the other model."""
    line = f"{name:20}{found['value']:12.6f} ± {reach(found):.2g}"
    if "difference" not in found:
        return line
    difference = found["difference"]
    low, high = difference["relative_interval"]
    return (
        f"{line:45}{found['against']['value']:12.6f}"
        f"{100 * difference['relative']:+9.2f} ± {50 * (high - low):.2g} %"
    )


def reach(found: Facts) -> float:
    """Return half the width of an interval."""
    low, high = found["interval"]
    return (high - low) / 2


def bits_lines(bits: Facts) -> Iterator[str]:
    """Yield the variational bound."""
    if bits["value"] is None:
        yield f"{'bits per dimension':20}{'-':>12}  {bits['left_out']}"
        return
    yield value_line("bits per dimension", bits)


def matrix_lines(matrix: Facts) -> Iterator[str]:
    """Yield whether experts are best at home."""
    if matrix["value"] is None:
        yield f"{'matrix':20}{'-':>12}  {matrix['left_out']}"
    elif "owner_is_best" in matrix:
        yield (
            f"an interval's own expert is the best of all on {100 * matrix['owner_is_best']:.0f} % "
            f"of the intervals ({matrix['num_images']} images)"
        )
