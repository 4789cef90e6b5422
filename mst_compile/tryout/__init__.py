"""``python -m mst_compile try``: a small GPT on a text of the user, sparse and dense, in a few minutes."""
