"""Audits: running detectors, proving their shortcuts on held-out examples, and judging how abnormal these are."""
