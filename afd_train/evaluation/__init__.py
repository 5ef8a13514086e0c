"""Measuring videos: physics of the playground, motion and quality of any clip, statistics and the report.

A metric is a pure function of pixels (and the prompt); its definition stands in a `METRICS` table beside it.
"""
