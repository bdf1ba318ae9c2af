"""Tasks: what each measures of a reconstruction. They compute; who decodes and asks judges is score."""
