"""The endpoint contract on the process backend: a merged model, adapters beside their base, and how its server begins and ends."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest

from contract.http_contract import HttpContract
from support.direct_server import children, engines_of, wait_until
from support.script_server import script_server
from support.tiny_adapter import make_adapter, make_lively_model
from trimtab.deployers.base import EndpointState
from trimtab.endpoint import Endpoint, close, deploy, deploy_request, endpoints
from trimtab.errors import BackendUnavailable, EndpointError, SpecError

KEY = "the-brass-key/of+the=tower"

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@pytest.fixture(scope="module", autouse=True)
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The module's own home and cache; no endpoint of its tests is left in it."""
    place = tmp_path_factory.mktemp("endpoints")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRIMTAB_HOME", str(place / "home"))
        patch.setenv("TRIMTAB_CACHE", str(place / "cache"))
        yield place / "home"
        assert endpoints("process") == []
        assert left(place / "home") == []


def left(home: Path) -> list[str]:
    """Folders of endpoints, and processes that serve from them."""
    place = home / "endpoints"
    folders = [str(path) for path in place.iterdir()] if place.exists() else []
    return folders + [str(pid) for folder in folders for pid in engines_of(Path(folder))]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_lively_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def artifact(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_adapter(tmp_path_factory.mktemp("artifact"), model)


@pytest.fixture(scope="module")
def served(home: Path, model: Path, artifact: Path) -> Iterator[Endpoint]:
    with deploy(artifact, model, api_key=KEY, dtype="float32") as endpoint:
        yield endpoint


class TestProcessEndpoint(HttpContract):
    listed = ("tuned", "tiny-lighthouse")

    @pytest.fixture
    def endpoint(self, served: Endpoint) -> Endpoint:
        return served


def test_adapters_are_served_beside_their_base(model: Path, artifact: Path, served: Endpoint, tmp_path: Path) -> None:
    other = make_adapter(tmp_path / "other", model, seed=2)
    with deploy(artifact, model, adapters={"other": other}) as endpoint:
        assert endpoint.api_key is None
        assert endpoint.models() == ["tuned", "other", "base", "tiny-lighthouse"]
        answers = {name: endpoint.generate("The keeper", model=name, max_new_tokens=6) for name in ("tuned", "other", "base")}
        assert len(set(answers.values())) == 3
        assert endpoint.generate("The keeper", max_new_tokens=6) == answers["tuned"]
        assert served.generate("The keeper", max_new_tokens=6) == answers["tuned"], "merged or not, it is one model"


def test_the_same_artifact_twice_is_two_endpoints_of_one_merge(model: Path, artifact: Path, served: Endpoint) -> None:
    (folder,) = [path for path in (Path(os.environ["TRIMTAB_CACHE"]) / "merged").iterdir() if path.is_dir()]
    made = (folder / "model.safetensors").stat()
    with deploy(artifact, model, title="the second") as second:
        assert second.url != served.url
        assert second.generate("The keeper", max_new_tokens=4) == served.generate("The keeper", max_new_tokens=4)
        newest, oldest = endpoints("process")
        assert (newest.handle, newest.title, newest.state) == (second.handle, "the second", EndpointState.SERVING)
        assert (oldest.handle, oldest.title, oldest.url) == (served.handle, "tiny-lighthouse", served.url)
    assert served.ready()
    assert (folder / "model.safetensors").stat() == made


def test_an_engine_that_dies_comes_back_once_and_then_says_why(model: Path, home: Path) -> None:
    with deploy(None, model) as endpoint:
        assert endpoint.models() == ["base"]
        folder = home / "endpoints" / str(endpoint.handle).rpartition("/")[2]
        server = json.loads((folder / "record.json").read_text())["pid"]
        (first,) = children(server)
        os.kill(first, signal.SIGKILL)
        wait_until(lambda: not endpoint.ready())
        assert endpoint.generate("The keeper", max_new_tokens=3), "the client waits for the engine that was started again"
        (second,) = children(server)
        assert second != first
        os.kill(second, signal.SIGKILL)
        wait_until(lambda: endpoint.status().state is EndpointState.FAILED)
        with pytest.raises(EndpointError, match=r"(?s)has ended: .*engine.*Its log ends:\n.*Deploy it again"):
            endpoint.generate("The keeper")
        assert endpoint.status().orphan == "", "its client will take it away"
        with pytest.raises(EndpointError, match=r"has failed: .*engine"):
            Endpoint.attach(str(endpoint.handle))


def test_what_its_folder_holds_is_its_owners(served: Endpoint, home: Path) -> None:
    (folder,) = (home / "endpoints").iterdir()
    assert folder.stat().st_mode & 0o777 == 0o700
    assert {name: (folder / name).stat().st_mode & 0o777 for name in ("record.json", "input/config/api_key", "log.txt")} == {
        "record.json": 0o600,
        "input/config/api_key": 0o600,
        "log.txt": 0o600,
    }
    record = json.loads((folder / "record.json").read_text())
    assert (record["url"], record["api_key"]) == (served.url, KEY)
    assert KEY not in json.dumps(record["request"])
    assert KEY not in "\n".join(served.logs())
    assert KEY not in repr(served) + repr(served.status())
    assert KEY.encode() not in Path(f"/proc/{record['pid']}/environ").read_bytes() + Path(f"/proc/{record['pid']}/cmdline").read_bytes()


def test_the_request_is_what_is_sent(model: Path, artifact: Path, served: Endpoint, home: Path) -> None:
    (folder,) = (home / "endpoints").iterdir()
    request = deploy_request(artifact, model, api_key=KEY, dtype="float32", ready_timeout=3.0)
    sent = json.dumps(json.loads((folder / "record.json").read_text())["request"])
    name = request["handle"].rpartition("/")[2]
    assert json.loads(sent.replace(folder.name, name)) == request
    assert KEY not in json.dumps(request)
    assert not (home / "endpoints" / name).exists()
    secret = {name for name in os.environ if "KEY" in name or "TOKEN" in name}
    assert not secret & set(request["environment"])


def test_without_the_key_nothing_is_answered(served: Endpoint) -> None:
    with pytest.raises(EndpointError, match=r"answered 401: .*api_key="):
        Endpoint(served.url).generate("a")
    with Endpoint(served.url + "/", api_key=KEY) as other:
        assert other.generate("The keeper", max_new_tokens=4) == served.generate("The keeper", max_new_tokens=4)
        assert (other.handle, other.api_key) == (None, KEY)
        with pytest.raises(EndpointError, match=r"Endpoint\.attach"):
            other.logs()
        other.close()
    assert served.ready(), "closing an endpoint made from an address ends nothing"


def test_what_cannot_be_served_says_why_and_leaves_nothing(
    model: Path, artifact: Path, served: Endpoint, home: Path, tmp_path: Path
) -> None:
    before = left(home)
    taken = int(served.url.rpartition(":")[2])
    with pytest.raises(EndpointError, match=r"ended before it answered: cannot listen .* choose another port"):
        deploy(None, model, port=taken)
    with pytest.raises(EndpointError, match=r"did not answer within 0\.01 s: give a larger ready_timeout"):
        deploy(None, model, ready_timeout=0.01)
    broken = tmp_path / "broken"
    broken.mkdir()
    for path in model.iterdir():
        (broken / path.name).write_bytes(path.read_bytes()[:3000])
    with pytest.raises(EndpointError, match=r"(?s)ended before it answered: .*Its log ends:"):
        deploy(None, broken)
    with pytest.raises(SpecError, match="no endpoint can be started on 'proces'; did you mean process"):
        deploy(None, model, backend="proces")
    with pytest.raises(SpecError, match="no option 'max_runing'; did you mean max_running"):
        deploy(None, model, max_runing=3)
    with pytest.raises(BackendUnavailable, match="--device xeon"):
        deploy(None, model, device="gpu")
    with pytest.raises(EndpointError, match="cannot be kept in /proc/"):
        deploy(None, model, home="/proc/nobody")
    assert left(home) == before


def test_a_host_that_others_reach_takes_a_key(model: Path, tmp_path: Path) -> None:
    with deploy(None, model, host="0.0.0.0", python=script_server(tmp_path)) as endpoint:
        assert endpoint.url.startswith("http://127.0.0.1:")
        assert endpoint.api_key is not None
        assert len(endpoint.api_key) >= 40
        assert endpoint.generate("abc") == "cba"
    with deploy(None, model, host="0.0.0.0", open=True, python=script_server(tmp_path)) as endpoint:
        assert endpoint.api_key is None


def test_a_detached_endpoint_outlives_its_client_until_it_is_closed(model: Path, home: Path, tmp_path: Path) -> None:
    server = script_server(tmp_path)
    program = (
        f"from trimtab.endpoint import deploy\nwith deploy(None, {str(model)!r}, python={server!r}, detach=True) as e: print(e.handle)"
    )
    handle = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.strip()
    with Endpoint.attach(handle) as attached:
        assert attached.generate("abc") == "cba"
        assert attached.logs() == ["script server"]
    (record,) = [one for one in endpoints("process") if str(one.handle) == handle]
    assert (record.state, record.orphan, record.expires, record.usd_per_hour) == (EndpointState.SERVING, "", None, None)
    assert attached.ready(), "the end of a block ends only what was started for it"
    attached.close()
    attached.close()
    close(handle)
    assert not attached.ready()
    assert not [one for one in endpoints("process") if str(one.handle) == handle]
    with pytest.raises(EndpointError, match=f"there is no endpoint {handle}"):
        Endpoint.attach(handle)
    with pytest.raises(EndpointError, match=r"nothing answers at .*\n.* was closed: deploy it again"):
        attached.generate("abc")


def test_an_endpoint_that_somebody_else_closed_is_closed(model: Path, tmp_path: Path, home: Path) -> None:
    before = left(home)
    with deploy(None, model, python=script_server(tmp_path)) as endpoint:
        assert endpoint.handle is not None
        subprocess.run([sys.executable, "-c", f"from trimtab.endpoint import close; close({str(endpoint.handle)!r})"], check=True)
        assert left(home) == before
        with pytest.raises(EndpointError, match="was closed: deploy it again"):
            endpoint.generate("a")
        with pytest.raises(EndpointError, match="there is no endpoint"):
            endpoint.status()
        endpoint.close()


def test_ctrl_c_while_it_comes_up_leaves_nothing(model: Path, home: Path, tmp_path: Path) -> None:
    before = left(home)
    server = script_server(tmp_path, "time.sleep(600)")
    program = f"from trimtab.endpoint import deploy; deploy(None, {str(model)!r}, python={server!r}, detach=True)"
    with subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.PIPE, text=True) as client:
        try:
            wait_until(lambda: any((path / "log.txt").stat().st_size for path in _others(home, before)))
        finally:
            client.send_signal(signal.SIGINT)
        assert "KeyboardInterrupt" in client.communicate(timeout=20)[1]
    assert left(home) == before, "without anyone looking"


def _others(home: Path, before: list[str]) -> list[Path]:
    return [path for path in home.glob("endpoints/trim-*") if str(path) not in before]


def test_a_full_disk_leaves_nothing(model: Path, home: Path, tmp_path: Path) -> None:
    before = left(home)
    server = script_server(tmp_path)
    limited = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (200, 200))"  # no file grows beyond that
    program = f"from trimtab.endpoint import deploy; {limited}; deploy(None, {str(model)!r}, python={server!r})"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert re.search(r"EndpointError: an endpoint cannot be kept in .*: make room, or set TRIMTAB_HOME", done.stderr)
    assert left(home) == before


def test_a_detached_server_that_was_killed_is_an_orphan_until_it_is_closed(model: Path, tmp_path: Path) -> None:
    with deploy(None, model, python=script_server(tmp_path), detach=True) as endpoint:
        record = json.loads((Path(os.environ["TRIMTAB_HOME"]) / "endpoints" / endpoint.handle.id / "record.json").read_text())  # type: ignore[union-attr]
        os.kill(record["pid"], signal.SIGKILL)
        wait_until(lambda: endpoint.status().state is EndpointState.FAILED)
        found = endpoint.status()
        assert "killed without a word" in found.reason
        assert "is left" in found.orphan
        endpoint.close()
        with pytest.raises(EndpointError, match="there is no endpoint"):
            endpoint.status()


def test_its_time_ends_it(model: Path) -> None:
    began = datetime.now(UTC)
    with deploy(None, model, ttl=0.1) as endpoint:
        expires = endpoint.status().expires
        assert expires is not None
        assert 5 < (expires - began).total_seconds() < 20
        wait_until(lambda: endpoint.status().state is EndpointState.ENDED, 60)
        assert endpoint.status().reason == "its time (ttl) was over"
        with pytest.raises(EndpointError, match=r"its time \(ttl\) was over"):
            endpoint.generate("a")


def test_a_server_ends_with_its_client_however_it_dies(model: Path, home: Path) -> None:
    before = left(home)
    program = (
        f"import time; from trimtab.endpoint import deploy; e = deploy(None, {str(model)!r}); print(e.url, flush=True); time.sleep(600)"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as client:
        assert client.stdout is not None
        endpoint = Endpoint(client.stdout.readline().strip())
        assert endpoint.ready()
        client.kill()
    wait_until(lambda: not endpoint.ready())
    endpoints("process")  # whoever looks next takes the folder away
    wait_until(lambda: left(home) == before)


@pytest.mark.parametrize("moment", ["record.json", "alive.lock", "log.txt"])
@pytest.mark.parametrize("detach", [False, True])
def test_a_client_that_is_killed_while_it_deploys_leaves_nothing(
    model: Path, home: Path, tmp_path: Path, moment: str, detach: bool
) -> None:
    before = left(home)
    server = script_server(tmp_path, "time.sleep(600)")
    program = f"from trimtab.endpoint import deploy; deploy(None, {str(model)!r}, python={server!r}, detach={detach})"

    def reached() -> bool:
        """The files appear one after the other, and the log is not empty once the server runs."""
        found = [path / moment for path in _others(home, before)]
        return any(path.exists() and (moment != "log.txt" or path.stat().st_size > 0) for path in found)

    with subprocess.Popen([sys.executable, "-c", program]) as client:
        try:
            wait_until(reached)
        finally:
            client.kill()

    def nothing_left() -> bool:
        endpoints("process")  # whoever looks next takes away what was left
        return left(home) == before

    wait_until(nothing_left)


def test_a_damaged_record_is_listed_and_stops_nothing_else(model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "endpoints" / "trim-ep-0badc0de"
    folder.mkdir(parents=True)
    (folder / "record.json").write_text('{"handle": 3')
    with deploy(None, model, python=script_server(tmp_path), home=tmp_path) as endpoint:
        found = {str(one.handle): one for one in endpoints("process", home=tmp_path)}
    assert set(found) == {str(endpoint.handle), "process://trim-ep-0badc0de"}
    assert f"remove the folder {folder}" in found["process://trim-ep-0badc0de"].orphan
