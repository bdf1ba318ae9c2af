"""representation: does what a token count holds suffice to tell what is in the image?

Legend: N images, K budgets, L latents of a budget, D numbers in a latent.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from components.analyze import drawing
from components.analyze.estimates import Estimate
from components.analyze.inputs import Inputs
from components.analyze.sections import Picture, Section, Table
from components.store import read_batches

if TYPE_CHECKING:
    from model import AlitTokenizer

CLAIM = "The latents are a representation: a linear classifier on them gets better with more tokens, soon with few."
ABOUT = (
    "Top-1 of a logistic regression on standardised latents as the decoder reads them, fitted to labelled images of "
    "the train split, tested on held-out ones; pooled: the mean latent, flat: all latents side by side. chance: the "
    "commonest label's share."
)


def representation(inputs: Inputs) -> Section:
    """Top-1 of a linear probe at each budget."""
    head = {"id": "representation", "title": "What a linear classifier reads from the tokens", "claim": CLAIM}
    train = inputs.sample(inputs.settings.probe_images, having="label", split="train")
    test = [name for name in inputs.sample(inputs.settings.images, having="label") if name not in set(train)]
    labels = [np.array(inputs.column(names, "label"), dtype=str) for names in (train, test)]
    if not test or not np.isin(labels[1], labels[0]).any() or len(set(labels[0])) < 2:
        return Section(
            **head, finding="Not measured: held-out images with labels that train images have too are needed."
        )
    codes = [_codes(inputs, names) for names in (train, test)]
    tokenizer = inputs.load_tokenizer()
    found: dict[str, Estimate] = {}
    for at, budget in enumerate(inputs.budgets):
        one, other = (_latents(tokenizer, rows, inputs.budgets, at) for rows in codes)
        for name, features in (
            ("pooled", (one.mean(1), other.mean(1))),
            ("flat", (one.reshape(len(one), -1), other.reshape(len(other), -1))),
        ):
            right = probed(features[0], labels[0], features[1], labels[1])
            found[f"{name} at {budget}"] = inputs.bootstrap.mean(right.astype(np.float64))
    commonest = max(set(labels[1].tolist()), key=labels[1].tolist().count)
    found["chance"] = inputs.bootstrap.mean((labels[1] == commonest).astype(np.float64))
    return Section(
        **head,
        finding=_finding(found, inputs.budgets, len(train), len(test)),
        images=len(test),
        figures=[_picture(found, inputs.budgets)],
        tables=[_table(found, inputs.budgets, len(train), len(test))],
        estimates=found,
        headline=[f"flat at {budget}" for budget in (inputs.budgets[0], inputs.budgets[-1])],
    )


def probed(train: np.ndarray, train_labels: np.ndarray, test: np.ndarray, test_labels: np.ndarray) -> np.ndarray:
    """Which test rows a multinomial logistic regression on standardised features gets right, bool [N]."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    fitted = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000)).fit(train, train_labels)
    return np.asarray(fitted.predict(test) == test_labels)


def _codes(inputs: Inputs, names: Sequence[str]) -> np.ndarray:
    """Codes at all budgets, flat, of these images, a row each."""
    wanted, rows = pa.array(names, pa.string()), {}
    for batch in read_batches(inputs.codes.table_uri, columns=["image_id", "codes"], batch_rows=1024):
        chosen = batch.filter(pc.is_in(batch["image_id"], value_set=wanted))
        if len(chosen):
            flat = chosen["codes"].flatten().to_numpy().reshape(len(chosen), -1)
            rows |= dict(zip(chosen["image_id"].to_pylist(), flat, strict=True))
    return np.stack([rows[name] for name in names])


def _latents(tokenizer: "AlitTokenizer", codes: np.ndarray, budgets: Sequence[int], at: int) -> np.ndarray:
    """What the decoder reads at a budget, float32 [N, L, D]."""
    import torch

    width = codes.shape[1] // sum(budgets)
    start = sum(budgets[:at]) * width
    values = torch.from_numpy(np.ascontiguousarray(codes[:, start : start + budgets[at] * width]))
    if tokenizer.config.codebook_size is None:
        return values.float().reshape(len(codes), budgets[at], -1).numpy()
    with torch.inference_mode():
        return tokenizer.latents(values.to(next(tokenizer.parameters()).device)).float().cpu().numpy()


def _picture(found: dict[str, Estimate], budgets: Sequence[int]) -> Picture:
    figure, ((axes,),) = drawing.new_figure()
    for number, name in enumerate(("flat", "pooled")):
        points = [found[f"{name} at {budget}"] for budget in budgets]
        drawing.curve(axes, budgets, points, drawing.Line(name, number))
    axes.axhline(found["chance"].value, color="#888888", linewidth=1, linestyle="--", label="chance")
    axes.set_ylim(0, None)
    drawing.label(axes, x="tokens", y="top-1")
    drawing.legend(figure, axes, columns=3)
    caption = f"Top-1 of a linear probe on the latents, 95% intervals, n = {found['chance'].images} held-out images."
    return Picture("representation.png", "Top-1 of a linear probe against tokens.", caption, drawing.png(figure))


def _table(found: dict[str, Estimate], budgets: Sequence[int], train: int, test: int) -> Table:
    rows = [[str(budget), str(found[f"flat at {budget}"]), str(found[f"pooled at {budget}"])] for budget in budgets]
    note = f"{ABOUT} {train} train and {test} held-out images; chance {found['chance']}."
    return Table("Linear probe by budget", ["tokens", "flat", "pooled"], rows, note)


def _finding(found: dict[str, Estimate], budgets: Sequence[int], train: int, test: int) -> str:
    first, last = found[f"flat at {budgets[0]}"], found[f"flat at {budgets[-1]}"]
    best = max(budgets, key=lambda budget: found[f"flat at {budget}"].value)
    way = "rises" if last.low > first.high else "falls" if last.high < first.low else "hardly changes"
    return (
        f"Top-1 {way} from {first} at {budgets[0]} tokens to {last} at {budgets[-1]}, best {found[f'flat at {best}']} "
        f"at {best} (chance {found['chance'].value:.3g}; {train} train, {test} held-out images)."
    )
