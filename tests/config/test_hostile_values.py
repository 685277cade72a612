"""Run files that another reader would take otherwise, and values that no field can hold: one short line each."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from test_config import changed, minimal, write

from pipeline.config.run_file import load
from pipeline.config.yaml_file import YamlError, parse_yaml
from pipeline.errors import InputError, short, shortened

SHORT = 700
"""Letters of a line that a reader takes in; a run file's path and the overrides are in it."""


def refusal(folder: Path, text: str, *overrides: str) -> str:
    """The line that refuses a run file."""
    with pytest.raises(InputError) as error:
        load(write(folder, text), overrides)
    line = str(error.value)
    assert "\n" not in line
    assert len(line) < SHORT
    return line


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("no", "no"),
        ("Off", "Off"),
        ("yes", "yes"),
        ("true", True),
        ("FALSE", False),
        ("42:40", "42:40"),
        ("1:30:00", "1:30:00"),
        ("2024-13-45", "2024-13-45"),
        ("2024-01-02", "2024-01-02"),
        ("0o17", 15),
        ("0x1F", 31),
        ("0b11", "0b11"),
        ("0", 0),
        ("-7", -7),
        ("1_536_000", 1536000),
        ("1e-4", 1e-4),
        ("2E3", 2000.0),
        (".5", 0.5),
        ("1.", 1.0),
        ("~", None),
        ("", None),
        ("=", "="),
        ("²", "²"),
        ("\u0663", "\u0663"),
        ("1_0.5", 10.5),
    ],
)
def test_scalars_are_read_as_yaml_1_2(text: str, value: object) -> None:
    read = parse_yaml(text)
    assert read == value
    assert type(read) is type(value)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("a: 1\nb: 2\na: 3\n", ["line 3", "'a'"]),
        ("a: {b: 1, 'b': 2}", ["line 1", "'b'"]),
        ("a:\n  - x: 1\n    y: 2\n    x: 1\n", ["line 4", "'x'"]),
        ("a: 010", ["line 1", "010", "0o10"]),
        ("a: -007", ["line 1", "-007"]),
        ("a: " + "9" * 5000, ["line 1", "5000"]),
        ("a: 0x" + "f" * 5000, ["line 1", "5002"]),
        ("a: !!int x", ["line 1", "'x'"]),
        ("a: !!timestamp 2024-99-99", ["month"]),
        ("a: !!python/object:os.system x", ["line 1", "os.system"]),
        ("a: *b", ["line 1", "'b'"]),
        ("[" * 100_000, ["levels"]),
        ("{a: " * 100_000, ["levels"]),
        ("a: \0", ["#x0000"]),
    ],
)
def test_what_is_ambiguous_or_broken_is_one_line_with_its_place(text: str, named: list[str]) -> None:
    with pytest.raises(YamlError) as error:
        parse_yaml(text)
    assert [part for part in named if part not in str(error.value)] == []
    assert "\n" not in str(error.value)


def test_merged_keys_may_be_given_again() -> None:
    assert parse_yaml("a: &a {x: 1, y: 2}\nb: {<<: *a, x: 3}\n")["b"] == {"x": 3, "y": 2}


@pytest.mark.parametrize("value", [".inf", "-.inf", ".nan", "1e999", "true", "[1]", "1e30", str(1 << 64)])
@pytest.mark.parametrize("key", ["training.num_rows", "training.shuffle_seed", "crosscoders.1.seed"])
def test_no_count_takes_what_is_no_number(tmp_path: Path, key: str, value: str) -> None:
    text = yaml.safe_dump(changed(key, "@")).replace("'@'", value)
    assert f"{key.replace('.1.', '.btk.')}: " in refusal(tmp_path, text)


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("crosscoders.l1.num_latents=1e12", ["crosscoders.l1.num_latents: ", "1000000000000"]),
        ("crosscoders.l1.expansion=10000000", ["crosscoders.l1.expansion: "]),
        ("crosscoders.l1.sparsity.mu=.nan", ["crosscoders.l1.sparsity.mu: "]),
        ("crosscoders.l1.sparsity={kind: [1]}", ["crosscoders.l1.sparsity.kind: ", "'batch_topk'"]),
        ("crosscoders.l1.kind=[1]", ["crosscoders.l1.kind: ", "'adopted'"]),
        ("crosscoders.².lr=1", ["'²'"]),
        ("crosscoders.\u0661.lr=1", ["'\u0661'"]),
        (f"crosscoders.{'9' * 5000}.lr=1", ["crosscoders has no", "5,0"]),
        (f"name={'n' * 5000}", ["name: ", "5,000"]),
        (f"name={'n' * 101}", ["name: "]),
        ("name=..", ["name: "]),
        (f"{'k' * 40_000}=1", ["40,00"]),
        (f"storage.root={'r' * 40_000}", ["storage.root: ", "40,000"]),
        ('storage.root="a\\0b"', ["storage.root: ", "'\\x00'"]),
        ('tracking.experiment="\\x1b[31m"', ["tracking.experiment: ", "'\\x1b'"]),
        ('storage.root="\\ud800"', ["storage.root: ", "'\\ud800'"]),
        ("corpus.sources.documents.weight=.nan", ["corpus.sources.documents.weight: "]),
        ("analyses.latent_scaling.num_resamples=1e15", ["analyses.latent_scaling.num_resamples: "]),
        ("analyses.steering={scales: [.inf]}", ["analyses.steering.scales.0: "]),
        ("analyses.steering.scales=[1]", ["analyses.steering ", "null"]),
        ("resources.training.custom={train: true}", ["resources.training.custom: ", "true"]),
        ("name=5", ["name: ", "got 5", "quotes"]),
    ],
)
def test_an_absurd_value_is_named_by_its_key_and_kept_short(tmp_path: Path, override: str, named: list[str]) -> None:
    line = refusal(tmp_path, yaml.safe_dump(minimal()), override)
    assert [part for part in named if part not in line] == []


def test_hundreds_of_faults_are_one_readable_line(tmp_path: Path) -> None:
    line = refusal(tmp_path, yaml.safe_dump(minimal()) + "".join(f"key{number}: 1\n" for number in range(500)))
    assert "and 495 more" in line


def test_a_bomb_of_aliases_is_told_in_a_line(tmp_path: Path) -> None:
    levels = [f"k{n}: &k{n} [{', '.join([f'*k{n - 1}'] * 9)}]\n" if n else "k0: &k0 [x]\n" for n in range(12)]
    assert "name: " in refusal(tmp_path, "".join(levels) + yaml.safe_dump(changed("name", "@")).replace("'@'", "*k11"))


def test_a_name_that_is_a_number_is_a_name_before_it_is_a_place(tmp_path: Path) -> None:
    tree = minimal()
    tree["crosscoders"][1]["name"] = "0"
    config = load(write(tmp_path, tree), ["crosscoders.0.seed=7"])
    assert [(one.name, getattr(one, "seed", None)) for one in config.crosscoders] == [("l1", 0), ("0", 7)]
    assert "crosscoders.0.seed: " in refusal(tmp_path, yaml.safe_dump(tree), "crosscoders.1.seed=-1")


def test_a_name_with_dots_is_found_as_a_whole(tmp_path: Path) -> None:
    tree = minimal()
    tree["crosscoders"][0]["name"], tree["crosscoders"][1]["name"] = "v1", "v1.5"
    config = load(write(tmp_path, tree), ["crosscoders.v1.5.seed=7", "crosscoders.v1.sparsity.mu=0.5"])
    assert [(one.name, getattr(one, "seed", None)) for one in config.crosscoders] == [("v1", 0), ("v1.5", 7)]
    assert "crosscoders.v1.5.lr: " in refusal(tmp_path, yaml.safe_dump(tree), "crosscoders.v1.5.lr=-1")
    assert "crosscoders.v1 has no 'lrr'" in refusal(tmp_path, yaml.safe_dump(tree), "crosscoders.v1.lrr=1")


def test_words_where_true_or_false_is_wanted_are_understood(tmp_path: Path) -> None:
    text = yaml.safe_dump(changed("activations.drop_bos", "@"))
    assert not load(write(tmp_path, text.replace("'@'", "no"))).activations.drop_bos
    assert load(write(tmp_path, text.replace("'@'", "on"))).activations.drop_bos


@pytest.mark.parametrize("value", ["x" * 100_000, ["x" * 50_000] * 50, {str(n): n for n in range(9999)}, "a\nb\x1b"])
def test_values_are_shown_short_and_printable(value: Any) -> None:
    assert len(short(value)) < 250
    assert short(value).isprintable()
    assert len(shortened("word " * 10_000)) < 120
