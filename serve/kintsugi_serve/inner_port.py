"""The port by which Ray Serve's replicas talk to each other."""

from typing import Any


def keep_to_node() -> None:
    """Bind this process's inner port to its node's address only; called while a deployment is constructed.

    Ray Serve 2.60 binds it on every interface ("[::]:0" in `ray/serve/_private/replica.py`), asks for no token there
    and unpickles what comes. Between nodes `RAY_USE_TLS` lets in those with a certificate only (docs/security.md).
    """
    import ray.util
    from ray.serve._private import replica

    node, bind = ray.util.get_node_ip_address(), replica.add_port_to_grpc_server
    host = f"[{node}]" if ":" in node else node

    def bind_to_node(server: Any, address: str) -> int:
        return bind(server, address.replace("[::]", host))

    replica.add_port_to_grpc_server = bind_to_node
