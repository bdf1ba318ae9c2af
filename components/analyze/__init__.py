"""analyze: where a tokenizer spends its tokens and why; the paper's claims, measured (arXiv 2411.02393)."""
