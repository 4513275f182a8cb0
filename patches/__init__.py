"""Corrections to vLLM that no hook covers. `ledger.py` lists them; `apply_all()` is the one call that applies them."""
