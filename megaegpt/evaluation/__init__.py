"""Evaluation of trained models: on texts, multiple choice, continuations, and EGPT's history."""
