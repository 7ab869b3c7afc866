"""Which network addresses may be read from. Pure but for `resolve`."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator, Sequence
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network

from trimtab.errors import DataError

Resolver = Callable[[str, int], Sequence[str]]
"""A host name and a port to numeric addresses, preferred first. Raises OSError when the name does not resolve."""

_CARRIER_GRADE = ip_network("100.64.0.0/10")  # RFC 6598
_NAT64 = ip_network("64:ff9b::/96")  # RFC 6052: on a network without IPv4 every IPv4 address looks like this, in the last 32 bits


def resolve(host: str, port: int) -> tuple[str, ...]:
    """Every address of `host`, in the order the system prefers. Raises OSError when there is none."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return tuple(dict.fromkeys(str(entry[4][0]) for entry in found))


def kind_of_private(address: str) -> str | None:
    """What keeps `address` from being a public one ("loopback", "private", ...), or None for a public address.

    An IPv6 address that carries an IPv4 one (mapped, 6to4, Teredo, NAT64) is judged by both.
    """
    ip = ip_address(address)
    return next((kind for candidate in (ip, *_carried(ip)) if (kind := _kind(candidate))), None)


def checked(host: str, addresses: Sequence[str], *, allow_private_hosts: bool) -> tuple[str, ...]:
    """`addresses` as they are, if all may be connected to. One private address among public ones refuses the host:
    a name that answers with both is how a page reaches a machine that it should not.

    Raises DataError naming the address and its kind.
    """
    if not addresses:
        raise DataError(f"the name {host} has no address; check its spelling")
    if not allow_private_hosts:
        for address in addresses:
            if kind := kind_of_private(address):
                article = "an" if kind[0] in "aeiou" else "a"
                what = f"{host} is {article} {kind} address" if host.strip("[]") == address else f"{host} has the {kind} address {address}"
                raise DataError(f"{what}; pass allow_private_hosts=True if you mean a machine of your own network")
    return tuple(addresses)


def _carried(ip: IPv4Address | IPv6Address) -> Iterator[IPv4Address]:
    if isinstance(ip, IPv6Address):
        if ip.ipv4_mapped:
            yield ip.ipv4_mapped
        if ip.sixtofour:
            yield ip.sixtofour
        if ip.teredo:
            yield from ip.teredo
        if ip in _NAT64:
            yield IPv4Address(int(ip) & 0xFFFFFFFF)


def _kind(ip: IPv4Address | IPv6Address) -> str | None:
    if isinstance(ip, IPv6Address) and (ip.ipv4_mapped or ip in _NAT64):
        return None  # judged by the IPv4 address it carries
    checks = (
        ("unspecified", ip.is_unspecified),
        ("loopback", ip.is_loopback),
        ("link-local", ip.is_link_local),
        ("multicast", ip.is_multicast),
        ("carrier-grade NAT", ip in _CARRIER_GRADE),
        ("site-local", isinstance(ip, IPv6Address) and ip.is_site_local),
        ("private", ip.is_private),
        ("reserved", ip.is_reserved or not ip.is_global),
    )
    return next((name for name, holds in checks if holds), None)
