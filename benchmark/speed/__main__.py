"""``python -m speed [digits] [precision] [taped] [cifar10]``: measure, and print tables or JSON."""

import argparse
import json
import sys
from collections.abc import Callable, Sequence

import pandas as pd
import torch

from dbp_bench.provenance import device_name
from speed import digits, network, precision, taped
from speed.contenders import T_STAR
from speed.network import Setting
from speed.timing import Row

ABOUT = {
    "digits": "One attack step is 20 reverse steps of ddpm on 60 digits x 10 EoT samples. Ratios "
    "are within a round, to the loop by hand or to the attack without retirement; medians.",
    "precision": "The ddpm of the digits in each precision, attacked and evaluated in itself, and "
    "re-evaluated in fp32. Gradients are compared with fp32 at the same draws.",
    "taped": f"ddpm on a tiny U-Net, {taped.IMAGES} images of 3 x 32 x 32, {taped.STEPS} draws, as "
    "a module that draws by itself. Ratios are within a round, to that module without a tape.",
    "cifar10": "One attack step of ddpm on networks of published size, one draw an image. Ratios "
    "are within a round, to the loop by hand; gradients are compared with fp32, not compiled. The "
    "share of the peak is of a large product of matrices in that precision, measured here.",
}
SUBJECTS = tuple(ABOUT)


def _from(least: int, most: int | None = None) -> Callable[[str], int]:
    """A whole number in `least` ... `most`."""

    def number(text: str) -> int:
        value = int(text)
        if value < least or (most is not None and value > most):
            raise argparse.ArgumentTypeError(f"{value}: {least} to {most or 'any number'}")
        return value

    return number


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The arguments, with the defaults of the device filled in."""
    parser = argparse.ArgumentParser("python -m speed", description=__doc__)
    parser.add_argument(
        "subjects",
        nargs="*",
        metavar="SUBJECT",
        help=f"{', '.join(SUBJECTS)} (default: all on a GPU, digits on a CPU)",
    )
    parser.add_argument("--device", choices=("cpu", "cuda"))
    parser.add_argument("--rounds", type=_from(1), default=7, help="rounds that are timed")
    parser.add_argument("--images", type=_from(1), help="cifar10: images in a pass (64; CPU: 1)")
    parser.add_argument(
        "--steps", type=_from(1, T_STAR), help="cifar10: reverse steps (20; CPU: 2)"
    )
    parser.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        help="cifar10: also compiled (default: on a GPU)",
    )
    parser.add_argument("--channels-last", action="store_true", help="cifar10: memory layout")
    parser.add_argument("--json", action="store_true", help="print JSON and nothing else")
    asked = parser.parse_args(arguments)
    for name in asked.subjects:
        if name not in SUBJECTS:
            parser.error(f"{name!r}: one of {', '.join(SUBJECTS)}")
    asked.device = asked.device or ("cuda" if torch.cuda.is_available() else "cpu")
    small = asked.device == "cpu"
    asked.subjects = asked.subjects or (["digits"] if small else list(SUBJECTS))
    asked.images = asked.images or (1 if small else 64)
    asked.steps = asked.steps or (2 if small else 20)
    asked.compile = not small if asked.compile is None else asked.compile
    return asked


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure what is asked for, and print it."""
    asked = parsed(arguments)
    machine = f"{device_name(asked.device)}, torch {torch.__version__}"
    found: dict[str, list[Row]] = {}
    about = dict(ABOUT)
    for subject in asked.subjects:
        if subject == "digits":
            with precision.arithmetic("fp32"):
                found[subject] = digits.measure(asked.device, asked.rounds)
        elif subject == "precision":
            found[subject] = precision.outcomes(asked.device)
        elif subject == "taped":
            found[subject] = taped.measure(asked.device, asked.rounds)
        else:
            networks, whose = network.published()
            about[subject] += f" {whose}. {asked.images} images, {asked.steps} reverse steps."
            setting = Setting(
                asked.images, asked.steps, asked.rounds, asked.compile, asked.channels_last
            )
            found[subject] = network.measure(networks, asked.device, setting, _note)
    if asked.json:
        print(json.dumps({"machine": machine, "about": about, **found}, indent=1))
        return
    print(f"{machine}, {torch.get_num_threads()} threads")
    for subject, rows in found.items():
        table = pd.DataFrame(rows).dropna(axis="columns", how="all")
        shown = table.to_string(index=False, na_rep="", float_format=lambda x: f"{x:.4g}")
        print(f"\n{about[subject]}\n\n{shown}")


def _note(rows: list[Row]) -> None:
    last = rows[-1]
    compiled = ", compiled" * last["compiled"]
    print(f"{last['precision']}{compiled}, {last['attack step']}: done", file=sys.stderr)


if __name__ == "__main__":
    main()
