"""MegaEGPT: distributed training of GPT models and their long-context descendant EGPT."""

__version__ = "0.1.0"
