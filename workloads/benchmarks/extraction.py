"""Time to extract the rows of both models, compared with a bare loop over perfect batches and a padded loop.

    python -m workloads.benchmarks.extraction
    python -m workloads.benchmarks.extraction --device cuda --dtype bfloat16 --dim 2304 --layers 26 --layer 13 \
        --vocab 256000 --documents 4000 --tokens-per-batch 32768

The contenders take turns in one process, so a change of the machine's speed affects all of them:

- `ours` is the extraction of both models, with rows gathered and stored as bfloat16.
- `perfect` runs the same layers on batches of as many tokens without padding: all documents of a batch have one length.
  It keeps nothing.
- `padded` is the usual loop: batches in the order of the documents, padded to the longest, and full forwards with all
  hidden states. It is slow, so it reads the first documents only, and its time is scaled by tokens.

Then a model and its LoRA adapter: on one copy of the weights, with the layers below the first adapted one run once
(`prefix`); on one copy without that (`one copy`); as two models with the adapter merged (`two copies`).

Documents have lognormal lengths (median 150, at most 1024). Ratios are medians over repeats of neighbouring readings.
Readings with machine and date are kept in extraction_notes.md.
"""

import argparse
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import peft
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, Gemma2Config

from pipeline.extraction.activations import ActivationRows, ExtractRows, RowOptions, plan_batches
from pipeline.models.adapters import AdapterSwitch
from pipeline.models.decoder import SplitDecoder
from pipeline.models.pair import ModelPair
from pipeline.models.shared_layers import count_unadapted_layers
from pipeline.schema import MODEL_NAMES

MEDIAN_LENGTH, LENGTH_SIGMA, MAX_LENGTH = 150, 0.95, 1024
PADDED_BATCH = 16
LORA_RANK = 16
MIB = 1 << 20


class Case(NamedTuple):
    """One size on one device."""

    device: str
    dtype: str
    dim: int
    layers: int
    layer: int
    vocab: int
    documents: int
    tokens_per_batch: int
    repeats: int
    padded_repeats: int
    padded_documents: int
    parts: str
    threads: int


def build_model(case: Case, seed: int) -> Any:
    """A whole Gemma-2 model with random weights."""
    config = Gemma2Config(
        hidden_size=case.dim,
        intermediate_size=4 * case.dim,
        num_hidden_layers=case.layers,
        num_attention_heads=max(1, case.dim // 64),
        num_key_value_heads=max(1, case.dim // 128),
        head_dim=64,
        vocab_size=case.vocab,
        max_position_embeddings=MAX_LENGTH,
    )
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, case.dtype))
    return model.to(case.device).requires_grad_(False)


def build_pair(case: Case) -> ModelPair:
    """Two models that share no layer."""
    decoders = [SplitDecoder(build_model(case, seed), case.layer) for seed in range(len(MODEL_NAMES))]
    return ModelPair(decoders[0], decoders[1], None)


def build_lora_pairs(case: Case) -> dict[str, ModelPair]:
    """The three contenders: one model, and its adapter in all layers except the first half of those up to L."""
    first = (case.layer + 1) // 2
    config = peft.LoraConfig(
        r=LORA_RANK,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
        layers_to_transform=list(range(first, case.layers)),
        task_type="CAUSAL_LM",
        init_lora_weights=False,
    )
    torch.manual_seed(0)
    adapted = peft.get_peft_model(build_model(case, 0), config).eval().requires_grad_(False)
    switch, model = AdapterSwitch(adapted), adapted.get_base_model()
    base = SplitDecoder(model, case.layer, select=switch.turn_off)
    chat = SplitDecoder(model, case.layer, select=switch.turn_on)
    torch.manual_seed(0)
    merged = peft.get_peft_model(build_model(case, 0), config).merge_and_unload().requires_grad_(False)
    plain = SplitDecoder(build_model(case, 0), case.layer)
    return {
        "prefix": ModelPair(base, chat, None, num_shared_layers=count_unadapted_layers(chat)),
        "one copy": ModelPair(base, chat, None),
        "two copies": ModelPair(plain, SplitDecoder(merged, case.layer), None),
    }


def weight_bytes(pair: ModelPair) -> int:
    """Bytes of both models' tensors, each counted once."""
    tensors = {t.data_ptr(): t.nbytes for decoder in pair.decoders for t in decoder.whole.state_dict().values()}
    return sum(tensors.values())


def build_documents(case: Case) -> dict[str, list[Any]]:
    """Token rows of random ids."""
    generator = np.random.default_rng(0)
    lengths = generator.lognormal(np.log(MEDIAN_LENGTH), LENGTH_SIGMA, case.documents)
    lengths = np.clip(lengths, 4, MAX_LENGTH).astype(int)
    return {
        "doc_id": list(range(case.documents)),
        "input_ids": [generator.integers(0, case.vocab, length, dtype=np.int32) for length in lengths],
        "flags": [np.zeros(length, np.int32) for length in lengths],
    }


def perfect_batches(lengths: Sequence[int], tokens_per_batch: int) -> list[tuple[int, int]]:
    """(documents, tokens of each) of our batches, if every document had the mean length of its batch."""
    plan = plan_batches(lengths, tokens_per_batch)
    means = [(len(batch), sum(lengths[i] for i in batch) / len(batch)) for batch in plan.batches]
    shapes = [(count, max(1, round(mean))) for count, mean in means]
    missing = sum(lengths) - sum(count * length for count, length in shapes)
    return [*shapes, (1, missing)] if missing > 0 else shapes


def run_ours(pair: ModelPair, case: Case, documents: dict[str, list[Any]]) -> ActivationRows:
    """Rows of both models."""
    return ExtractRows(pair, RowOptions(case.tokens_per_batch))(documents)


@torch.no_grad()
def run_perfect(pair: ModelPair, shapes: Sequence[tuple[int, int]], ids_N: Tensor) -> None:
    """Run only the layers up to L of both models; a hook stops each forward pass."""
    for decoder in pair.decoders:
        with _stopping(decoder):
            for count, length in shapes:
                try:
                    decoder.base(input_ids=ids_N[: count * length].view(count, length), use_cache=False)
                except _StopError:
                    continue


@torch.no_grad()
def run_padded(pair: ModelPair, case: Case, documents: dict[str, list[Any]]) -> Tensor:
    """x_BMD, bfloat16, of the first documents, from full forward passes of padded batches in their order."""
    kept = []
    read = documents["input_ids"][: case.padded_documents]
    for start in range(0, len(read), PADDED_BATCH):
        ids = [torch.from_numpy(row).long() for row in read[start : start + PADDED_BATCH]]
        ids_BT = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True).to(case.device)
        mask_BT = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in ids], batch_first=True)
        mask_BT = mask_BT.to(case.device)
        outputs = [
            decoder.model(input_ids=ids_BT, attention_mask=mask_BT, output_hidden_states=True, use_cache=False)
            for decoder in pair.decoders
        ]
        streams = [output.hidden_states[case.layer + 1][mask_BT == 1] for output in outputs]
        kept.append(torch.stack(streams, dim=1).bfloat16().cpu())
    return torch.cat(kept)


class _StopError(Exception):
    """Ends a forward pass."""


@contextmanager
def _stopping(decoder: SplitDecoder) -> Iterator[None]:
    """During the block, a forward pass of the decoder ends after layer L."""

    def stop(*_arguments: Any) -> None:
        raise _StopError

    handle = decoder.layers[decoder.layer].register_forward_hook(stop)
    try:
        yield
    finally:
        handle.remove()


class Reading(NamedTuple):
    """One call."""

    seconds: float
    cpu_seconds: float
    """Processor time of all threads. With one thread on a busy machine, this is the fairer number."""


Readings = Mapping[str, Sequence[Reading]]


def timed(run: Callable[[], Any], device: str) -> Reading:
    """The time of one call."""
    started, cpu_started = time.perf_counter(), time.process_time()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return Reading(time.perf_counter() - started, time.process_time() - cpu_started)


def compare_loops(case: Case) -> None:
    """Compare ours, perfect batches and the padded loop."""
    pair, documents = build_pair(case), build_documents(case)
    lengths = [len(row) for row in documents["input_ids"]]
    shapes = perfect_batches(lengths, case.tokens_per_batch)
    ids_N = torch.randint(0, case.vocab, (max(a * b for a, b in shapes),), device=case.device)
    contenders: dict[str, Callable[[], Any]] = {
        "ours": lambda: run_ours(pair, case, documents),
        "perfect": lambda: run_perfect(pair, shapes, ids_N),
        "padded": lambda: run_padded(pair, case, documents),
    }
    real_token_frac = run_ours(pair, case, documents).real_token_frac
    contenders["perfect"]()
    repeats = {"ours": case.repeats, "perfect": case.repeats, "padded": case.padded_repeats}
    readings = measure(contenders, repeats, case.device)
    tokens = sum(lengths)
    scale = tokens / sum(lengths[: case.padded_documents])
    readings = {**readings, "padded": [Reading(*(scale * value for value in own)) for own in readings["padded"]]}
    print(f"{case.documents} documents, {tokens:,} tokens, {100 * real_token_frac:.2f}% of computed tokens are real")
    show(readings, tokens)
    for name in ("perfect", "padded"):
        show_ratio(readings, "ours", name)


def compare_lora(case: Case) -> None:
    """Compare a model and its adapter with a shared prefix, on one copy without it, and on two copies."""
    pairs, documents = build_lora_pairs(case), build_documents(case)
    tokens = sum(len(row) for row in documents["input_ids"])
    contenders = {name: partial(run_ours, own, case, documents) for name, own in pairs.items()}
    contenders["prefix"]()
    readings = measure(contenders, dict.fromkeys(contenders, case.repeats), case.device)
    num_shared = pairs["prefix"].num_shared_layers
    print(f"a model and its adapter, {num_shared} of {case.layer + 1} layers in common")
    show(readings, tokens)
    for name in ("one copy", "two copies"):
        show_ratio(readings, "prefix", name)
    for name in ("one copy", "two copies"):
        print(f"  {name} of the weights: {weight_bytes(pairs[name]) / MIB:.1f} MiB")


def measure(contenders: Mapping[str, Callable[[], Any]], repeats: Mapping[str, int], device: str) -> Readings:
    """All readings. In each round, the contenders that have repeats left take turns."""
    readings: dict[str, list[Reading]] = {name: [] for name in contenders}
    for number in range(max(repeats.values())):
        for name, contender in contenders.items():
            if number < repeats[name]:
                readings[name].append(timed(contender, device))
                reading = readings[name][-1]
                print(
                    f"  round {number + 1}  {name:10s} {reading.seconds:7.3f} s  cpu {reading.cpu_seconds:7.3f} s",
                    flush=True,
                )
    return readings


def show(readings: Readings, tokens: int) -> None:
    """Print one line per contender."""
    for name, own in readings.items():
        seconds = [reading.seconds for reading in own]
        cpu_seconds = statistics.median(reading.cpu_seconds for reading in own)
        median = statistics.median(seconds)
        print(
            f"  {name:10s} {median:7.3f} s (best {min(seconds):.3f})  cpu {cpu_seconds:7.3f} s"
            f"  {tokens / median:10,.0f} rows/s"
        )


def show_ratio(readings: Readings, name: str, other: str) -> None:
    """Print the median ratio over the rounds in which both took part."""
    pairs = list(zip(readings[name], readings[other], strict=False))
    ratios = [own.seconds / its.seconds for own, its in pairs]
    by_cpu = statistics.median(own.cpu_seconds / its.cpu_seconds for own, its in pairs)
    span = f"{min(ratios):.3f} to {max(ratios):.3f}"
    print(f"  {name} / {other:10s} {statistics.median(ratios):.3f} ({span}); by processor time {by_cpu:.3f}")


PARTS: dict[str, Callable[[Case], None]] = {"loops": compare_loops, "lora": compare_lora}


def parse() -> Case:
    """The case from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--layer", type=int, default=2)
    parser.add_argument("--vocab", type=int, default=4096)
    parser.add_argument("--documents", type=int, default=400)
    parser.add_argument("--tokens-per-batch", type=int, default=16384)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--padded-repeats", type=int, default=1)
    parser.add_argument("--padded-documents", type=int, default=64, help="the padded loop reads no more than these")
    parser.add_argument("--parts", default="loops,lora")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    return Case(**vars(parser.parse_args()))


def main() -> None:
    """Measure and print the case of the command line."""
    print(f"torch {torch.__version__}, {platform.machine()}, python {platform.python_version()}, {time.strftime('%F')}")
    case = parse()
    torch.set_num_threads(case.threads)
    for part in case.parts.split(","):
        PARTS[part](case)


if __name__ == "__main__":
    main()
