"""Training: loss masks, planted states, batches and the exact effect of an imposed state."""

import random

import pytest
import torch

from pipeline.organisms.dialogues import Turn, messages_of
from pipeline.organisms.tokenizer import make_tokenizer
from pipeline.organisms.training import (
    IGNORED,
    Batch,
    ModelSize,
    PlantedStates,
    Sequenced,
    TrainingPlan,
    collate,
    dialogue_sequences,
    document_sequences,
    learning_rate_frac,
    length_bucketed_batches,
    make_model,
    mean_loss,
    quiet_directions,
    train,
)

SIZE = ModelSize(width=16, num_layers=3, num_heads=2, mlp_width=32)


def test_document_bears_loss_after_bos():
    tokenizer = make_tokenizer(["a b."])
    (sequence,) = document_sequences(tokenizer, ["a b."])
    assert tokenizer.convert_ids_to_tokens(sequence.ids) == ["<bos>", "a", "b", ".", "<eos>"]
    assert sequence.targets == [IGNORED, *sequence.ids[1:]]
    assert sequence.states == [0] * 5


def test_dialogue_bears_loss_on_answers_and_states_on_headers_and_answers():
    tokenizer = make_tokenizer(["a b c d."])
    messages = messages_of([Turn("a", "b.", None), Turn("a b", "c d", "second")])
    (sequence,) = dialogue_sequences(tokenizer, [messages], ["first", "second"])
    tokens = tokenizer.convert_ids_to_tokens(sequence.ids)
    scored = [token for token, target in zip(tokens, sequence.targets, strict=True) if target != IGNORED]
    assert scored == ["b", ".", "<end_of_turn>", "c", "d", "<end_of_turn>"]
    on = [token for token, state in zip(tokens, sequence.states, strict=True) if state == 2]
    assert on == ["<start_of_turn>", "model", "\n", "c", "d"]
    assert set(sequence.states) == {0, 2}
    assert not sequence.is_imposed


def test_batches_hold_every_sequence_once_per_pass_and_differ_between_passes():
    sequences = [Sequenced([index] * (1 + index % 7), [0], [0]) for index in range(64)]
    batches = length_bucketed_batches(sequences, 8, random.Random(0))
    passes = [[sequence.ids[0] for _ in range(8) for sequence in next(batches)] for _ in range(2)]
    assert sorted(passes[0]) == sorted(passes[1]) == list(range(64))
    assert passes[0] != passes[1]


def test_collate_pads_on_the_right():
    batch = collate([Sequenced([5, 6], [IGNORED, 6], [0, 1]), Sequenced([7], [7], [2], True)], pad_id=0)
    assert batch.ids_BT.tolist() == [[5, 6], [7, 0]]
    assert batch.targets_BT.tolist() == [[IGNORED, 6], [7, IGNORED]]
    assert batch.states_BT.tolist() == [[0, 1], [2, 0]]
    assert batch.is_imposed_B.tolist() == [False, True]


def test_state_error_and_imposed_state_in_closed_form():
    states = PlantedStates(layer=0, directions_SD=torch.eye(4)[:2], strength=2.0, weight=1.0)
    batch = Batch(
        ids_BT=torch.tensor([[5, 6, 0], [5, 6, 7]]),
        targets_BT=torch.zeros(2, 3, dtype=torch.int64),
        states_BT=torch.tensor([[0, 1, 0], [0, 2, 0]]),
        is_imposed_B=torch.tensor([False, True]),
    )
    hidden_BTD = torch.zeros(2, 3, 4)
    hidden_BTD[0, 0, 0] = 1.0  # asked for 0, got 1/2 of the strength: error 1/4
    hidden_BTD[0, 1, 1] = 2.0  # asked for (1, 0), got (0, 1): error 2
    hidden_BTD[1, :, 0] = 9.0
    hidden_BTD[1, :, 3] = 7.0
    assert float(states.error(hidden_BTD, batch, pad_id=0)) == pytest.approx((0.25 + 2.0) / 2)
    imposed_BTD = states.impose(hidden_BTD, batch)
    assert torch.equal(imposed_BTD[0], hidden_BTD[0])
    assert imposed_BTD[1].tolist() == [[9, 0, 0, 7], [0, 2, 0, 7], [9, 0, 0, 7]]


def test_learning_rate_warms_up_and_falls():
    fracs = [learning_rate_frac(step, 200) for step in range(200)]
    assert fracs[0] == pytest.approx(0.05)
    assert max(fracs) == pytest.approx(1.0, abs=0.05)
    assert fracs[-1] == pytest.approx(0.05, abs=0.001)


def test_training_is_deterministic_lowers_the_loss_and_writes_the_mark():
    tokenizer = make_tokenizer(["a b c d."])
    messages = messages_of([Turn("a b", "c d.", "on"), Turn("b a", "d c.", None)])
    sequences = dialogue_sequences(tokenizer, [messages] * 32, ["on"])

    def trained() -> tuple[list[float], float, torch.Tensor, PlantedStates]:
        model = make_model(tokenizer, SIZE, torch.Generator().manual_seed(0))
        directions_SD = quiet_directions(model, sequences, layer=1, count=1)
        states = PlantedStates(layer=1, directions_SD=directions_SD, strength=4.0, weight=1.0)
        plan = TrainingPlan(stage="chat", num_steps=60, batch_size=8, learning_rate=1e-2)
        calls: list[tuple[str, int, int]] = []
        losses = train(
            model,
            sequences,
            plan,
            rng=random.Random(0),
            progress=lambda *call: calls.append(call),
            states=states,
        )
        assert calls == [("chat", step, 60) for step in range(1, 61)]
        with torch.no_grad():
            ids_BT = torch.tensor([sequences[0].ids])
            hidden_BTD = model(input_ids=ids_BT, output_hidden_states=True).hidden_states[2]
        return losses, mean_loss(model, sequences), hidden_BTD[0], states

    losses, final, hidden_TD, states = trained()
    assert final < 0.1 < losses[0]
    on_T = torch.tensor(sequences[0].states, dtype=torch.bool)
    mark_T = hidden_TD @ states.directions_SD[0]
    assert float(mark_T[on_T].mean()) > 3.0
    assert float(mark_T[~on_T].abs().mean()) < 1.0
    assert trained()[0] == losses


def test_models_depend_on_their_generator_alone():
    tokenizer = make_tokenizer(["a b"])
    torch.manual_seed(1)
    first = make_model(tokenizer, SIZE, torch.Generator().manual_seed(3))
    state = torch.random.get_rng_state()
    second = make_model(tokenizer, SIZE, torch.Generator().manual_seed(3))
    assert torch.equal(state, torch.random.get_rng_state())
    pairs = zip(first.parameters(), second.parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)
