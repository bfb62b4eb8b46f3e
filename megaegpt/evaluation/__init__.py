"""What trained models are worth: texts, multiple choice, continuations, EGPT's history."""
