"""Parts of the example ``pretrain_gpt.py``: text, runs, FLOPs, figures. None of it is needed to use mst_compile."""
