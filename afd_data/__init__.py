"""Prompts -> teacher -> journal + spool -> sealed shards -> stream.

Makes and reads teacher datasets; never imports `afd_train`.  Importing this package imports neither torch nor datasets.
"""
