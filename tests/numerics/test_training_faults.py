"""Faults seen in other crosscoder trainers (numbered as in the list of peers' faults), each held down by a test."""

import threading

import pytest
import torch
from torch import Tensor

from pipeline.numerics import schedule
from pipeline.numerics.crosscoder import Normalisation
from pipeline.numerics.encoder import matrix_products
from pipeline.numerics.trainer import CrosscoderSpec, CrosscoderTrainer
from tests.numerics.small import D, F, M, changed, make_spec, rows


def train(spec: CrosscoderSpec, num_steps: int = 5, **arguments: object) -> CrosscoderTrainer:
    trainer = CrosscoderTrainer(spec, **arguments)  # type: ignore[arg-type]
    for step in range(num_steps):
        trainer.step(rows(step))
    return trainer


def assert_equal_states(
    first: CrosscoderTrainer, second: CrosscoderTrainer, rtol: float = 0.0, only_first: tuple[str, ...] = ()
) -> None:
    states = first.state_dict(), second.state_dict()
    assert [states[0].pop(name) is not None for name in only_first] == [True] * len(only_first)
    assert states[0].keys() == states[1].keys()
    for name, value in states[0].items():
        ours, theirs = torch.as_tensor(value), torch.as_tensor(states[1][name])
        torch.testing.assert_close(ours, theirs, rtol=rtol, atol=rtol, msg=lambda text, name=name: f"{name}: {text}")


def test_fault_1_the_auxiliary_gradient_reaches_the_encoder() -> None:
    spec = make_spec(dead_after_rows=48, clip_norm=None, lr_warmup_steps=0)
    silent = [4, 9]
    trainers = [CrosscoderTrainer(changed(spec, aux_weight=weight)) for weight in (1 / 32, 0.0)]
    before = trainers[0].state_dict()
    for trainer in trainers:
        state = trainer.state_dict()
        # Scores of these two never reach the cut, so they die, but they do respond to the rows.
        for name in ("weights.W_enc_FN", "weights.W_dec_FN"):
            state[name][silent] *= 1e-3
        trainer.load_state_dict(state)
        for step in range(3):
            trainer.step(rows(step))
        assert trainer.metrics()["dead_frac"] == pytest.approx(2 / F)
    moved, still = (trainer.state_dict()["weights.W_enc_FN"][silent] for trainer in trainers)
    assert torch.equal(still, before["weights.W_enc_FN"][silent] * 1e-3)
    assert float((moved - still).abs().max()) > 1e-4


def test_fault_2_the_auxiliary_loss_is_part_of_the_loss() -> None:
    trainer = train(make_spec(dead_after_rows=24, k=1), num_steps=6)
    metrics = trainer.metrics()
    assert metrics["loss_auxiliary"] > 0
    assert metrics["loss"] == pytest.approx(metrics["loss_reconstruction"] + metrics["loss_auxiliary"])


def test_fault_4_activations_are_normalised_exactly_once() -> None:
    normalisation = Normalisation(torch.full((M, D), 3.0), torch.tensor([0.5, 2.0]))
    spec = make_spec()
    raw, by_hand = CrosscoderTrainer(spec, normalisation=normalisation), CrosscoderTrainer(spec)
    raw.initialise(rows(0))
    by_hand.initialise((rows(0) - 3.0) * normalisation.scale_M[:, None])
    for step in range(4):
        raw.step(rows(step))
        by_hand.step((rows(step) - 3.0) * normalisation.scale_M[:, None])
    assert_equal_states(raw, by_hand, only_first=Normalisation._fields)
    x_BMD = rows(9)
    normalised = (x_BMD - 3.0) * normalisation.scale_M[:, None]
    codes, plain = raw.crosscoder().encode(x_BMD), by_hand.crosscoder().encode(normalised)
    assert torch.equal(codes.values_P, plain.values_P)
    expected = by_hand.crosscoder().decode(plain) / normalisation.scale_M[:, None] + 3.0
    torch.testing.assert_close(raw.crosscoder().decode(codes), expected)
    assert raw.evaluate(x_BMD)["loss_reconstruction"] == pytest.approx(
        by_hand.evaluate(normalised)["loss_reconstruction"]
    )


@pytest.mark.parametrize("kind", ["batch_topk", "l1", "topk", "jumprelu"])
def test_fault_5_evaluation_changes_no_state(kind: str) -> None:
    spec = make_spec(kind=kind, mu=0.1)
    watched, plain = train(spec), train(spec)
    watched.evaluate(rows(50, 100))
    watched.metrics()
    assert_equal_states(watched, plain)
    watched.step(rows(7))
    plain.step(rows(7))
    assert_equal_states(watched, plain)


@pytest.mark.parametrize("kind", ["batch_topk", "l1", "topk", "jumprelu"])
def test_fault_7_accumulated_gradients_equal_the_large_batch(kind: str) -> None:
    spec = make_spec(kind=kind, mu=0.1, dtype="float64", dead_after_rows=48, mu_warmup_steps=3, threshold_lr_factor=1.0)
    whole, pieces = (train(changed(spec, block_rows=size), num_steps=8) for size in (1000, 5))
    assert_equal_states(whole, pieces, rtol=1e-9)


def test_fault_8_warm_up_and_annealing_count_steps_whatever_the_batch() -> None:
    for num_rows in (8, 64):
        trainer = CrosscoderTrainer(make_spec(k=2, k_start=10, k_anneal_steps=4))
        seen = []
        for step in range(6):
            trainer.step(rows(step, num_rows))
            seen.append((trainer.metrics()["k"], trainer.metrics()["lr"]))
        assert [k for k, _ in seen] == [10, 8, 6, 4, 2, 2]
        assert [lr for _, lr in seen] == pytest.approx([2e-3, 4e-3, 6e-3, 8e-3, 1e-2, 1e-2])


def test_fault_10_the_selection_is_over_the_whole_batch_not_over_its_parts() -> None:
    trainer = CrosscoderTrainer(make_spec(block_rows=6, k=4))
    loud = rows(0)
    loud[:6] *= 100
    trainer.step(loud)
    assert trainer.metrics()["l0"] == 4
    codes = trainer.crosscoder().encode(loud)
    # With the cut of the whole batch the six loud rows take nearly all of the 96 codes, not a quarter of them.
    assert int((codes.rows_P() < 6).sum()) > 60


def test_fault_11_no_annealing_steps_mean_k_from_the_start() -> None:
    assert schedule.active_latents(0, k=100, k_start=2048, anneal_steps=0) == 100
    trainer = CrosscoderTrainer(make_spec(k=3, k_start=20, k_anneal_steps=0))
    trainer.step(rows(0))
    assert trainer.metrics()["l0"] == 3


def test_fault_12_a_warm_up_longer_than_the_run_neither_divides_by_zero_nor_stalls() -> None:
    rates = [schedule.learning_rate(step, lr=1.0, warmup_steps=1000, num_steps=10) for step in range(10)]
    assert rates == pytest.approx([(step + 1) / 1000 for step in range(10)])
    assert schedule.learning_rate(0, lr=1.0, warmup_steps=0, num_steps=10) == 1.0
    train(make_spec(num_steps=3, lr_warmup_steps=1000, lr_decay_frac=1.0), num_steps=3)


def test_fault_14_variance_explained_is_explained_and_not_the_rest() -> None:
    spec = make_spec(kind="l1", mu=0.0, num_steps=1)
    trainer = CrosscoderTrainer(spec)
    state = trainer.state_dict()
    state["weights.W_dec_FN"].zero_()
    trainer.load_state_dict(state)
    assert trainer.evaluate(rows(0))["fve"] == pytest.approx(0.0, abs=1e-6)
    # An identity dictionary: latent pairs +d and -d reproduce every number exactly.
    identity = torch.cat([torch.eye(M * D), -torch.eye(M * D)])
    state["weights.W_enc_FN"], state["weights.W_dec_FN"] = identity, identity
    trainer.load_state_dict(state)
    metrics = trainer.evaluate(rows(0))
    assert [metrics[name] for name in ("fve", "fve_base", "fve_chat")] == pytest.approx([1, 1, 1])


@pytest.mark.parametrize("kind", ["batch_topk", "l1", "topk", "jumprelu"])
@pytest.mark.parametrize("stop", [1, 6])
def test_resuming_continues_bit_for_bit(kind: str, stop: int) -> None:
    spec = make_spec(kind=kind, mu=0.1, dead_after_rows=48, k_start=8, k_anneal_steps=5)
    straight = train(spec, num_steps=9)
    first = train(spec, num_steps=stop)
    resumed = CrosscoderTrainer(spec)
    resumed.load_state_dict(first.state_dict())
    for step in range(stop, 9):
        resumed.step(rows(step))
    assert_equal_states(straight, resumed)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("kind", ["batch_topk", "l1", "topk", "jumprelu"])
def test_bad_activations_are_named_by_row_and_leave_the_weights_alone(kind: str, bad: float) -> None:
    trainer = train(make_spec(kind=kind, mu=0.1), num_steps=2)
    before = trainer.state_dict()
    x_BMD = rows(3)
    x_BMD[17, 1, 4] = bad
    with pytest.raises(FloatingPointError, match=r"at step 2: row 17 .* model \[1\] \(1 such rows\)"):
        trainer.step(x_BMD)
    after = trainer.state_dict()
    assert all(torch.equal(torch.as_tensor(before[name]), torch.as_tensor(after[name])) for name in before)
    trainer.step(rows(3))


def overflowing() -> tuple[CrosscoderTrainer, Tensor]:
    """A trainer and rows whose loss is finite while the encoder's gradient is not."""
    trainer = CrosscoderTrainer(make_spec(reconstruction="mse", clip_norm=None))
    state = trainer.state_dict()
    state["weights.W_enc_FN"] *= 1e-30
    state["weights.W_dec_FN"] *= 1e12
    trainer.load_state_dict(state)
    return trainer, rows(0) * 1e15


def test_a_gradient_that_overflows_under_a_finite_loss_leaves_the_weights_alone() -> None:
    trainer, x_BMD = overflowing()
    before = trainer.state_dict()
    with pytest.raises(FloatingPointError, match=r"got \d\S+, 0, 0 .* gradient of norm (inf|nan) at step 0: rows are"):
        trainer.step(x_BMD)
    after = trainer.state_dict()
    assert all(torch.equal(torch.as_tensor(before[name]), torch.as_tensor(after[name])) for name in before)


def test_a_step_that_was_not_taken_leaves_counters_and_threshold_alone() -> None:
    trainer = train(make_spec(), num_steps=3)
    before = trainer.state_dict()
    fired_F, smallest = torch.ones(F, dtype=torch.bool), torch.tensor(9.0, dtype=torch.float64)
    trainer._count(fired_F, smallest, 24, torch.tensor(False))  # what a CUDA step does, whose host does not know yet
    assert torch.equal(trainer._rows_since_fired_F, before["rows_since_fired_F"])
    assert torch.equal(trainer._threshold, before["threshold"])
    for refused in (trainer.state_dict, trainer.metrics, trainer.crosscoder):
        with pytest.raises(FloatingPointError, match="first at step 3 of 4"):
            refused()
    trainer.load_state_dict(before)
    assert_equal_states(trainer, train(make_spec(), num_steps=3))


def test_a_state_carries_its_normalisation() -> None:
    normalisation = Normalisation(torch.full((M, D), 3.0), torch.tensor([0.5, 2.0]))
    trained, resumed = train(make_spec(), normalisation=normalisation), CrosscoderTrainer(make_spec())
    resumed.load_state_dict(trained.state_dict())
    for trainer in (trained, resumed):
        trainer.step(rows(6))
    assert_equal_states(trained, resumed)
    assert torch.equal(trained.crosscoder()(rows(7)), resumed.crosscoder()(rows(7)))
    with pytest.raises(ValueError, match="expected mean_MD and scale_M"):
        trained.load_state_dict(train(make_spec()).state_dict())


def test_the_default_dtype_of_the_process_decides_nothing() -> None:
    expected, batches = train(make_spec()), [rows(step) for step in range(5)]
    torch.set_default_dtype(torch.float64)
    try:
        actual = CrosscoderTrainer(make_spec())
        for x_BMD in batches:
            actual.step(x_BMD)
        model = actual.crosscoder()
    finally:
        torch.set_default_dtype(torch.float32)
    assert_equal_states(actual, expected)
    assert {tensor.dtype for tensor in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("kind", ["batch_topk", "l1", "topk", "jumprelu"])
def test_busy_neighbours_change_no_bit(kind: str) -> None:
    """Two threads compute beside the second run, so that its own threads are delayed at random."""
    spec = make_spec(kind=kind, mu=0.1, dead_after_rows=48, num_latents=512)
    num_threads, stop = torch.get_num_threads(), threading.Event()

    def compute() -> None:
        matrix = torch.ones(200, 200)
        while not stop.is_set():
            matrix @ matrix

    torch.set_num_threads(2)
    try:
        alone = train(spec, num_steps=6)
        neighbours = [threading.Thread(target=compute) for _ in range(2)]
        for neighbour in neighbours:
            neighbour.start()
        crowded = train(spec, num_steps=6)
    finally:
        stop.set()
        torch.set_num_threads(num_threads)
    assert_equal_states(crowded, alone)


def test_tf32_is_refused_where_it_would_be_float32() -> None:
    with pytest.raises(ValueError, match="precision 'tf32', got device 'cpu'"):
        CrosscoderTrainer(make_spec(precision="tf32"))


@pytest.mark.parametrize(("precision", "is_allowed"), [("float32", False), ("tf32", True), ("bfloat16", True)])
def test_precision_decides_the_products_on_cuda_and_is_put_back(precision: str, is_allowed: bool) -> None:
    before = torch.backends.cuda.matmul.allow_tf32
    with matrix_products(precision, torch.device("cuda")):
        assert torch.backends.cuda.matmul.allow_tf32 == is_allowed
    assert torch.backends.cuda.matmul.allow_tf32 == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"k": 33}, "k=33"),
        ({"k": None}, "k > 0, got None"),
        ({"k": 0}, "k > 0, got 0"),
        ({"k_start": 64}, "k_start=64"),
        ({"kind": "l1", "mu": -0.1}, "mu >= 0 and finite, got -0.1"),
        ({"code_weight": "l3"}, "'l3'"),
        ({"reconstruction": "l1"}, "'l1'"),
        ({"lr": 0.0}, "lr > 0 and finite, got 0.0"),
        ({"num_latents": 0}, "num_latents > 0, got 0"),
        ({"threshold_decay": 1.0}, "threshold_decay .*got 1.0"),
        ({"clip_norm": -1.0}, "clip_norm"),
        ({"lr_decay_frac": 1.5}, "lr_decay_frac"),
        ({"precision": "int8"}, "'int8'"),
        ({"precision": "bfloat16", "dtype": "float64"}, "precision float32 with dtype float64, got bfloat16"),
    ],
)
def test_a_spec_that_makes_no_sense_is_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_spec(**changes)


@pytest.mark.parametrize("shape", [(4, M + 1, D), (4, M, D + 1), (4, M * D)])
def test_activations_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    trainer = CrosscoderTrainer(make_spec())
    with pytest.raises(ValueError, match=r"M=2, D=8\], got torch.float32"):
        trainer.step(torch.zeros(shape))
    with pytest.raises(ValueError, match=r"at least one row per rank, got \[0\]"):
        trainer.step(torch.zeros(0, M, D))


def test_a_checkpoint_of_another_shape_or_kind_is_refused() -> None:
    state = CrosscoderTrainer(make_spec()).state_dict()
    with pytest.raises(ValueError, match=r"weights.W_enc_FN of shape \[64, 16\] .* got \[32, 16\]"):
        CrosscoderTrainer(make_spec(num_latents=64)).load_state_dict(state)
    with pytest.raises(ValueError, match="another kind"):
        CrosscoderTrainer(make_spec(kind="jumprelu")).load_state_dict(state)


def test_the_order_of_calls_is_checked() -> None:
    trainer = CrosscoderTrainer(make_spec())
    with pytest.raises(ValueError, match="before metrics"):
        trainer.metrics()
    trainer.step(rows(0))
    with pytest.raises(ValueError, match="before initialise, got 1"):
        trainer.initialise(rows(0))
