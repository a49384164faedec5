"""Commands and options of earlier versions: each says, on one line, what took its place."""

from collections.abc import Mapping

from dbp_bench.cli.app import app
from dbp_bench.errors import BadRequest

COMMANDS: Mapping[str, str] = {
    "plan": "`plan` is now `run --dry-run`.",
    "describe": "`describe NAME` is now `list NAME`.",
    "check-grad": "`check-grad` is now `check --gradients`.",
    "doctor": "`doctor` is now `check --environment`.",
    "export": "`export` is now `report --outcomes FILE.csv`.",
    "judge": "`judge` is now `verify`, which takes a file of adversarial images.",
    "samples": "`samples` is now `verify --pictures`, which takes a result.",
    "schema": "`schema` is gone: the schema is results/schema.json, in the repository.",
    "bench": "`bench` is gone: measure with `python -m speed` in a checkout.",
    "push": "`push` is gone: `submit --upload owner/name` proposes a bundle to a data set.",
    "pull": "`pull` is gone: `report --results hf://datasets/owner/name` reads results from there.",
}
"""The line that each removed command prints."""

OPTIONS: Mapping[str, str] = {
    **{
        f"--{name}": f"`--{name} N` is now `--set {name.replace('-', '_')}=N`."
        for name in ("steps", "eot", "step-size", "restarts")
    },
    "--loss": "`--loss NAME` is now `--set loss=NAME`.",
    "--random-start": "`--random-start` is now `--set random_start=true`.",
    "--no-random-start": "`--no-random-start` is now `--set random_start=false`.",
    "--rows": "`--rows` is now `--max-batch`.",
    "--resume": "`--resume` is gone: what is there is continued unless `--no-resume` is given.",
}
"""The line that each removed option of `run` prints."""


def _register(name: str, said: str) -> None:
    """Let the command called `name` say where it went, whatever else it is given."""

    @app.command(
        name,
        hidden=True,
        add_help_option=False,
        context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    )
    def say() -> None:
        raise BadRequest(said)


for _name, _said in COMMANDS.items():
    _register(_name, _said)
