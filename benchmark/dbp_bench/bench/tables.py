"""What was measured, for a terminal."""

from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.table import Table

from dbp_bench.bench import digits

_CONTENDERS = {
    "by hand": "by hand, all stored",
    "none": "dbp-bench, all stored",
    "step": "dbp-bench, checkpointed",
}


def show(found: dict[str, Any], say: Console) -> None:
    """What :func:`dbp_bench.bench.run.measure` found."""
    lines = [f"{found['device']}, torch {found['torch']}, {found['threads']} threads"]
    lines += [f"- {line}" for line in found["protocol"]]
    say.print("\n".join(lines), highlight=False)
    say.print("\nprecision, on trained weights", highlight=False)
    say.print(effects_table(found["precision"]))
    for one in found["precision"]:
        say.print(f"{one['track']}: {one['defense']}, {one['attack']}", highlight=False)
    if "digits" in found:
        say.print(f"\n{digits.render(found['digits'])}", highlight=False)
    if "cifar10" in found:
        say.print("", *about_network(found["cifar10"]), sep="\n", highlight=False)
        say.print(network_table(found["cifar10"]))


def network_table(found: dict[str, Any]) -> Table:
    """The cells of :func:`dbp_bench.bench.network.measure`."""
    table = Table(box=None, pad_edge=False)
    table.add_column("precision")
    table.add_column("one attack step")
    for name in (
        "gradients/s",
        "x steps/s",
        "share of peak",
        "peak MiB",
        "x by hand (pairs)",
        "cosine (lowest)",
        "equal signs",
    ):
        table.add_column(name, justify="right")
    for cell in found["cells"]:
        for row in _rows(cell):
            table.add_row(*row)
    return table


def _rows(cell: dict[str, Any]) -> Iterator[list[str]]:
    name = cell["precision"] + (", compiled" if cell["compiled"] else "")
    gradient = cell["gradient"]
    for contender, one in cell["contenders"].items():
        title = _CONTENDERS[contender]
        if one["problem"]:
            yield [name, f"{title}: {one['problem']}", *[""] * 7]
            continue
        ratio, peak = one["ratio"], one["peak_bytes"]
        yield [
            name,
            title,
            f"{one['gradients_per_s']:.3g}",
            f"{one['passes_per_s']:.3g}",
            f"{100 * one['share']:.1f} %",
            "" if peak is None else f"{peak / 2**20:.0f}",
            f"{ratio['median']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f})" if ratio else "",
            *(_gradient(gradient) if contender == "step" else ["", ""]),
        ]


def _gradient(found: dict[str, Any] | None) -> list[str]:
    if found is None or found["cosine"] is None:
        return ["", ""]
    return [
        f"{found['cosine']:.5f} ({found['cosine_low']:.5f})",
        f"{100 * found['sign']:.2f} %",
    ]


def about_network(found: dict[str, Any]) -> list[str]:
    """What the cells are of, in lines."""
    setting, flops = found["setting"], found["flops"]
    lines = []
    for role, one in found["networks"].items():
        whose = "made-up weights" if one["made_up"] else f"weights of {one['checkpoint']}"
        lines.append(f"{role}: {one['network']}, {one['parameters']:,} parameters, {whose}")
    lines.append(
        f"{setting['images']} images x 1 draw, {setting['steps']} reverse steps from level 100; an "
        f"image takes {flops['denoiser_gradient'] / 1e9:.1f} GFLOP a step and "
        f"{flops['classifier_gradient'] / 1e9:.1f} for the classifier, forward and backward; "
        f"{flops['denoiser'] / 1e9:.1f} more a step where it is checkpointed"
    )
    peaks = ", ".join(f"{k} {v / 1e12:.3g}" for k, v in found["matmul_flops_per_s"].items())
    lines.append(f"peak: products of large matrices, measured in this run, TFLOP/s: {peaks}")
    if "tf32" not in found["matmul_flops_per_s"]:
        lines.append("tf32 is left out: a CPU has none")
    if not setting["compiles"]:
        lines.append("compiled cells are left out; --compile adds them")
    return lines


def effects_table(found: list[dict[str, Any]]) -> Table:
    """What :func:`dbp_bench.bench.effects.measure` says of one or more tracks."""
    table = Table(box=None, pad_edge=False)
    for name in ("track", "images", "precision"):
        table.add_column(name)
    for name in ("cosine (lowest)", "equal signs", "clean right", "same class"):
        table.add_column(name, justify="right")
    table.add_column("draws")
    for name in ("robust", "judged in fp32", "same outcome"):
        table.add_column(name, justify="right")
    for one in found:
        for row in one["rows"]:
            head = [one["track"], str(one["images"]), row["precision"]]
            head += [*_gradient(row["gradient"]), str(row["clean"]), str(row["same_class"])]
            for draws, counts in row["attacks"].items():
                cells = (counts[k] for k in ("robust", "judged_in_fp32", "same_outcome"))
                table.add_row(*head, draws, *map(str, cells))
                head = [""] * len(head)
    return table
