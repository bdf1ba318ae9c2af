"""The registered model: MLflow loads this file beside the weights (models from code; nothing is pickled).

Input: a column ``image`` with encoded images (bytes, or base64 text as a scoring server gets them). Params: ``rule``
(the name of a task whose rule was registered, or "most"), ``num_tokens`` (a fixed budget, 0: use the rule), ``output``
("tokens" or "images"). Output rows: num_tokens, and token_ids (a list) or image (a PNG in base64).
"""

import base64
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from mlflow.models import set_model
from mlflow.pyfunc import PythonModel, PythonModelContext
from PIL import Image

from components.config import RuleConfig
from components.images import encode_png, prepare, to_float, to_uint8
from components.rules import HEADS, rule_with_head
from model import AlitTokenizer

MAX_PIXELS = 100_000_000
BATCH = 32


class AlitModel(PythonModel):
    """Tokens or reconstructions of encoded images."""

    def load_context(self, context: PythonModelContext) -> None:
        """Load weights and rules."""
        folder = Path(context.artifacts["tokenizer"])
        self.tokenizer = AlitTokenizer.load(folder)
        self.heads = folder / HEADS
        self.rules = json.loads((folder / "rules.json").read_text())

    def predict(
        self, context: PythonModelContext, model_input: pd.DataFrame, params: dict[str, Any] | None = None
    ) -> Any:
        """One output row an input row; raises ValueError for an image that can't be read or an unknown rule."""
        params = params or {}
        images = model_input["image"].tolist()
        parts = [self._predict(images[i : i + BATCH], params) for i in range(0, len(images), BATCH)]
        return pd.concat(parts, ignore_index=True)

    def _predict(self, images: list[bytes | str], params: dict[str, Any]) -> pd.DataFrame:
        size = self.tokenizer.config.image_size[0]
        data = [base64.b64decode(image) if isinstance(image, str) else image for image in images]
        pixels = [np.asarray(prepare(item, size=size, max_pixels=MAX_PIXELS).image) for item in data]
        batch = to_float(torch.from_numpy(np.stack(pixels).transpose(0, 3, 1, 2).copy()))
        tokens = self.tokenizer.encode(batch, self._rule(params))
        rows = pd.DataFrame({"num_tokens": tokens.num_tokens})
        if params.get("output", "tokens") == "images":
            rows["image"] = [_base64_png(pixels) for pixels in to_uint8(self.tokenizer.decode(tokens))]
        else:
            rows["token_ids"] = [ids.tolist() for ids in tokens]
        return rows

    def _rule(self, params: dict[str, Any]) -> Any:
        if params.get("num_tokens"):
            return int(params["num_tokens"])
        name = params.get("rule") or next(iter(self.rules), "most")
        if name == "most":
            return self.tokenizer.budgets[-1]
        if name not in self.rules:
            raise ValueError(f"rule = {name!r}: allowed are {[*self.rules, 'most']}")
        return rule_with_head(RuleConfig.model_validate(self.rules[name]), self.heads / name)


def _base64_png(pixels: np.ndarray) -> str:
    return base64.b64encode(encode_png(Image.fromarray(pixels))).decode()


set_model(AlitModel())
