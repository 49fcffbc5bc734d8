"""Measurements of the op against its floor and its peers; `docs/performance.md` says how to run them."""
