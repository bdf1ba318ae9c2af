"""Tokens of several images, each with its own count.

Legend: N images, T tokens in all, D numbers in a continuous token.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import ceil, log2
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import pyarrow as pa


def id_type(codebook_size: int) -> type[np.unsignedinteger[Any]]:
    """The smallest unsigned integer type that holds every code of the codebook."""
    return np.uint8 if codebook_size <= 2**8 else np.uint16 if codebook_size <= 2**16 else np.uint32


def _ids(values: NDArray[Any], codebook_size: int) -> NDArray[Any]:
    """Token ids in their smallest type; raises ValueError when one is outside the codebook."""
    if len(values) and (values.min() < 0 or values.max() >= codebook_size):
        raise ValueError(f"token ids {values.min()} to {values.max()}: allowed is 0 to {codebook_size - 1}")
    return values.astype(id_type(codebook_size), copy=False)


@dataclass(frozen=True)
class TokenBatch:
    """A ragged batch.

    ``values``: the tokens of all images, one image after the other: codebook indices [T] (unsigned integers), or
    latents [T, D] (floats) of a continuous tokenizer. ``num_tokens``: int64 [N], sums to T. ``codebook_size``: None
    when continuous.
    """

    values: NDArray[Any]
    num_tokens: NDArray[np.int64]
    codebook_size: int | None

    def __post_init__(self) -> None:
        if int(self.num_tokens.sum()) != len(self.values):
            raise ValueError(
                f"num_tokens sums to {int(self.num_tokens.sum())}, but there are {len(self.values)} tokens"
            )
        if self.codebook_size is not None and len(self.values) and int(self.values.max()) >= self.codebook_size:
            raise ValueError(f"token id {int(self.values.max())}: the codebook has {self.codebook_size} entries")

    @classmethod
    def from_numpy(cls, images: Sequence[NDArray[Any]], codebook_size: int | None) -> "TokenBatch":
        """From one array of tokens an image: integers [L], or floats [L, D] (float16 stays, else float32).

        Raises ValueError when an id is outside the codebook.
        """
        counts = np.array([len(tokens) for tokens in images], dtype=np.int64)
        if codebook_size is not None:
            values = np.concatenate(images) if len(images) else np.zeros(0, dtype=np.uint8)
            return cls(_ids(values, codebook_size), counts, codebook_size)
        values = np.concatenate(images) if len(images) else np.zeros((0, 0))
        return cls(values.astype(np.float16 if values.dtype == np.float16 else np.float32, copy=False), counts, None)

    def __len__(self) -> int:
        return len(self.num_tokens)

    def __getitem__(self, index: int) -> NDArray[Any]:
        """The tokens of one image: ids [L] or latents [L, D]."""
        ends = np.cumsum(self.num_tokens)
        return self.values[ends[index] - self.num_tokens[index] : ends[index]]

    def __iter__(self) -> Iterator[NDArray[Any]]:
        return iter(np.split(self.values, np.cumsum(self.num_tokens)[:-1])) if len(self) else iter(())

    def to_numpy(self) -> list[NDArray[Any]]:
        """One array of tokens an image."""
        return list(self)

    @property
    def bits(self) -> NDArray[np.int64]:
        """Bits of each image, int64 [N]: ceil(log2(codebook)) a token; continuous: as stored, 16 or 32 a number."""
        if self.codebook_size is None:
            return self.num_tokens * (8 * self.values.dtype.itemsize * self.values.shape[-1])
        return self.num_tokens * ceil(log2(self.codebook_size))

    def half(self) -> "TokenBatch":
        """Continuous latents as float16, as they are stored; ids as they are."""
        values = self.values.astype(np.float16) if self.codebook_size is None else self.values
        return TokenBatch(values, self.num_tokens, self.codebook_size)

    def to_arrow(self) -> "pa.ListArray":
        """A pyarrow list array with one list of tokens an image (latents: flattened, D numbers a token)."""
        import pyarrow as pa

        width = self.values.shape[1] if self.values.ndim > 1 else 1
        offsets = np.concatenate([[0], np.cumsum(self.num_tokens) * width]).astype(np.int32)
        return pa.ListArray.from_arrays(pa.array(offsets), pa.array(self.values.reshape(-1)))

    @classmethod
    def from_arrow(
        cls, array: "pa.ListArray", codebook_size: int | None, latent_dim: int | None = None
    ) -> "TokenBatch":
        """The inverse of :meth:`to_arrow`; ``latent_dim`` is D of a continuous tokenizer (its values are D a token).

        Raises ValueError when an id is outside the codebook, an image's numbers are no multiple of D, or a row is null.
        """
        if array.null_count:
            raise ValueError(f"{array.null_count} rows are null: every image needs its tokens")
        lengths = np.diff(np.asarray(array.offsets)).astype(np.int64)
        values = array.flatten().to_numpy(zero_copy_only=False)
        if codebook_size is not None:
            return cls(_ids(values, codebook_size), lengths, codebook_size)
        width = latent_dim or 1
        if (lengths % width).any():
            raise ValueError(f"latent_dim = {latent_dim}: an image has a number of values that is no multiple of it")
        return cls(values.reshape(-1, width), lengths // width, None)
