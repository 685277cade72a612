"""Report and explorer over a dictionary of paper size: how large, how fast, how much memory.

    crossray run workloads/demo.yaml
    python -m workloads.benchmarks.large_dictionary workloads/demo.yaml FOLDER --crosscoder batch_topk

Copies a finished run and gives one of its crosscoders F = 131,072 latents, 2,000 of them chat-specific: decoder rows
and table rows of its own latents again and again, contexts and cards for all 2,000. The report is rendered from these
artifacts and opened in Chromium; the explorer is started on them as a user would, and a browser asks it for views. The
figures of one machine are in docs/explorer.md.
"""

import argparse
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from pipeline.config.run_file import load
from pipeline.numerics.crosscoder import Crosscoder
from pipeline.run.flow import build_flow
from pipeline.schema import Verdict
from pipeline.terminal import text_table

FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
BY_LATENT = {"examples": ("examples", "histograms", "neighbours"), "logit_lens": ("logit_lens",)}
"""Stages whose tables have rows of single latents, and those tables."""


def enlarge(folders: Mapping[str, Path], name: str, *, num_latents: int, num_specific: int) -> None:
    """Rewrites the crosscoder and its tables in place; folders: of the run's artifacts, by step."""
    random = np.random.default_rng(0)
    latents = pd.read_parquet(folders[f"latents {name}"] / "latents.parquet")
    listed = sorted(
        set(pd.read_parquet(folders[f"examples {name}"] / "examples.parquet", columns=["latent"])["latent"])
    )
    is_specific_F = latents["verdict"] == Verdict.CHAT_SPECIFIC
    own = [latent for latent in listed if is_specific_F[latent]]
    others = latents.index[(latents["verdict"] == Verdict.SHARED).to_numpy()].to_numpy()
    # New latent -> the old one that it repeats; the first num_specific are chat-specific and have contexts.
    source_F = np.concatenate([random.choice(own, num_specific), random.choice(others, num_latents - num_specific)])
    _rewrite(folders[f"latents {name}"] / "latents.parquet", lambda table: _repeated(table, source_F))
    for stage, files in BY_LATENT.items():
        for file in files:
            _rewrite(
                folders[f"{stage} {name}"] / f"{file}.parquet", lambda table: _of_each(table, source_F[:num_specific])
            )
    folder = folders[f"crosscoder {name}"]
    crosscoder = Crosscoder.from_pretrained(folder)
    index_F, generator = torch.from_numpy(source_F), torch.Generator().manual_seed(0)
    is_first_F = ~pd.Series(source_F).duplicated().to_numpy()
    scale_F = torch.where(torch.from_numpy(is_first_F), 1.0, torch.rand(num_latents, generator=generator) ** 2)
    for weights in ("W_enc_FMD", "W_dec_FMD"):
        rows = getattr(crosscoder, weights).detach()[index_F]
        rows = rows + 0.05 * rows.std() * torch.randn(rows.shape, generator=generator)
        if weights == "W_enc_FMD":  # else all copies of a latent fire at once, and L0 is that of no dictionary
            rows *= scale_F[:, None, None]
        setattr(crosscoder, weights, torch.nn.Parameter(rows, requires_grad=False))
    crosscoder.b_enc_F = torch.nn.Parameter(crosscoder.b_enc_F.detach()[index_F], requires_grad=False)
    crosscoder.save_pretrained(folder)


def _rewrite(path: Path, change: Callable[[pd.DataFrame], pd.DataFrame]) -> None:
    table = pq.read_table(path)
    pq.write_table(pa.Table.from_pandas(change(table.to_pandas()), table.schema, preserve_index=False), path)


def _repeated(table: pd.DataFrame, source_F: np.ndarray) -> pd.DataFrame:
    return table.iloc[source_F].assign(latent=np.arange(len(source_F), dtype=np.int32))


def _of_each(table: pd.DataFrame, source_F: np.ndarray) -> pd.DataFrame:
    rows = dict(list(table.groupby("latent")))
    parts = [rows[old].assign(latent=np.int32(new)) for new, old in enumerate(source_F.tolist()) if old in rows]
    return pd.concat(parts)


@contextmanager
def opened_browser() -> Iterator[Any]:
    """A headless Chromium that is installed."""
    from playwright.sync_api import sync_playwright

    program = next(found for name in ("chromium", "google-chrome") if (found := shutil.which(name)))
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, headless=True, args=FLAGS)
        yield browser
        browser.close()


def measure_report(path: Path, browser: Any, *, pictures: Path) -> Iterator[tuple[str, str]]:
    """Size, time to open and to filter."""
    yield "report, size", f"{path.stat().st_size / 1e6:.1f} MB"
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    started = time.monotonic()
    page.goto(path.as_uri())
    page.locator("#latent-table tbody tr").first.wait_for()
    yield "report, latent table is there", f"{time.monotonic() - started:.1f} s"
    page.wait_for_selector("html[data-figures=drawn]", timeout=120_000)
    yield "report, all figures are drawn", f"{time.monotonic() - started:.1f} s"
    typed = page.evaluate(
        """() => {
          const box = document.getElementById("f-text"), times = [];
          for (const text of ["n", "nu_r<0.3", "nu_r<0.3 fires>1%", ""]) {
            const started = performance.now();
            box.value = text;
            box.dispatchEvent(new Event("input", {bubbles: true}));
            document.body.getBoundingClientRect();
            times.push(performance.now() - started);
          }
          return times;
        }"""
    )
    yield "report, filter of the table", f"{max(typed):.0f} ms at most"
    page.screenshot(path=pictures / "report.png")
    page.close()


@contextmanager
def served(file: str, root: Path) -> Iterator[tuple[str, int]]:
    """`crossray explore` as a process: its address and its id."""
    command = [sys.executable, "-m", "pipeline", "explore", file, "--set", f"storage.root={root}"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        if not line.startswith("explorer"):
            raise SystemExit(f"the explorer did not start: {line}")
        yield line.split()[1], process.pid
    finally:
        process.terminate()
        process.wait()


def resident(process: int) -> float:
    """Memory of a process now, in GB."""
    pages = int(Path(f"/proc/{process}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e9


def measure_explorer(
    file: str, root: Path, browser: Any, crosscoder: str, *, pictures: Path
) -> Iterator[tuple[str, str]]:
    """Time to the first view and to others, and memory."""
    started = time.monotonic()
    with served(file, root) as (url, process):
        yield "explorer, address is printed", f"{time.monotonic() - started:.1f} s"
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.set_default_timeout(120_000)
        views = {
            "first view (a latent's page)": (f"?view=latent&latent=5&crosscoder={crosscoder}", "heading", "Latent 5"),
            "another latent's page": (f"?view=latent&latent=70000&crosscoder={crosscoder}", "heading", "Latent 70000"),
        }
        for what, (query, role, name) in views.items():
            asked = time.monotonic()
            page.goto(url + query)
            page.get_by_role(role, name=name, exact=True).wait_for()
            yield f"explorer, {what}", f"{time.monotonic() - asked:.1f} s"
            page.screenshot(path=pictures / f"{name.replace(' ', '-')}.png")
        asked = time.monotonic()
        page.goto(f"{url}?view=find&crosscoder={crosscoder}&condition=nu_r%3C0.3%20frequency%3E0.1%25")
        page.locator("table tbody tr").first.wait_for()
        yield "explorer, a condition over all latents", f"{time.monotonic() - asked:.1f} s"
        page.goto(f"{url}?view=text&crosscoder={crosscoder}")
        for what, word in (("first text", "flag"), ("second text", "capital")):
            page.get_by_label("text or dialogue").fill(f"User: what is the {word} of halvia?")
            asked = time.monotonic()
            page.get_by_role("button", name="Read", exact=True).click()
            page.locator(".typed", has_text=word).wait_for()
            page.get_by_role("heading", name="Strongest latents of the text").wait_for()
            yield f"explorer, {what} read", f"{time.monotonic() - asked:.1f} s"
        yield "explorer, memory", f"{resident(process):.2f} GB"
        page.close()


def main() -> None:
    """Make the run and print a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("file")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--crosscoder", required=True)
    parser.add_argument("--latents", type=int, default=131_072)
    parser.add_argument("--chat-specific", type=int, default=2000)
    settings = parser.parse_args()
    config = load(Path(settings.file))
    root = settings.folder.resolve() / "runs"
    shutil.copytree(config.storage.root, root, ignore=shutil.ignore_patterns("report", "mlflow", "logs"))
    folders = {step.name: root / step.folder for step in build_flow(config).steps}
    enlarge(folders, settings.crosscoder, num_latents=settings.latents, num_specific=settings.chat_specific)
    started = time.monotonic()
    command = [sys.executable, "-m", "pipeline", "report", settings.file, "--set", f"storage.root={root}"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    (line,) = [own for own in printed.splitlines() if own.startswith("report ")]
    rows = [("report, made in", f"{time.monotonic() - started:.1f} s")]
    with opened_browser() as browser:
        rows += measure_report(Path(line.split(maxsplit=1)[1]), browser, pictures=settings.folder)
        rows += measure_explorer(settings.file, root, browser, settings.crosscoder, pictures=settings.folder)
    print(text_table(["what", "measured"], rows))


if __name__ == "__main__":
    main()
