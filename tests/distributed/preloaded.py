"""What forked ranks have imported already."""

import megaegpt.generation.generator
import megaegpt.training.pretraining
import megaegpt.training.processes

__all__ = ["megaegpt"]
