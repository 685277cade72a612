"""The driver's cost of one item of a worker pool: its processor time per result, with workers that do nothing.

Run from the repository's root: `python -m workloads.benchmarks.driver_items`. A shard of a store is such an item, so
the figure limits how many shards one driver can handle (infra/SCALING.md). Half a minute on two cores.
"""

import tempfile
import time
from pathlib import Path

from pipeline.cluster.connect import connected
from pipeline.cluster.pools import Pool, run_pool
from pipeline.config.resources import ClusterSection, WorkersSection

_NUM_ITEMS = (20, 420, 1220)


class Nothing:
    """A worker whose results have the size of a shard's description."""

    def __call__(self, item: dict[str, int]) -> dict[str, object]:
        """About 300 bytes."""
        return {"number": item["number"], "sha256": "0" * 256, "moments": [0.0] * 4}


def main() -> None:
    """One line per number of items; the differences between lines are free of start-up."""
    with tempfile.TemporaryDirectory() as folder, connected(ClusterSection(), Path(folder) / "ray.log"):
        for num_items in _NUM_ITEMS:
            pool = Pool("extraction", WorkersSection(workers=2), Nothing, (), uses_actors=True)
            wall, processor = time.monotonic(), time.process_time()
            received = sum(1 for _ in run_pool(pool, [{"number": number} for number in range(num_items)]))
            wall, processor = time.monotonic() - wall, time.process_time() - processor
            print(f"{received:>6} items  driver {processor:.2f} s of processor time  {wall:.1f} s in all")


if __name__ == "__main__":
    main()
