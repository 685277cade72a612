"""The model card of a run's crosscoder: what it is of, how good it is, what the verdict says, how it is loaded.

Every number is one of the run's records and tables. Names of the run are written as text, whatever they hold; a model
of this machine is named by its folder alone.
"""

from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

from pipeline.exports.markdown import front_matter, plain, table
from pipeline.library.crosscoder import Crosscoder
from pipeline.library.runs import Run
from pipeline.library.summary import CrosscoderSummary, strongest_token
from pipeline.report import formatting as fmt
from pipeline.schema import MODEL_NAMES, Verdict

NUM_LATENTS = 10
"""Latents in the table of the strongest ones."""
_TAGS = ["crosscoder", "model-diffing", "sparse-autoencoder", "interpretability"]
_MEANINGS = {
    Verdict.CHAT_SPECIFIC: "the base model does not hold it",
    Verdict.STRONGER: "both models hold it, the base model less of it",
    Verdict.ROTATED: "both models hold it, in different directions",
    Verdict.SHRINKAGE: "looks new by decoder norms alone; the base model has it",
    Verdict.DECOUPLING: "looks new by decoder norms alone; other latents carry it in the base model",
    Verdict.BOTH: "looks new by decoder norms alone, for both reasons",
    Verdict.UNDECIDED: "the rows do not decide",
    Verdict.WITHHELD: "not called, because the models cannot be told apart",
    Verdict.BASE_ONLY: "the chat model does not hold it",
    Verdict.SHARED: "both models hold it",
    Verdict.OTHER: "between the classes",
    Verdict.DEAD: "never fires",
}


def model_card(run: Run, name: str, crosscoder: Crosscoder, *, source: str = "FOLDER") -> str:
    """README.md of a folder or repository that holds one crosscoder.

    Args:
        run: the finished run.
        name: of its crosscoder.
        crosscoder: read from the run.
        source: what from_pretrained is given: a hub id, or a folder.
    """
    summary = run.crosscoder_summary(name, num_latents=NUM_LATENTS)
    base, chat = models_of(run)
    parts = [
        front_matter(_front(run)),
        f"# Crosscoder {plain(name)} of {plain(base)} and {plain(chat)}\n",
        f"One dictionary of {summary.num_latents:,} latents for the residual streams of a base model and its "
        f"fine-tuned version after layer {run.origin.layer} (counted from 0), fitted and judged by crossray "
        f"{version('crossray')} in the run {plain(run.name)}.\n",
        _facts(run, name, crosscoder, summary),
        _verdicts(run, summary),
        _strongest(summary),
        _loading(run, source),
    ]
    return "\n".join(part for part in parts if part)


def models_of(run: Run) -> tuple[str, str]:
    """The base and the chat model as others may read them: hub ids as they are, of a local path its last part."""
    base, chat = run.labels
    return _shown(base), _shown(chat)


def _shown(label: str) -> str:
    return " + ".join(_last(part) for part in label.split(" + ")) or "a model that the run does not name"


def _last(part: str) -> str:
    is_path = part.startswith(("/", ".", "~")) or part.count("/") > 1 or "\\" in part
    return part.replace("\\", "/").rstrip("/").rpartition("/")[2] if is_path else part


def _front(run: Run) -> dict[str, Any]:
    models = [model.name for model in (run.origin.base, run.origin.chat) if model.name]
    texts = [source["dataset"] for source in _sources(run) if source.get("dataset")]
    known = {name: own for name, own in (("base_model", models), ("datasets", texts)) if own}
    return {"library_name": "crossray", "tags": _TAGS, **known}


def _facts(run: Run, name: str, crosscoder: Crosscoder, summary: CrosscoderSummary) -> str:
    settings, fidelity = run.settings(), summary.fidelity
    base, chat = models_of(run)
    rows = [
        ("base model", plain(base)),
        ("chat model", plain(chat)),
        ("layer", str(run.origin.layer)),
        ("corpus", ", ".join(plain(own.get("dataset") or own["name"]) for own in _sources(run)) or fmt.DASH),
        (
            "latents, models, width",
            f"{crosscoder.num_latents:,}, {crosscoder.num_models}, {crosscoder.activation_dim:,}",
        ),
        ("sparsity", _sparsity(settings.get(f"crosscoder {name}", {}), crosscoder)),
        ("normalisation", _normalisation(crosscoder)),
        ("L0 (mean active latents per row)", fmt.decimal(fidelity["l0"], 1)),
        ("FVE base, chat", f"{fmt.decimal(fidelity['fve_base'])}, {fmt.decimal(fidelity['fve_chat'])}"),
        ("validation rows", fmt.count(fidelity["num_rows"])),
    ]
    return table(["", ""], rows)


def _sources(run: Run) -> list[Mapping[str, Any]]:
    return list(run.settings().get("corpus", {}).get("sources", []))


def _sparsity(section: Mapping[str, Any], crosscoder: Crosscoder) -> str:
    sparsity = section.get("sparsity")
    if not isinstance(sparsity, Mapping):
        return plain(crosscoder.activation)
    kept = ", ".join(f"{key} {fmt.setting(sparsity[key])}" for key in ("k", "mu") if sparsity.get(key) is not None)
    return plain(f"{sparsity['kind']} ({kept})" if kept else sparsity["kind"])


def _normalisation(crosscoder: Crosscoder) -> str:
    if not crosscoder.is_normalised:
        return "none: activations enter as they are"
    scales = zip(MODEL_NAMES, crosscoder.scale_M.tolist(), strict=False)
    factors = ", ".join(f"{model} {fmt.significant(scale)}" for model, scale in scales)
    return (
        f"each model's mean is subtracted and its rows are scaled ({factors}); stored in the weights' file and undone"
    )


def _verdicts(run: Run, summary: CrosscoderSummary) -> str:
    counts = {verdict: number for verdict, number in summary.verdicts.items() if number}
    rows = [[verdict, f"{number:,}", _MEANINGS[verdict]] for verdict, number in counts.items()]
    lines = ["## Verdict\n"]
    if run.is_distinguishable is False:
        lines.append("**The two models cannot be told apart**, so no latent is called new.\n")
    lines.append(table(["verdict", "latents", "meaning"], rows))
    if summary.num_confident:
        lines.append(
            f"{summary.num_confident:,} of the chat-specific latents are so at the run's false discovery rate.\n"
        )
    return "\n".join(lines)


def _strongest(summary: CrosscoderSummary) -> str:
    if not summary.latents:
        return ""
    rows = [
        [
            str(one.latent),
            one.verdict + (" (confident)" if one.is_confident else ""),
            *(fmt.decimal(one.numbers[column], 2) for column in ("delta_norm", "nu_eps", "nu_r")),
            fmt.percent(one.numbers["frequency"]),
            f'"{plain(strongest_token(one))}"',
        ]
        for one in summary.latents
    ]
    header = ["latent", "verdict", "Delta_norm", "nu_eps", "nu_r", "fires on", "strongest at"]
    return f"## Strongest latents\n\n{table(header, rows)}"


def _loading(run: Run, source: str) -> str:
    names, where = [model.name for model in (run.origin.base, run.origin.chat)], ""
    if not all(names):
        names, where = ["BASE", "CHAT"], "  # folders or hub ids of the two models above"
    return f"""## Loading

```python
import crossray

crosscoder = crossray.Crosscoder.from_pretrained({source!r})
pair = crossray.load_pair({names[0]!r}, {names[1]!r}, layer={run.origin.layer}){where}
rows = pair.activations(["A text."])
codes = crosscoder.encode(rows.x.float())  # raw activations in; codes.to_dense() is [rows, latents]
reconstruction = crosscoder.decode(codes)  # [rows, models, width], base first
```

`model.safetensors` and `config.json` are the published layout of crosscoders. A verdict holds for this pair, this layer
and this corpus.
"""
