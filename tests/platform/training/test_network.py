"""That workers of several hosts find each other is tested in tests/infra/hosts."""

import os

import pytest
import ray.util

from kintsugi.training import network


def test_the_interface_of_an_address_is_found_by_name() -> None:
    assert network.interface_of("127.0.0.1") == "lo"
    assert network.interface_of("192.0.2.77") is None


@pytest.mark.parametrize(
    ("node", "before", "after"), [("127.0.0.1", None, "lo"), ("127.0.0.1", "ib0", "ib0"), ("192.0.2.77", None, None)]
)
def test_gloo_keeps_to_the_node_s_interface_unless_told_otherwise(
    monkeypatch: pytest.MonkeyPatch, node: str, before: str | None, after: str | None
) -> None:
    monkeypatch.setattr(os, "environ", {network.GLOO: before} if before else {})
    monkeypatch.setattr(ray.util, "get_node_ip_address", lambda: node)
    network.use_node_interface()
    assert os.environ.get(network.GLOO) == after
