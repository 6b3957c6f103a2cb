import pytest

from kintsugi.cluster import connect
from kintsugi.errors import StackError


def test_without_an_address_it_says_how_to_get_a_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(StackError, match="kintsugi up"):
        connect()
