"""How endpoints of SageMaker end: with their client, at their time, when something goes wrong; and that nothing of them stays."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from support.faults import cut_answer, hang, late, lost_answer, refused_json
from support.faulty_proxy import FaultyProxy
from support.hosting import ROLE, handle, until
from trimtab.aws import endpoint_life, guardian
from trimtab.deployers.sagemaker import SageMakerDeployer
from trimtab.endpoint import Endpoint, deploy, new_id
from trimtab.errors import EndpointError
from trimtab.serving import serving

LIMIT = "The account-level service limit 'ml.c7i.large for endpoint usage' is 0 Instances"
CLIENT = """
import sys, time
from trimtab.deployers.sagemaker import SageMakerDeployer
from trimtab.serving import serving
from trimtab.spec import ServeSpec
deployer = SageMakerDeployer(role="SageMakerExecutionRole", home=sys.argv[3], poll_seconds=0.1)
spec = ServeSpec(ttl_minutes=float(sys.argv[5])) if len(sys.argv) > 5 else None
print("begin", flush=True)
deployer.start(serving(base_model=sys.argv[2], spec=spec), sys.argv[1], detach=sys.argv[4] == "detach")
print("ready", flush=True)
if sys.argv[4] != "detach":
    time.sleep(600)
"""


@pytest.fixture(autouse=True)
def _soon(monkeypatch):
    """What guardians and rollbacks wait for takes minutes at AWS."""
    monkeypatch.setattr(endpoint_life, "APPEARING", 1.0)


@pytest.fixture
def slow_model(lively_model, tmp_path):
    """It does not come up before the file `released` is there."""
    return _with(lively_model, tmp_path / "slow-model", "slow.json", json.dumps(str(tmp_path / "released")))


@pytest.fixture
def release(tmp_path):
    return (tmp_path / "released").touch


def _with(model, folder, name, text="{}"):
    folder.mkdir()
    for path in model.iterdir():
        (folder / path.name).symlink_to(path.resolve())
    (folder / name).write_text(text)
    return folder


def test_a_containers_refusal_is_told_in_its_own_words_and_its_death_as_one(account, deployer_of, base_alone):
    deployer, id = deployer_of(), new_id()
    deployer.start(base_alone, id)
    with Endpoint.attach(f"sagemaker://{id}", role=ROLE, timeout=1.5) as endpoint:
        with pytest.raises(EndpointError, match=rf"{id} answered 400: temperature is out of range; give 0 to 2"):
            endpoint.generate("refuse")
        with pytest.raises(EndpointError, match="6 MB: shorten it"):
            endpoint.generate("a" * 6_291_456)
        with pytest.raises(EndpointError, match="CloudWatch"):
            deployer.transport(handle(id)).ask("/metrics", timeout=1)
        with pytest.raises(EndpointError, match=rf"{id} did not answer"):
            endpoint.generate("die")
        deployer.end(handle(id))
        with pytest.raises(EndpointError, match="nothing answers as sagemaker://"):
            endpoint.generate("a")
        assert not endpoint.ready()


def test_what_does_not_come_up_is_told_with_its_last_lines_and_leaves_nothing(account, deployer_of, lively_model, tmp_path):
    deployer = deployer_of()
    broken = serving(base_model=_with(lively_model, tmp_path / "broken", "breaks.json"))
    with pytest.raises(
        EndpointError, match=r"did not pass the ping health check(.|\n)*start_seconds=3600\nIts last lines:\n.*the weights do not fit"
    ):
        deployer.start(broken, new_id())
    assert account.left() == []


@pytest.mark.parametrize("operation", ["CreateModel", "CreateEndpointConfig", "CreateEndpoint"])
@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ({"code": "AccessDeniedException"}, "lacks the permission sagemaker:{operation}"),
        ({"code": "ResourceLimitExceeded", "message": LIMIT}, "quota 'ml.c7i.large for endpoint usage'"),
        ({"code": "InternalFailure", "times": 8}, "wait a minute"),
    ],
    ids=["permission", "quota", "trouble"],
)  # fmt: skip
def test_nothing_stays_when_one_request_is_refused(
    account, deployer_of, base_alone, hosting_plane, monkeypatch, tmp_path, operation, fault, said
):
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "2")
    hosting_plane.fault(operation=operation, **fault)
    id = new_id()
    with pytest.raises(EndpointError, match=said.format(operation=operation)):
        deployer_of().start(base_alone, id)
    hosting_plane.faults.clear()
    if "times" in fault:  # what became of the request was never said
        _let_it_look_once(account, tmp_path, id)
    assert account.left() == []


@pytest.mark.parametrize("operation", ["CreateModel", "CreateEndpointConfig", "CreateEndpoint"])
def test_an_answer_lost_on_its_way_makes_nothing_twice(account, deployer_of, base_alone, hosting_plane, operation):
    hosting_plane.fault(operation=operation, drop=True, after=True)
    deployer, id = deployer_of(), new_id()
    deployer.start(base_alone, id)
    deployer.end(handle(id))


def test_a_name_that_another_has_is_not_taken_from_him(account, deployer_of, base_alone):
    client, id = account.client("sagemaker"), new_id()
    client.create_model(ModelName=id, PrimaryContainer={"Image": "image"}, ExecutionRoleArn=f"arn:aws:iam::000000000000:role/{ROLE}")
    with pytest.raises(EndpointError, match=f"there is a model {id} already, and it is another one's"):
        deployer_of().start(base_alone, id)
    assert account.left(id) == [f"Models {id}"]
    client.delete_model(ModelName=id)
    client.close()


def test_a_shortage_of_machines_names_the_remedy(account, deployer_of, base_alone, hosting_plane):
    hosting_plane.fault(kind="capacity")
    with pytest.raises(EndpointError, match=r"Unable to provision requested ML compute capacity.*instance_type=TYPE"):
        deployer_of().start(base_alone, new_id())


def test_without_a_guardian_nothing_is_deployed(account, deployer_of, base_alone, tmp_path, hosting_plane):
    (tmp_path / "full").write_text("")  # a file where a folder should be, as good as a full disk
    before = len(hosting_plane.requests)
    with pytest.raises(EndpointError, match=r"nothing was deployed.*export TRIMTAB_HOME"):
        deployer_of(home=tmp_path / "full").start(base_alone, new_id())
    assert not [name for name, _ in hosting_plane.requests[before:] if name.startswith("Create")]


@pytest.fixture
def proxy(hosting_plane, hosting_amazon, monkeypatch):
    """In front of SageMaker and its runtime, for what goes wrong on the way."""
    with FaultyProxy(hosting_plane.url) as found:
        monkeypatch.setenv("AWS_ENDPOINT_URL_SAGEMAKER", found.url)
        monkeypatch.setenv("AWS_ENDPOINT_URL_SAGEMAKER_RUNTIME", found.url)
        yield found


def test_a_network_that_is_away_while_it_comes_up_is_waited_for(account, deployer_of, slow_model, release, proxy, monkeypatch):
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    proxy.fault(hang(0.1), on="DescribeEndpoint", times=6, after=2)
    deployer, id = deployer_of(), new_id()
    with _when(lambda: proxy.count("DescribeEndpoint") > 8, release):
        deployer.start(serving(base_model=slow_model), id)
    deployer.end(handle(id))


def test_credentials_that_end_while_it_comes_up_are_told_and_nothing_stays(
    account, deployer_of, slow_model, release, proxy, tmp_path, monkeypatch
):
    """The client can delete nothing any more; the guardian can when they are renewed."""
    monkeypatch.setattr("trimtab.deployers.sagemaker.SOON", 0.2)
    said = "The security token included in the request is expired"
    fault = refused_json(400, "ExpiredTokenException", said)
    proxy.fault(fault, on=lambda seen: seen.operation not in ("CreateModel", "ListTags"), times=4, after=3)
    id = new_id()
    with pytest.raises(EndpointError, match="renew them with  aws sso login"):
        deployer_of().start(serving(base_model=slow_model), id)
    release()
    _let_it_look_once(account, tmp_path, id)


def test_an_answer_that_breaks_off_is_told_as_that(account, deployer_of, base_alone, proxy, monkeypatch):
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    deployer, id = deployer_of(), new_id()
    deployer.start(base_alone, id)
    with Endpoint.attach(f"sagemaker://{id}", timeout=5) as endpoint:
        proxy.fault(cut_answer(200), on=lambda seen: seen.path.endswith("response-stream"))
        with pytest.raises(EndpointError, match=rf"{id} broke off its answer"):
            list(endpoint.stream("The keeper"))
        proxy.fault(lost_answer(), on=lambda seen: seen.path.endswith("invocations"))
        with pytest.raises(EndpointError, match=rf"to ask {id} and does not answer"):
            endpoint.generate("The keeper")
        assert endpoint.generate("The keeper") == "the lamp is lit"
    deployer.end(handle(id))


def test_one_that_is_too_slow_is_taken_back_by_its_guardian(account, deployer_of, slow_model, release, tmp_path, monkeypatch):
    """SageMaker deletes nothing that is being created; the client does not wait for it."""
    monkeypatch.setattr("trimtab.deployers.sagemaker.SOON", 0.2)
    id = new_id()
    with pytest.raises(EndpointError, match="still Creating when its time was over, and is taken back"):
        deployer_of().start(serving(base_model=slow_model), id, ready_timeout=0.5)
    assert account.guardians(id)
    assert f"Endpoints {id}" in account.left(id)
    release()
    _let_it_look_once(account, tmp_path, id)


def _let_it_look_once(account, tmp_path, id):
    """A guardian looks a second time later, for what may appear late; the test does not wait for that."""
    log = tmp_path / "home" / "sagemaker" / f"{id}.log"
    until(lambda: log.exists() and f"{id} is deleted" in log.read_text())
    account.end_guardians(id)


def _client(hosting_amazon, model, tmp_path, *arguments):
    """A client in a process of its own, once it has begun."""
    id = new_id()
    process = subprocess.Popen(
        [sys.executable, "-c", CLIENT, id, str(model), str(tmp_path / "home"), *arguments],
        stdout=subprocess.PIPE, text=True, env={**os.environ, **hosting_amazon},
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "begin\n"
    return process, id


def _kill(process, number=signal.SIGKILL):
    process.send_signal(number)
    process.wait()
    process.stdout.close()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_an_endpoint_ends_with_its_client_however_it_dies(account, deployer_of, hosting_amazon, lively_model, tmp_path, number):
    process, id = _client(hosting_amazon, lively_model, tmp_path, "attached")
    assert process.stdout.readline() == "ready\n"
    assert Endpoint.attach(f"sagemaker://{id}", role=ROLE).generate("a") == "the lamp is lit"
    _kill(process, number)
    _let_it_look_once(account, tmp_path, id)


def test_a_client_killed_while_it_deploys_leaves_nothing(account, deployer_of, hosting_amazon, slow_model, release, tmp_path):
    process, id = _client(hosting_amazon, slow_model, tmp_path, "attached")
    until(lambda: f"Endpoints {id}" in account.left(id))
    _kill(process)
    release()
    _let_it_look_once(account, tmp_path, id)


def test_ctrl_c_while_it_deploys_leaves_nothing(account, deployer_of, hosting_amazon, slow_model, release, tmp_path):
    process, id = _client(hosting_amazon, slow_model, tmp_path, "attached")
    until(lambda: f"Endpoints {id}" in account.left(id))
    process.send_signal(signal.SIGINT)
    release()
    _kill(process, signal.SIGCONT)  # nothing but a wait
    until(lambda: not [name for name in account.left(id) if not name.startswith("guardian")])
    account.end_guardians(id)


def test_what_an_interrupted_request_makes_later_is_deleted(account, deployer_of, base_alone, proxy, monkeypatch):
    monkeypatch.setattr(guardian, "AGAIN", 3.0)
    proxy.fault(late(2.0), on="CreateModel")
    id = new_id()
    with (
        _when(lambda: proxy.count("CreateModel") > 0, lambda: os.kill(os.getpid(), signal.SIGINT)),
        pytest.raises(KeyboardInterrupt),
    ):
        deployer_of().start(base_alone, id)
    until(lambda: f"Models {id}" in account.left(id))  # after the client has removed all that it found
    until(lambda: account.left(id) == [])


@contextlib.contextmanager
def _when(true, then):
    """Inside, `then` is done as soon as it is true."""
    thread = threading.Thread(target=lambda: (until(true), then()))
    thread.start()
    try:
        yield
    finally:
        thread.join()


def test_a_detached_endpoint_outlives_its_client_until_its_time_is_over(account, deployer_of, hosting_amazon, lively_model, tmp_path):
    before = time.time()
    process, id = _client(hosting_amazon, lively_model, tmp_path, "detach", "0.2")
    assert process.wait(60) == 0
    process.stdout.close()
    assert account.guardians(id)
    until(lambda: f"Endpoints {id}" not in account.left(id))
    assert time.time() > before + 12
    _let_it_look_once(account, tmp_path, id)


def test_a_detached_endpoint_without_a_limit_needs_no_guardian(account, deployer_of, base_alone):
    deployer, id = deployer_of(), new_id()
    deployer.start(base_alone, id, detach=True)
    until(lambda: not account.guardians(id))
    assert f"Endpoints {id}" in account.left(id)
    deployer.end(handle(id))


def test_a_guardian_goes_on_while_aws_is_away_with_credentials_that_were_renewed(account, hosting_plane, tmp_path, monkeypatch):
    client, id = account.client("sagemaker"), new_id()
    client.create_model(ModelName=id, PrimaryContainer={"Image": "image"}, ExecutionRoleArn=f"arn:aws:iam::000000000000:role/{ROLE}")
    client.close()
    monkeypatch.setattr(guardian, "SHORTEST", 0.2)
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)

    def renew(key):
        (tmp_path / "credentials").write_text(f"[default]\naws_access_key_id={key}\naws_secret_access_key=test\n")

    def say(line):
        said.append(line)
        renew("test")

    said = []
    renew("111111111111")  # another account, where nothing of it is
    hosting_plane.fault(operation="DeleteModel", code="ServiceUnavailable", times=2)
    assert guardian.delete(guardian.Charge(id, "us-east-1", None, None, "", again=0.1), say)
    assert ["not deleted yet" in line for line in said] == [True, True, False, False]
    assert account.left(id) == []


def test_a_guardian_that_is_told_to_end_deletes_what_it_holds(account, deployer_of, base_alone, tmp_path):
    deployer, id = deployer_of(), new_id()
    deployer.start(base_alone, id)
    (pid,) = account.guardians(id)
    os.kill(pid, signal.SIGTERM)  # a logout, a shutdown
    _let_it_look_once(account, tmp_path, id)
    deployer.end(handle(id))


def test_credentials_that_end_by_themselves_are_told(deployer_of, hosting_amazon, monkeypatch):
    assert deployer_of()._short_lived() == []
    monkeypatch.setenv("AWS_SESSION_TOKEN", "token")
    (choice,) = deployer_of()._short_lived()
    assert "nothing here can end the endpoint: use a profile" in choice.reason


def test_what_is_refused_before_it_does_not_keep_an_endpoint(account, deployer_of, base_alone, hosting_plane, monkeypatch):
    id = new_id()
    deployer_of(max_instances=2).start(base_alone, id)
    hosting_plane.fault(operation="ListTags", code="AccessDeniedException", times=-1)
    hosting_plane.fault(operation="DeregisterScalableTarget", code="AccessDeniedException", times=-1)
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    hosting_plane.fault(operation="DeleteEndpoint", code="ThrottlingException")
    with pytest.raises(EndpointError, match=r"lacks the permission sagemaker:ListTags"):
        deployer_of().end(handle(id))
    assert account.left(id)[:2] == [f"EndpointConfigs {id}", f"Models {id}"]  # whose tags tell what else there is
    hosting_plane.faults.clear()
    hosting_plane.fault(operation="ListTags", code="AccessDeniedException", times=-1)
    deployer_of().end(handle(id))  # what it had is not known, and nothing is left
    account.end_guardians(id)


def test_a_handle_that_is_not_shown_leaves_no_endpoint(account, hosting_amazon, lively_model, tmp_path, monkeypatch):
    class Mute(SageMakerDeployer):
        def transport(self, handle):
            raise EndpointError("no way to it")

    settings = {"backend": "sagemaker", "role": ROLE, "home": tmp_path, "poll_seconds": 0.1, "detach": True}
    with monkeypatch.context() as patch:
        patch.setattr("trimtab.deployers.sagemaker.SageMakerDeployer", Mute)
        with pytest.raises(EndpointError, match="no way to it"):
            deploy(None, lively_model, **settings)
    assert [name for name in account.left() if not name.startswith("guardian")] == []


@pytest.mark.parametrize(("operation", "what"), [("CreateEndpointConfig", "model"), ("CreateEndpoint", "endpoint configuration")])
def test_what_is_not_known_everywhere_yet_is_asked_for_again(account, deployer_of, base_alone, hosting_plane, operation, what):
    deployer, id = deployer_of(), new_id()
    hosting_plane.fault(operation=operation, code="ValidationException", message=f'Could not find {what} "{id}".')
    deployer.start(base_alone, id)
    deployer.end(handle(id))
