"""ingest: the files of a source become an ImageSet; what can't become an image becomes a row of ``rejected``."""

from components.ingest.decode import Work, choose_split, decode_block
from components.ingest.listing import BLOCKS_PER_LISTING, read_block, write_blocks
from components.ingest.stage import ingest

__all__ = ["BLOCKS_PER_LISTING", "Work", "choose_split", "decode_block", "ingest", "read_block", "write_blocks"]
