"""By what this host is reached: interfaces, its name, and what MPI is told of the network."""

from __future__ import annotations

import fcntl
import os
import re
import socket
import struct
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from .. import _system
from .._system import Limits
from . import trial
from .facts import Fact, Status
from .place import Place
from .trial import Tell

_SIOCGIFADDR, _SIOCGIFFLAGS, _IFF_UP = 0x8915, 0x8913, 1
# What containers and virtual machines are behind. Every host may have such, all with the same addresses.
_BRIDGE_NAMES = re.compile(r"(docker|br-|virbr|cni|flannel|podman|lxcbr|lxdbr)")
# With what users tell MPI which interface to take.
_CHOOSES_INTERFACE = ("FI_TCP_IFACE", "UCX_NET_DEVICES", "OMPI_MCA_btl_tcp_if_include", "OMPI_MCA_btl_tcp_if_exclude")
_OF_MPI = re.compile(r"(UCX|FI|MPIR_CVAR|MPICH|OMPI_MCA|PRTE_MCA|I_MPI|TORCH_RPC_MPI|TP|GLOO)_")
# What Open MPI's mpirun sets for each rank, whatever the user has chosen.
_OF_MPIRUN = {f"OMPI_MCA_{name}" for name in ("PREFIXES", "cpu_type", "initial_wdir", "num_procs")}
_LOOKUP_LIMIT = 5.0  # seconds


class Interface(NamedTuple):
    name: str
    address: str
    bridge: bool = False
    default: bool = False  # the default route leads through it


def interfaces(found: Sequence[Interface], environ: Mapping[str, str], several_hosts: bool) -> Fact:
    """Args: those that are up and have an address, without the loopback; whether the ranks are on several hosts."""
    key = "interfaces"
    if not found:
        return Fact(key, "only the loopback: ranks of other hosts cannot be reached", Status.NOTE)

    def text(interface: Interface) -> str:
        marks = [mark for mark, has in (("bridge", interface.bridge), ("default route", interface.default)) if has]
        return f"{interface.name} {interface.address}" + (f" ({', '.join(marks)})" if marks else "")

    value = ", ".join(map(text, found))
    chosen = [f"{name}={environ[name]}" for name in _CHOOSES_INTERFACE if name in environ]
    if chosen:
        return Fact(key, f"{value}; chosen by {' '.join(chosen)}")
    if len(found) == 1:
        return Fact(key, value)
    best = next((each for each in found if each.default and not each.bridge), None)
    name = (best or next((each for each in found if not each.bridge), found[0])).name
    remedy = (
        f"in worlds of several hosts let MPI take one that leads to them: FI_TCP_IFACE={name} and "
        f"UCX_NET_DEVICES={name} (MPICH), OMPI_MCA_btl_tcp_if_include={name} (Open MPI), `mpirun -iface {name}` "
        "(MPICH's launcher)"
    )
    bridges = any(interface.bridge for interface in found)
    return Fact(key, value, Status.WARNING if bridges and several_hosts else Status.NOTE, remedy)


def host_name(library: str, name: str, addresses: Sequence[str] | None) -> Fact:
    """Args: the text of MPI_Get_library_version; what the name resolves to, None if that took too long."""
    key = "host_name"
    if (problem := _system.host_name_problem(library, name)) is not None:
        return Fact(key, problem, Status.PROBLEM)
    remedy = "in worlds of several hosts: correct /etc/hosts or DNS, or use addresses (MASTER_ADDR, mpirun's host list)"

    if addresses is None:
        return Fact(key, f"{name}, which did not resolve within {_LOOKUP_LIMIT:.0f} s", Status.WARNING, remedy)
    if not addresses:
        return Fact(key, f"{name}, which does not resolve", Status.NOTE, remedy)
    value = f"{name}, which resolves to {', '.join(addresses)}"
    if all(address.startswith("127.") or address == "::1" for address in addresses):
        return Fact(key, f"{value}, where other hosts do not find it", Status.NOTE, remedy)
    return Fact(key, value)


def network(library: str, limits: Limits, fast: bool) -> Fact:
    """Which network MPI takes between hosts."""
    key, value = "network", "InfiniBand, Slingshot, Omni-Path or EFA" if fast else "Ethernet"
    settings = _system.mpi_settings(library, [limits], 2) if library else {}
    told = " ".join(f"{name}={text}" for name, text in settings.items())
    return Fact(key, value + (f"; without a launcher, MPI is told {told} between hosts" if told else ""))


def settings(environ: Mapping[str, str]) -> Fact:
    """Those of the environment that MPI, its network libraries or this package take."""
    found = [
        f"{name}={text}" for name, text in sorted(environ.items()) if _OF_MPI.match(name) and name not in _OF_MPIRUN
    ]
    return Fact("settings", " ".join(found) or "none", Status.NOTE if found else Status.OK)


def network_facts(place: Place, library: str, environ: Mapping[str, str] = os.environ) -> list[Fact]:
    several = place.size is not None and place.ranks_here is not None and place.size > place.ranks_here
    name = socket.gethostname()
    return [
        host_name(library, name, resolve(name)),
        interfaces(_interfaces(), environ, several),
        network(library, Limits.here(environ=environ), _system.has_fast_network()),
        settings(environ),
    ]


def resolve(name: str, limit: float = _LOOKUP_LIMIT) -> list[str] | None:
    """The addresses of a name; None if nobody has answered by then, for which the system may wait for half a minute."""

    def look_up(tell: Tell) -> None:
        with suppress(OSError, UnicodeError):
            found = [str(info[4][0]) for info in socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)]
            tell({"addresses": list(dict.fromkeys(found))}, "")

    done = trial.run(look_up, limit)
    addresses: list[str] | None = done.found.get("addresses", None if done.failure else [])
    return addresses


def _interfaces() -> list[Interface]:
    found = []
    default = _default_route()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asked:
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name.encode()[:15])
            with suppress(OSError):  # it has no address
                flags = struct.unpack("H", fcntl.ioctl(asked, _SIOCGIFFLAGS, request)[16:18])[0]
                address = socket.inet_ntoa(fcntl.ioctl(asked, _SIOCGIFADDR, request)[20:24])
                if flags & _IFF_UP and not address.startswith("127."):
                    bridge = Path("/sys/class/net", name, "bridge").exists() or bool(_BRIDGE_NAMES.match(name))
                    found.append(Interface(name, address, bridge and name != default, name == default))
    return found


def _default_route() -> str:
    with suppress(OSError):
        for line in Path("/proc/net/route").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[1] == "00000000":
                return fields[0]
    return ""
