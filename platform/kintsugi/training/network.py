"""Which of a host's networks the workers of one training speak to each other by."""

import os
from typing import Any

import psutil
import ray
from ray.train.torch import TorchConfig

GLOO = "GLOO_SOCKET_IFNAME"


class NodeNetwork(TorchConfig):
    """Ray's process group, but over the interface by which Ray knows each node; a GLOO_SOCKET_IFNAME that is set stays.

    Gloo by itself tells the others the address that the host's own name resolves to, on many hosts 127.0.1.1, and
    they connect to themselves. NCCL chooses an interface that leaves the host.
    """

    @property
    def backend_cls(self) -> Any:
        return _Backend


class _Backend(TorchConfig().backend_cls):
    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        worker_group.execute(use_node_interface)
        super().on_start(worker_group, backend_config)


def use_node_interface() -> None:
    found = interface_of(ray.util.get_node_ip_address())
    if found:
        os.environ.setdefault(GLOO, found)


def interface_of(address: str) -> str | None:
    """The name of the network interface that has `address`; None behind a translation of addresses."""
    known = psutil.net_if_addrs().items()
    return next((name for name, found in known if address in {entry.address for entry in found}), None)
