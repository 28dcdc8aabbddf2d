"""The report: one self-contained HTML page of a whole study, made from saved results and caches alone."""
