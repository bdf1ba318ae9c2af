"""grids: what the trained base makes of every image, kept for a distill stage that doesn't augment its images.

Worth it where the base takes more of a step than reading takes: a grid is 262 kB an image at 256 px, in float32.

Legend: B batch, E channels of the grid, h w its rows and columns.
"""

from functools import partial

import numpy as np
import pyarrow as pa

from components.artifacts import BaseTokenizer, Figures, GridSet, ImageSet, Job
from components.config import InferenceResources, NoConfig
from components.images import stack, to_float
from components.mapping import Mapping, Totals, map_parts
from components.parts import earlier_by, plan_parts
from components.store import join, local_folder, write_json

MAKER = "base.json"  # the digest of the base that made the grids
KEYS = ("image_id", "split", "image")  # of the table, as the images have them


def make_grids(
    job: Job, *, config: NoConfig, resources: InferenceResources, images: ImageSet, base: BaseTokenizer
) -> Figures:
    """Write a GridSet; grids that an earlier one of the same base has are taken over.

    Figures are of all images, but for ``encoded``: images that went through the base in this run.
    """
    target, digest = join(job.output, "table"), base.digest()
    mapping = Mapping(
        sources=[images.table_uri],
        target=target,
        build=partial(_Maker, base.uri),
        resources=resources,
        columns=[list(KEYS)],
    )
    earlier = earlier_by(job, config, maker=MAKER, digest=digest, column=GridSet.column)
    plan = plan_parts(images.table_uri, [GridSet.column], earlier, keys=KEYS)
    totals = map_parts(plan, lambda _: mapping, target=target, progress=job.progress)
    write_json(join(job.output, MAKER), digest)
    return {"images": int(totals["rows"]), "encoded": int(totals["made"])}


class _Maker:
    """Runs the base's encoder over batches of PNGs."""

    def __init__(self, base_uri: str) -> None:
        import torch

        from model.base.files import load_base
        from model.memory import keep_freed_memory

        keep_freed_memory()
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        with local_folder(base_uri) as folder:
            self._base = load_base(folder).eval().to(self._device, memory_format=torch.channels_last)

    def __call__(self, table: pa.Table) -> tuple[pa.Table, Totals]:
        grids = self._grids(stack(table["image"].to_pylist()))
        column = pa.FixedSizeListArray.from_arrays(pa.array(grids.reshape(-1)), grids.shape[1])
        return pa.table({**{name: table[name] for name in KEYS}, GridSet.column: column}), {"rows": len(grids)}

    def _grids(self, images: np.ndarray) -> np.ndarray:
        """uint8 [B, 3, H, W] to float32 [B, E * h * w]; on a CPU one image at a time, as convolutions round there."""
        import torch

        with torch.inference_mode():
            pixels = to_float(torch.from_numpy(images).to(self._device))
            parts = pixels.split(1 if self._device == "cpu" else len(pixels))
            features = [self._base.encode(part).features_BEhw.float().cpu().contiguous() for part in parts]
        return torch.cat(features).flatten(1).numpy()
