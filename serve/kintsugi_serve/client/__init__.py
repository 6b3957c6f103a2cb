"""Client of the service, for programs on the line: `Client`, and `AsyncClient` for asyncio.

with Client("http://127.0.0.1:8000") as client:
    client.restore("part.png").save("restored.png")
"""

from kintsugi_serve.client.async_client import AsyncClient
from kintsugi_serve.client.client import Client
from kintsugi_serve.client.retry import RetryBudget
from kintsugi_serve.client.values import Outcome, RestoredImage, ServiceError

__all__ = ["AsyncClient", "Client", "Outcome", "RestoredImage", "RetryBudget", "ServiceError"]
