"""Tells DeepSpeed which devices it is for; imported before it.

DeepSpeed looks for devices as it is imported, and where it finds none warns on stdout, among what a
program has to say.
"""

from __future__ import annotations

import os

import torch

if not torch.cuda.is_available() or os.environ.get("MEGAEGPT_DEVICE") == "cpu":
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
