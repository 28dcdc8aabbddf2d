"""The report: one self-contained HTML page that holds a whole study, made from saved results and caches alone.

``collect`` gathers, ``choice`` ranks by validation and compares on the test set, ``numbers`` counts, ``words`` tells,
``charts``, ``embedding`` and ``attention`` draw, ``provenance`` says how to make it again, ``page`` puts it together.
"""
