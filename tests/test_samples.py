import json
from base64 import b64decode
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from torch import nn

from dbp_bench.data import load_data
from dbp_bench.entries.registry import Registry
from dbp_bench.noise import FORWARD, VICTIM, Tape
from dbp_bench.purifiers.schedule import Schedule, to_diffusion
from dbp_bench.reporting.page import load_samples
from dbp_bench.reporting.records import load
from dbp_bench.reporting.samples import Samples, samples_path
from dbp_bench.result import Result, outcome_digest
from dbp_bench.runs.execute import execute
from dbp_bench.runs.job import Overrides, resolve
from dbp_bench.runs.pictures import first_input, picture
from pngs import pixels

if TYPE_CHECKING:
    from conftest import Command


def run(defense: str, threat: str, out: Path) -> Path:
    """A quick result: 6 images in groups of 4."""
    overrides = Overrides(
        effort={"budget": 4}, examples=6, batch_size=4, draws=None if threat == "dwbox" else 2
    )
    job = resolve(
        Registry(), "digits-linf", defense, threat, seed=3, device="cpu", overrides=overrides
    )
    return execute(job, out)


def grey(png: str) -> torch.Tensor:
    return torch.tensor(pixels(b64decode(png))).squeeze(-1) / 255


def diffused(image: torch.Tensor, number: int) -> torch.Tensor:
    """At level 100, with the forward noise of the victim's first draw, as an image."""
    z = to_diffusion(image.view(1, 1, 8, 8))
    noise = Tape.make(3, VICTIM, [number], 0).normal(FORWARD, 0, z)
    signal = Schedule().signal()[100]
    noised: torch.Tensor = signal**0.5 * z + (1 - signal) ** 0.5 * noise
    return ((noised + 1) / 2).clamp(0, 1).view(8, 8)


@pytest.mark.parametrize(("defense", "threat"), [("oneshot", "dwbox"), ("noise-only", "eot")])
def test_pictures_of_a_result(
    defense: str, threat: str, tmp_path: Path, command: "Command"
) -> None:
    path = run(defense, threat, tmp_path)
    before = path.read_bytes()
    said = command("verify", path, "--pictures")
    result = Result.read(path)
    samples = Samples.read(samples_path(path))
    count = 4 * (3 * 5 if threat == "dwbox" else 2 * 2)
    stated = f"{path}: {count} of {count} outcomes of the first 4 images are as stated."
    assert said == (0, f"{stated}\n{samples_path(path)}\n", "")
    assert path.read_bytes() == before
    assert sorted(p.name for p in path.parent.iterdir()) == ["samples-seed-3.json", "seed-3.json"]
    assert samples.result_sha256 == sha256(before).hexdigest()
    assert [sample.id for sample in samples.images] == result.ids[:4]
    clean, labels = load_data("digits").select(result.ids[:4])
    for i, sample in enumerate(samples.images):
        assert sample.label == labels[i]
        assert torch.allclose(grey(sample.clean), clean[i, 0], atol=0.5 / 255 + 1e-6)
        gap = (grey(sample.adversarial) - clean[i, 0]).abs().max()
        assert 0.05 < gap <= result.eps + 0.5 / 255 + 1e-6
        # What the pictures say is what the result says of their draw.
        assert sample.said_clean == result.predicted.clean[i][0]
        assert sample.said_adversarial == result.predicted.adversarial[i][0]
        assert (sample.noised is None) == (defense == "noise-only")
        assert sample.purified != sample.adversarial
        if sample.noised is not None:
            noised = diffused(grey(sample.adversarial), result.ids[i])
            assert torch.allclose(grey(sample.noised), noised, atol=2 / 255)
    assert list(load_samples(load(tmp_path)).values()) == [samples]
    again = samples_path(path).read_bytes()
    command("verify", path, "--pictures")
    assert samples_path(path).read_bytes() == again


def test_an_edited_result_is_found_out(tmp_path: Path, command: "Command") -> None:
    path = run("oneshot", "eot", tmp_path)
    result = Result.read(path)
    raised = [[label] * 2 for label in result.labels]
    assert result.predicted.adversarial[:4] != raised[:4]
    predicted = result.predicted.model_copy(update={"adversarial": raised})
    digest = outcome_digest(result.ids, result.labels, result.draws, predicted)
    result.model_copy(update={"predicted": predicted, "digest": digest}).write(path)
    said = command("verify", path, "--pictures")
    assert (said.code, said.err) == (1, "")
    assert "of 8 adversarial outcomes stated as right are wrong (0 may be" in said.out
    assert not samples_path(path).exists()
    told = json.loads(command("verify", path, "--json").out)
    assert told["kinds"]["clean"] == {
        "outcomes": 8,
        "lost": 0,
        "gained": 0,
        "other": 0,
        "allowed": 0,
    }
    assert told["kinds"]["adversarial"]["lost"] > 0


def test_a_result_of_other_weights_is_refused(tmp_path: Path, command: "Command") -> None:
    path = run("oneshot", "eot", tmp_path)
    table = json.loads(path.read_text())
    table["provenance"]["weights"]["denoiser"] = "0" * 64
    Result.model_validate(table).write(path)
    said = command("verify", path, "--pictures")
    assert said.code == 2
    assert "another request: weights" in said.err


def test_the_first_input_is_that_of_the_first_network() -> None:
    first, second = nn.Identity(), nn.Flatten()
    x = torch.arange(4.0).view(1, 1, 2, 2)
    with first_input() as seen:
        second(first(x) + 1)
    assert len(seen) == 1
    assert torch.equal(seen[0], x)
    with first_input() as nothing:
        pass
    first(x)
    assert nothing == []


def test_a_picture_has_rows_of_pixels_with_their_channels() -> None:
    image = torch.zeros(3, 2, 2)
    image[0, 0, 1], image[2, 1, 0] = 1.0, 2.0
    rows = pixels(b64decode(picture(image)))
    assert rows == [[(0, 0, 0), (255, 0, 0)], [(0, 0, 255), (0, 0, 0)]]
