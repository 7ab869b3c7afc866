"""How endpoints of SageMaker are found: those in order, those that nothing will end, and what is left of others."""

from __future__ import annotations

import platform
from dataclasses import replace
from datetime import timedelta

import pytest

from support.hosting import handle, until
from trimtab.deployers.base import EndpointState
from trimtab.endpoint import new_id
from trimtab.events import Choice
from trimtab.spec import ServeSpec


def test_one_that_was_just_made_is_asked_about_with_one_question(account, deployer_of, base_alone, hosting_plane, monkeypatch):
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    deployer, id = deployer_of(), new_id()
    deployer.start(base_alone, id)
    deployer.transport(handle(id))
    hosting_plane.fault(operation="DescribeEndpoint", code="ServiceUnavailable", times=2)
    before = len(hosting_plane.requests)
    assert deployer.look(handle(id)).usd_per_hour == pytest.approx(0.107)
    assert {name for name, _ in hosting_plane.requests[before:]} == {"DescribeEndpoint"}
    deployer.end(handle(id))


def test_one_that_should_end_with_its_client_and_does_not_is_found(account, deployer_of, base_alone, tmp_path):
    mine, elsewhere, id, told = deployer_of(), deployer_of(home=tmp_path / "elsewhere"), new_id(), []
    mine.start(base_alone, id, show=told.append)
    assert "12 h" in [event.value for event in told if isinstance(event, Choice)]
    (record,) = mine.endpoints()
    assert (record.reason, record.orphan) == ("", "")
    assert record.expires - record.created == timedelta(hours=12)
    account.end_guardians(id)  # the machine was switched off
    words = f"it should end with its client on {platform.node()}"
    until(lambda: mine.look(handle(id)).orphan == f"{words}, and nothing that does that is there any more")
    (record,) = elsewhere.endpoints()
    assert (record.reason, record.orphan) == (words, "")
    mine.end(handle(id))


def test_one_that_is_past_its_time_is_found_from_any_machine(account, deployer_of, base_alone, tmp_path):
    spec = ServeSpec(ttl_minutes=0.05)
    theirs, mine, id, kept = deployer_of(home=tmp_path / "other"), deployer_of(), new_id(), new_id()
    theirs.start(replace(base_alone, spec=spec), id, detach=True)
    account.end_guardians(id)  # their machine is switched off
    mine.start(base_alone, kept)
    until(lambda: mine.look(handle(id)).orphan.startswith("its time was over at "))
    assert [record.handle.id for record in mine.endpoints() if record.orphan] == [id]
    for each in (id, kept):
        mine.end(handle(each))


def test_what_is_left_of_an_endpoint_is_found_when_it_is_not_just_being_made(account, deployer_of, base_alone, monkeypatch):
    deployer, id = deployer_of(), new_id()
    deployer.start(base_alone, id, detach=True)
    client = account.client("sagemaker")
    client.delete_endpoint(EndpointName=id)  # as in the console
    client.close()
    until(lambda: f"Endpoints {id}" not in account.left(id))
    (record,) = deployer.endpoints()
    assert (record.state, record.orphan) == (EndpointState.ENDED, "")
    assert record.reason == "only its configuration is there, and its endpoint may be about to come"
    monkeypatch.setattr("trimtab.aws.hosting_standing.YOUNG", timedelta(0))
    (record,) = deployer.endpoints()
    assert record.orphan == "a configuration without an endpoint"
    deployer.end(record.handle)
