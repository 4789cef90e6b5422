"""Parts of the example ``quality_study.py``: text, model, runs, figures. None of it is needed to use mst_compile."""
