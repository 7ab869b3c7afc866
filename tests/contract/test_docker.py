"""The docker backend keeps the contract; and what is its own: confinement, labels, limits, what a container leaves, lost engines."""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
import threading
import traceback
from pathlib import Path

import pytest
from docker import DockerClient

from contract.backend_contract import PATIENCE, BackendContract, finish, until
from support.script_runs import ANY_JOB, MINE, SCRIPT_IMAGE, containers_of, derived, printed
from trimtab.backends import docker
from trimtab.backends.base import Listable, Preflight, Removable, Reporting, Resumable, RunState
from trimtab.backends.docker import DockerBackend
from trimtab.backends.engine import Engine
from trimtab.backends.process import ProcessBackend
from trimtab.errors import BackendError, RunFailed, RunNotFound
from trimtab.events import Choice
from trimtab.run import Run
from trimtab.spec import TrainSpec

LORA = TrainSpec(model="smollm2-135m-instruct", method="lora")

pytestmark = pytest.mark.usefixtures("volumes_before")


class TestDocker(BackendContract):
    @pytest.fixture(scope="class")
    @classmethod
    def backend(cls, tmp_path_factory, xeon_image, client):
        return DockerBackend(tmp_path_factory.mktemp("place") / "my runs, größer 家", image=xeon_image, client=client)

    def kill(self, backend, handle):
        backend.engine.client.api.kill(handle.id)

    def environment(self, backend):
        return {**os.environ, "TRIMTAB_HOME": str(backend.home)}

    def test_the_same_job_gives_the_same_tensors_as_a_process(self, backend, pair, job, staged, tmp_path):
        place = ProcessBackend(tmp_path)
        there = Run(place.submit(job, staged.channels), place)
        there.wait(PATIENCE)
        assert there.artifact() == Run(pair[0], backend).artifact()

    def test_it_says_aloud_which_image_runs_and_that_there_is_no_network(self, backend, pair):
        said = {event.name: event for event in Run(pair[0], backend).events() if isinstance(event, Choice)}
        assert said["network"].value == "none"
        assert said["image"].value == backend.image
        assert "network none: weights and rows are staged channels" in backend.logs(pair[0])

    def test_a_job_that_memory_is_too_small_for_says_what_it_needs_and_succeeds_with_that(self, backend, job, staged):
        small = DockerBackend(backend.home, image=backend.image, memory="200m", client=backend.engine.client)
        run = Run(small.submit(job, staged.channels), small)
        with pytest.raises(RunFailed) as caught:
            run.wait(PATIENCE)
        assert "out of memory, killed at its container's limit of 200m, " in caught.value.reason
        assert "before its first step" in caught.value.reason
        more = re.search(rf"trimtab resume {run.handle} --backend-option (\w+)=(\w+)$", caught.value.reason)
        again = Run.attach(run.handle, home=backend.home, **{more[1]: more[2]})
        assert again.resume().wait(PATIENCE).state is RunState.SUCCEEDED

    def test_a_second_run_reads_the_base_that_the_first_has_put_into_nf4(self, backend, client, job, staged, tmp_path, monkeypatch):
        monkeypatch.setenv("TRIMTAB_NF4_CACHE", str(tmp_path / "größer" / "nf4"))
        train = staged.train.model_copy(update={"method": "qlora", "max_steps": 1})
        file = "$(python3 -c 'from trimtab_runtime import nf4_cache; print(nf4_cache.__file__)')"
        lowered = f"f={file}; sed -i 's/^PAYS_FROM = 1 << 28/PAYS_FROM = 0/' $f; rm -f $(dirname $f)/__pycache__/nf4_*"
        tag = derived(client, f"{MINE}nf4:latest", f"FROM {backend.image}", f"RUN {lowered}")  # else a tiny model is not kept
        try:
            place, found, entries = DockerBackend(backend.home, image=tag, client=client), [], []
            for _ in range(2):
                run = Run(place.submit(job.model_copy(update={"train": train}), staged.channels), place)
                run.wait(PATIENCE)
                found.append(("base in NF4 from /opt/ml/nf4/nf4-" in "\n".join(run.logs()), run.artifact()))
                entries.append({path.name: path.stat().st_ino for path in (tmp_path / "größer" / "nf4").iterdir()})
        finally:
            client.images.remove(tag)
        assert [read for read, _ in found] == [False, True]
        assert found[0][1] == found[1][1]
        assert entries[0] == entries[1]
        assert sorted(name.partition("-")[0] for name in entries[0]) == ["lost", "nf4"]


# of Python 3.12, to a fork where clients have threads. A new program it cannot be: interpreter and checkout may lie in folders of
# root's that are closed to that user
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork:DeprecationWarning")
def test_a_user_who_is_not_root_runs_a_job_and_owns_what_it_leaves(xeon_image, small_job, staged):
    if os.getuid() != 0:
        pytest.skip("this is not root: the other tests are run as such a user")
    user, group = 12_345, Path("/var/run/docker.sock").stat().st_gid
    train = staged.train.model_copy(update={"max_steps": 2})
    with tempfile.TemporaryDirectory(dir="/tmp", prefix=MINE) as place:  # pytest's own folders are closed to other users
        home = Path(place)
        channels = {name: Path(shutil.copytree(folder, home / name)) for name, folder in staged.channels.items()}
        for path in (home, *home.rglob("*")):
            os.chown(path, user, user)
        child = os.fork()
        if child == 0:
            code = 1
            try:
                os.setgroups([group])
                os.setgid(user)
                os.setuid(user)
                backend = DockerBackend(home / "home", image=xeon_image)
                run = Run(backend.submit(small_job.model_copy(update={"train": train}), channels), backend)
                run.wait(PATIENCE)
                code = 0 if run.artifact().spec == train else 2
            except BaseException:  # noqa: BLE001  this is a fork of the tests, and must not go on with them
                traceback.print_exc()
            finally:
                os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        left = list((home / "home").rglob("*"))
        assert {path.name for path in left} >= {"trimtab.json", "events.jsonl", "log.txt"}
        assert {(path.lstat().st_uid, path.lstat().st_gid) for path in left} == {(user, user)}


def test_it_has_every_ability():
    for ability in (Preflight, Reporting, Resumable, Listable, Removable):
        assert isinstance(DockerBackend(), ability)


def test_a_container_gets_no_secret_of_the_callers(run_script, monkeypatch, tmp_path):
    for name in ("HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY_ID", "AWS_SESSION_TOKEN", "SOMETHING_NEW"):
        monkeypatch.setenv(name, "s3cret")
    monkeypatch.setenv("MKL_VERBOSE", "0")
    (tmp_path / "config.json").write_text(json.dumps({"proxies": {"default": {"httpProxy": "http://me:s3cret@proxy.example.com"}}}))
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path))
    backend, handle = run_script("env")
    finish(backend, handle)
    lines = printed(backend, handle)
    assert "s3cret" not in "\n".join(lines)
    assert {"HF_HUB_OFFLINE=1", "OMP_NUM_THREADS=1", "MKL_VERBOSE=0", "TRIMTAB_ROOT=/opt/ml"} <= set(lines)


def test_a_container_has_no_powers_and_sees_only_what_it_was_given(run_script):
    backend, handle = run_script(
        """
        grep -E '^(CapEff|CapBnd|NoNewPrivs):' /proc/self/status | tr -d '\\t'
        ls /sys/class/net
        find /opt/ml -type f | sort
        cat '/opt/ml/input/data/model/model 1.bin'
        for place in /here /opt/ml/input/config/here /opt/ml/input/data/train/here '/opt/ml/input/data/model/model 1.bin'; do
            (echo > "$place") 2>/dev/null && echo "could write $place"
        done
        for place in /tmp /opt/ml/model /opt/ml/checkpoints /opt/ml/output; do
            echo > "$place/here" || echo "could not write in $place"
        done
        """
    )
    finish(backend, handle)
    assert printed(backend, handle) == [
        "CapEff:0000000000000000",
        "CapBnd:0000000000000000",
        "NoNewPrivs:1",
        "lo",
        "/opt/ml/input/config/hyperparameters.json",
        "/opt/ml/input/data/model/model 1.bin",
        "/opt/ml/input/data/train/script",
        "/opt/ml/output/data/events.jsonl",
        "weights",
    ]
    assert (backend.home / "runs" / handle.id / "model" / "here").stat().st_uid == os.getuid()


@pytest.mark.parametrize("asked", [None, "theirs", ""])
def test_quantised_bases_stay_where_the_caller_wants_them_and_are_the_callers(run_script, client, monkeypatch, tmp_path, asked):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TRIMTAB_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("TRIMTAB_NF4_CACHE", raising=False)
    if asked is not None:
        monkeypatch.setenv("TRIMTAB_NF4_CACHE", asked)
    keep = "test -z ${TRIMTAB_NF4_CACHE:-''} || echo kept >> $TRIMTAB_NF4_CACHE/entry"
    backend, handle = run_script(f"echo ${{TRIMTAB_NF4_CACHE:-none}}; ls /opt/ml; {keep}")
    finish(backend, handle)
    here = tmp_path / (asked or "cache/nf4")
    there = ["checkpoints", "input", "model", *(["nf4"] if asked != "" else []), "output"]
    assert printed(backend, handle)[: 1 + len(there)] == ["none" if asked == "" else "/opt/ml/nf4", *there]
    if asked == "":
        assert not (tmp_path / "cache").exists()
        return
    assert (here / "entry").stat().st_uid == os.getuid()
    shutil.rmtree(here)  # as whoever needs room would
    backend.resume(handle)
    finish(backend, handle)
    assert (here / "entry").read_text() == "kept\n"


@pytest.mark.parametrize("job", [ANY_JOB.model_copy(update={"device": "gpu"}), ANY_JOB.model_copy(update={"train": LORA})])
def test_no_quantised_bases_for_a_job_that_has_no_use_for_them(job, client, channels, script_image, tmp_path, monkeypatch):
    backend = DockerBackend(tmp_path / "home", image=script_image, client=client)
    monkeypatch.setattr(backend, "_image", lambda device: backend.own_image("xeon", "train"))  # this one computes on a GPU, too
    host = backend.render(job, channels, "trim-1")["container"]["HostConfig"]
    assert "/opt/ml/nf4" not in {mount["Target"] for mount in host["Mounts"]}
    assert "/opt/ml/nf4" in {mount["Target"] for mount in backend.render(ANY_JOB, channels, "trim-1")["container"]["HostConfig"]["Mounts"]}


def test_cpus_memory_and_shared_memory_are_bounded(run_script):
    limits = "/sys/fs/cgroup/memory/memory.limit_in_bytes /sys/fs/cgroup/memory.max"  # of cgroups 1 and 2
    script = f"OMP_NUM_THREADS= nproc; df -k --output=size /dev/shm | tail -1; cat {limits} 2>/dev/null"
    backend, handle = run_script(script, cpus="0", memory="96m", shm_size="48m")
    finish(backend, handle)
    lines = [line.strip() for line in backend.logs(handle)]
    assert "memory 96m: asked for, swap included" in lines
    assert "cpus 0: asked for" in lines
    assert lines[-3:] == ["1", str(48 * 1024), str(96 << 20)]


def test_limits_given_to_a_resume_take_the_place_of_the_runs_own_when_it_can_be_started(run_script, client):
    backend, handle = run_script("exit 0", shm_size="48m", memory="96m")
    finish(backend, handle)

    def kept() -> list[object]:
        record = json.loads((backend.home / "runs" / handle.id / "run.json").read_text())
        return [record["request"]["container"]["HostConfig"][name] for name in ("ShmSize", "Memory", "NetworkMode")]

    with pytest.raises(BackendError, match="docker network ls"):
        DockerBackend(backend.home, client=client, shm_size="16m", network="nowhere").resume(handle)
    assert kept() == [48 << 20, 96 << 20, "none"]
    other = DockerBackend(backend.home, client=client, shm_size="16m", network="bridge")
    other.resume(handle)
    assert kept() == [16 << 20, 96 << 20, "bridge"]
    finish(other, handle)


def test_the_request_that_was_printed_is_the_one_that_is_kept_and_run(run_script, channels, client):
    backend, handle = run_script("trap exit TERM; while :; do sleep 0.05; done")
    request = backend.render(ANY_JOB, channels, handle.id)
    assert json.loads((backend.home / "runs" / handle.id / "run.json").read_text())["request"] == request
    facts = client.api.inspect_container(handle.id)
    assert facts["Image"] == request["container"]["Image"] == client.images.get(SCRIPT_IMAGE).id
    assert facts["HostConfig"]["NetworkMode"] == "none"
    assert facts["HostConfig"]["Privileged"] is False
    backend.stop(handle)


def test_a_container_deaf_to_sigterm_is_killed_when_its_grace_is_over(run_script, monkeypatch, client):
    monkeypatch.setattr(docker, "GRACE", 1.0)
    backend, handle = run_script("trap '' TERM; echo deaf; while :; do sleep 0.05; done")
    until(lambda: printed(backend, handle) == ["deaf"], "its word")
    backend.stop(handle)
    status = backend.status(handle)
    assert status.state is RunState.STOPPED
    assert "did not end within 1 s of SIGTERM and was killed" in status.reason
    assert f"trimtab resume {handle}" in status.reason
    assert containers_of(client, handle) == []


def test_a_run_is_found_by_its_labels_from_another_home_and_leaves_its_log_in_its_own(run_script, client, tmp_path, script_image):
    backend, handle = run_script("trap 'echo bye; exit' TERM; echo here; while :; do sleep 0.05; done")
    other = DockerBackend(tmp_path / "elsewhere", client=client)
    until(lambda: printed(other, handle) == ["here"], "its word")
    assert not other.status(handle).done
    assert handle in [run.handle for run in other.runs()]
    other.stop(handle)
    assert containers_of(client, handle) == []
    assert printed(backend, handle) == ["here", "bye"]
    assert backend.status(handle).state is RunState.STOPPED
    with pytest.raises(RunNotFound, match="trimtab list --backend docker"):
        other.status(handle)


def test_what_is_over_needs_no_engine(run_script):
    backend, handle = run_script("echo so; exit 3")
    assert "without a word (exit code 3)" in finish(backend, handle).reason
    alone = DockerBackend(backend.home, client=DockerClient(base_url="unix:///nowhere.sock", version="1.41"))
    assert alone.status(handle) == backend.status(handle)
    assert printed(alone, handle) == ["so"]


def test_listing_takes_in_what_has_ended_and_leaves_no_container(run_script, client):
    backend, handle = run_script("exit 0")
    until(lambda: not any(container.running for container in backend.engine.containers(handle)), "its end")
    assert containers_of(client, handle) != []
    assert [run.status.state for run in backend.runs() if run.handle == handle] == [RunState.FAILED]
    assert containers_of(client, handle) == []


def test_a_container_whose_folder_was_deleted_goes_with_the_next_list(run_script, client):
    backend, handle = run_script("exit 0")
    until(lambda: not any(container.running for container in backend.engine.containers(handle)), "its end")
    shutil.rmtree(backend.home / "runs" / handle.id)
    assert handle not in [run.handle for run in backend.runs()]
    assert containers_of(client, handle) == []


def test_clients_that_look_at_once_take_the_log_in_once(run_script, client):
    backend, handle = run_script("seq 2000; exit 1")
    seen, problems = set(), []

    def look() -> None:
        try:
            mine = DockerBackend(backend.home, client=client)
            seen.add(finish(mine, handle).reason)
        except BackendError as exc:
            problems.append(exc)

    threads = [threading.Thread(target=look) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert problems == []
    assert len(seen) == 1
    assert printed(backend, handle) == [str(number) for number in range(1, 2001)]


def test_following_goes_on_to_the_end_though_another_client_takes_the_run_in(run_script, client):
    backend, handle = run_script("echo one; sleep 1; seq 2 3000")
    following = backend.logs(handle, follow=True)
    taking_in = threading.Thread(target=finish, args=(DockerBackend(backend.home, client=client), handle))
    taking_in.start()
    lines = list(following)
    taking_in.join()
    assert lines[2:] == ["one", *(str(number) for number in range(2, 3001))]


def test_a_container_removed_behind_our_back_says_how_to_go_on(run_script, client):
    backend, handle = run_script("while :; do sleep 0.05; done")
    assert not backend.status(handle).done
    client.api.remove_container(handle.id, force=True)
    status = backend.status(handle)
    assert status.state is RunState.FAILED
    assert "removed before its end was seen" in status.reason
    assert f"trimtab resume {handle}" in status.reason


def test_a_client_that_dies_before_the_start_leaves_a_run_that_can_be_started(run_script, client, monkeypatch, channels):
    def die(engine: Engine, container: str) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Engine, "start", die)
        with pytest.raises(KeyboardInterrupt):
            run_script("echo started")
    [found] = [container for container in Engine(client).containers() if channels["train"].parent in container.folder.parents]
    handle, backend = found.handle, DockerBackend(found.folder.parents[1], client=client)
    assert "died before it could start it" in backend.status(handle).reason
    assert containers_of(client, handle) == []
    backend.resume(handle)
    finish(backend, handle)
    assert printed(backend, handle)[-1] == "started"
