"""``python -m dbp_bench.bench``: the ratios on the digits alone, on a CPU."""

from dbp_bench.bench.digits import measure, render

if __name__ == "__main__":
    print(render(measure("cpu", 7)))  # noqa: T201
