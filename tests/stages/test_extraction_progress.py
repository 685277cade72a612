"""Progress of the extraction moves with every batch and never past what is planned."""

import numpy as np
from test_extractor import LENGTHS, extractor  # noqa: F401 (a fixture)

from pipeline.config.resources import ResourcesSection
from pipeline.run.runner import Unlogged
from pipeline.stages.activations import PlannedShard, ShardProgress
from pipeline.stages.extractor import Extractor
from pipeline.stages.step import StageContext
from pipeline.terminal import Progress, SilentReporter


class Told(SilentReporter):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[int] = []

    def progress(self, progress: Progress) -> None:
        self.seen.append(progress.done)


def test_batches_shards_and_shards_begun_anew_are_counted_once(extractor: Extractor) -> None:  # noqa: F811
    reporter = Told()
    context = StageContext(extractor.storage, ResourcesSection(), reporter, Unlogged(), "run", 10)
    plan = [PlannedShard(name, "train", np.arange(4), number) for name, number in (("a", 100), ("b", 50), ("c", 10))]
    progress = ShardProgress(context, plan, ["c"])
    progress.batch("a", 40)
    progress.batch("b", 30)
    progress.batch("b", 10)  # its worker was lost
    progress.shard("a", "")
    progress.batch("a", 60)  # late news
    progress.batch("b", 70)  # a part of it ran twice
    progress.shard("b", "")
    assert reporter.seen == [10, 50, 80, 60, 120, 160, 160]


def test_every_batch_is_told(extractor: Extractor) -> None:  # noqa: F811
    told: list[int] = []
    extractor(np.array([0, 2, 3]), told.append)
    assert sum(told) == LENGTHS[0] + LENGTHS[2] + LENGTHS[3]
