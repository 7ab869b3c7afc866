from __future__ import annotations

import socket

import pytest

from trimtab.data.addresses import checked, kind_of_private, resolve
from trimtab.errors import DataError

PUBLIC = ["93.184.216.34", "8.8.8.8", "2606:2800:220:1:248:1893:25c8:1946", "::ffff:93.184.216.34", "64:ff9b::5db8:d822"]
PRIVATE = {
    "127.0.0.1": "loopback",
    "127.8.9.1": "loopback",
    "::1": "loopback",
    "10.1.2.3": "private",
    "172.16.0.1": "private",
    "192.168.1.1": "private",
    "fd00::1": "private",
    "169.254.169.254": "link-local",
    "fe80::1": "link-local",
    "fe80::1%lo": "link-local",
    "0.0.0.0": "unspecified",
    "::": "unspecified",
    "224.0.0.1": "multicast",
    "ff02::1": "multicast",
    "100.64.0.1": "carrier-grade NAT",
    "fec0::1": "site-local",
    "::ffff:127.0.0.1": "loopback",
    "::ffff:169.254.169.254": "link-local",
    "2002:7f00:1::": "loopback",  # 6to4 of 127.0.0.1
    "64:ff9b::a9fe:a9fe": "link-local",  # NAT64 of 169.254.169.254
    "::127.0.0.1": "reserved",
}


@pytest.mark.parametrize("address", PUBLIC)
def test_public_addresses_are_public(address: str):
    assert kind_of_private(address) is None


@pytest.mark.parametrize(("address", "kind"), PRIVATE.items())
def test_private_addresses_are_named(address: str, kind: str):
    assert kind_of_private(address) == kind


@pytest.mark.parametrize(
    "address", ["240.0.0.1", "255.255.255.255", "192.0.2.1", "198.18.0.1", "64:ff9b:1::10.0.0.1", "2001:db8::1", "100::1"]
)
def test_reserved_ranges_are_refused(address: str):
    assert kind_of_private(address) in ("private", "reserved")  # the words changed between Python's patch releases


def test_teredo_carries_two_addresses_and_both_count():
    assert kind_of_private("2001:0:5db8:d822:0:0:80ff:fffe") is not None  # client 127.0.0.1


def test_one_private_address_among_public_ones_refuses_the_host():
    with pytest.raises(DataError, match=r"news\.test has the private address 10\.0\.0\.8; pass allow_private_hosts=True"):
        checked("news.test", ("93.184.216.34", "10.0.0.8"), allow_private_hosts=False)
    assert checked("news.test", ("93.184.216.34", "10.0.0.8"), allow_private_hosts=True) == ("93.184.216.34", "10.0.0.8")


def test_a_name_without_address_is_said():
    with pytest.raises(DataError, match=r"nowhere\.test has no address"):
        checked("nowhere.test", (), allow_private_hosts=True)


@pytest.mark.parametrize("host", ["2130706433", "0x7f.1", "127.1", "017700000001"])
def test_odd_spellings_of_the_loopback_are_found_by_resolving(host: str):
    assert all(kind_of_private(address) == "loopback" for address in resolve(host, 80))


def test_a_name_that_does_not_resolve_is_an_oserror():
    with pytest.raises(socket.gaierror):
        resolve("no-such-host.invalid", 80)
