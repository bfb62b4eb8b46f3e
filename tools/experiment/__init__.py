"""The experiment that asks whether EGPT uses its context: data, runs, measurements, report."""
