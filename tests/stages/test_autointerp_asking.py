"""Asking about latents, against a real server: scores that are right, faults that are counted, nothing asked twice."""

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from runs import Finished, command, environment, run_file
from talker import Reply, Request, Talker, chat_reply, honest, talking

from pipeline.analyses.autointerp import Interpretation, InterpTask, TokenWindow, interpretation_table
from pipeline.analyses.autointerp_columns import ANSWER_COLUMNS, InterpStatus
from pipeline.config.run_file import load
from pipeline.errors import CrossrayError, InputError
from pipeline.models.endpoint import Endpoint, EndpointOptions
from pipeline.run import runner
from pipeline.stages.interviews import Answers, Interview, control_all, interview_all, pending_cost
from pipeline.storage.filesystem import Storage
from pipeline.terminal import SilentReporter
from pipeline.tracking.tracker import RecordingTracker

KEY = "sk-do-not-write-me-down"


@pytest.fixture
def talker() -> Iterator[Talker]:
    with talking() as server:
        yield server


def case(latent: int, *, hidden: int = 0) -> InterpTask:
    """A latent that fires on its own word; in `hidden` of the six contexts held out it fires without that word."""
    word = f" word{latent}"
    fitting = ("some", word, " text")
    active = [TokenWindow(10 + i, "web", fitting, (0.0, 3.0 - i / 10, 0.0)) for i in range(12)]
    judged = [TokenWindow(90 + i, "web", ("other",), (1.0,)) if i < hidden else active[6 + i] for i in range(6)]
    quiet = [TokenWindow(50 + i, "web", ("other", " text"), (0.0, 0.0)) for i in range(6)]
    return InterpTask(latent, tuple(active[:6]), (*judged, *quiet), (True,) * 6 + (False,) * 6)


def ask(
    talker: Talker, folder: Path, cases: list[InterpTask], *, repeats: int = 1, per_request: int = 12, retries: int = 8
) -> dict[int, Interpretation]:
    endpoint = Endpoint(EndpointOptions(talker.url, KEY, 2.0, retries, 0.005), {"model": "m"})
    interview = Interview(endpoint, Answers(Storage(str(folder)), "answers"), per_request, repeats)
    try:
        return {one.latent: one for one in interview_all(interview, cases, concurrency=4)}
    finally:
        endpoint.close()


def test_a_word_latent_is_explained_and_detected(talker: Talker, tmp_path: Path) -> None:
    found = ask(talker, tmp_path, [case(1), case(2, hidden=3)])
    assert found[1].explanation == 'It fires on the token " word1"'
    table = interpretation_table([found[1], found[2]]).set_index("latent")
    assert table.loc[1, "balanced_accuracy"] == 1.0
    assert table.loc[2, "balanced_accuracy"] == 0.75
    assert table.loc[2, "true_positive_frac"] == 0.5
    assert (table["tokens_in"] == 200).all()
    assert len(talker.requests) == 4


def test_latents_are_asked_about_side_by_side_within_the_limit(talker: Talker, tmp_path: Path) -> None:
    talker.delay_seconds = 0.05
    ask(talker, tmp_path, [case(latent) for latent in range(12)])
    assert 2 <= talker.most_at_once <= 4


def test_faults_of_every_kind_end_in_the_same_scores(talker: Talker, tmp_path: Path) -> None:
    clean = ask(talker, tmp_path / "clean", [case(latent) for latent in range(10)], per_request=5)
    counter: Counter[str] = Counter()

    def faulty(request: Request) -> Reply:
        counter["requests"] += 1
        return {
            0: (429, {"Retry-After": "0"}, b"slow down"),
            1: (500, {}, b"oops"),
            2: (200, {}, b'{"choices": [{"mess'),
            3: chat_reply("I would rather not."),
        }.get(counter["requests"] % 8, honest(request))

    talker.reply = faulty
    found = ask(talker, tmp_path / "faulty", [case(latent) for latent in range(10)], per_request=5, repeats=9)
    assert {latent: one.answers for latent, one in found.items()} == {
        latent: one.answers for latent, one in clean.items()
    }
    assert sum(one.num_malformed for one in found.values()) > 0


def test_an_unreadable_model_is_counted_and_no_crash(talker: Talker, tmp_path: Path) -> None:
    talker.reply = lambda _: chat_reply("As a language model, I cannot.")
    found = ask(talker, tmp_path, [case(1)])
    assert found[1].status == InterpStatus.UNEXPLAINED
    assert (found[1].explanation, found[1].num_malformed) == (None, 2)
    roles = [message["role"] for message in talker.requests[1].body["messages"]]
    assert roles == ["system", "user", "assistant", "user"]

    def explains_only(request: Request) -> Reply:
        return chat_reply("?") if "Explanation: " in request.words else honest(request)

    talker.reply = explains_only
    found = ask(talker, tmp_path / "other", [case(1)])
    assert found[1].status == InterpStatus.EXPLAINED
    assert found[1].explanation is not None
    assert found[1].answers == ()


def test_answers_are_kept_as_they_come_and_nothing_is_asked_twice(talker: Talker, tmp_path: Path) -> None:
    cases = [case(latent) for latent in range(8)]
    talker.reply = lambda request: (401, {}, b"revoked") if talker.place(request) >= 9 else honest(request)
    with pytest.raises(InputError, match="status 401: revoked"):
        ask(talker, tmp_path, cases)
    answered = Counter(request.words for request in talker.requests[:9])
    kept = Answers(Storage(str(tmp_path)), "answers")
    assert len(kept) == 9
    pending = sum(pending_cost(kept, one, 12, with_control=False).num_requests for one in cases)
    talker.requests.clear()
    talker.reply = honest
    found = ask(talker, tmp_path, cases)
    assert len(found) == 8
    assert pending == len(talker.requests) == 16 - 9
    assert not answered & Counter(request.words for request in talker.requests)
    before = len(talker.requests)
    assert ask(talker, tmp_path, cases) == found
    assert len(talker.requests) == before
    table = Answers(Storage(str(tmp_path)), "answers").table(range(8))
    assert list(table.columns) == [column.name for column in ANSWER_COLUMNS]
    assert table["latent"].tolist() == [latent for latent in range(8) for _ in range(2)]
    assert KEY not in table.to_json()


def test_the_neighbours_explanation_scores_chance_and_is_asked_once(talker: Talker, tmp_path: Path) -> None:
    cases = [case(1), case(2), case(3)]
    endpoint = Endpoint(EndpointOptions(talker.url, KEY, 2.0, 1, 0.005), {"model": "m"})
    answers = Answers(Storage(str(tmp_path)), "answers")
    interview = Interview(endpoint, answers, 5, 1)
    found = {one.latent: one for one in interview_all(interview, cases, concurrency=2)}
    cost = pending_cost(answers, cases[0], 5, with_control=True).num_requests
    before = len(talker.requests)
    checked = {one.latent: one for one in control_all(interview, cases, found, concurrency=2)}
    assert cost == (len(talker.requests) - before) / 3 == 3
    assert [checked[latent].control for latent in (1, 2, 3)] == [0.5] * 3
    assert interpretation_table(list(checked.values()))["balanced_accuracy"].tolist() == [1.0] * 3
    assert checked[1].tokens_in == found[1].tokens_in + 300
    assert pending_cost(answers, cases[0], 5, with_control=True).num_requests == 0
    assert {one.latent: one for one in control_all(interview, cases, found, concurrency=2)} == checked
    assert len(talker.requests) == before + 9
    same = {latent: one._replace(explanation="the same") for latent, one in found.items()}
    assert list(control_all(interview, cases, same, concurrency=2)) == []
    endpoint.close()


def test_an_endpoint_that_stays_overloaded_ends_the_run_in_one_line(talker: Talker, tmp_path: Path) -> None:
    talker.reply = lambda _: (429, {}, b"never")
    with pytest.raises(CrossrayError, match=r"got status 429: never in 3 tries; answers so far are kept"):
        ask(talker, tmp_path, [case(latent) for latent in range(6)], retries=2)


KILLED = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from stages.test_autointerp_asking import ask, case
from talker import Talker
talker = Talker()
talker.url = sys.argv[2]
ask(talker, Path(sys.argv[3]), [case(latent) for latent in range(30)])
"""


def test_a_killed_process_asks_nothing_again_that_was_answered(talker: Talker, tmp_path: Path) -> None:
    talker.delay_seconds = 0.03
    tests = Path(__file__).parent.parent
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(tests), talker.url, str(tmp_path)],
        env={**environment(), "PYTHONPATH": f"{tests.parent}:{tests}"},
    )
    deadline = time.monotonic() + 60
    while len(talker.requests) < 20 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    kept = len(Answers(Storage(str(tmp_path)), "answers"))
    assert kept >= 10
    time.sleep(0.1)  # what was under way arrives at the server all the same
    found = ask(talker, tmp_path, [case(latent) for latent in range(30)])
    assert len(found) == 30
    times = Counter(request.words for request in talker.requests)
    assert len(times) == 60
    assert sum(times.values()) - 60 <= 4, "only the four requests under way may come twice"
    assert len(talker.requests) - kept - 4 <= 60 - kept


# The step in a run.


def tiny_run(finished: Finished, talker: Talker, folder: Path, **more: object) -> Path:
    """The finished run with latents to explain, which need contexts first."""
    tree = finished.config.model_dump(mode="json")
    tree["analyses"]["examples"]["latents"] = [latent for latent in more.get("latents", []) if latent < 128]  # type: ignore[attr-defined]
    tree["analyses"]["autointerp"] = {"model": "m", "num_explaining": 3, **more}
    tree["resources"]["autointerp"] = {
        "base_url": talker.url, "api_key_env": "TALKER_KEY", "price_in": 1.0, "price_out": 4.0, "backoff_seconds": 0.01,
    }  # fmt: skip
    return run_file(folder, str(finished.root), analyses=tree["analyses"], resources=tree["resources"])


def rare_latents(finished: Finished, number: int) -> list[int]:
    """Latents of the BatchTopK crosscoder that fire in some documents and are silent in most."""
    table = finished.table("latents batch_topk", "latents.parquet")
    table = table[table["num_documents"] >= 12].sort_values("num_documents")
    return [int(str(latent)) for latent in table["latent"][:number]]


def files_with(needle: str, root: Path) -> list[str]:
    return [str(path) for path in root.rglob("*") if path.is_file() and needle.encode() in path.read_bytes()]


@pytest.mark.ray
@pytest.mark.slow
def test_a_run_explains_latents_and_never_shows_its_key(
    finished: Finished, talker: Talker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TALKER_KEY", KEY)
    latents = rare_latents(finished, 4)
    path = tiny_run(finished, talker, tmp_path, latents=latents)
    tracker, reporter = RecordingTracker(), SilentReporter()
    outcome = runner.run(load(path), reporter, tracker)
    assert outcome.num_made == 5  # examples and autointerp of two crosscoders, and the report
    said = [message for message in reporter.messages if message.startswith("autointerp: ")]
    assert len(said) == 1
    assert "at the configured prices" in said[0]
    states = {state.step.name: state for state in runner.inspect(load(path), finished.storage)}
    step = states["autointerp batch_topk"].step
    assert finished.storage.files(step.key.folder) == ["answers.parquet", "autointerp.parquet", "record.json"]
    record = states["autointerp batch_topk"].record
    assert record is not None
    assert record.counts["num_latents"] == 4
    assert record.counts["num_scored"] >= 3
    assert 0 <= record.counts["mean_control_accuracy"] <= 1
    assert {request.key for request in talker.requests} == {f"Bearer {KEY}"}
    assert files_with(KEY, finished.root) == []
    assert files_with(KEY, tmp_path) == []
    assert KEY not in repr(tracker.runs)
    assert KEY not in "".join(reporter.messages)
    asked = len(talker.requests)
    again = runner.run(load(path), SilentReporter(), RecordingTracker())
    assert again.num_made == 0
    moved = load(path, ["resources.autointerp.base_url=http://127.0.0.1:9/v1", "resources.autointerp.concurrency=1"])
    assert {state.state for state in runner.inspect(moved, finished.storage)} == {"done"}
    assert len(talker.requests) == asked


@pytest.mark.ray
@pytest.mark.slow
def test_what_cannot_be_asked_is_said_before_anything_is_made(
    finished: Finished, talker: Talker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tiny_run(finished, talker, tmp_path, latents=[128], seed=1)
    monkeypatch.delenv("TALKER_KEY", raising=False)
    with pytest.raises(InputError, match="TALKER_KEY"):
        runner.run(load(path), SilentReporter(), RecordingTracker())
    with pytest.raises(InputError, match=r"resources\.autointerp\.base_url: expected the address"):
        runner.run(load(path, ["resources.autointerp.base_url=null"]), SilentReporter(), RecordingTracker())
    monkeypatch.setenv("TALKER_KEY", KEY)
    with pytest.raises(InputError, match=r"analyses.autointerp.latents.* 127, got \[128\]"):
        runner.run(load(path), SilentReporter(), RecordingTracker())
    with pytest.raises(InputError, match=r"analyses\.autointerp: expected analyses\.examples to be on"):
        runner.inspect(load(path, ["analyses.examples=null"]), finished.storage)
    assert talker.requests == []


@pytest.mark.ray
@pytest.mark.rare
def test_a_killed_run_with_mlflow_continues_and_leaves_no_key_behind(
    finished: Finished, talker: Talker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TALKER_KEY", KEY)
    path = tiny_run(finished, talker, tmp_path, latents=rare_latents(finished, 12), seed=2)
    planned = command("plan", str(path), cwd=tmp_path)
    assert "at most 72 requests" in planned.stdout
    assert "at the configured prices" in planned.stdout
    talker.delay_seconds = 0.3
    arguments = [sys.executable, "-m", "pipeline", "run", str(path)]
    process = subprocess.Popen(arguments, env=environment(), cwd=tmp_path, start_new_session=True)
    deadline = time.monotonic() + 240
    while len(talker.requests) < 20 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    time.sleep(0.5)
    before = Counter(request.words for request in talker.requests)
    done = command("run", str(path), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "answers are there from before" in done.stderr
    times = Counter(request.words for request in talker.requests)
    assert sum((times - Counter(list(times))).values()) <= 8, "only requests under way may come twice"
    assert sum(before.values()) >= 20
    assert (finished.root / "mlflow" / "mlflow.db").exists()
    assert (finished.root / "logs" / "ray.log").exists()
    for root in (finished.root, tmp_path):
        assert files_with(KEY, root) == []
    assert KEY not in done.stdout + done.stderr
