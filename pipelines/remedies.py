"""What to do next about a failure, from its cause in one line."""

import re

AGAIN = "run the same command again: what is finished is kept, and training goes on from its last checkpoint"
REMEDIES = (
    (
        r"memory with \d+ images at once",  # components.train says what to set by itself
        f"do what it says and {AGAIN}",
    ),
    (
        r"^OutOfMemoryError|out of memory|^MemoryError",
        "take less at once (training.micro_batch, inference.batch_size, fewer workers or actors) or nodes with more "
        f"memory; then {AGAIN}",
    ),
    (
        r"No space left on device|OutOfDiskError|Disk quota exceeded",
        f"make room on the disk of the workspace, or on /tmp, which Ray fills; then {AGAIN}",
    ),
    (
        r"ACCESS_DENIED|AccessDenied|InvalidAccessKeyId|SignatureDoesNotMatch|HTTP status 403|\(403\)",
        "let the credentials of every node (AWS_PROFILE, a role, AWS_ACCESS_KEY_ID) read the source and write the "
        f"workspace; then {AGAIN}",
    ),
    (
        r"NoCredentials|Unable to locate credentials",
        f"give every node credentials (AWS_PROFILE, a role, AWS_ACCESS_KEY_ID); then {AGAIN}",
    ),
    (
        r"^TrackingError",
        "start the MLflow server, or set MLFLOW_TRACKING_URI or mlflow.uri to one that answers; where neither is set, "
        "a run is recorded in its workspace",
    ),
    (
        r"^ClusterError",
        "set RAY_ADDRESS or ray.address to the host:port of a running head (`ray status` there tells), or to nothing, "
        "and the run starts a Ray of its own",
    ),
    (r"^PermissionError|Permission denied", f"let this user read and write there; then {AGAIN}"),
    (r"^(ModuleNotFoundError|ImportError)", f"install it where the stages run, on every node; then {AGAIN}"),
    (
        r"^(WorkerCrashedError|ActorDiedError|ActorUnavailableError|NodeDiedError|LocalRayletDiedError|OwnerDiedError"
        r"|ObjectLostError|RaySystemError)|Connection (closed|reset) by",
        f"see at the end of the log whether memory ran out or a node went away, as it mostly is; then {AGAIN}",
    ),
    (
        r"^(Connection\w*Error|\w*Timeout\w*)|AWS Error (NETWORK_CONNECTION|SLOW_DOWN|SERVICE_UNAVAILABLE)",
        f"when the other side answers again, {AGAIN}",
    ),
)
OTHERWISE = f"mend what the cause names, the whole trace is in the log; then {AGAIN}"


def next_step(cause: str) -> str:
    """What a person does next about ``cause`` (``TypeName: message``)."""
    return next((step for pattern, step in REMEDIES if re.search(pattern, cause)), OTHERWISE)
