"""Everything tiny that tests share: models, also in other programs' forms, runs and engines."""
