"""The report: one self-contained HTML page of a whole study, made from saved results and caches alone.

``page`` renders what the other modules give: ``collect`` (results, and what may be shown), ``sections`` (a task),
``beside`` (the paper), ``cohort`` and ``checklist`` (who is in the study), ``embedding`` (map, thumbnails, attention),
``provenance`` (how to make it again).
"""
