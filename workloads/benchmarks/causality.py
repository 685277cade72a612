"""The cost of the causality analysis, compared with the model halves that it must run.

    python -m workloads.benchmarks.causality                                   # the demo pair's size
    python -m workloads.benchmarks.causality --dim 512 --layers 8 --vocab 32768 --latents 16384 --k 64 --dialogues 16

The reference runs the same padded batches without the analysis: both lower halves once, and the chat model's upper
half (without its head) once per distinct edit. The analysis adds encoding, editing the stream, the head at the
predicting positions and the KL. A second reference adds the bare logits at those positions, which any KL needs.
References and analysis alternate in one process with one thread, so their ratio comes from one run. Weights are
random, because the cost does not depend on what a model knows. Readings with machine and date are kept in
causality_notes.md.
"""

import argparse
import platform
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from transformers import AutoModelForCausalLM, Gemma2Config

from pipeline.analyses.causality import Causality, causality_batches, without_name
from pipeline.analyses.interventions import Baselines, plan_curve, plan_interventions
from pipeline.analyses.latent_sets import causality_latents
from pipeline.extraction.activations import RowOptions, plan_batches
from pipeline.models.decoder import SplitDecoder
from pipeline.models.padding import pad_tokens
from pipeline.models.pair import ModelPair
from pipeline.numerics.crosscoder import Crosscoder
from pipeline.schema import BASE, CHAT, Flag, Ownership

PARTS = ("lower", "encode", "edit", "upper", "head")
"""Parts that are timed separately. The rest is the KL and bookkeeping."""


class Case(NamedTuple):
    """One size."""

    dim: int = 96
    layers: int = 5
    layer: int = 2
    vocab: int = 254
    latents: int = 1024
    k: int = 16
    chosen: int = 64
    """Latents in the candidate set. They set the number of points of the curve."""
    dialogues: int = 64
    tokens: int = 96
    """Mean length of a dialogue."""
    tokens_per_batch: int = 4096
    repeats: int = 3


class Reading(NamedTuple):
    """Seconds, medians over the repeats."""

    halves: float
    """Two lower halves and one upper half per edit."""
    logits: float
    """The bare logits of every edit at the predicting positions."""
    analysis: float
    parts: dict[str, float]
    num_edits: int

    @property
    def ratio(self) -> float:
        """Time of the analysis over that of the halves."""
        return self.analysis / self.halves

    @property
    def ratio_with_logits(self) -> float:
        """Time of the analysis over that of halves and logits."""
        return self.analysis / (self.halves + self.logits)


def make_pair(case: Case) -> ModelPair:
    """Two random Gemma-2 models; the second is the first with a little noise."""
    config = Gemma2Config(
        hidden_size=case.dim,
        intermediate_size=case.dim * 8 // 3,
        num_hidden_layers=case.layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=case.dim // 4,
        vocab_size=case.vocab,
        pad_token_id=None,
    )
    decoders = []
    for seed in range(2):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        torch.manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.02 * seed)
        decoders.append(SplitDecoder(model.requires_grad_(False), case.layer))
    base, chat = decoders
    return ModelPair(base, chat, None)


def make_dialogues(case: Case) -> dict[str, list[Any]]:
    """Token rows in which the second half of every dialogue is the assistant's."""
    generator = np.random.default_rng(0)
    lengths = generator.integers(case.tokens // 2, case.tokens * 3 // 2, case.dialogues)
    flags = [np.where(np.arange(n) < n // 2, int(Flag.USER), int(Flag.ASSISTANT)).astype(np.int32) for n in lengths]
    ids = [generator.integers(0, case.vocab, n).astype(np.int32) for n in lengths]
    return {"doc_id": list(range(case.dialogues)), "input_ids": ids, "flags": flags}


def make_analysis(case: Case, pair: ModelPair, dialogues: dict[str, list[Any]]) -> Causality:
    """Every intervention, halves of each ranking, two random halves, a curve by evidence and one in random order."""
    crosscoder = Crosscoder(case.latents, 2, case.dim, activation="batch_topk", k=case.k)
    latent = np.arange(case.latents)
    table = pd.DataFrame(
        {
            "latent": latent,
            "ownership": np.where(latent < case.chosen, Ownership.CHAT_ONLY, Ownership.SHARED),
            "delta_norm": 1 - latent / case.latents,
            "nu_act": 1.0,
            "decoder_norm_base": 1.0,
            "frequency": 0.1,
            "nu_eps": latent / case.latents,
            "nu_r": latent[::-1] / case.latents,
        }
    )
    with torch.no_grad():
        crosscoder.W_dec_FMD.normal_().div_(case.dim**0.5)
        crosscoder.W_enc_FMD.normal_().div_(case.dim**0.5)
        x_BMD = pair.activations(*pad_tokens(dialogues["input_ids"][:8])).flatten(0, 1).float()
        score_BF = torch.einsum("BMD,FMD->BF", x_BMD, crosscoder.W_enc_FMD)
        crosscoder.threshold.fill_(float(score_BF.quantile(1 - case.k / case.latents)) if score_BF.numel() < 1e7 else 2)
    chosen = causality_latents(table)
    return Causality(crosscoder, (*plan_interventions(chosen, baselines=baselines_of(case)), *plan_curve(chosen)))


def baselines_of(case: Case) -> Baselines:
    """All baselines, along random directions."""
    return Baselines(torch.randn(case.dim), torch.linalg.qr(torch.randn(case.dim, 4))[0].T, num_first=5)


def read(case: Case) -> Reading:
    """References and analysis in turn, `repeats` times."""
    pair, dialogues = make_pair(case), make_dialogues(case)
    analysis = make_analysis(case, pair, dialogues)
    edits = {without_name(i) for i in analysis.interventions if i.latents or i.kind not in ("replace", "add")}
    num_edits = len(edits)  # `base` is one run of an upper half like the others
    baselines = baselines_of(case)
    parts: dict[str, float] = defaultdict(float)

    def measured() -> None:
        sums = analysis.start()
        for batch in causality_batches(pair, dialogues, RowOptions(case.tokens_per_batch), baselines):
            analysis.update(sums, batch)

    halves, logits, whole = [], [], []
    for _ in range(case.repeats):
        halves.append(_seconds(lambda: _halves(case, pair, dialogues, num_edits)))
        logits.append(_seconds(lambda: _logits(case, pair, dialogues, num_edits)))
        whole.append(_seconds(measured))
    with _timed(parts, pair, analysis):
        measured()
    return Reading(
        halves=statistics.median(halves),
        logits=statistics.median(logits),
        analysis=statistics.median(whole),
        parts=dict(parts),
        num_edits=num_edits,
    )


def _halves(case: Case, pair: ModelPair, dialogues: dict[str, list[Any]], num_edits: int) -> None:
    for ids, _ in _batches(case, dialogues):
        padded = pad_tokens(ids)
        for model in (BASE, CHAT):
            h_BTD = pair.lower(model, padded.ids_BT, padded.mask_BT)
        for _ in range(num_edits):
            pair.upper(CHAT, h_BTD, padded.mask_BT)


def _logits(case: Case, pair: ModelPair, dialogues: dict[str, list[Any]], num_edits: int) -> None:
    for _, flags in _batches(case, dialogues):
        hidden_PD = torch.randn(sum(int((row == int(Flag.ASSISTANT)).sum()) for row in flags), case.dim)
        for _ in range(num_edits):
            for here in pair.decoders[CHAT].head_chunks(len(hidden_PD)):
                pair.head(CHAT, hidden_PD[here])


def _batches(case: Case, dialogues: dict[str, list[Any]]) -> Sequence[tuple[list[Any], list[Any]]]:
    plan = plan_batches([len(row) for row in dialogues["input_ids"]], case.tokens_per_batch)
    return [tuple([dialogues[name][i] for i in batch] for name in ("input_ids", "flags")) for batch in plan.batches]  # type: ignore[misc]


def _seconds(work: Callable[[], None]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


class _timed:  # noqa: N801 (used as a function)
    """Sums the processor time of the named parts during the block."""

    def __init__(self, parts: dict[str, float], pair: ModelPair, analysis: Causality) -> None:
        editor = analysis._editor
        self.parts = parts
        self.places: list[tuple[Any, str, str]] = [
            (pair, "activations", "lower"),
            (pair, "upper", "upper"),
            (pair, "head", "head"),
        ]
        self.places += [(editor, "edited_stream", "edit"), (editor.crosscoder, "encode", "encode")]

    def __enter__(self) -> None:
        for owner, name, part in self.places:
            object.__setattr__(owner, name, self._timed_call(getattr(owner, name), part))

    def __exit__(self, *_: object) -> None:
        for owner, name, _part in self.places:
            object.__delattr__(owner, name)

    def _timed_call(self, function: Callable[..., Any], part: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            start = time.process_time()
            result = function(*args, **kwargs)
            self.parts[part] += time.process_time() - start
            return result

        return call


def print_reading(case: Case, reading: Reading) -> None:
    """Print the ratios, and where the analysis spends its time."""
    print(f"{platform.machine()}, torch {torch.__version__}, one thread, processor time; {case}")
    print(f"distinct edits                     {reading.num_edits}")
    print(f"halves alone                       {reading.halves:.2f} s")
    print(f"bare logits                        {reading.logits:.2f} s")
    print(f"analysis                           {reading.analysis:.2f} s")
    print(f"analysis / halves                  {reading.ratio:.2f}")
    print(f"analysis / (halves + bare logits)  {reading.ratio_with_logits:.2f}")
    for part in PARTS:
        print(f"  {part:<8} {reading.parts[part]:6.2f} s  {reading.parts[part] / reading.analysis:4.0%}")
    rest = reading.analysis - sum(reading.parts[part] for part in PARTS)
    print(f"  rest     {rest:6.2f} s  {rest / reading.analysis:4.0%}")


def main() -> None:
    """Measure the case of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in Case()._asdict().items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default)
    case = Case(**vars(parser.parse_args()))
    torch.set_num_threads(1)
    print_reading(case, read(case))


if __name__ == "__main__":
    main()
