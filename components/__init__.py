"""The stages: one file, one job; artifacts in, an artifact out."""
