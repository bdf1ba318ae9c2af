"""A Judge artifact: ``judge.json``, with what it is, sees, answers and has scored, and its files beside."""

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from components.judges.classes import Classes, read_classes
from components.judges.judge import Judge, JudgeInput
from components.plugins import load_class, source_digest
from components.store import join, read_bytes, read_json, write_json
from components.task_config import JUDGE_KINDS, Answer, JudgeOptions, JudgeStageConfig

FILE = "judge.json"
GALLERY = ("gallery.safetensors", "gallery.json")
NOT_WEIGHTS = ("judge.json", "artifact.json", *GALLERY)


@dataclass(frozen=True)
class JudgeRecord:
    """What ``judge.json`` says."""

    spec: str
    kind: str  # of the task
    options: dict[str, Any]
    answers: tuple[Answer, ...]
    input: JudgeInput
    classes: Classes
    digest: str  # sha256 of its files, and of its code where that is one's own
    scored: Mapping[str, Any] = field(default_factory=dict)  # what it scored on originals

    @classmethod
    def read(cls, folder: str) -> "JudgeRecord":
        """The record in ``folder``."""
        values = read_json(f"{folder}/{FILE}")
        given = JudgeInput(**{name: _tuples(value) for name, value in values.pop("input").items()})
        return cls(**{**values, "input": given, **{n: _tuples(values[n]) for n in ("answers", "classes")}})

    def write(self, folder: str) -> None:
        """As ``judge.json``."""
        write_json(f"{folder}/{FILE}", asdict(self))

    @property
    def identity(self) -> str:
        """The same for judges that give the same answers, so that one can answer for several tasks."""
        facts = (self.spec, self.digest, self.input, sorted(self.answers), sorted(self.options["arguments"].items()))
        return hashlib.sha256(repr(facts).encode()).hexdigest()


def value_digest(folder: str) -> str:
    """The same for judge artifacts that give an image the same values: all but what the judge scored in its trial."""
    digest = hashlib.sha256(repr(replace(JudgeRecord.read(folder), scored={})).encode())
    for name in GALLERY:
        try:
            digest.update(hashlib.sha256(read_bytes(join(folder, name))).digest())
        except FileNotFoundError:  # a gallery is kept for retrieval alone
            continue
    return digest.hexdigest()


def _tuples(value: Any) -> Any:
    return tuple(_tuples(one) for one in value) if isinstance(value, list) else value


def build_judge(config: JudgeStageConfig, answer: Answer) -> Judge:
    """The judge that ``config`` names, from where it comes; ``answer``: what the task asks it for.

    Raises ValueError when it isn't there, its package isn't, or it doesn't answer that.
    """
    options = config.options
    classes = read_classes(options.classes) if options.classes else ()
    judge = _build(config.spec, options, answer, None, None)
    judge.input = _seen(judge.input, options)
    judge.classes = classes or judge.classes
    if answer not in judge.answers:
        raise ValueError(f"judge {config.spec!r}: it answers {list(judge.answers)}, the task asks for {answer!r}")
    return judge


def _seen(own: JudgeInput, options: JudgeOptions) -> JudgeInput:
    given = {name: getattr(options, name) for name in ("size", "mean", "std") if getattr(options, name) is not None}
    return replace(own, **given)


def save_judge(judge: Judge, config: JudgeStageConfig, folder: str, scored: Mapping[str, Any]) -> JudgeRecord:
    """Write the judge's files and its record into ``folder``."""
    judge.save(folder)
    record = JudgeRecord(
        spec=config.spec,
        kind=config.kind,
        options=config.options.model_dump(mode="json"),
        answers=tuple(judge.answers),
        input=judge.input,
        classes=judge.classes,
        digest=_digest(config.spec, folder),
        scored=scored,
    )
    record.write(folder)
    return record


def open_judge(folder: str, device: str = "cpu") -> Judge:
    """The judge whose artifact is in the local ``folder``; raises ValueError when its files or code have changed."""
    record = JudgeRecord.read(folder)
    found = _digest(record.spec, folder)
    if found != record.digest:
        raise ValueError(
            f"judge {record.spec!r} in {folder}: its digest is {found[:12]}, recorded {record.digest[:12]}"
        )
    options = JudgeOptions.model_validate(record.options)
    judge = _build(record.spec, options, record.answers[0], folder, record.input)
    judge.input, judge.classes = record.input, record.classes
    judge.to(device)
    return judge


def _build(spec: str, options: JudgeOptions, answer: Answer, folder: str | None, given: JudgeInput | None) -> Judge:
    """From the files in ``folder``, or, where that is None, from its origin."""
    kind, _, place = spec.partition(":")
    if kind == "efficientnet-lite0":
        from components.judges.efficientnet import EfficientNetJudge, load_network

        return EfficientNetJudge(load_network(folder), options.size)
    if kind in ("torchscript", "onnx"):
        from components.judges.files import FILES, OnnxJudge, TorchScriptJudge

        path = place if folder is None else f"{folder}/{FILES[kind]}"
        make = TorchScriptJudge if kind == "torchscript" else OnnxJudge
        return make(path, answer=answer, given=given or JudgeInput(), classes=())
    if kind in ("torchvision", "timm", "hf"):
        from components.judges.hub import build_hub_judge

        return build_hub_judge(spec, answer, folder, given)
    if kind == "probe":
        from components.judges.probe import Probe, ProbeJudge

        assert folder is not None, "a probe is trained, see components.train.probe"
        return ProbeJudge(Probe.load(folder))
    return load_class(spec, Judge)(**options.arguments)


def _digest(spec: str, folder: str) -> str:
    """sha256 over the files of a judge, and over the code of one's own."""
    digest = hashlib.sha256()
    if spec.partition(":")[0] not in JUDGE_KINDS:
        digest.update(source_digest(spec).encode())
    for path in sorted(Path(folder).iterdir()):
        if path.is_file() and path.name not in NOT_WEIGHTS:
            digest.update(path.name.encode() + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()
