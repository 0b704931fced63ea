"""Which method, with which settings? Rules as data, each with the measurements that carry it, and what applies them."""
