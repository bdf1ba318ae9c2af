"""The same run through Ray's job API: sent to a cluster, its log followed, its exit code ours."""

import asyncio
import logging
import os
import re
import shlex
import signal
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from components.tracking import redact
from pipelines.bundle import MIB, Bundle, make_bundle
from pipelines.cluster import ClusterError
from pipelines.config import ConfigError, config_file, load_config

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

ALWAYS_PASSED = ("MLFLOW_TRACKING_URI",)  # when it is set here
OVERRULING = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")  # Ray prefers these to the address it is given
ANSWER_S = 10.0
LOST_S = 60.0  # a cluster that has been away for so long is given up
SILENCE_S = 120.0  # after which the connection is made anew, as it may be dead
POLL_S = 1.0
CHATTY = ("ray.dashboard.modules.dashboard_sdk", "ray.dashboard.modules.job.sdk")

Say = Callable[[str], None]


@dataclass(frozen=True)
class Request:
    """What to run, and where."""

    config: str  # a YAML file, or the name of a ready config
    address: str  # of the cluster's dashboard, http://HOST:8265
    overrides: Sequence[str] = ()  # key.path=value
    options: Sequence[str] = ()  # further arguments of ``alit run``
    environment: Sequence[str] = ()  # names of variables to pass on
    working_dir: str = "."


@dataclass(frozen=True)
class Job:
    """A job that the cluster has taken."""

    client: "JobSubmissionClient"
    address: str
    submission_id: str

    def commands(self) -> Iterator[str]:
        """How to look after it by hand."""
        yield f"follow  ray job logs --address {redact(self.address)} --follow {self.submission_id}"
        yield f"stop    ray job stop --address {redact(self.address)} {self.submission_id}"


def send(request: Request, say: Say) -> Job:
    """Check the config, pack the working directory, and give both to the cluster.

    Raises ConfigError, before anything is sent, for what is wrong with the request, and ClusterError for what is wrong
    with the cluster. Values of variables are neither logged nor shown.
    """
    _check_config(request)
    variables = _variables(request.environment)
    with tempfile.TemporaryDirectory() as folder:
        bundle = make_bundle(
            Path(request.working_dir).absolute(), config=config_file(request.config), output=Path(folder, "bundle.zip")
        )
        client = _client(request.address)
        say(f"sends {bundle.num_files} files, {bundle.size_bytes / MIB:.1f} MiB, to {redact(client.get_address())}")
        with _cluster_errors(client.get_address()):
            submission_id = client.submit_job(
                entrypoint=_entrypoint(request, bundle),
                submission_id=_new_id(request.config),
                runtime_env={"working_dir": str(bundle.file), "env_vars": variables},
            )
    say(f"job {submission_id}" + (f" with {', '.join(variables)}" if variables else ""))
    return Job(client, client.get_address(), submission_id)


def follow(job: Job, say: Say) -> int:
    """Repeat the job's log until it ends; returns its exit code, 143 when somebody stopped it.

    Ctrl-C stops the following and not the job; the code is 130 then. Raises ClusterError when the cluster is gone.
    """
    try:
        details = asyncio.run(_until_ended(job, _Lines(say)))
    except KeyboardInterrupt:
        say("\nno longer followed; the job goes on")
        for line in job.commands():
            say(line)
        return 128 + signal.SIGINT
    return _exit_code(job, details, say)


def _check_config(request: Request) -> None:
    config = load_config(request.config, request.overrides, folders_exist=False)
    if "://" not in config.workspace and not Path(config.workspace).is_absolute():
        raise ConfigError(
            f"workspace = {config.workspace!r}: a submitted job needs s3:// or an absolute path that all nodes see; "
            "a relative one would lie in the job's temporary folder (--set workspace=...)"
        )


def _variables(names: Sequence[str]) -> dict[str, str]:
    """The variables to pass on, by name."""
    for name in names:
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            raise ConfigError("--env: the name of a variable is needed; its value is the one it has here")
        if name not in os.environ:
            raise ConfigError(f"--env {name}: not set here")
    return {name: os.environ[name] for name in dict.fromkeys((*ALWAYS_PASSED, *names)) if name in os.environ}


def _entrypoint(request: Request, bundle: Bundle) -> str:
    overrides = [argument for text in request.overrides for argument in ("--set", text)]
    return shlex.join(["python", "-m", "pipelines", "run", bundle.config, *overrides, *request.options])


def _new_id(config: str) -> str:
    name = re.sub(r"[^A-Za-z0-9_-]", "-", Path(config).stem)
    return f"alit-{name}-{time.strftime('%Y%m%d-%H%M%S')}-{uuid.uuid4().hex[:6]}"


def _client(address: str) -> "JobSubmissionClient":
    from ray.job_submission import JobSubmissionClient

    if not re.match(r"https?://[^/]", address):
        raise ConfigError(f"--address {redact(address)!r}: the dashboard's is needed, http://HOST:8265")
    for name in CHATTY:
        logging.getLogger(name).setLevel(logging.WARNING)
    address = address.rstrip("/")
    with _cluster_errors(address), _without(OVERRULING):
        _look_for(address)
        return JobSubmissionClient(address)


def _look_for(address: str) -> None:
    """Ray's own client would wait for minutes where nobody answers."""
    import requests

    requests.get(f"{address}/api/version", timeout=ANSWER_S).close()


@contextmanager
def _without(names: Sequence[str]) -> Iterator[None]:
    """The environment without some variables, for the length of a ``with``."""
    kept = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(kept)


@contextmanager
def _cluster_errors(address: str) -> Iterator[None]:
    """What Ray and the network say, in one line that tells what to do."""
    from ray.exceptions import AuthenticationError

    where = redact(address)
    try:
        yield
    except AuthenticationError as error:
        mode = os.environ.get("RAY_AUTH_MODE", "not set")
        raise ClusterError(
            f"{where} wants its own token: set RAY_AUTH_MODE=token (it is {mode} here), and RAY_AUTH_TOKEN or "
            "~/.ray/auth_token to what the cluster was started with"
        ) from error
    except OSError as error:  # requests' errors are among these
        raise ClusterError(f"{where} can't be reached: {_reason(error)}") from error
    except (RuntimeError, ValueError, KeyError) as error:
        raise ClusterError(f"{where} does not take the job as a Ray cluster would: {_first_line(error)}") from error


def _reason(error: OSError) -> str:
    """What requests has wrapped twice."""
    inner = getattr(error.args[0], "reason", error) if error.args else error
    return _first_line(inner).rpartition("): ")[2]


def _first_line(error: Exception) -> str:
    return redact(str(error)).strip().split("\n", maxsplit=1)[0][:500]


class _Lines:
    """Says a growing text line by line; a text that begins anew is said from where it was left."""

    def __init__(self, say: Say) -> None:
        self.say, self.taken, self.seen, self.rest = say, 0, 0, ""

    def begin(self) -> None:
        self.seen = 0

    def take(self, text: str) -> None:
        fresh = text[max(0, self.taken - self.seen) :]
        self.seen += len(text)
        self.taken = max(self.taken, self.seen)
        *lines, self.rest = (self.rest + fresh).split("\n")
        for line in lines:
            self.say(line)

    def end(self) -> None:
        if self.rest:
            self.say(self.rest)


async def _until_ended(job: Job, lines: _Lines) -> Any:
    """The details of the job once it has ended."""
    import aiohttp

    lost_since = None
    while True:
        try:
            await _tail(job, lines)
            details = job.client.get_job_info(job.submission_id)
            lost_since = None
            if details.status.is_terminal():
                lines.end()
                return details
        except (aiohttp.ClientError, OSError, RuntimeError) as error:
            lost_since = lost_since or time.monotonic()
            if time.monotonic() - lost_since > LOST_S:
                raise ClusterError(f"{redact(job.address)} is gone: {_first_line(error)}; the job may go on") from error
        await asyncio.sleep(POLL_S)


async def _tail(job: Job, lines: _Lines) -> None:
    """The log until the connection ends or nothing has come for long."""
    lines.begin()
    texts = job.client.tail_job_logs(job.submission_id)
    try:
        while True:
            lines.take(await asyncio.wait_for(anext(texts), SILENCE_S))
    except (StopAsyncIteration, TimeoutError):
        return


def _exit_code(job: Job, details: Any, say: Say) -> int:
    status, code = str(details.status.value), details.driver_exit_code
    if status == "STOPPED":
        say(f"job {job.submission_id} was stopped")
        return 128 + signal.SIGTERM
    if status == "FAILED" and code is None:
        raise ClusterError(f"job {job.submission_id} did not run to its end: {_first_line(Exception(details.message))}")
    code = int(code or 0)
    say(f"job {job.submission_id} {status.lower()}" + (f" with exit code {code}" if code else ""))
    return 128 - code if code < 0 else code
