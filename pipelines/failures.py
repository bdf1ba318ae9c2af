"""What went wrong with a stage, in one line, and whether another try may help."""

import builtins
import re
from collections.abc import Iterator
from dataclasses import dataclass

CAUSE_LENGTH = 500
TRANSIENT_NAMES = frozenset(
    {
        # Ray: a process, a node or the store went away
        "WorkerCrashedError",
        "ActorDiedError",
        "ActorUnavailableError",
        "NodeDiedError",
        "LocalRayletDiedError",
        "OutOfMemoryError",  # Ray's monitor killed a worker; torch's own is raised in the worker and told apart below
        "ObjectLostError",
        "ObjectFetchTimedOutError",
        "OwnerDiedError",
        "RaySystemError",
        "RpcError",
        "RuntimeEnvSetupError",
        "TaskPlacementGroupRemoved",
        "ActorPlacementGroupRemoved",
        # Ray Train
        "PreemptionError",
        "WorkerHealthCheckTimeoutError",
        "WorkerHealthCheckFailedError",
        "WorkerGroupStartupTimeoutError",
        "WorkerGroupStartupFailedError",
        # the network, also botocore's and urllib3's, which don't derive from the built-in ones
        "ConnectionError",
        "TimeoutError",
        "HTTPClientError",
        "ConnectTimeoutError",
        "ChangedFile",  # of a source: listed anew, it is read as it is now
    }
)
TRANSIENT_STORE = re.compile(
    r"AWS Error (NETWORK_CONNECTION|SLOW_DOWN|SERVICE_UNAVAILABLE|REQUEST_TIMEOUT|INTERNAL_FAILURE|THROTTLING"
    r"|UNKNOWN \(HTTP status (429|5\d\d)\))"
)
LOST_PEER = re.compile(
    r"Connection (closed|reset) by (remote )?peer|connectFullMesh|Broken pipe|Read timeout"
    r"|NCCL.*(remote|abort|timeout)",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Failure:
    """Why a stage failed."""

    cause: str  # one line
    transient: bool  # from infrastructure, so that the same input may pass the next time


def diagnose(error: BaseException) -> Failure:
    """The root cause of ``error`` in one line, without the layers that Ray puts around it."""
    roots = [_retold(root, error) for root in _roots(error)]
    telling = [root for root in roots if not _lost_peer(root)] or roots
    root = next((root for root in telling if not _transient(root)), telling[0])
    return Failure(_one_line(root), _transient(root))


def _roots(error: BaseException, depth: int = 0) -> Iterator[BaseException]:
    """The innermost errors: one, or one per failed rank of a training."""
    inner: list[BaseException] = []
    for attribute in ("worker_failures", "cause", "controller_failure"):  # Ray Train's, ray.get's, Ray Train's
        value = getattr(error, attribute, None)
        inner += (
            list(value.values()) if isinstance(value, dict) else [value] if isinstance(value, BaseException) else []
        )
    if not inner and _is_wrapper(error) and error.__cause__ is not None:
        inner = [error.__cause__]
    inner = [one for one in inner if one is not error]
    if not inner or depth > 10:
        yield error
        return
    for one in inner:
        yield from _roots(one, depth + 1)


def _retold(root: BaseException, outer: BaseException) -> BaseException:
    """Ray Data's wrapper loses the error of a user's function on its way; only the printed trace still has it."""
    told = re.search(r"^([\w.]+): (.*)\n+The above exception was the direct cause", str(outer), re.MULTILINE)
    if not _is_wrapper(root) or told is None:
        return root
    name = told[1].rpartition(".")[2]
    known = getattr(builtins, name, None)
    cls = known if isinstance(known, type) and issubclass(known, Exception) else type(name, (Exception,), {})
    return cls(told[2])


def _is_wrapper(error: BaseException) -> bool:
    return type(error).__name__ in {"UserCodeException", "SystemException", "UserExceptionWithTraceback"}


def _transient(error: BaseException) -> bool:
    if getattr(error, "actor_init_failed", False):
        return False
    names = {cls.__name__ for cls in type(error).__mro__}
    if "OutOfMemoryError" in names and not type(error).__module__.startswith("ray"):
        return False
    return bool(names & TRANSIENT_NAMES) or bool(TRANSIENT_STORE.search(str(error))) or _lost_peer(error)


def _lost_peer(error: BaseException) -> bool:
    """Whether this is how gloo or NCCL says that another rank went away."""
    return isinstance(error, RuntimeError) and bool(LOST_PEER.search(str(error)))


def _one_line(error: BaseException) -> str:
    """``TypeName: message``, the message's telling line only, without credentials."""
    name = type(error).__name__.removeprefix("RayTaskError(").removesuffix(")")
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if getattr(error, "actor_init_failed", False) or name == "RayTaskError":
        lines = lines[-1:]  # the last line of a traceback
    text = re.sub(r"://[^/@\s]+@", "://***@", f"{name}: {lines[0]}" if lines else name)
    return text if len(text) <= CAUSE_LENGTH else text[: CAUSE_LENGTH - 1] + "…"
