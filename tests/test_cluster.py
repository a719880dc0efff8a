"""Shards made by the workers of a Dask cluster are those that one machine makes, whatever ends
meanwhile; what is wrong is one line.
"""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

distributed = pytest.importorskip("distributed", reason="needs the extra cluster")

from conftest import REPO
from helpers.clusters import (
    SETTINGS,
    SharedLab,
    die_always,
    die_once,
    fail_while_there,
    real_cluster,
    unreadable,
    until,
    wait_while_there,
    words_of,
    write_count,
)
from helpers.commands import Run, all_gone, conversion
from helpers.made_up import LabSource
from helpers.sets import committed, content, convert

from convert import cluster, pipeline, shard_task
from convert.cluster import Cluster, ShardsFailed
from convert.environment import OtherVersions, environment_of
from convert.pipeline import Execution, convert_to_set, make_plan
from convert.shard import is_train_of
from convert.shard_task import CannotMake, Job, ShardTask, make_shards, shards_together
from shards.copy import codecs_of
from shards.errors import UserError, WrongSetting, WrongSource
from shards.manifest import MANIFEST
from shards.spec import Codecs, ConversionSettings

OF_MAT = ConversionSettings(size=16, rows_per_shard=6)
TOGETHER = ConversionSettings(fields=("rgb", "depth", "label"), size=8, rows_per_shard=7)
ALL_TOGETHER = ConversionSettings(fields=("rgb", "thermal"), size=8, rows_per_shard=4)


@pytest.fixture(scope="module")
def client() -> Iterator[Any]:
    """Of a cluster in this process: one worker, two tasks at once."""
    with (
        distributed.LocalCluster(
            n_workers=1, threads_per_worker=2, processes=False, dashboard_address=":0"
        ) as local,
        distributed.Client(local) as made,
    ):
        yield made


@contextmanager
def processes_of_dask(n_workers: int = 2) -> Iterator[Any]:
    with (
        distributed.LocalCluster(
            n_workers=n_workers, threads_per_worker=1, dashboard_address=":0", silence_logs=50
        ) as local,
        distributed.Client(local) as made,
    ):
        yield made


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The laboratory's set as one machine makes it."""
    return convert(SharedLab(), tmp_path_factory.mktemp("lab"), SETTINGS)


def on(client: Any, source: Any, root: Path, settings: Any = SETTINGS, **how: Any) -> Path:
    return Path(pipeline.convert(source, root, settings, client=client, **how))


def temporary_in(root: Path) -> list[Path]:
    return [path for path in root.rglob(".*") if not path.name.endswith(".lock")]


# ---------------------------------------------------------------- the same bytes


@pytest.mark.parametrize("form", ["npy", "zarr"])
def test_a_mat_is_the_same_set_from_a_cluster_which_stays_open(
    mat: Path, tmp_path: Path, client: Any, form: str
) -> None:
    codecs: Codecs = codecs_of(form, "blosc" if form == "zarr" else "none", OF_MAT.fields)
    here = convert(mat, tmp_path / "here", OF_MAT, codecs=codecs)
    there = on(client, mat, tmp_path / "there", OF_MAT, codecs=codecs)
    assert committed(there) == committed(here)
    assert not temporary_in(tmp_path)
    assert client.status == "running"
    assert client.submit(sum, (1, 2)).result() == 3


def test_a_table_with_a_row_that_fails_is_the_same_set(
    tmp_path: Path, client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("PIL", reason="needs pillow")
    pytest.importorskip("pyarrow", reason="needs pyarrow")
    from helpers.frames import AS_IS, convert_frames, write_frames_of, write_table

    rows = write_frames_of(tmp_path, 21, split="train")
    (tmp_path / rows[3]["depth"]).write_bytes(b"no picture")
    write_table(tmp_path / "rows.csv", rows)
    monkeypatch.chdir(tmp_path)  # relative paths are of this process, and not of the workers'
    here = convert_frames(Path("rows.csv"), tmp_path / "here", AS_IS, max_failed=0.1)
    there = convert_frames(Path("rows.csv"), Path("there"), AS_IS, max_failed=0.1, client=client)
    assert committed(tmp_path / there) == committed(here)
    assert "failed.csv" in content(here)
    with pytest.raises(WrongSource, match="1 of 21 rows cannot be read: row 3: "):
        convert_frames(Path("rows.csv"), tmp_path / "none", AS_IS, client=client)


def test_shards_that_share_what_is_decoded_are_one_task_and_nothing_is_decoded_twice(
    tmp_path: Path, client: Any
) -> None:
    """Labels come in fours, shards in sevens: shards 0 to 3 are one task, the last one another."""
    folder = tmp_path / "counts"
    folder.mkdir()
    here = convert(SharedLab(), tmp_path / "here", TOGETHER)
    there = on(client, SharedLab(partial(write_count, folder)), tmp_path / "there", TOGETHER)
    assert committed(there) == committed(here)
    counts = [path.read_text() for path in folder.iterdir()]
    assert counts == ["x"] * (30 + 5 + 8)


def test_where_all_shards_are_one_task_that_is_one_line(tmp_path: Path, client: Any) -> None:
    with pytest.raises(WrongSource, match="the lab has chunks that all its shards share"):
        on(client, SharedLab(), tmp_path, ALL_TOGETHER)


def test_together_are_the_shards_that_a_group_joins() -> None:
    """Against the definition: groups, and shards that one of them falls in, joined up."""
    for n_rows in (1, 7, 30):
        for rows in (1, 4, 7):
            settings = replace(SETTINGS, rows_per_shard=rows)
            plan = replace(make_plan(SharedLab(), settings, None), n_rows=n_rows)
            for group_rows in ((1,), (4,), (1, 7), (2, 3), (13,)):
                n_shards = len(plan.bounds)
                joined = {
                    k
                    for each in group_rows
                    for k in range(1, n_shards)
                    if any(first < k * rows < first + each for first in range(0, n_rows, each))
                }
                expected: list[tuple[int, ...]] = []
                for k in range(n_shards):
                    expected = (
                        [*expected[:-1], (*expected[-1], k)] if k in joined else [*expected, (k,)]
                    )
                assert shards_together(plan, group_rows, range(n_shards)) == expected


def job_of(source: SharedLab, settings: ConversionSettings, folder: Path) -> Job:
    plan = make_plan(source, settings, None)
    folder.mkdir(exist_ok=True)
    return Job(
        key=f"test-{folder}",
        opener=source.opener,
        plan=plan,
        folder=str(folder),
        environment=environment_of(plan),
        token=None,
    )


@pytest.mark.parametrize("settings", [SETTINGS, TOGETHER, ALL_TOGETHER])
def test_a_task_that_runs_twice_even_at_once_writes_the_same_and_says_the_same(
    tmp_path: Path, settings: ConversionSettings
) -> None:
    source = SharedLab()
    job = job_of(source, settings, tmp_path / "set")
    facts = source.row_facts()
    shards = tuple(range(len(job.plan.bounds)))
    is_train = {k: is_train_of(facts, job.plan, k) for k in shards}
    task = ShardTask(shards=shards, is_train=is_train)
    answers = []
    threads = [
        threading.Thread(target=lambda: answers.append(make_shards(job, task, "here")))
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    again = make_shards(job, task, "here")
    shard_task.close_sources()
    assert len(answers) == 3
    assert [[(k, receipt.to_json()) for k, receipt in answer] for answer in answers] == 3 * [
        [(k, receipt.to_json()) for k, receipt in again]
    ]
    whole = convert(source, tmp_path, settings)
    expected = content(whole)
    for name, data in content(tmp_path / "set").items():
        assert expected[name] == data
    assert len(content(tmp_path / "set")) == len(shards) * len(settings.fields)


# ---------------------------------------------------------------- what ends meanwhile


def test_a_worker_that_is_killed_in_a_task_is_made_up_for(lab: Path, tmp_path: Path) -> None:
    with processes_of_dask() as client:
        there = on(client, SharedLab(partial(die_once, tmp_path)), tmp_path / "there")
    assert (tmp_path / "died").exists()
    assert committed(there) == committed(lab)
    assert not temporary_in(tmp_path)


def test_a_failed_shard_is_told_once_the_others_are_done_and_made_by_the_next_run(
    lab: Path, tmp_path: Path, client: Any
) -> None:
    bad = tmp_path / "bad"
    bad.touch()
    source = SharedLab(partial(fail_while_there, bad))
    with pytest.raises(ShardsFailed) as raised:
        on(client, source, tmp_path / "there")
    said = "1 of 8 shards failed, the first: shard 2: RuntimeError: the weather is bad"
    assert str(raised.value) == f"{said}. What is done is kept"
    directory = tmp_path / "there" / lab.name
    assert len(list(directory.glob("receipt-*"))) == 7
    assert not (directory / MANIFEST).exists()
    assert not temporary_in(tmp_path)
    bad.unlink()
    assert committed(on(client, source, tmp_path / "there")) == committed(lab)


def test_what_a_user_can_mend_comes_back_as_itself(tmp_path: Path, client: Any) -> None:
    bad = tmp_path / "bad"
    bad.touch()
    with pytest.raises(WrongSource, match=r"the lab: the label camera row 8 could not be read"):
        on(client, SharedLab(partial(unreadable, bad)), tmp_path / "there")


def test_a_conversion_that_ends_early_keeps_what_is_done_and_cancels_the_rest(
    lab: Path, tmp_path: Path, client: Any
) -> None:
    hold = tmp_path / "hold"
    hold.touch()
    source = SharedLab(partial(wait_while_there, hold))

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    execution = Execution(cluster=Cluster(client=client), on_shard=stop)
    with pytest.raises(KeyboardInterrupt):
        convert_to_set(source, tmp_path / "there", SETTINGS, execution)
    hold.unlink()
    directory = tmp_path / "there" / lab.name
    assert 1 <= len(list(directory.glob("receipt-*"))) < 8
    assert client.status == "running"
    until(lambda: not client.processing() or not any(client.processing().values()))
    assert committed(on(client, SharedLab(), tmp_path / "there")) == committed(lab)


def test_a_set_that_is_there_needs_no_worker_and_parts_go_on_a_cluster_too(
    lab: Path, tmp_path: Path, client: Any
) -> None:
    from convert.plan import Part

    for number in (1, 2):
        part = Part(number=number, of=2)
        how = Execution(cluster=Cluster(client=client), part=part)
        made = convert_to_set(SharedLab(), tmp_path, SETTINGS, how)
        assert (made is None) == (number == 1)
    assert committed(tmp_path / lab.name) == committed(lab)
    nowhere = Execution(cluster=Cluster(scheduler="tcp://127.0.0.1:9"))
    assert convert_to_set(SharedLab(), tmp_path, SETTINGS, nowhere) is not None


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize("when", ["at first", "in a task"])
def test_a_worker_with_another_version_is_refused(
    tmp_path: Path, client: Any, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    """In a task: as by a worker that joins later."""
    real = environment_of
    monkeypatch.setattr(cluster, "environment_of", lambda plan: {**real(plan), "numpy": "9.9.9"})
    if when == "in a task":
        monkeypatch.setattr(cluster, "_check_workers", lambda *_: None)
    with pytest.raises(
        OtherVersions, match=r"the worker inproc://\S+ has numpy [12]\S+, this program 9\.9\.9"
    ):
        on(client, SharedLab(), tmp_path)
    assert not list(tmp_path.rglob("receipt-*"))


@pytest.mark.parametrize("when", ["at first", "in a task"])
def test_a_worker_that_does_not_see_the_folder_is_refused(
    tmp_path: Path, client: Any, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    @contextmanager
    def elsewhere(_: object) -> Iterator[None]:
        yield

    monkeypatch.setattr(cluster, "_token_there", elsewhere)
    if when == "in a task":
        monkeypatch.setattr(cluster, "_check_workers", lambda *_: None)
    with pytest.raises(CannotMake, match=r"the worker inproc://\S+ does not see \S+ as this"):
        on(client, SharedLab(), tmp_path)
    assert not list(tmp_path.rglob("*.npy"))


def test_a_worker_that_opens_another_source_is_refused(tmp_path: Path, client: Any) -> None:
    source = SharedLab()
    source.opener = partial(LabSource, n_rows=29)
    with pytest.raises(CannotMake, match="the lab is another one where the worker inproc://"):
        on(client, source, tmp_path)


def test_what_a_worker_wrote_elsewhere_is_not_taken(
    tmp_path: Path, client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where a shared folder is gone from one machine, and its own disk shows below."""
    monkeypatch.setattr(cluster, "_folder_for_workers", lambda _: str(tmp_path / "below"))
    with pytest.raises(
        ShardsFailed, match="8 of 8 shards failed, the first: shard 0: a worker has"
    ):
        on(client, SharedLab(), tmp_path / "there")
    assert not list((tmp_path / "there").rglob("receipt-*"))


def test_a_source_that_cannot_be_opened_again_is_one_line(tmp_path: Path, client: Any) -> None:
    with pytest.raises(WrongSource, match="the lab cannot be opened by other processes"):
        on(client, LabSource(), tmp_path)


def test_no_client_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(WrongSetting, match="client str: expected a dask"):
        on("tcp://127.0.0.1:1", SharedLab(), tmp_path)


def test_without_dask_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(UserError, match=r"needs Dask\. Install the extra cluster: pip install"):
        convert_to_set(SharedLab(), tmp_path, SETTINGS, Execution(cluster=Cluster()))
    assert not list(tmp_path.iterdir())


def test_a_cluster_without_workers_says_so_and_takes_those_that_come(
    lab: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cluster, "SAY_EVERY_S", 0.1)
    monkeypatch.setattr(cluster, "LOOK_EVERY_S", 0.05)
    said = threading.Event()
    log = cluster.log

    def heard(message: str) -> None:
        log(message)
        said.set()

    monkeypatch.setattr(cluster, "log", heard)
    with (
        distributed.LocalCluster(
            n_workers=0, threads_per_worker=1, processes=False, dashboard_address=":0"
        ) as local,
        distributed.Client(local) as client,
    ):

        def join() -> None:
            said.wait(30)
            local.scale(1)

        thread = threading.Thread(target=join)
        thread.start()
        there = on(client, SharedLab(), tmp_path)
        thread.join()
    assert committed(there) == committed(lab)
    assert f"no worker at {local.scheduler_address}: waiting for one" in capsys.readouterr().err


# ---------------------------------------------------------------- as a user runs it


def test_the_command_makes_a_cluster_of_its_own_and_ends_it(
    mat: Path, tmp_path: Path, command: Run
) -> None:
    here = convert(mat, tmp_path / "here", OF_MAT)
    words = (*words_of(OF_MAT), "--scheduler", "dask", "--workers", "2")
    done = command("convert", "run", mat, "--out", tmp_path / "there", *words)
    there = tmp_path / "there" / here.name
    assert (done.returncode, done.stdout) == (0, f"{there}\n"), done.stderr
    assert "Traceback" not in done.stderr
    assert "Warning" not in done.stderr
    assert committed(there) == committed(here)
    again = command("convert", "run", mat, "--out", tmp_path / "there", *words)
    assert (again.returncode, again.stdout) == (0, f"{there}\n")
    assert "nothing to do" in again.stderr


WRONG = {
    "what": (("--scheduler", "spark"), "'spark': choose local, dask, an address such as"),
    "no file": (("--scheduler", "none.json"), "--scheduler none.json: there is no such file"),
    "report": (("--report", "x.html"), "--report x.html is for --scheduler dask"),
    "Drive": (
        ("--scheduler", "dask", "--drive", "d"),
        "--scheduler dask does not go with --drive d",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_mistake_is_one_line_with_status_2(
    mat: Path, tmp_path: Path, command: Run, case: str
) -> None:
    words, said = WRONG[case]
    done = command("convert", "run", mat, "--out", tmp_path / "out", *words)
    assert (done.returncode, done.stdout) == (2, "")
    assert said in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "number",
    [
        pytest.param(signal.SIGINT, marks=pytest.mark.stress),
        pytest.param(signal.SIGTERM, marks=pytest.mark.stress),
        signal.SIGKILL,
    ],
)
def test_a_client_that_is_stopped_leaves_no_process_and_the_same_command_goes_on(
    mat: Path, tmp_path: Path, number: int
) -> None:
    settings = ConversionSettings(size=16, rows_per_shard=1)
    words = (*words_of(settings), "--scheduler", "dask", "--workers", "1")
    command = conversion(mat, tmp_path / "there", *words)
    pipe = subprocess.PIPE
    with subprocess.Popen(
        command, cwd=REPO, stdout=pipe, stderr=pipe, text=True, start_new_session=True
    ) as process:
        until(lambda: list(tmp_path.rglob("receipt-*")) or process.poll() is not None)
        session = [
            pid
            for pid in map(int, filter(str.isdigit, os.listdir("/proc")))
            if is_in(pid, process.pid)
        ]
        os.killpg(process.pid, number) if number == signal.SIGINT else process.send_signal(number)
        out, errors = process.communicate(timeout=60)
    assert out == ""
    if number == signal.SIGKILL:
        assert process.returncode == -signal.SIGKILL
    else:
        assert process.returncode == 130, errors
        assert errors.splitlines()[-1].startswith("interrupted: what is finished is kept")
        assert "Traceback" not in errors
        assert not temporary_in(tmp_path)
    assert all_gone(session, 20)
    here = convert(mat, tmp_path / "here", settings)
    there = convert(mat, tmp_path / "there", settings)
    assert committed(there) == committed(here)
    assert not temporary_in(tmp_path)


def is_in(pid: int, session: int) -> bool:
    try:
        return os.getsid(pid) == session
    except ProcessLookupError:
        return False


# ---------------------------------------------------------------- real processes


@pytest.mark.stress
def test_workers_that_die_each_time_are_one_line_that_says_memory(
    lab: Path, tmp_path: Path
) -> None:
    with processes_of_dask() as client, pytest.raises(ShardsFailed) as raised:
        on(client, SharedLab(die_always), tmp_path)
    said = "1 of 8 shards failed, the first: shard 2: its worker died each time it was tried"
    assert str(raised.value).startswith(f"{said}: its memory limit may be too low")
    assert len(list(tmp_path.rglob("receipt-*"))) == 7
    assert committed(convert(SharedLab(), tmp_path, SETTINGS)) == committed(lab)


@pytest.mark.stress
@pytest.mark.parametrize("form", ["npy", "zarr"])
def test_a_scheduler_and_workers_of_their_own_make_the_same_sets(
    mat: Path, tmp_path: Path, command: Run, form: str
) -> None:
    words = [*words_of(OF_MAT), "--format", form]
    with real_cluster(tmp_path, 2) as file:
        for where in ("local", file):
            root = tmp_path / ("here" if where == "local" else "there")
            done = command("convert", "run", mat, "--out", root, *words, "--scheduler", where)
            assert done.returncode == 0, done.stderr
    (here,) = (tmp_path / "here").glob("*/manifest.json")
    (there,) = (tmp_path / "there").glob("*/manifest.json")
    assert committed(there.parent) == committed(here.parent)


@pytest.mark.stress
def test_a_scheduler_that_is_killed_is_one_line(mat: Path, tmp_path: Path, command: Run) -> None:
    settings = ConversionSettings(size=16, rows_per_shard=1)
    command_line = conversion(
        mat, tmp_path / "there", *words_of(settings), "--scheduler", tmp_path / "scheduler.json"
    )
    from helpers.clusters import processes

    pipe = subprocess.PIPE
    with processes(tmp_path) as start:
        file = tmp_path / "scheduler.json"
        scheduler = start(
            "scheduler", "--port", "0", "--no-dashboard", "--no-show", "--scheduler-file", file
        )
        until(file.exists)
        start("worker", "--scheduler-file", file, "--nthreads", "1", "--no-dashboard")
        with subprocess.Popen(
            command_line, cwd=REPO, stdout=pipe, stderr=pipe, text=True
        ) as process:
            until(lambda: list(tmp_path.rglob("receipt-*")) or process.poll() is not None)
            scheduler.kill()
            out, errors = process.communicate(timeout=120)
    assert (process.returncode, out) == (2, ""), errors
    assert "does not answer any more, or was restarted" in errors.splitlines()[-1]
    assert errors.splitlines()[-1].endswith("Run the same command again to go on")
    assert "Traceback" not in errors
    here = convert(mat, tmp_path / "here", settings)
    assert committed(convert(mat, tmp_path / "there", settings)) == committed(here)
