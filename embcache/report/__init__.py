"""The report: one self-contained HTML page that holds a whole study, made from saved results and caches alone.

``collect`` gathers, ``choice`` ranks by validation and compares on the test set, ``words`` tells, ``sections`` lays a
task out with ``numbers``, ``decide`` and ``beside``, ``cohort`` counts who is in it, ``warn`` says what must be known
and hides names, ``checklist`` answers, ``charts``, ``embedding`` and ``attention`` draw, ``provenance`` says how to
make it again, ``page`` puts it together.
"""
