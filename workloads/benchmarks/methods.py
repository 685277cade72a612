"""Methods of model diffing on the organisms of workloads/zoo/: the same questions, the same rows, the cost beside them.

    python -m workloads.benchmarks.methods FOLDER [--organisms full lora ...] [--seeds 0 1 2] [--steps 500]
    python -m workloads.benchmarks.methods FOLDER --endpoint URL --model NAME [--key-variable OPENAI_API_KEY]
    python -m workloads.benchmarks.methods FOLDER --table docs/methods.md

The organism of each run file is built once per seed and read at its layer; every dictionary is fitted on the same
training rows (`crossray.fit`, no Ray), and all methods are asked about the same held-out dialogues. What is finished is
kept in FOLDER, so a stopped benchmark goes on. methods_table.py makes the table. With an endpoint a language model
reads both models' answers too (reader.py); without one nothing is asked.

A method gives findings: called latents, or one score per token. A finding is right if its maximum over an answer ranks
the answers that show one behaviour above all others with an AUROC of at least 0.9 (pipeline/planted/pair.py). Other
changes of the chat training have no label, so precision is a lower bound.
"""

import argparse
import json
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import torch
from torch import Tensor

import crossray
from pipeline.analyses.latent_tables import limits_of
from pipeline.analyses.logit_lens import LogitLens
from pipeline.analyses.next_tokens import Prediction, at_places, compare, next_token_batches
from pipeline.analyses.planted import CHAT_SPECIFIC_LATENT, MEAN_DIFFERENCE, Planted
from pipeline.analyses.planted_columns import Scoring
from pipeline.analyses.rows import Sums, analyse, encoded_batches
from pipeline.analyses.steering import SteeringOptions, SteeringRequest, steer
from pipeline.analyses.steering_inputs import Direction, directions_of, random_controls
from pipeline.checkpoints.export import replace_text
from pipeline.config.analyses import LatentScalingSection
from pipeline.config.data import OrganismModel
from pipeline.config.run_file import load
from pipeline.library.pair import Pair
from pipeline.library.rows import Rows
from pipeline.library.texts import tokenised
from pipeline.numerics.crosscoder import Crosscoder
from pipeline.organisms.build import build, spec_of
from pipeline.planted.pair import MIN_AUROC, label_score
from pipeline.planted.trial import called
from pipeline.schema import BASE, CHAT
from pipeline.text.prompts import BehaviorPrompts, parse_prompts
from pipeline.text.tokenise import Tokenise
from workloads.benchmarks.methods_table import write_page
from workloads.benchmarks.reader import METHOD, Reader, answered, held_out_prompts, make_reader, planned_text, read

ZOO = Path(__file__).parent.parent / "zoo"
NUM_DOCUMENTS = 2000
"""Of each corpus, as the run files of the zoo say."""
VALIDATION_FRAC = 0.2
NUM_LATENTS, BATCH_ROWS, K = 512, 1024, 16
COMMON: dict[str, Any] = {"num_latents": NUM_LATENTS, "batch_rows": BATCH_ROWS, "lr": 2e-3, "lr_decay_frac": 0.3}
TOPK = {"sparsity": {"kind": "batch_topk", "k": K, "dead_after_rows": 100_000, "threshold_decay": 0.98}}
NO_DICTIONARY = "no dictionary"
DICTIONARIES: dict[str, dict[str, Any]] = {
    "L1 crosscoder": {
        "sparsity": {"kind": "l1", "mu": 0.07, "mu_warmup_steps": 50, "target_l0": float(K)},
        "clip_norm": 1.0,
    },
    "BatchTopK crosscoder": TOPK,
    "difference SAE": {**TOPK, "inputs": "difference"},
    "dedicated latents": {**TOPK, "dedicated_frac": 0.05},
}
RULES = {"by_evidence": "verdict", "by_delta_norm": "Delta_norm"}
"""With Latent Scaling, and the paper's rule of decoder norms alone."""
FIRST_POSITIONS, NUM_PROMPTS, NUM_RANDOM = 5, 24, 2


class World(NamedTuple):
    """One organism of one seed, read at its layer."""

    pair: Pair
    train: Rows
    held: Rows
    labels: tuple[str, ...]
    """Behaviours that it was taught."""
    prompts: tuple[BehaviorPrompts, ...]
    """Harmless prompts of these behaviours, with their markers."""
    texts: Sequence[Any]


def main() -> None:
    """The benchmark, or its page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--organisms", nargs="+", default=sorted(path.stem for path in ZOO.glob("*.yaml")))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=500, help="of every fit, 1,024 rows each")
    parser.add_argument("--endpoint", help="address of an OpenAI-compatible API, such as http://localhost:8000/v1")
    parser.add_argument("--model", help="language model there that reads both models' answers")
    parser.add_argument("--key-variable", help="environment variable that holds the key; without it no key is sent")
    parser.add_argument("--fields", type=json.loads, default={}, help="JSON of further fields of every request")
    parser.add_argument("--table", type=Path, help="page whose table is written from what is finished; nothing is run")
    arguments = parser.parse_args()
    if arguments.table is not None:
        write_page(arguments.folder, arguments.table)
        return
    if (arguments.endpoint is None) != (arguments.model is None):
        parser.error("expected --endpoint and --model together, got one of them")
    reader = None
    pairs = [(name, seed) for seed in arguments.seeds for name in arguments.organisms]
    if arguments.endpoint is not None:
        reader = make_reader(arguments.endpoint, arguments.model, arguments.key_variable, arguments.fields)
        print(planned_text(sum(METHOD in missing_cells(*pair, arguments.folder, reader) for pair in pairs)), flush=True)
    for pair in pairs:
        run_missing(*pair, arguments.folder, num_steps=arguments.steps, reader=reader)


def missing_cells(name: str, seed: int, folder: Path, reader: Reader | None) -> dict[str, Path]:
    """Method -> the file that is not there yet; the method that asks a language model has one for each."""
    files = {method: method for method in (NO_DICTIONARY, *DICTIONARIES)}
    if reader is not None:
        files[METHOD] = f"{METHOD} {reader.model}"
    paths = {
        method: folder / "cells" / f"{name}-{seed}-{re.sub(r'[^A-Za-z0-9.]+', '-', file)}.json"
        for method, file in files.items()
    }
    return {method: path for method, path in paths.items() if not path.is_file()}


def run_missing(name: str, seed: int, folder: Path, *, num_steps: int, reader: Reader | None = None) -> None:
    """Every method on one organism of one seed; what is finished is not made again."""
    missing = missing_cells(name, seed, folder, reader)
    if not missing:
        return
    world = open_world(name, seed, folder)
    for method, path in missing.items():
        if method == NO_DICTIONARY:
            rows = without_dictionary(world)
        elif method == METHOD:
            assert reader is not None
            rows = [with_language_model(world, reader)]
        else:
            rows = with_dictionary(method, DICTIONARIES[method], world, seed=seed, num_steps=num_steps)
        about = {"organism": name, "seed": seed, "num_steps": num_steps}
        text = json.dumps([about | row for row in rows], indent=1)
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_text(path, text)
        print(path, flush=True)


def open_world(name: str, seed: int, folder: Path) -> World:
    """The organism of a run file, built where it is missing, and its rows."""
    config = load(ZOO / f"{name}.yaml", [f"organism.seed={seed}"])
    assert config.organism is not None
    section = config.organism.model_dump()
    place = folder / "organisms" / f"{name}-{seed}"
    if not (place / "organism.json").is_file():
        build(place, spec_of(**section), lambda *_: None)
    is_untouched = isinstance(config.models.chat, OrganismModel) and config.models.chat.member == "base"
    chat = place / ("base" if is_untouched else "chat")
    pair = crossray.load_pair(str(place / "base"), str(chat), layer=config.activations.layer_number, device="cpu")
    labels = () if is_untouched else config.organism.behaviors
    pair.tokenise = Tokenise(pair.tokenizer, max_tokens=256, labels=labels)
    documents, dialogues = (
        [json.loads(line) for line in (place / f"{part}.jsonl").read_text().splitlines()[:NUM_DOCUMENTS]]
        for part in ("documents", "dialogues")
    )
    texts = [*(row["text"] for row in documents), *(row["messages"] for row in dialogues)]
    train, held = pair.activations(list(texts)).split(VALIDATION_FRAC)
    every = parse_prompts(json.loads((place / "prompts.json").read_text()), num_prompts=NUM_PROMPTS, source="prompts")
    return World(pair, train, held, labels, tuple(own for own in every if own.behavior in labels), texts)


def with_dictionary(
    method: str, settings: Mapping[str, Any], world: World, *, seed: int, num_steps: int
) -> list[dict[str, Any]]:
    """One dictionary under both rules."""
    started = time.monotonic()
    crosscoder = crossray.fit(world.train, seed=seed, num_steps=num_steps, device="cpu", **COMMON, **settings)
    table = crossray.latents(crosscoder, world.held, training_rows=world.train, num_resamples=200)
    seconds = time.monotonic() - started
    calls = called(table, limits_of(LatentScalingSection()))
    planted, sums = _planted(world, crosscoder)
    rows = []
    for rule, words in RULES.items():
        chosen = calls.loc[calls[rule], "latent"].astype(int).tolist()
        row = {
            "method": method,
            "rule": words,
            "num_called": len(chosen),
            "seconds": seconds,
            "rows_read": num_steps * BATCH_ROWS + len(world.held),
            "fve": table.attrs["fidelity"]["fve"],
            "l0": table.attrs["fidelity"]["l0"],
        }
        if planted is not None:
            is_called_F = torch.zeros(crosscoder.num_latents, dtype=torch.bool)
            is_called_F[chosen] = True
            score = label_score(planted.auroc_by_latent(sums, Scoring.TURN), is_called_F)
            best = _best_scores(planted.table(sums, chosen), CHAT_SPECIFIC_LATENT)
            row |= {"precision": score.precision, "recall": score.recall}
            row |= {"auroc": {label: auroc for label, (_, auroc) in best.items()}}
            latents = {label: latent for label, (latent, _) in best.items() if latent >= 0}
            row["steering"] = {
                label: _moved(
                    world, label, directions_of(crosscoder, table, [latent]), _random(crosscoder, table, latent)
                )
                for label, latent in latents.items()
            }
        rows.append(row)
    return rows


def without_dictionary(world: World) -> list[dict[str, Any]]:
    """The mean difference on first tokens, and KL per token; one score per token each."""
    started = time.monotonic()
    x_BMD, data = world.train.x.float(), world.train.data
    first_B = (data.position_B <= FIRST_POSITIONS) & (data.corpus_B == world.train.corpora.index("texts"))
    difference_D = (x_BMD[first_B, CHAT] - x_BMD[first_B, BASE]).mean(0)
    lens = LogitLens(world.pair.models, world.pair.tokenizer, num_tokens=10)
    first = {
        "method": "mean difference, first tokens",
        "seconds": time.monotonic() - started,
        "rows_read": int(first_B.sum()),
        "promoted": lens.named(lens.logits(CHAT, difference_D[None]))["promoted"].tolist()[0],
    }
    started = time.monotonic()
    kl_B, shift_V = _kl_of_rows(world)
    kl = {
        "method": "KL per token",
        "seconds": time.monotonic() - started,
        "rows_read": len(world.held),
        "promoted": lens.named(shift_V[None])["promoted"].tolist()[0],
    }
    norm = float(difference_D.norm())
    nothing = Crosscoder(1, 2, world.held.activation_dim)
    for row, score_B in ((first, None), (kl, kl_B)):
        row |= {"rule": "-", "num_called": int(norm > 0 if score_B is None else kl_B.max() > 1e-5)}
        planted, sums = _planted(world, nothing, difference_D)
        if planted is None:
            continue
        if score_B is not None:
            is_dialogue_B = world.held.data.corpus_B == world.held.corpora.index("dialogues")
            sums["score"] = score_B[is_dialogue_B]
        aurocs = {label: auroc for label, (_, auroc) in _best_scores(planted.table(sums), MEAN_DIFFERENCE).items()}
        found = [label for label, auroc in aurocs.items() if auroc >= MIN_AUROC]
        row |= {"auroc": aurocs, "precision": float(bool(found)), "recall": len(found) / len(aurocs)}
    if norm > 0:
        projected_B = (x_BMD[:, CHAT] @ difference_D).abs() / norm
        direction = Direction(-1, difference_D / norm, float(projected_B.max()))
        first["steering"] = {label: _moved(world, label, (direction,), None) for label in world.labels}
    return [first, kl]


def with_language_model(world: World, reader: Reader) -> dict[str, Any]:
    """The language model on both models' answers to prompts of the held-out dialogues."""
    started = time.monotonic()
    proposing, judged = (answered(world.pair, prompts) for prompts in held_out_prompts(world.held, world.texts))
    row = read(proposing, judged, {own.behavior: own.markers for own in world.prompts}, reader)
    return row | {"seconds": time.monotonic() - started}


def _kl_of_rows(world: World) -> tuple[Tensor, Tensor]:
    """KL(p_chat || p_base) at every held-out row, and the mean shift of log-probabilities weighted by it, [V]."""
    models, held = world.pair.models, world.held.data
    documents = tokenised(world.pair.tokenise, list(world.texts))
    wanted = set(held.doc_id_B.tolist())
    keep = [place for place, doc_id in enumerate(documents["doc_id"]) if doc_id in wanted]
    kept = {name: [column[place] for place in keep] for name, column in documents.items()}
    found: dict[tuple[int, int], float] = {}
    shift_V, total = torch.zeros(models.vocab_size, dtype=torch.float64), 0.0
    for batch in next_token_batches(models, kept, world.pair.options):
        chat, base = (
            Prediction(
                m,
                at_places(models.upper(m, models.lower(m, batch.ids_BT, batch.mask_BT), batch.mask_BT), batch.place_P),
            )
            for m in (CHAT, BASE)
        )
        (comparison,) = compare(models, chat, [base])
        width = batch.ids_BT.shape[1]
        for document, place, kl in zip(batch.document_P, batch.place_P, comparison.kl_P, strict=True):
            found[int(batch.doc_id_B[document]), int(place) % width] = float(kl)
        chat_PV, base_PV = (
            models.shared_head(own.model, own.hidden_PD).double().log_softmax(-1) for own in (chat, base)
        )
        shift_V += comparison.kl_P @ (chat_PV.exp() * (chat_PV - base_PV))
        total += float(comparison.kl_P.sum())
    places = zip(held.doc_id_B.tolist(), held.position_B.tolist(), strict=True)
    kl_B = torch.tensor([found.get(place, 0.0) for place in places])
    return kl_B, (shift_V / max(total, 1e-12)).float()


def _planted(world: World, crosscoder: Crosscoder, difference_D: Tensor | None = None) -> tuple[Planted | None, Sums]:
    """The labels' analysis with its sums; None for an organism that was taught nothing."""
    if not world.labels:
        return None, {}
    planted = Planted(
        activation_dim=crosscoder.activation_dim,
        num_latents=crosscoder.num_latents,
        labels=world.labels,
        chat_corpora=world.held.dialogue_corpora,
        mean_difference_D=difference_D,
        num_resamples=100,
    )
    return planted, analyse({"planted": planted}, encoded_batches(crosscoder, world.held.columns()))["planted"]


def _best_scores(table: pd.DataFrame, candidate: str) -> dict[str, tuple[int, float]]:
    """Behaviour -> (latent, AUROC by answer), chosen on one half of the dialogues and scored on the other."""
    rows = table[(table["candidate"] == candidate) & (table["scoring"] == Scoring.TURN)]
    return {str(row["behavior"]): (int(row["latent"]), float(row["auroc"])) for row in rows.to_dict("records")}


def _random(crosscoder: Crosscoder, table: pd.DataFrame, latent: int) -> Tensor:
    return random_controls(crosscoder, table, excluded=[latent], num=NUM_RANDOM, seed=0)


def _moved(world: World, label: str, directions: tuple[Direction, ...], controls_RD: Tensor | None) -> dict[str, float]:
    """Share of harmless prompts whose answer shows the behaviour: unsteered, steered, steered by random latents."""
    (prompts,) = [own for own in world.prompts if own.behavior == label]
    if controls_RD is None:
        generator = torch.Generator().manual_seed(0)
        controls_RD = torch.nn.functional.normalize(
            torch.randn(NUM_RANDOM, world.held.activation_dim, generator=generator)
        )
    request = SteeringRequest(prompts, directions, controls_RD)
    table = steer(world.pair.models, [request], SteeringOptions(scales=(1.0,), num_samples=0)).table
    return {str(control): float(rows["rate"].mean()) for control, rows in table.groupby("control")}


if __name__ == "__main__":
    main()
