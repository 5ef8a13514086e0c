"""Stream -> rollout -> discriminator -> advantage -> student -> checkpoint -> report.

Takes batches of teacher videos and makes causal students.  Importing this package does not import torch.
"""
