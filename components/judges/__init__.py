"""Judges: models that say a task's answer for an image. One file a kind, behind the interface in judge.py."""
