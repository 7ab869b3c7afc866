"""The endpoint contract on the docker backend, in the image of this checkout: what its container may, and how it begins and ends."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import docker
import pytest
from docker import DockerClient

from contract.http_contract import HttpContract
from support.direct_server import wait_until
from support.script_runs import MINE, derived, no_engine_there
from support.script_server import program
from support.tiny_adapter import make_adapter, make_lively_model
from support.tiny_weights import tiny_model_files
from trimtab.deployers.base import EndpointState
from trimtab.deployers.serve_container import ENDPOINT_LABEL
from trimtab.endpoint import Endpoint, close, deploy, deploy_request, endpoints
from trimtab.errors import BackendUnavailable, EndpointError, SpecError

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@pytest.fixture(scope="module", autouse=True)
def home(client: DockerClient, left_behind: Callable[..., list[str]], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The module's own home and cache; no endpoint of its tests is left in it, nor in the engine."""
    place = tmp_path_factory.mktemp("endpoints")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRIMTAB_HOME", str(place / "home"))
        patch.setenv("TRIMTAB_CACHE", str(place / "cache"))
        yield place / "home"
        assert [path.name for path in (place / "home").glob("endpoints/*")] == []
    assert left_behind() == []


@pytest.fixture(scope="module")
def script_image(client: DockerClient, base_image: str) -> Iterator[str]:
    """An image with our labels, whose server is of a few lines and does first what model/script.json says."""
    labels = {"context": "0", "spec_version": 1, "device": "xeon", "target": "serve"}
    text = program("script = root / 'model/script.json'", "if script.exists(): exec(json.loads(script.read_text()))")
    lines = (
        f"FROM {base_image}",
        "LABEL " + " ".join(f"trimtab.{name}={value}" for name, value in labels.items()),
        "ENTRYPOINT " + json.dumps(["python3", "-c", text]),
    )
    yield derived(client, f"{MINE}serve:latest", *lines)
    client.images.remove(f"{MINE}serve:latest")


@pytest.fixture
def script(tmp_path: Path, script_image: str, client: DockerClient) -> Callable[..., dict[str, Any]]:
    """The arguments of `deploy` for a server that first does these lines of Python."""

    def arguments(*lines: str) -> dict[str, Any]:
        folder = tmp_path / f"model-{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        for name, content in tiny_model_files().items():
            if "/" not in name:
                (folder / name).write_bytes(content)
        (folder / "script.json").write_text(json.dumps("\n".join(lines)))
        return {"base_model": folder, "backend": "docker", "image": script_image, "client": client}

    return arguments


def containers(client: DockerClient) -> list[str]:
    """The names of the containers of all endpoints."""
    return [container.name for container in client.containers.list(all=True, filters={"label": ENDPOINT_LABEL}, ignore_removed=True)]


def gone(client: DockerClient, endpoint: Endpoint) -> bool:
    assert endpoint.handle is not None
    return endpoint.handle.id not in containers(client)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_lively_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def artifact(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_adapter(tmp_path_factory.mktemp("artifact"), model)


@pytest.fixture(scope="module")
def served(home: Path, client: DockerClient, xeon_serve_image: str, model: Path, artifact: Path) -> Iterator[Endpoint]:
    with deploy(artifact, model, backend="docker", image=xeon_serve_image, client=client, memory="2g", dtype="float32") as endpoint:
        yield endpoint


class TestDockerEndpoint(HttpContract):
    listed = ("tuned", "tiny-lighthouse")

    @pytest.fixture
    def endpoint(self, served: Endpoint) -> Endpoint:
        return served


def test_what_its_container_may(served: Endpoint, client: DockerClient) -> None:
    assert served.handle is not None
    container = client.containers.get(served.handle.id)
    facts, host = container.attrs, container.attrs["HostConfig"]
    assert (host["ReadonlyRootfs"], host["CapDrop"], host["SecurityOpt"], host["Privileged"]) == (
        True,
        ["ALL"],
        ["no-new-privileges"],
        False,
    )
    assert (host["Memory"], host["MemorySwap"], host["AutoRemove"]) == (2 << 30, 2 << 30, True)
    assert [bound["HostIp"] for bounds in facts["NetworkSettings"]["Ports"].values() for bound in bounds or ()] == ["127.0.0.1"]
    assert sorted(mount["Destination"] for mount in facts["Mounts"] if mount["RW"]) == ["/opt/ml/output", "/opt/ml/scratch"]
    assert served.api_key is not None
    assert served.api_key not in json.dumps(facts)
    assert served.api_key not in "\n".join(served.logs())
    titles, processes = (container.top(ps_args="-eo pid,uid")[key] for key in ("Titles", "Processes"))
    users = {int(process[titles.index("UID")]) for process in processes}
    assert len(processes) >= 3, "the first process, the server, its engine"
    assert users == {os.getuid() or 10_001}
    for process in processes:
        status = Path(f"/proc/{process[0]}/status").read_text()
        assert "CapEff:\t0000000000000000" in status
        assert "NoNewPrivs:\t1" in status


def test_a_model_larger_than_its_tmp_is_served(
    client: DockerClient, xeon_serve_image: str, model: Path, home: Path, tmp_path: Path
) -> None:
    import torch
    from transformers import AutoConfig, LlamaForCausalLM

    large = tmp_path / "large"
    shutil.copytree(model, large)
    config = AutoConfig.from_pretrained(large, intermediate_size=40_000, num_hidden_layers=2)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(large)
    with deploy(None, large, backend="docker", image=xeon_serve_image, client=client, max_running=1, cache_gb=0.1) as endpoint:
        assert endpoint.generate("The keeper", max_new_tokens=2) is not None
        assert endpoint.handle is not None
        told = client.containers.get(endpoint.handle.id).exec_run(["stat", "-fc", "%b %S", "/tmp"]).output.split()
        assert int(told[0]) * int(told[1]) < (large / "model.safetensors").stat().st_size, "else this shows nothing"
        folder = home / "endpoints" / endpoint.handle.id
        assert list((folder / "scratch").iterdir()) == [], "it goes once the model is loaded"
    assert not folder.exists()


def test_an_adapter_of_a_4_bit_base_is_to_be_merged(client: DockerClient, xeon_serve_image: str, model: Path, tmp_path: Path) -> None:
    """The image has neither torch nor bitsandbytes; merged, the same adapter needs neither."""
    four = make_adapter(tmp_path / "four", model, method="qlora")
    with pytest.raises(EndpointError, match=r"was trained on a 4-bit base, .* not installed here: merge it \(leave out --no-merge\)"):
        deploy(four, model, backend="docker", image=xeon_serve_image, client=client, merge=False)


def test_the_request_is_what_is_sent(
    served: Endpoint, home: Path, client: DockerClient, xeon_serve_image: str, model: Path, artifact: Path
) -> None:
    assert served.handle is not None
    folder = home / "endpoints" / served.handle.id
    request = deploy_request(
        artifact, model, backend="docker", image=xeon_serve_image, client=client, memory="2g", dtype="float32", api_key=served.api_key
    )
    name = request["handle"].rpartition("/")[2]
    assert json.loads(json.dumps(json.loads((folder / "record.json").read_text())["request"]).replace(folder.name, name)) == request
    assert served.api_key not in json.dumps(request)
    assert not (home / "endpoints" / name).exists()


def test_a_detached_endpoint_outlives_its_client_until_it_is_closed(script: Any, client: DockerClient) -> None:
    asked = {**script("print('up')"), "base_model": str(script("print('up')")["base_model"]), "client": None}
    code = f"from trimtab.endpoint import deploy\nwith deploy(None, detach=True, **{asked!r}) as e: print(e.handle)"
    handle = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    with Endpoint.attach(handle, client=client) as attached:
        assert attached.generate("abc") == "cba"
        assert attached.logs() == ["script server", "up"]
        assert attached.api_key is not None
        with pytest.raises(EndpointError, match=r"answered 401: wrong key.*api_key="):
            Endpoint(attached.url).generate("abc")
    found = attached.status()
    assert (found.state, found.orphan, found.url) == (EndpointState.SERVING, "", attached.url)
    elsewhere = Endpoint.attach(handle, client=client, home="/nowhere")
    assert elsewhere.generate("abc") == "cba", "found by its container's labels"
    elsewhere.close()
    close(handle, client=client)
    assert gone(client, attached)
    with pytest.raises(EndpointError, match=f"there is no endpoint {handle}"):
        Endpoint.attach(handle, client=client)


@pytest.mark.parametrize("detach", [False, True])
def test_how_a_server_ended_is_said(script: Any, client: DockerClient, detach: bool) -> None:
    with deploy(None, **script("threading.Timer(1, lambda: (print('last words', flush=True), end(3))).start()"), detach=detach) as endpoint:
        wait_until(lambda: endpoint.status().state in (EndpointState.FAILED, EndpointState.ENDED))
        with pytest.raises(EndpointError, match=r"(?s)has ended: .*Its log ends:.*last words\nDeploy it again") as refused:
            endpoint.generate("a")
        wait_until(lambda: gone(client, endpoint), what="it was taken in, or the engine removes it")
        assert endpoint.logs() == ["script server", "last words"]
        assert not detach or "exit code 3" in str(refused.value)
        assert bool(endpoint.status().orphan) == detach
        endpoint.close()
    with deploy(
        None, **script("threading.Timer(1, lambda: (failure.write_text('the model is cursed'), end(1))).start()"), detach=detach
    ) as endpoint:
        wait_until(lambda: endpoint.status().state is EndpointState.FAILED)
        assert endpoint.status().reason == "the model is cursed"
        endpoint.close()


@pytest.mark.parametrize("detach", [False, True])
def test_a_container_that_somebody_removed_is_said(script: Any, client: DockerClient, detach: bool) -> None:
    with deploy(None, **script(), detach=detach) as endpoint:
        assert endpoint.handle is not None
        client.containers.get(endpoint.handle.id).remove(force=True)
        with pytest.raises(EndpointError, match=r"(?s)nothing answers .*its container is gone without a word \(docker rm"):
            endpoint.generate("a")
        endpoint.close()


def test_out_of_memory_is_said(script: Any) -> None:
    eat = "threading.Timer(1, lambda: [bytearray(1 << 24) for _ in range(99)]).start()"
    with deploy(None, **script(eat), detach=True, memory="64m") as endpoint:
        wait_until(lambda: endpoint.status().state is EndpointState.FAILED)
        assert "out of memory, at its container's limit of 0.1 GiB" in endpoint.status().reason
        endpoint.close()


def test_what_cannot_be_served_says_why_and_leaves_nothing(served: Endpoint, script: Any, client: DockerClient, home: Path) -> None:
    def left() -> tuple[list[str], list[str]]:
        return sorted(containers(client)), sorted(path.name for path in (home / "endpoints").iterdir())

    before = left()
    port = int(served.url.rpartition(":")[2])
    with pytest.raises(EndpointError, match=f"cannot listen on 127.0.0.1:{port}, something else does: choose another port"):
        deploy(None, **script(), port=port)
    for detach in (False, True):
        with pytest.raises(EndpointError, match=r"(?s)ended before it answered: no such model.*Its log ends:.*good bye"):
            deploy(None, **script("failure.write_text('no such model'); print('good bye', flush=True); end(1)"), detach=detach)
        with pytest.raises(EndpointError, match=r"did not answer within 1 s: give a larger ready_timeout"):
            deploy(None, **script("time.sleep(600)"), ready_timeout=1, detach=detach)
    for wrong in ({"network": "none"}, {"network": "host"}, {"memory": "much"}):
        with pytest.raises(SpecError):
            deploy(None, **script(), **wrong)
    with pytest.raises(BackendUnavailable, match="cpus=99: the engine has"):
        deploy(None, **script(), cpus="99")
    with no_engine_there(), pytest.raises(BackendUnavailable, match="does not answer"):
        deploy(None, **{**script(), "client": docker.DockerClient(base_url="unix:///nowhere/sock", version="1.41")})
    assert left() == before


def test_an_image_of_another_kind_is_refused(script: Any, client: DockerClient, script_image: str) -> None:
    tag = derived(client, f"{MINE}train:latest", f"FROM {script_image}", "LABEL trimtab.target=train")
    try:
        with pytest.raises(BackendUnavailable, match=r"is a train image: .* target serve"):
            deploy(None, **{**script(), "image": tag})
    finally:
        client.images.remove(tag)


def test_orphans_are_listed_and_closed(script: Any, client: DockerClient, home: Path) -> None:
    with deploy(None, **script(), detach=True) as endpoint:
        assert endpoint.handle is not None
    shutil.rmtree(home / "endpoints" / endpoint.handle.id)
    (found,) = [one for one in endpoints("docker", client=client) if one.handle == endpoint.handle]
    assert (found.state, found.url) == (EndpointState.SERVING, "")
    assert "a container without its folder" in found.orphan
    close(endpoint.handle, client=client)
    assert gone(client, endpoint)
    assert not [one for one in endpoints("docker", client=client) if one.handle == endpoint.handle]


def test_a_container_ends_with_its_client_however_that_dies(script: Any, client: DockerClient, home: Path) -> None:
    before = set(containers(client)), set((home / "endpoints").iterdir())
    asked = {**script(), "base_model": str(script()["base_model"]), "client": None}
    code = f"import time; from trimtab.endpoint import deploy; e = deploy(None, **{asked!r}); print(e.handle, flush=True); time.sleep(600)"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        id = process.stdout.readline().strip().rpartition("/")[2]
        assert id in containers(client)
        process.kill()
    wait_until(lambda: set(containers(client)) == before[0], what="the engine removes it, without anyone looking")
    endpoints("docker", client=client)
    assert set((home / "endpoints").iterdir()) == before[1]


@pytest.mark.parametrize("moment", ["folder", "created", "running"])
@pytest.mark.parametrize("detach", [False, True])
def test_a_client_that_is_killed_while_it_deploys_leaves_nothing(
    script: Any, client: DockerClient, home: Path, moment: str, detach: bool
) -> None:
    before = set(containers(client)), set((home / "endpoints").iterdir())
    asked = {**script(), "base_model": str(script("time.sleep(600)")["base_model"]), "client": None, "detach": detach}
    code = f"from trimtab.endpoint import deploy; deploy(None, **{asked!r})"

    def reached() -> bool:
        if moment == "folder":
            return set((home / "endpoints").iterdir()) != before[1]
        status = {"created": ["created", "running"], "running": ["running"]}[moment]
        found = client.containers.list(all=True, filters={"label": ENDPOINT_LABEL}, ignore_removed=True)
        return any(one.name not in before[0] and one.status in status for one in found)

    with subprocess.Popen([sys.executable, "-c", code]) as process:
        wait_until(reached)
        process.kill()

    def nothing_left() -> bool:
        endpoints("docker", client=client)  # whoever looks next takes away what was left
        return (set(containers(client)), set((home / "endpoints").iterdir())) == before

    wait_until(nothing_left)
