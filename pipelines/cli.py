"""The command line: ``alit``. Exit codes: 0 done, 1 a stage failed, 2 the config or the arguments are wrong."""

import argparse
import logging
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

from pipelines.cli_model import add_model_commands
from pipelines.config import ConfigError, user_errors

if TYPE_CHECKING:
    from pipelines.config import AnyConfig
    from pipelines.dag import Pipeline

_out = logging.getLogger("alit")


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse ``arguments`` (default: the process's own), run the command, return its exit code."""
    _configure_output()
    try:
        options = _parser().parse_args(arguments)
        return int(options.command(options))
    except ConfigError as error:
        _out.error("error: %s", error)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader, `head` for example, has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        return _refused(error)


def _refused(error: Exception) -> int:
    """Say what kept a command from its work; raises what is a fault of the program. Its imports aren't for --help."""
    from components.artifacts import WorkspaceError
    from pipelines.summary import lines_of_refusal

    if isinstance(error, WorkspaceError):
        for line in lines_of_refusal(error):
            _out.error("%s", line)
    elif isinstance(error, ConnectionError):
        _out.error("error: %s", error)
    else:
        raise error
    return 1


def _configure_output() -> None:
    """What commands say goes to stdout as it is; errors and progress go to stderr."""
    say = logging.StreamHandler(sys.stdout)
    say.addFilter(lambda record: record.name == "alit" and record.levelno < logging.ERROR)
    tell = logging.StreamHandler(sys.stderr)
    tell.addFilter(lambda record: record.name != "alit" or record.levelno >= logging.ERROR)
    tell.setFormatter(_Clocked())
    root = logging.getLogger()
    root.handlers[:] = [say, tell]
    root.setLevel(logging.WARNING)
    for name in ("alit", "pipelines", "components"):
        logging.getLogger(name).setLevel(logging.INFO)


class _Clocked(logging.Formatter):
    """Progress lines begin with the time; errors of the command don't."""

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        return text if record.name == "alit" else f"[{self.formatTime(record, '%H:%M:%S')}] {text}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="alit", description="Adaptive-length image tokenization on Ray and MLflow.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, command: Callable[[argparse.Namespace], int], help_text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=help_text, description=help_text)
        sub.set_defaults(command=command)
        return sub

    def add_config(name: str, command: Callable[[argparse.Namespace], int], help_text: str) -> argparse.ArgumentParser:
        sub = add(name, command, help_text)
        sub.add_argument("config", help="a YAML file, or the name of a ready config such as demo")
        sub.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override one dotted key")
        return sub

    run = add_config("run", _run, "Run what is missing.")
    _add_stages(run)
    plan = add_config("plan", _plan, "Say what would run and why.")
    plan.add_argument("--force", action="append", default=[], metavar="STAGE", help="as for run")
    add_config("graph", _graph, "Print the DAG as mermaid text.")
    add_config("status", _status, "Show stages, artifacts and sizes.")
    sweep = add_config("sweep", _sweep, "Run the variants of a config and compare them.")
    sweep.add_argument("--plan", action="store_true", help="only say what would run and why")
    submit = add_config("submit", _submit, "Run on a cluster, through Ray's job API.")
    _add_stages(submit)
    submit.add_argument("--address", required=True, metavar="URL", help="the cluster's dashboard, http://HOST:8265")
    submit.add_argument("--env", action="append", default=[], metavar="NAME", help="pass this variable on to the job")
    submit.add_argument("--working-dir", default=".", metavar="DIR", help="the code to send (default: this folder)")
    submit.add_argument("--no-wait", action="store_true", help="don't follow the job to its end")
    page = add_config("report", _report, "Print the path of the HTML report.")
    page.add_argument("--open", action="store_true", help="open it in a browser")
    select = add_config("select", _select, "Choose token counts again from stored scores.")
    select.add_argument("--task", required=True, help="a task of the config")
    rule = select.add_mutually_exclusive_group(required=True)
    rule.add_argument("--max", type=float, help="the metric is at most this")
    rule.add_argument("--min", type=float, help="the metric is at least this")
    rule.add_argument("--within", type=float, metavar="RATIO", help="within this ratio of the value at the most tokens")
    rule.add_argument("--mean-tokens", type=float, metavar="B", help="at most this many tokens a mean image")
    promote = add_config("promote", _promote, "Make the challenger, or a version, the champion.")
    promote.add_argument("--version", type=int, metavar="N", help="this version of the registered model")
    add_config("rollback", _rollback, "Return to the champion before this one.")
    gc = add_config("gc", _gc, "List artifacts that no plan, run or registered model refers to.")
    gc.add_argument("--delete", action="store_true", help="remove them")
    gc.add_argument("--keep-runs", type=int, metavar="N", help="of runs, only the newest N count (default: all)")
    add_model_commands(add)
    return parser


def _add_stages(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--until", metavar="STAGE", help="run what this stage needs, and it")
    parser.add_argument("--force", action="append", default=[], metavar="STAGE", help="run a stage again if it stands")


def _config(options: argparse.Namespace) -> "AnyConfig":
    """The config, after what it says of buckets counts here, and its workspace, if in one, is known to be there."""
    from components import buckets
    from pipelines.config import load_config

    config = load_config(options.config, options.set)
    buckets.use(config.s3)
    if buckets.is_bucket(config.workspace):
        with user_errors():
            buckets.check(config.workspace, "workspace")
    return config


def _run(options: argparse.Namespace) -> int:
    from pipelines.build import build, options_of
    from pipelines.runner import run
    from pipelines.summary import lines_of

    config = _config(options)
    pipeline = build(config)
    for name in (*options.force, *([options.until] if options.until else [])):
        _known_stage(pipeline.names, name)
    record = run(
        pipeline,
        workspace=config.workspace,
        options=options_of(config, pipeline, force=options.force, until=options.until),
    )
    for line in lines_of(record):
        _out.info("%s", line)
    return record.exit_code


def _submit(options: argparse.Namespace) -> int:
    from pipelines.submit import Request, follow, send

    until = ["--until", options.until] if options.until else []
    request = Request(
        config=options.config,
        address=options.address,
        overrides=options.set,
        options=[*until, *(argument for stage in options.force for argument in ("--force", stage))],
        environment=options.env,
        working_dir=options.working_dir,
    )
    job = send(request, _say)
    if not options.no_wait:
        return follow(job, _say)
    for line in job.commands():
        _say(line)
    return 0


def _say(line: str) -> None:
    _out.info("%s", line)


def _known_stage(names: Sequence[str], name: str) -> None:
    if name not in names:
        raise ConfigError(f"stage {name!r}: allowed are {list(names)}")


def _plan(options: argparse.Namespace) -> int:
    from pipelines.build import build

    config = _config(options)
    pipeline = build(config)
    for name in options.force:
        _known_stage(pipeline.names, name)
    return _say_plan(pipeline, config.workspace, tuple(options.force))


def _say_plan(pipeline: "Pipeline", workspace: str, force: tuple[str, ...]) -> int:
    from pipelines.dag import plan
    from pipelines.summary import table

    planned = plan(pipeline, workspace, force)
    rows = [(one.stage.name, one.key, one.state, one.reason) for one in planned]
    for line in table(("stage", "key", "state", "why"), rows):
        _out.info("%s", line)
    for name, fact in pipeline.facts.items():
        _out.info("%-10s %s", name, fact)
    _out.info("%d of %d stages would run", sum(one.state == "run" for one in planned), len(planned))
    return 0


def _sweep(options: argparse.Namespace) -> int:
    from pipelines.build import build, options_of
    from pipelines.runner import run
    from pipelines.summary import lines_of
    from pipelines.sweep import COMPARE, build_sweep, comparison_lines

    config = _config(options)
    pipeline = build_sweep(options.config, options.set)
    if options.plan:
        return _say_plan(pipeline, config.workspace, ())
    record = run(pipeline, workspace=config.workspace, options=options_of(config, build(config)))
    compared = comparison_lines(record[COMPARE].uri) if record.exit_code == 0 else ()
    for line in (*lines_of(record), "", *compared):
        _out.info("%s", line)
    return record.exit_code


def _graph(options: argparse.Namespace) -> int:
    from pipelines.build import build

    _out.info("%s", build(_config(options)).mermaid().rstrip())
    return 0


def _status(options: argparse.Namespace) -> int:
    from pipelines.build import build
    from pipelines.summary import status_rows, table

    config = _config(options)
    headings = ("stage", "key", "state", "made", "size", "figures", "MLflow run")
    for line in table(headings, status_rows(build(config), config.workspace)):
        _out.info("%s", line)
    return 0


def _report(options: argparse.Namespace) -> int:
    from pipelines.build import build
    from pipelines.page import find_page, local_copy

    config = _config(options)
    found = find_page(build(config), config.workspace)
    if found is None:
        _out.error("error: no report in %s yet: alit run %s", config.workspace, options.config)
        return 1
    if not found.current:
        logging.getLogger(__name__).info(
            f"the config or its data changed since; `alit run {options.config}` makes a new one"
        )
    _say(found.uri)
    if options.open:
        import webbrowser
        from pathlib import Path

        webbrowser.open(Path(local_copy(found.uri)).as_uri())
    return 0


def _select(options: argparse.Namespace) -> int:
    from pipelines.choose import choose_again

    config = _config(options)
    given = {"max": options.max, "min": options.min, "ratio": options.within, "mean": options.mean_tokens}
    return _say_all(
        choose_again(config, options.task, {name: value for name, value in given.items() if value is not None})
    )


def _promote(options: argparse.Namespace) -> int:
    from pipelines.promotion import promote

    return _say_all(promote(_config(options), options.version))


def _rollback(options: argparse.Namespace) -> int:
    from pipelines.promotion import rollback

    return _say_all(rollback(_config(options)))


def _gc(options: argparse.Namespace) -> int:
    from pipelines.garbage import collect

    return _say_all(collect(_config(options), delete=options.delete, keep_runs=options.keep_runs))


def _say_all(lines: Iterable[str]) -> int:
    for line in lines:
        _say(line)
    return 0
