"""The pages that are drawn from the code: one module for each kind, `page` is its text. `docs/build.py` writes them."""
