"""What `crossray plan` prints: every step with its state and drift, what to know before, and the cost."""

from pipeline.config.run_file import RunConfig
from pipeline.planning.estimate import estimate_text
from pipeline.run.runner import inspect, notes
from pipeline.storage.filesystem import Storage


def plan_text(config: RunConfig, *, gpu: str) -> str:
    """The plan of a run on its storage root, which is only read; gpu is assumed for stages that ask for one."""
    storage = Storage(config.storage.root)
    states = inspect(config, storage)
    width = max(len(state.step.name) for state in states)
    lines = [f"{config.name}: {len(states)} steps on {storage.root}"]
    for state in states:
        lines.append(f"  {state.state:<8}{state.step.name:<{width}}  {state.step.key.folder}")
        lines += [f"  {'':<8}{'':<{width}}    {line}" for line in state.drift]
    return "\n".join([*lines, *notes(config, storage), estimate_text(config, states, storage, gpu=gpu)])
