"""Extensions from outside the package: each is one registered class, named in a configuration.

A toy optimizer, attention backend, metric writer and data source train a tiny model together.
"""

SEEN: dict[str, list] = {}
