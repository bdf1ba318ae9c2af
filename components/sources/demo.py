"""The embedded source: square crops of the real photographs inside the scikit-image and scikit-learn wheels.

No network. Drawings, test patterns and microscope phase images are left out, and so are photographs whose package
states no licence (scikit-image's moon and motorcycle, matplotlib's grace_hopper).
"""

import functools
import importlib.util
import io
import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from components.sources import SourceObject, Targets, listing_digest

if TYPE_CHECKING:
    from PIL import Image

RECIPE = "1"  # raise it when the same settings give other crops
MIN_SIDE = 96  # px
REDUCTION = 4  # the smallest crop's side is the short side divided by this, at least MIN_SIDE
GOLDEN = 0.6180339887498949  # its multiples, modulo 1, cover 0..1 evenly for any number of crops


@dataclass(frozen=True)
class Photograph:
    """A photograph in a wheel; ``split`` is that of all its crops, so what is held out is never seen in training."""

    name: str
    package: str
    file: str
    width: int
    height: int
    split: str
    credit: str  # as its package states it


_SKIMAGE = "skimage"
_SKLEARN = "sklearn"

PHOTOGRAPHS = (
    Photograph(
        "astronaut", _SKIMAGE, "data/astronaut.png", 512, 512, "train",
        "Eileen Collins, NASA Great Images database; no known copyright restrictions, released into the public domain",
    ),
    Photograph(
        "brick", _SKIMAGE, "data/brick.png", 512, 512, "train", "CC0Textures, Bricks25; CC0",
    ),
    Photograph(
        "camera", _SKIMAGE, "data/camera.png", 512, 512, "train", "Lav Varshney; CC0 by the photographer",
    ),
    Photograph(
        "chelsea", _SKIMAGE, "data/chelsea.png", 451, 300, "val", "Stefan van der Walt; CC0 by the photographer",
    ),
    Photograph(
        "china", _SKLEARN, "datasets/images/china.jpg", 640, 427, "train",
        "danielbuechele on flickr, retrieved by Robert Layton; CC BY 2.0, some rights reserved",
    ),
    Photograph(
        "clock", _SKIMAGE, "data/clock_motion.png", 400, 300, "train",
        "Stefan van der Walt; released into the public domain by the photographer",
    ),
    Photograph(
        "coffee", _SKIMAGE, "data/coffee.png", 600, 400, "train",
        "Rachel Michetti, courtesy of Pikolo Espresso Bar; CC0 by the photographer",
    ),
    Photograph(
        "coins", _SKIMAGE, "data/coins.png", 384, 303, "val",
        "Brooklyn Museum Collection, image 51611; no known copyright restrictions",
    ),
    Photograph(
        "flower", _SKLEARN, "datasets/images/flower.jpg", 640, 427, "val",
        "vultilion on flickr (the page linked; the text names danielbuechele), retrieved by Robert Layton; CC BY 2.0",
    ),
    Photograph(
        "grass", _SKIMAGE, "data/grass.png", 512, 512, "train", "linolafett on DeviantArt, Grass 01; CC0",
    ),
    Photograph(
        "gravel", _SKIMAGE, "data/gravel.png", 512, 512, "train", "CC0Textures, Gravel04; CC0",
    ),
    Photograph(
        "hubble_deep_field", _SKIMAGE, "data/hubble_deep_field.jpg", 1000, 872, "train",
        "NASA, HubbleSite (eXtreme Deep Field); may be freely used in the public domain",
    ),
    Photograph(
        "ihc", _SKIMAGE, "data/ihc.png", 512, 512, "train",
        "Center for Microscopy And Molecular Imaging (stained tissue); no known copyright restrictions",
    ),
    Photograph(
        "retina", _SKIMAGE, "data/retina.jpg", 1411, 1411, "train",
        "Mikael Häggström, Wikimedia Commons; CC0 1.0 public domain dedication",
    ),
    Photograph(
        "rocket", _SKIMAGE, "data/rocket.jpg", 640, 427, "val",
        "SpaceX Photos, launch of DSCOVR on Falcon 9; released in the public domain",
    ),
)  # fmt: skip

_BY_NAME = {photograph.name: photograph for photograph in PHOTOGRAPHS}


@dataclass(frozen=True)
class DemoSource:
    """``crops`` crops, about as many of each photograph; a larger number only adds to those of a smaller one."""

    crops: int
    limit: int | None = None

    def list(self) -> Iterator[SourceObject]:
        """The crops, sorted by path; raises ValueError when a wheel lacks its photograph."""
        return islice(self._all(), self.limit)

    def digest(self, listed: str = "") -> str:
        """sha256 over the listing: the recipe, the wheels' file sizes and every crop's place; nothing is decoded."""
        return listed or listing_digest(self.list())

    def read(self, path: str, etag: str = "") -> bytes:
        """The crop as PNG, at its own size and in the photograph's own mode (RGB or grey)."""
        name, index = path.removesuffix(".png").split("/")
        photograph = _BY_NAME[name]
        left, top, side = _box(photograph, int(index))
        crop = _load(photograph).crop((left, top, left + side, top + side))
        buffer = io.BytesIO()
        crop.save(buffer, "PNG", compress_level=1)
        return buffer.getvalue()

    def uri(self, path: str) -> str:
        """``demo://astronaut/0007.png``: nothing that a file system or a browser opens."""
        return f"demo://{path}"

    def _all(self) -> Iterator[SourceObject]:
        each, more = divmod(self.crops, len(PHOTOGRAPHS))
        for place, photograph in enumerate(PHOTOGRAPHS):
            size = _file(photograph).stat().st_size
            names = {f"{index:04d}": index for index in range(each + (place < more))}
            targets = Targets(label=photograph.name, split=photograph.split)
            for name in sorted(names):
                box = "-".join(map(str, _box(photograph, names[name])))
                yield SourceObject(f"{photograph.name}/{name}.png", size, f"{RECIPE}-{box}", targets)


def _box(photograph: Photograph, index: int) -> tuple[int, int, int]:
    """Left, top and side in px of a photograph's crop: the whole short side first, then evenly over the scales."""
    short = min(photograph.width, photograph.height)
    side = max(MIN_SIDE, round(short * REDUCTION ** -(index * GOLDEN % 1)))
    place = random.Random(f"{RECIPE}/{photograph.name}/{index}")  # a seed of text does not depend on the process
    return place.randint(0, photograph.width - side), place.randint(0, photograph.height - side), side


def _file(photograph: Photograph) -> Path:
    """The photograph's file, found without importing its package; raises ValueError when it isn't there."""
    spec = importlib.util.find_spec(photograph.package)
    file = Path(spec.origin).parent / photograph.file if spec and spec.origin else None
    if file is None or not file.is_file():
        missing = f"{photograph.file} of the package {photograph.package} is not installed"
        raise ValueError(f"data.source 'demo': {missing}; install this project's dependencies, or use a folder")
    return file


@functools.lru_cache(maxsize=2)  # crops are listed photograph by photograph
def _load(photograph: Photograph) -> "Image.Image":
    from PIL import Image

    with Image.open(_file(photograph)) as image:
        image.load()
    if image.size != (photograph.width, photograph.height):
        expected = f"{photograph.width} x {photograph.height}"
        raise ValueError(f"data.source 'demo': {photograph.file} has {image.size} px, this release expects {expected}")
    return image
