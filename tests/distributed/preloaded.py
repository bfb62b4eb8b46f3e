"""What forked ranks have imported already."""

import megaegpt.generation.generator
import megaegpt.parallel.launch
import megaegpt.training.pretraining

__all__ = ["megaegpt"]
