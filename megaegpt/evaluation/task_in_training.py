"""A task that is scored while a model is trained on other data."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from megaegpt.errors import DataError
from megaegpt.evaluation.scorer import Scorer
from megaegpt.evaluation.tasks import TaskResult, read_task
from megaegpt.parallel.grid import ProcessGrid
from megaegpt.parallel.together import broadcast_object, raising_together


class TaskInTraining:
    """Scores a model in training on a file of LAMBADA's or HellaSwag's form, which rank 0 reads
    once. Collective over all ranks.

    Args:
        name: of the task, for messages.
        path: its file.
        model: that is trained.
        scorer: of the model.
        grid: its place.

    Raises:
        DataError: the file cannot be read, or the model cannot be asked what is in it.
    """

    def __init__(
        self, name: str, path: Path, model: nn.Module, scorer: Scorer, grid: ProcessGrid
    ) -> None:
        self._model, self._scorer = model, scorer
        self._task = broadcast_object(lambda: read_task(path), grid)
        with raising_together(grid):
            try:
                scorer.check(self._task.pairs(scorer, self._task.examples))
            except DataError as error:
                raise DataError(f"the task {name} ({path}): {error}") from None

    def evaluate(self, why_end: Callable[[], str | None] = lambda: None) -> TaskResult:
        """Collective over all ranks. The model is left in the mode it was in.

        Compiled blocks run uncompiled: every length of a batch would be compiled anew.

        Args:
            why_end: as that of :meth:`~megaegpt.evaluation.text_loss.Evaluator.evaluate`.

        Raises:
            AbandonedEvaluationError: ``why_end`` gave a reason.
        """
        was_training = self._model.training
        self._model.eval()
        try:
            with torch.compiler.set_stance("force_eager"):
                scorer = self._scorer.unless(why_end)
                return self._task.score(scorer, self._task.examples, None)
        finally:
            self._model.train(was_training)
