import numpy as np

from pipeline.models.padding import pad, pad_tokens


def test_the_mask_tells_tokens_from_padding_on_either_side() -> None:
    sequences = ([5, 0, 7], np.array([9], dtype=np.int32), [])
    right, left = pad_tokens(sequences), pad_tokens(sequences, on_left=True)
    assert right.ids_BT.tolist() == [[5, 0, 7], [9, 0, 0], [0, 0, 0]]
    assert right.mask_BT.tolist() == [[1, 1, 1], [1, 0, 0], [0, 0, 0]]
    assert left.ids_BT.tolist() == [[5, 0, 7], [0, 0, 9], [0, 0, 0]]
    assert left.mask_BT.tolist() == [[1, 1, 1], [0, 0, 1], [0, 0, 0]]


def test_other_fillers_stand_for_targets_that_count_for_nothing() -> None:
    assert pad([[1], [2, 3]], filler=-100).tolist() == [[1, -100], [2, 3]]
