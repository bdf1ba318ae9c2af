"""Every command that a manifest, a unit, a cron line or a page here gives is one that exists, arguments included."""

import re
import shlex
import shutil
import string
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from pipelines.cli import main
from pipelines.config import load_config
from tests.infra.files import (
    AWS,
    COMPOSE,
    INFRA,
    RAY_OBJECTS,
    entrypoint_commands,
    expand,
    job_spec,
    readme_commands,
    without_files,
)

SYSTEMD = INFRA / "systemd"
NIGHTLY = dict(
    line.split("=", 1) for line in (SYSTEMD / "nightly.env").read_text().splitlines() if not line.startswith("#")
)
SERVICE = (SYSTEMD / "alit-nightly.service").read_text()
CRON = (SYSTEMD / "alit.cron").read_text()
TIME = re.compile(r"(\*|\d+(-\d+)?(,\d+(-\d+)?)*)(/\d+)?")
RANGES = {"minute": (0, 59), "hour": (0, 23), "day": (1, 31), "month": (1, 12), "weekday": (0, 7)}


def cron_line() -> tuple[list[str], str, str]:
    """Five fields, user, command."""
    (line,) = (one for one in CRON.splitlines() if re.match(r"[\d*]", one))
    *fields, user, command = line.split(None, 6)
    return fields, user, command


def exec_starts() -> list[list[str]]:
    """The run and what follows it."""
    lines = re.findall(r"^ExecStart(?:Post)?=(.*)", SERVICE, re.MULTILINE)
    return [[string.Template(word).substitute(NIGHTLY) for word in line.split()] for line in lines]


def commands() -> Iterator[tuple[str, list[str]]]:
    """Where it stands, and its words."""
    for name, document in RAY_OBJECTS.items():
        if entrypoint := job_spec(document).get("entrypoint"):
            yield from ((name, words) for words in entrypoint_commands(entrypoint))
    for name, service in COMPOSE["services"].items():
        command = service.get("command", [])
        words = shlex.split(command) if isinstance(command, str) else command
        if words and words[0] in ("alit", "ray", "mlflow"):
            yield f"compose.yaml:{name}", words
    for line in (*AWS["head_start_ray_commands"], *AWS["worker_start_ray_commands"]):
        yield "aws.yaml", expand(line, {"RAY_HEAD_IP": "10.0.0.1"})
    yield from (("alit-nightly.service", ["alit", *words[1:]]) for words in exec_starts())
    command = cron_line()[2]
    yield from (("alit.cron", expand(one, NIGHTLY)) for one in command[command.index("alit run") :].split("&&"))
    yield from readme_commands()


COMMANDS = list(commands())
OF_ALIT = [(place, words) for place, words in COMMANDS if words[0] == "alit"]
OF_OTHERS = [(place, words) for place, words in COMMANDS if words[0] != "alit"]
DEPLOYED = [(place, words) for place, words in OF_ALIT if words[1] in ("run", "submit") and words[2] != "my.yaml"]


def ids(found: list[tuple[str, list[str]]]) -> list[str]:
    return [f"{place}: {' '.join(words[:3])}" for place, words in found]


def test_every_place_has_one() -> None:
    places = {place for place, _ in COMMANDS}
    assert {"train-rayjob.yaml:RayJob", "nightly-raycronjob.yaml:RayCronJob", "nightly-rayjob.yaml:RayJob"} <= places
    assert {"compose.yaml:job", "compose.yaml:mlflow", "aws.yaml", "alit.cron", "alit-nightly.service"} <= places
    assert {"infra/README.md", "infra/compose/README.md", "infra/kuberay/README.md", "infra/ray/README.md"} <= places


@pytest.mark.parametrize(("place", "words"), OF_ALIT, ids=ids(OF_ALIT))
def test_alit_takes_the_arguments(place: str, words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """argparse checks what comes before --help."""
    with pytest.raises(SystemExit) as done:
        main([*words[1:], "--help"])
    assert done.value.code == 0 and "CONFIG" in capsys.readouterr().out.upper()


@pytest.mark.usefixtures("registry")
@pytest.mark.parametrize(("place", "words"), DEPLOYED, ids=ids(DEPLOYED))
def test_the_run_can_be_planned(place: str, words: list[str], tmp_path: Path) -> None:
    """With the images that are here, and after the config was checked with the settings it has there."""
    overrides = [words[i + 1] for i, word in enumerate(words) if word == "--set"]
    config = load_config(words[2], overrides, folders_exist=False)
    assert "://" in config.workspace or Path(config.workspace).is_absolute()
    here = ["--set", "data.source=demo", "--set", "data.crops=4", "--set", f"workspace={tmp_path}/w"]
    settings = [argument for text in (*overrides, *without_files(config)) for argument in ("--set", text)]
    assert main(["plan", words[2], *settings, *here]) == 0


def parse(command: click.Command, words: list[str], parent: click.Context | None = None) -> click.Context:
    """Check the words as click does before it runs the command; raises UsageError."""
    if isinstance(command, click.Group):
        context = command.make_context(command.name, [], parent=parent, resilient_parsing=True)
        _, inner, rest = command.resolve_command(context, words)
        assert inner is not None
        return parse(inner, rest, context)
    return command.make_context(command.name, words, parent=parent)


def click_command(name: str) -> click.Command:
    if name == "ray":
        from ray.scripts.scripts import cli
    else:
        from mlflow.cli import cli
    return cli


@pytest.mark.parametrize(("place", "words"), OF_OTHERS, ids=ids(OF_OTHERS))
def test_ray_and_mlflow_take_the_arguments(place: str, words: list[str]) -> None:
    parse(click_command(words[0]), words[1:])


def test_wrong_arguments_are_found() -> None:
    with pytest.raises(click.UsageError):
        parse(click_command("ray"), ["start", "--head", "--num-cpu=0"])


@pytest.mark.parametrize("name", RAY_OBJECTS)
def test_parameters_of_ray_start_exist(name: str) -> None:
    spec = job_spec(RAY_OBJECTS[name]).get("rayClusterSpec", RAY_OBJECTS[name]["spec"])
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        given = [f"--{option}={value}" for option, value in group["rayStartParams"].items()]
        parse(click_command("ray"), ["start", *given])


def test_one_variable_says_what_the_night_runs() -> None:
    nightly = [words for place, words in OF_ALIT if "nightly" in place or "cron" in place]
    assert [words[1] for words in nightly] == ["run", "gc"] * 4
    assert all(words[-3:] == ["--keep-runs", "14", "--delete"] for words in nightly if words[1] == "gc")
    assert {words[2] for words in nightly} == {NIGHTLY["ALIT_CONFIG"]} == {"rerun"}
    assert all(f"model={NIGHTLY['ALIT_MODEL']}" in words for words in nightly)
    for text in (SERVICE, CRON, *(path.read_text() for path in (INFRA / "kuberay").glob("nightly*"))):
        assert NIGHTLY["ALIT_CONFIG"] not in text


def test_cron_line() -> None:
    fields, user, command = cron_line()
    assert user == "alit" and "%" not in command  # which cron takes for an end of line
    for field, (low, high) in zip(fields, RANGES.values(), strict=True):
        assert TIME.fullmatch(field)
        assert all(low <= int(number) <= high for number in re.findall(r"\d+", field.partition("/")[0]))
    assert "flock --nonblock" in command


@pytest.mark.skipif(shutil.which("flock") is None, reason="no flock here")
def test_cron_line_runs(tmp_path: Path) -> None:
    """With a settings file, a folder and a command of the test's own."""
    (tmp_path / "alit").write_text("#!/bin/sh\nprintf '%s\\n' \"$@\"\n")
    (tmp_path / "alit").chmod(0o755)
    command = cron_line()[2].replace("/etc/alit", str(SYSTEMD)).replace("/var/lib/alit", f"{tmp_path}")
    (shell,) = re.findall(r"^SHELL=(.*)", CRON, re.MULTILINE)
    path = {"PATH": f"{tmp_path}:/usr/bin:/bin"}
    settings = (SYSTEMD / "nightly.env").read_text().replace("/var/lib/alit", str(tmp_path))
    (tmp_path / "nightly.env").write_text(settings)
    command = command.replace(str(SYSTEMD / "nightly.env"), str(tmp_path / "nightly.env"))
    subprocess.run([shell, "-c", command], env=path, check=True)
    said = (tmp_path / "nightly.log").read_text().splitlines()
    assert said[:2] == ["run", NIGHTLY["ALIT_CONFIG"]] and said.count(f"workspace={tmp_path}/imagenet100") == 2
    assert said[-3:] == ["--keep-runs", "14", "--delete"]


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd-analyze here")
def test_systemd_takes_the_units(tmp_path: Path) -> None:
    """With a command that is here in place of the installed one, and this folder's page."""
    here = SERVICE.replace(exec_starts()[0][0], str(Path(sys.executable)))
    (tmp_path / "alit-nightly.service").write_text(here)
    shutil.copy(SYSTEMD / "alit-nightly.timer", tmp_path)
    units = [str(path) for path in tmp_path.iterdir()]
    done = subprocess.run(["systemd-analyze", "verify", *units], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
